"""DeepSeek-V3 as a target."""

from __future__ import annotations

from max.pipelines.lib import MAXModelConfig

from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.target import ExtraTypes, TargetFamily

from .config import DeepseekV3Config
from .inputs import distributed_types
from .model import DeepseekV3Model
from .stack import DeepseekV3
from .weights import dequantised, target_state_dict

__all__ = ["DEEPSEEK_V3"]


def _read(model_config: MAXModelConfig, config: DeepseekV3Config) -> Checkpoint:
    """Dequantised, unless the stack computes in FP8."""
    tensors, source = read_weights(model_config, float8_stays=config.fp8 is not None)
    plain = dequantised(tensors, config, source=source)
    return Checkpoint(plain, model_config.huggingface_config, source)


def _extra_types(config: DeepseekV3Config) -> ExtraTypes:
    return distributed_types(config.devices, config.ep)


DEEPSEEK_V3 = TargetFamily(
    name="deepseekV3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    example_repo_id="deepseek-ai/DeepSeek-V3",
    config=DeepseekV3Config,
    read=_read,
    state=target_state_dict,
    stack=DeepseekV3,
    model=DeepseekV3Model,
    extra_types=_extra_types,
)
"""DeepSeek-V3, V3.1 and R1."""
