"""Inputs of the Kimi K2.5 graphs in their documented order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType

from unispec.pipelines.targets.deepseek.inputs import (
    DEEPSEEK_ORDER,
    DeepseekV3Inputs,
    DistributedInputs,
    distributed_types,
)

__all__ = ["KIMI_ORDER", "ImageInputs", "KimiK2_5ModelInputs", "kimi_types"]

_IMAGES = ("language_image_embeddings", "language_image_token_indices")

KIMI_ORDER = (*DEEPSEEK_ORDER, *_IMAGES)
"""The language graph's inputs: DeepSeek-V3's, then the features of images."""


def kimi_types(hidden_size: int, device: DeviceRef) -> dict[str, Sequence[TensorType | BufferType]]:
    """Graph input types that only Kimi K2.5 has, by name."""
    features = TensorType(DType.float32, ["num_image_tokens", hidden_size], device=device)
    indices = TensorType(DType.int64, ["num_image_tokens"], device=device)
    return {
        **distributed_types([device]),
        **dict(zip(_IMAGES, ([features], [indices]), strict=True)),
    }


@dataclass(kw_only=True)
class ImageInputs(DistributedInputs):
    """Media items of a step, as patches or as features. One entry a device, so one."""

    image_token_indices: list[Buffer] | None = None
    """int64 `[n]`: where the features of `pixel_values` or `precomputed_image_embeddings` stand
    among the step's tokens, drafts included; negative: nowhere in this step."""
    precomputed_image_embeddings: list[Buffer] | None = None
    """float32 `[n, H]`: features of items, in place of `pixel_values`."""
    pixel_values: list[Buffer] | None = None
    """float32 `[L, 3, patch_size, patch_size]`: patches of all items, one after the other."""
    grid_thws: list[Buffer] | None = None
    """int64 `[items, 3]`: frames, rows and columns of each item."""
    cu_seqlens: list[Buffer] | None = None
    """uint32 `[items + 1]`: where the patches of each item start; follows from the grids, and is
    held against them."""
    max_seqlen: list[Buffer] | None = None
    """uint32 `[1]`: patches of the largest item; likewise."""
    vision_position_ids: list[Buffer] | None = None
    """int64 `[L]`: row * 512 + column of each patch; likewise."""
    language_image_embeddings: list[Buffer] = field(default_factory=list)
    """float32 `[n, H]`: what the language graph reads."""
    language_image_token_indices: list[Buffer] = field(default_factory=list)
    """int64 `[n]`: where it stands among the step's tokens, drafts included."""

    @property
    def has_images(self) -> bool:
        """Whether the caller hands over patches, features or their indices."""
        return any(
            buffers is not None
            for buffers in (
                self.image_token_indices,
                self.pixel_values,
                self.precomputed_image_embeddings,
            )
        )


@dataclass
class KimiK2_5ModelInputs(DeepseekV3Inputs, ImageInputs):
    """One step's inputs; the bases say what each field holds."""

    GRAPH_ORDER: ClassVar[tuple[str, ...]] = KIMI_ORDER

    tokens: Buffer
    input_row_offsets: Buffer
    signal_buffers: list[Buffer]
    host_input_row_offsets: Buffer
    batch_context_lengths: list[Buffer]
    image_token_indices: list[Buffer] | None = None
    precomputed_image_embeddings: list[Buffer] | None = None
    pixel_values: list[Buffer] | None = None
    grid_thws: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None
    max_seqlen: list[Buffer] | None = None
    vision_position_ids: list[Buffer] | None = None
    language_image_embeddings: list[Buffer] = field(default_factory=list)
    language_image_token_indices: list[Buffer] = field(default_factory=list)

    @property
    def target_kv_cache(self) -> Any:
        """The target's part of `kv_cache_inputs`."""
        return _branch(self.kv_cache_inputs, "target")

    @property
    def draft_kv_cache(self) -> Any:
        """The draft's part of `kv_cache_inputs`."""
        return _branch(self.kv_cache_inputs, "draft")


def _branch(caches: Any, name: str) -> Any:
    return None if caches is None else caches[name]
