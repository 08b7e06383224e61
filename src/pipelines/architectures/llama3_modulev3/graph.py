"""Llama 3 as a ModuleV3 module: from ragged tokens to logits."""

from __future__ import annotations

from max.dtype import DType
from max.experimental import functional as F
from max.experimental.nn import Embedding, Linear, Module, ModuleList, as_subgraph
from max.experimental.tensor import Tensor
from max.graph import TensorValue, ops
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.lib import ModuleV3Outputs

from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.targets.llama.stack import llama_rope

from .layers import DecoderLayer, layer_index, norm

__all__ = ["Llama3"]


class Llama3(Module[..., ModuleV3Outputs]):
    """A causal language model; weights have Hugging Face's names without `model.`."""

    def __init__(self, config: Llama3Config) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, dim=config.hidden_size)
        self.layers = ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, row_offsets: Tensor, return_n_logits: Tensor, *cache: Tensor
    ) -> ModuleV3Outputs:
        """Runs new tokens after those in the cache.

        Args:
            tokens: int64 `[T]`, ragged.
            row_offsets: uint32 `[B + 1]`.
            return_n_logits: int64 `[1]` on the CPU: n, with `ReturnLogits.VARIABLE`; every row
                has at least n tokens.
            cache: the inputs that `config.kv_params` names.

        Returns:
            `next_token_logits` float32 `[B, V]`; with VARIABLE or ALL, `logits` float32
            `[B * n, V]` or `[T, V]` and `logit_offsets` `[B + 1]`; where asked for,
            `hidden_states` `[B, H]` or `[T, H]`, before the final norm if not NORMALIZED.
        """
        x = self._decode(tokens, row_offsets, cache)
        mode = self.config.return_logits
        if mode == ReturnLogits.LAST_TOKEN:
            outputs = ModuleV3Outputs(next_token_logits=self._logits(_last(x, row_offsets)))
        else:
            states, offsets = x, row_offsets
            if mode == ReturnLogits.VARIABLE:
                rows, offsets = _trailing_rows(row_offsets, return_n_logits)
                states = F.gather(x, rows, axis=0)
            # The head is the largest matrix: it runs once.
            logits = self._logits(states)
            outputs = ModuleV3Outputs(
                next_token_logits=_last(logits, offsets), logits=logits, logit_offsets=offsets
            )
        wanted = self.config.return_hidden_states
        if wanted == ReturnHiddenStates.LAST:
            outputs.hidden_states = _last(x, row_offsets)
        elif wanted == ReturnHiddenStates.ALL:
            outputs.hidden_states = x
        elif wanted == ReturnHiddenStates.ALL_NORMALIZED:
            outputs.hidden_states = self.norm(x)
        return outputs

    def _decode(self, tokens: Tensor, row_offsets: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
        """Embedding and layers, `[T, H]`."""
        x = self.embed_tokens(tokens) * self.config.embedding_multiplier
        freqs_cis = llama_rope(self.config).freqs_cis.cast(self.config.dtype)
        table = Tensor.from_graph_value(freqs_cis).to(x.device)
        for index, layer in enumerate(self.layers):
            # One subgraph for all layers: the compiler sees a layer once, not thirty times.
            call = as_subgraph(layer, name="llama3_layer")
            x = call(layer_index(index), x, table, row_offsets, *cache)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """float32 `[R, V]` for what the layers put out, `[R, H]`."""
        tied = self.config.tie_word_embeddings
        head = self.embed_tokens.weight if tied else self.lm_head.weight
        logits: Tensor = F.cast(self.norm(x) @ head.T, DType.float32)  # [R, V]
        return logits / self.config.logits_scaling


def _last(rows: Tensor, offsets: Tensor) -> Tensor:
    """The last of each sequence's rows, `[B, ...]`, where they begin at `offsets` `[B + 1]`."""
    found: Tensor = F.gather(rows, offsets[1:] - 1, axis=0)
    return found


def _rows_of_logits(
    row_offsets: TensorValue, count: TensorValue
) -> tuple[TensorValue, TensorValue]:
    """Indices int64 `[B * n]` of each row's last n tokens, where each row's begin `[B + 1]`."""
    device, bounds = row_offsets.device, row_offsets.shape[0]
    back = ops.range(count[0], 0, -1, out_dim="num_logits", dtype=DType.int64, device=device)
    ends = ops.unsqueeze(row_offsets[1:].cast(DType.int64), 1)  # [B, 1]
    ramp = ops.range(0, bounds, 1, out_dim=bounds, dtype=DType.int64, device=device)
    return (ends - back).reshape([-1]), ramp * count.to(device)


# As an operation on ModuleV3 tensors.
_trailing_rows = F.functional(_rows_of_logits)
