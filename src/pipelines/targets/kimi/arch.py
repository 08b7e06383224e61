"""Registration with MAX: a Kimi K2.5 target alone."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .config import KimiK2_5Config
from .model import KimiK2_5Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = text_architecture(
    "KimiK25ForConditionalGeneration",
    KimiK2_5Model,
    KimiK2_5Config,
    example_repo_id="moonshotai/Kimi-K2.5",
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry, for engines of this package; MAX's own commands keep MAX's."""
