"""The DFlash draft: a projection of the target's features, then layers over a masked block.

Format and forward pass as in the reference (z-lab/dflash, `dflash/model.py`): keys and
values of the context come from the projected features of each token, the same for all
layers and without the layer's input norm; the block [next token, mask, mask, ...] stands
at the positions after them; slot i proposes the token at its own position, slot 0 none.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn import LayerList, RMSNorm
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.drafts.vocabulary import TargetVocabularyDraft
from unispec.pipelines.layers.linear import Linear, fused_linear
from unispec.pipelines.layers.stack import layer_index
from unispec.pipelines.targets.llama.stack import llama_rope

from .gathered import is_gathered
from .layers import DflashLayer
from .unified import UnifiedDflashConfig

__all__ = ["DflashDraft"]


class DflashDraft(TargetVocabularyDraft):
    """A DFlash draft for a target.

    Args:
        config: both stacks, which target layers are tapped, and how a block looks.
        target: the target's stack.
    """

    def __init__(self, config: UnifiedDflashConfig, target: Any) -> None:
        super().__init__(config, target)
        stack, count = config.draft, config.draft.num_hidden_layers
        windows, causal = config.windows or [None] * count, config.causal or [False] * count
        self.block_size = config.resolve_block_size()
        self.mask_token_id = config.mask_token_id
        self.rope = llama_rope(stack)
        hidden, dtype, device = stack.hidden_size, stack.dtype, stack.devices[0]
        self.fc = Linear(len(config.target_layer_ids) * hidden, hidden, dtype, device)
        self.hidden_norm = RMSNorm(hidden, dtype, stack.norm_eps)
        gathered = is_gathered(windows, device)
        self.layers = LayerList(
            [
                DflashLayer(stack, window=window, causal=hides, gathered=gathered)
                for window, hides in zip(windows, causal, strict=True)
            ]
        )
        self.norm = RMSNorm(hidden, dtype, stack.norm_eps)

    def materialize(
        self, features: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> None:
        """Writes the context's keys and values in every layer.

        Args:
            features: `[U, n * H]`, outputs of the tapped target layers.
        """
        context = self.hidden_norm(self.fc(features))  # [U, H]
        attentions = [layer.self_attn for layer in self._layers()]
        projections = [p for attention in attentions for p in (attention.k_proj, attention.v_proj)]
        projected = iter(fused_linear(context, projections))
        for index, attention in enumerate(attentions):
            attention.store(
                layer_index(index),
                next(projected),
                next(projected),
                cache,
                self.rope.freqs_cis,
                row_offsets,
            )

    def __call__(self, next_tokens: TensorValue, cache: PagedCacheValues) -> TensorValue:
        """Runs one block after the cached tokens; `[B, block_size - 1, H]`, normed.

        Args:
            next_tokens: int64 `[B]`.
            cache: the draft's cache as far as it is verified.
        """
        batch, device = next_tokens.shape[0], next_tokens.device
        mask = ops.constant(self.mask_token_id, DType.int64, device=device)
        masks = ops.broadcast_to(mask, [batch, self.block_size - 1])
        block = ops.concat([ops.unsqueeze(next_tokens, 1), masks], axis=1)
        x = self.embed_tokens(block.reshape([batch * self.block_size]))
        width = batch + 1
        ramp = ops.range(0, width, 1, out_dim=width, dtype=DType.uint32, device=device)
        for index, layer in enumerate(self._layers()):
            x = layer(layer_index(index), x, cache, self.rope.freqs_cis, ramp * self.block_size)
        return self.norm(x).reshape([batch, self.block_size, x.shape[1]])[:, 1:]

    def _layers(self) -> list[DflashLayer]:
        return [layer for layer in self.layers if isinstance(layer, DflashLayer)]
