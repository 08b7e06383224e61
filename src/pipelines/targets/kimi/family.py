"""Kimi K2.5 as a target."""

from __future__ import annotations

from collections.abc import Mapping

from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints import Tensor
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.deepseek.weights import dequantised, target_state_dict
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.target import ExtraTypes, TargetFamily

from .config import KimiK2_5Config
from .inputs import kimi_types
from .model import KimiK2_5Model
from .stack import KimiK2_5
from .weights import language_tensors, vision_tensors

__all__ = ["KIMI_K25"]


def _read(model_config: MAXModelConfig, config: KimiK2_5Config) -> Checkpoint:
    """The vision part as it is, the language model's dequantised."""
    tensors, source = read_weights(model_config)
    language = dequantised(language_tensors(tensors), config, source=source)
    both = {**vision_tensors(tensors), **language}
    return Checkpoint(both, model_config.huggingface_config, source)


def _state(
    tensors: Mapping[str, Tensor], config: KimiK2_5Config, *, source: str
) -> dict[str, Tensor]:
    return target_state_dict(language_tensors(tensors), config, source=source)


def _extra_types(config: KimiK2_5Config) -> ExtraTypes:
    return kimi_types(config.hidden_size, config.devices[0])


KIMI_K25 = TargetFamily(
    name="kimi_k25",
    model_type="kimi_k25",
    architecture="KimiK25ForConditionalGeneration",
    example_repo_id="moonshotai/Kimi-K2.5",
    config=KimiK2_5Config,
    read=_read,
    state=_state,
    stack=KimiK2_5,
    model=KimiK2_5Model,
    extra_types=_extra_types,
)
"""Kimi K2.5, which reads images."""
