"""The configurations that the stack of the unified graphs has code for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.layers.fields import check_only
from unispec.pipelines.layers.rope import RopeType

from .checks import check_window
from .config import Llama3Config

__all__ = ["StackConfig"]

_CAUSAL: Final = {"is_causal": True, "use_bidirectional_attention": False}
"""What a target that writes text may state."""


@dataclass(kw_only=True)
class StackConfig(Llama3Config):
    """A Llama stack of a unified graph, target or draft.

    A model that differs from Llama by these fields sets them in a subclass.
    """

    ROPE_TYPES: ClassVar[Sequence[RopeType]] = ("default", "llama3")
    CONSTANTS: ClassVar[Collection[str]] = ()
    """Which of Granite's constants this model has; the others must change nothing."""

    qkv_bias: bool = False
    """Whether the q, k and v projections have a bias, though `attention_bias` does not say so."""
    qk_norm: bool = False
    """Whether each query and key head is normed before it is rotated."""

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
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: what `Llama3Config.initialize` refuses, a constant that this model does
                not have, or a target whose sequences outgrow its sliding window.
        """
        model_config = model_config or pipeline_config.model
        config = super().initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        source = model_config.model_name
        # A draft's layers see what its method says.
        if model_config is pipeline_config.model:
            check_window(model_config.huggingface_config, config.max_seq_len, source)
            check_only(model_config.huggingface_config, _CAUSAL, source, model="Llama")
        neutral = {
            "attention_multiplier": 1 / math.sqrt(config.head_dim),
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "clip_qkv": None,
        }
        for name, value in neutral.items():
            if name not in cls.CONSTANTS and getattr(config, name) != value:
                raise InputError(
                    f"{name} of {source} is {getattr(config, name)}, which this stack does not"
                    " have; use a Llama without it"
                )
        return config
