"""Configuration of Kimi K2.5: the language model's stack, vision tower and projector."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from max.dtype import DType
from max.graph import DeviceRef
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.layers.fields import check_only, positive_integer
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.placement import check_one_device

__all__ = ["KimiK2_5Config", "VisionConfig"]

_SIZES: Final = (
    "patch_size",
    "vt_hidden_size",
    "vt_intermediate_size",
    "vt_num_hidden_layers",
    "vt_num_attention_heads",
    "init_pos_emb_height",
    "init_pos_emb_width",
    "init_pos_emb_time",
)
_ONLY: Final = {
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "video_attn_type": "spatial_temporal",
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shapes of the vision tower (MoonViT, with frames of a video side by side)."""

    patch_size: int
    """Pixels of a patch's side."""
    hidden_size: int
    """D, width of the tower."""
    intermediate_size: int
    """Width inside a block's MLP."""
    num_hidden_layers: int
    """Blocks."""
    num_attention_heads: int
    """Heads of a block."""
    position_height: int
    """Rows of the learned table of positions."""
    position_width: int
    """Columns of the learned table of positions."""
    max_frames: int
    """Frames of one media item at most."""
    text_hidden_size: int
    """H, width of the language model."""
    projector_eps: float
    """Of the projector's norm."""
    dtype: DType
    """Of weights and activations."""
    device: DeviceRef
    """Where the tower runs."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def read(
        cls, hf: Any, *, text_hidden_size: int, dtype: DType, device: DeviceRef, source: str
    ) -> Self:
        """Reads `vision_config` of a Kimi K2.5 config.

        Raises:
            InputError: a size is missing or does not fit, or the tower is of another kind.
        """
        vision = hf.vision_config
        sizes = {
            name: positive_integer(f"vision_config.{name}", getattr(vision, name, None), source)
            for name in _SIZES
        }
        check_only(vision, _ONLY, source, model="Kimi K2.5", prefix="vision_config.")
        width = getattr(vision, "text_hidden_size", text_hidden_size)
        if width != text_hidden_size:
            raise InputError(
                f"vision_config.text_hidden_size {width} of {source} is not the language model's"
                f" {text_hidden_size}; correct its config.json"
            )
        heads = sizes["vt_num_attention_heads"]
        if sizes["vt_hidden_size"] % (4 * heads):
            raise InputError(
                f"vision_config.vt_hidden_size {sizes['vt_hidden_size']} of {source} does not make"
                f" {heads} heads of a width that 4 divides; correct its config.json"
            )
        return cls(
            patch_size=sizes["patch_size"],
            hidden_size=sizes["vt_hidden_size"],
            intermediate_size=sizes["vt_intermediate_size"],
            num_hidden_layers=sizes["vt_num_hidden_layers"],
            num_attention_heads=heads,
            position_height=sizes["init_pos_emb_height"],
            position_width=sizes["init_pos_emb_width"],
            max_frames=sizes["init_pos_emb_time"],
            text_hidden_size=text_hidden_size,
            projector_eps=float(getattr(vision, "projector_ln_eps", 1e-5)),
            dtype=dtype,
            device=device,
        )


@dataclass(kw_only=True)
class KimiK2_5Config(DeepseekV3Config):
    """A DeepSeek-V3 stack and the vision tower before it."""

    vision: VisionConfig
    """Tower and projector."""

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads the stack and the tower of `model_config`, by default the target.

        Args:
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: what `DeepseekV3Config.initialize` and `VisionConfig.read` refuse.
        """
        model_config = model_config or pipeline_config.model
        stack = DeepseekV3Config.initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        check_one_device(stack.devices, "Kimi K2.5")
        vision = VisionConfig.read(
            model_config.huggingface_config,
            text_hidden_size=stack.hidden_size,
            dtype=stack.dtype,
            device=stack.devices[0],
            source=model_config.model_name,
        )
        return cls(**{f.name: getattr(stack, f.name) for f in fields(stack)}, vision=vision)
