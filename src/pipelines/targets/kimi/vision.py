"""The vision tower and the projector of Kimi K2.5, for one media item at a time.

A media item is an image, or up to four frames of a video. Its patches see each other in both
directions, those of its frames included, and no other item's.
"""

from __future__ import annotations

import math
from typing import Final

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from max.graph import Module as CompilationUnit
from max.nn import LayerList, LayerNorm, Linear, Module

from .config import VisionConfig
from .positions import ROTARY_STRIDE

__all__ = ["VISION_GRAPH", "VisionModel", "build_vision_graph"]

VISION_GRAPH: Final = "kimik2_5_vision"
"""The graph's name."""

_MERGED = 4
_NORM_EPS = 1e-5
_ROTARY_BASE = 10000.0


class _Attention(Module):
    """Attention of all patches to all, rotated by row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size, dtype, device = config.hidden_size, config.dtype, config.device
        self.wqkv = Linear(size, 3 * size, dtype, device, has_bias=True)
        self.wo = Linear(size, size, dtype, device, has_bias=True)

    def __call__(self, x: TensorValue, cos: TensorValue, sin: TensorValue) -> TensorValue:
        heads, width = self.config.num_attention_heads, self.config.head_dim
        projected = ops.split(self.wqkv(x), [heads * width] * 3, axis=-1)
        query, key, value = (y.reshape([x.shape[0], heads, width]) for y in projected)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        scores = query.permute([1, 0, 2]) @ key.permute([1, 2, 0])  # [heads, L, L]
        weights = ops.softmax(scores.cast(DType.float32) / math.sqrt(width)).cast(x.dtype)
        attended = (weights @ value.permute([1, 0, 2])).permute([1, 0, 2])
        return self.wo(attended.reshape(x.shape))


class _Block(Module):
    """Attention and MLP, each after a LayerNorm and around a residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        dtype, device = config.dtype, config.device
        self.norm0 = _norm(config)
        self.norm1 = _norm(config)
        self.attention = _Attention(config)
        self.fc0 = Linear(size, inner, dtype, device, has_bias=True)
        self.fc1 = Linear(inner, size, dtype, device, has_bias=True)

    def __call__(self, x: TensorValue, cos: TensorValue, sin: TensorValue) -> TensorValue:
        x = x + self.attention(self.norm0(x), cos, sin)
        return x + self.fc1(ops.gelu(self.fc0(self.norm1(x)), approximate="tanh"))


class VisionModel(Module):
    """Patches of one media item to features that stand in for tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size, dtype, device = config.hidden_size, config.dtype, config.device
        self.patch_embed = Linear(3 * config.patch_size**2, size, dtype, device, has_bias=True)
        self.blocks = LayerList([_Block(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = _norm(config)
        joined = _MERGED * size
        self.pre_norm = LayerNorm(size, [device], dtype, config.projector_eps)
        self.proj_0 = Linear(joined, joined, dtype, device, has_bias=True)
        self.proj_2 = Linear(joined, config.text_hidden_size, dtype, device, has_bias=True)

    def __call__(
        self,
        patches: TensorValue,
        positions: TensorValue,
        rotary_ids: TensorValue,
        order: TensorValue,
    ) -> TensorValue:
        """Runs tower and projector.

        Args:
            patches: float32 `[L, 3 * patch_size ** 2]`, channel, then row, then column.
            positions: float32 `[L, D]`, see `position_embeddings`.
            rotary_ids: int64 `[L]`, see `rotary_ids`.
            order: int64 `[N, 4, frames]`, see `merge_order`.

        Returns:
            float32 `[N, H]`.
        """
        dtype = self.config.dtype
        x = self.patch_embed(patches.cast(dtype))
        x = x + ops.rebind(positions.cast(dtype), x.shape)
        cos, sin = self._angles(rotary_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.final_layernorm(x)
        count, merged, frames = order.shape
        taken = ops.gather(x, order.reshape([count * merged * frames]), axis=0)
        taken = taken.reshape([count * merged, frames, self.config.hidden_size])
        features = ops.mean(taken, axis=1).reshape([count * merged, self.config.hidden_size])
        features = self.pre_norm(features).reshape([count, _MERGED * self.config.hidden_size])
        return self.proj_2(ops.gelu(self.proj_0(features))).cast(DType.float32)

    def _angles(self, ids: TensorValue) -> tuple[TensorValue, TensorValue]:
        """Cosine and sine `[L, 1, head_dim / 2]`: pair 2 i turns by the column, 2 i + 1 by the row.

        The documentation of the published code has rows first, the code itself columns.
        """
        width = self.config.head_dim
        frequencies = [_ROTARY_BASE ** (-4 * i / width) for i in range(width // 4)]
        turn = ops.constant(frequencies, DType.float32, device=ids.device)  # [head_dim / 4]
        row, column = ids // ROTARY_STRIDE, ids % ROTARY_STRIDE
        by_column, by_row = (
            ops.unsqueeze(index.cast(DType.float32), 1) * turn for index in (column, row)
        )
        angles = ops.stack([by_column, by_row], axis=-1).reshape([ids.shape[0], 1, width // 2])
        return ops.cos(angles), ops.sin(angles)


def build_vision_graph(module: VisionModel, unit: CompilationUnit) -> Graph:
    """Builds the graph of `VisionModel`; nothing is compiled."""
    config = module.config
    device: DeviceRef = config.device
    types = [
        TensorType(DType.float32, ["num_patches", 3 * config.patch_size**2], device=device),
        TensorType(DType.float32, ["num_patches", config.hidden_size], device=device),
        TensorType(DType.int64, ["num_patches"], device=device),
        TensorType(DType.int64, ["num_features", _MERGED, "num_frames"], device=device),
    ]
    with Graph(VISION_GRAPH, input_types=types, module=unit) as graph:
        graph.output(module(*(value.tensor for value in graph.inputs)))
    return graph


def _norm(config: VisionConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, [config.device], config.dtype, _NORM_EPS)


def _rotate(x: TensorValue, cos: TensorValue, sin: TensorValue) -> TensorValue:
    """Turns neighbouring columns of `[L, heads, head_dim]` in pairs, in float32."""
    length, heads, width = x.shape
    pairs = x.cast(DType.float32).reshape([length, heads, width // 2, 2])
    real, imaginary = pairs[:, :, :, 0], pairs[:, :, :, 1]
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return ops.stack(turned, axis=-1).reshape(x.shape).cast(x.dtype)
