"""One DeepSeek-V3 decoder layer, used by the target and by its MTP layer alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from max.graph import TensorValue, ops
from max.nn import Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues

from . import kernels
from .config import DeepseekV3Config
from .mesh import Communication

__all__ = ["DecoderLayer"]


class DecoderLayer(Module):
    """Attention, then experts or one MLP, each after an RMSNorm and around a residual.

    Attributes:
        attention: `self_attn` as each device runs it.
        mlps: `mlp` likewise.
    """

    def __init__(self, config: DeepseekV3Config, *, experts: bool) -> None:
        super().__init__()
        hidden, dtype = config.hidden_size, config.dtype
        self.self_attn = kernels.latent_attention(config)
        self.mlp = kernels.experts(config) if experts else kernels.mlp(config)
        self.input_layernorm = RMSNorm(hidden, dtype, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, dtype, config.rms_norm_eps)
        self.attention = kernels.shards(self.self_attn, config)
        self.mlps = kernels.shards(self.mlp, config)
        self._input_norms = kernels.shards(self.input_layernorm, config)
        self._mlp_norms = kernels.shards(self.post_attention_layernorm, config)

    def __call__(
        self,
        layer: TensorValue,
        xs: Sequence[TensorValue],
        caches: Sequence[PagedCacheValues],
        freqs_cis: Sequence[TensorValue],
        row_offsets: Sequence[TensorValue],
        plans: Sequence[Sequence[TensorValue]],
        communication: Communication,
    ) -> list[TensorValue]:
        """Runs the layer over ragged rows and writes their cache entries; all lists by device.

        Args:
            freqs_cis: `[positions, qk_rope_head_dim]` each, the rotary table.

        Returns:
            `[T, H]` each.
        """
        attended = [
            attention(layer, *arguments)
            for attention, arguments in self._attending(xs, caches, freqs_cis, row_offsets, plans)
        ]
        xs = _added(xs, communication.sum(attended))
        normed = [norm(x) for norm, x in zip(self._mlp_norms, xs, strict=True)]
        return _added(
            xs, communication.sum(kernels.through_mlps(self.mlps, normed, communication.ep_inputs))
        )

    def read(
        self,
        layer: TensorValue,
        xs: Sequence[TensorValue],
        caches: Sequence[PagedCacheValues],
        freqs_cis: Sequence[TensorValue],
        row_offsets: Sequence[TensorValue],
        plans: Sequence[Sequence[TensorValue]],
    ) -> None:
        """Writes the rows' cache entries as a call would, without what comes after attention."""
        for attention, arguments in self._attending(xs, caches, freqs_cis, row_offsets, plans):
            kernels.store(attention, layer, *arguments)

    def _attending(
        self,
        xs: Sequence[TensorValue],
        caches: Sequence[PagedCacheValues],
        freqs_cis: Sequence[TensorValue],
        row_offsets: Sequence[TensorValue],
        plans: Sequence[Sequence[TensorValue]],
    ) -> Iterator[tuple[Any, Sequence[Any]]]:
        """Each device's attention, and what it is called with after the layer's index."""
        normed = (norm(x) for norm, x in zip(self._input_norms, xs, strict=True))
        unpacked = (kernels.unpacked(plan) for plan in plans)
        for attention, x, cache, freqs, offsets, plan in zip(
            self.attention, normed, caches, freqs_cis, row_offsets, unpacked, strict=True
        ):
            yield attention, (x, cache, freqs, offsets, *plan)


def _added(xs: Sequence[TensorValue], changes: Sequence[TensorValue]) -> list[TensorValue]:
    """The residual stream after a branch: `[T, H]` of each device."""
    return [x + ops.rebind(change, x.shape) for x, change in zip(xs, changes, strict=True)]
