"""Registration with MAX: a DeepSeek-V3 target alone."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .config import DeepseekV3Config
from .model import DeepseekV3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = text_architecture(
    "DeepseekV3ForCausalLM",
    DeepseekV3Model,
    DeepseekV3Config,
    example_repo_id="deepseek-ai/DeepSeek-V3",
    supported_encodings=DeepseekV3Config.SUPPORTED_ENCODINGS,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry, for engines of this package; MAX's own commands keep MAX's."""
