"""The configurations that the stack of the unified graphs has code for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.layers.rope import RopeType

from .checks import check_window
from .config import Llama3Config

__all__ = ["StackConfig"]


class StackConfig(Llama3Config):
    """A Llama 2, 3, 3.1 or 3.2 or Mistral stack, target or draft of a unified graph."""

    ROPE_TYPES: ClassVar[Sequence[RopeType]] = ("default", "llama3")
    FIXED: ClassVar[Mapping[str, Any]] = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "clip_qkv": None,
    }
    """Fields that the stack has no code for, each with the only value that it may have."""

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads the stack of `model_config`, by default the target.

        Args:
            pipeline_config: target and speculative configuration.
            model_config: whose config.json is read; None: the target's.
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: what `Llama3Config.initialize` refuses, another value of a field than
                `FIXED` allows, or a target whose sequences outgrow its sliding window.
        """
        model_config = model_config or pipeline_config.model
        config = super().initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        source = model_config.model_name
        # A draft's layers see what its method says.
        if model_config is pipeline_config.model:
            check_window(model_config.huggingface_config, config.max_seq_len, source)
        for name, value in cls.FIXED.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"{name} of {source} is {getattr(config, name)}, which no unified graph"
                    " supports; use a Llama checkpoint"
                )
        return config
