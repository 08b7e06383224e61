"""A Llama decoder layer, and what a draft's own layers have in common with it."""

from __future__ import annotations

from max.graph import TensorValue
from max.nn import Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

from unispec.kernels.operations import attention_block, decoder_layer
from unispec.pipelines.layers.linear import GatedMLP

from .attention import Attention
from .stack_config import StackConfig

__all__ = ["AttentionAndMLP", "DecoderLayer"]


class AttentionAndMLP(Module):
    """Attention, then an MLP after an RMSNorm, each around a residual.

    Args:
        input_size: columns of what attention reads; None: the stack's hidden size.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, input_size: int | None = None
    ) -> None:
        super().__init__()
        size, dtype = config.hidden_size, config.dtype
        self.self_attn = Attention(config, rope, input_size=input_size)
        self.mlp = GatedMLP(size, config.intermediate_size, dtype, config.devices[0])
        self.post_attention_layernorm = RMSNorm(size, dtype, config.norm_eps)

    def run(
        self,
        residual: TensorValue,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
        *,
        norm: RMSNorm | None,
        factor: float = 1.0,
    ) -> TensorValue:
        """Runs both over ragged rows, `[T, H]`.

        Args:
            residual: what attention adds to.
            x: what it reads, after the norm if there is one.
            factor: of what each adds.
        """
        attending = self.self_attn.attending(layer, cache, freqs_cis, row_offsets)
        attend = self.self_attn.half(residual, x, attending, norm=norm, factor=factor)
        if attend is None:
            x = self.self_attn(residual, x, attending, norm=norm, factor=factor)
            return self.mlp.added(x, self.post_attention_layernorm, factor)
        transform = self.mlp.half(self.post_attention_layernorm, factor)
        if transform is None:
            return self.mlp.added(attention_block(attend), self.post_attention_layernorm, factor)
        return decoder_layer(attend, transform)

    def store(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
        *,
        norm: RMSNorm | None,
    ) -> None:
        """Writes the keys and values that `run` would, and computes nothing else."""
        attending = self.self_attn.attending(layer, cache, freqs_cis, row_offsets)
        self.self_attn.store(x, attending, norm=norm)


class DecoderLayer(AttentionAndMLP):
    """A layer whose attention reads, after an RMSNorm, what it adds to.

    Args:
        input_norm: an EAGLE draft's first layer has no norm before its attention.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, input_norm: bool = True
    ) -> None:
        super().__init__(config, rope)
        self.has_input_norm = input_norm
        if input_norm:
            self.input_layernorm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Runs the layer over ragged rows and writes their keys and values."""
        factor = self.residual_multiplier
        return self.run(x, layer, x, cache, freqs_cis, row_offsets, norm=self._norm, factor=factor)

    def read(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> None:
        """Writes the rows' keys and values as a call would, and computes nothing else."""
        self.store(layer, x, cache, freqs_cis, row_offsets, norm=self._norm)

    @property
    def _norm(self) -> RMSNorm | None:
        return self.input_layernorm if self.has_input_norm else None
