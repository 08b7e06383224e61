"""A DFlash draft under training.

A block starts at an anchor: its token, then block_size - 1 masks. Slot i predicts the i-th token
after the anchor. The target's hidden states of the tokens before the anchor give keys and
values to every layer; within the block all slots see each other (DFlash, arXiv 2602.06036).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from .collection import Example
from .draft import Draft, padded

__all__ = ["DFlashDraft"]

ANCHORS = 24
"""How many blocks of a sequence a step of the fit has."""

DECAY = 4.0
"""Slots over which the loss's weight falls to 1 / e: an early miss voids all that follow."""

ANCHOR_DISTANCE = 3
"""Distance of two blocks that are measured, in tokens of an answer."""


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, self.width = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, heads * self.width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, hidden, bias=False)
        self.q_norm = LlamaRMSNorm(self.width, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.width, config.rms_norm_eps)

    def forward(
        self, block: Tensor, context: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        """Attention of Q slots `[B, Q, H]` to themselves and the context before them.

        Args:
            block: `[B, Q, H]`.
            context: `[B, T, H]`.
            cos: of the rotation of both, `[B, T + Q, head_dim]`.
            sin: likewise.
            mask: bool `[B, Q, T + Q]`, True where a slot sees a key.
        """

        def heads(x: Tensor) -> Tensor:
            apart = x.reshape(*x.shape[:2], -1, self.width)  # [B, ..., heads, head_dim]
            return apart.transpose(1, 2)

        rows = torch.cat([context, block], dim=1)
        key, value = self.k_norm(heads(self.k_proj(rows))), heads(self.v_proj(rows))
        query = self.q_norm(heads(self.q_proj(block)))
        tail = block.shape[1]
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -tail:], sin[:, -tail:])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        seen = F.scaled_dot_product_attention(query, key, value, mask[:, None], enable_gqa=True)
        output: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return output


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(self, block: Tensor, *around: Tensor) -> Tensor:
        block = block + self.self_attn(self.input_layernorm(block), *around)
        output: Tensor = block + self.mlp(self.post_attention_layernorm(block))
        return output


class DFlashDraft(Draft):
    """`fc` and `hidden_norm` over the features, decoder layers over blocks, `norm`.

    Args:
        target: the target's configuration, whose shape the layers take.
        layers: how many decoder layers.
        block_size: slots of a block; K is one less.
        target_layer_ids: the layers whose outputs are the features.
        mask_token_id: the token of the slots to be filled.
        **borrowed: see `Draft`.
    """

    def __init__(
        self,
        target: LlamaConfig,
        layers: int,
        *,
        block_size: int,
        target_layer_ids: Sequence[int],
        mask_token_id: int,
        **borrowed: Tensor | None,
    ) -> None:
        super().__init__(**borrowed)  # type: ignore[arg-type]
        self.block_size, self.num_proposals = block_size, block_size - 1
        self._format = {
            "block_size": block_size,
            "num_target_layers": target.num_hidden_layers,
            "dflash_config": {
                "mask_token_id": mask_token_id,
                "target_layer_ids": list(target_layer_ids),
            },
        }
        self._mask = mask_token_id
        changed = {"num_hidden_layers": layers, "attention_bias": False, "mlp_bias": False}
        self._config = LlamaConfig(**target.to_dict() | changed)
        hidden, eps = target.hidden_size, target.rms_norm_eps
        self.fc = nn.Linear(len(target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = LlamaRMSNorm(hidden, eps)
        self.layers = nn.ModuleList(_Layer(self._config) for _ in range(layers))
        self.norm = LlamaRMSNorm(hidden, eps)
        self.rotary = LlamaRotaryEmbedding(self._config)

    def outputs(self, tokens: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
        """Fills blocks.

        Args:
            tokens: int64 `[B, T]`.
            features: `[B, T, F]`.
            anchors: int64 `[B, A]`, positions at which blocks begin.

        Returns:
            `[B, A, block_size - 1, H]`, what the head reads for each mask.
        """
        size, count = self.block_size, anchors.shape[1]
        context = self.hidden_norm(self.fc(features))  # [B, T, H]
        ids = torch.full((*anchors.shape, size), self._mask, device=tokens.device)
        ids[..., 0] = tokens.gather(1, anchors)
        block = self.embedding[ids.flatten(1)]  # [B, Q, H], Q = A * block_size
        slots = anchors[..., None] + torch.arange(size, device=tokens.device)  # [B, A, block_size]
        before = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # [B, T]
        cos, sin = self.rotary(block, torch.cat([before, slots.flatten(1)], dim=1))
        started = anchors.repeat_interleave(size, dim=1)[..., None]  # [B, Q, 1]
        number = torch.arange(count, device=tokens.device).repeat_interleave(size)  # [Q]
        same = (number[:, None] == number).expand(len(tokens), -1, -1)
        mask = torch.cat([before[:, None] < started, same], dim=-1)  # [B, Q, T + Q]
        for layer in self.layers:
            block = layer(block, context, cos, sin, mask)
        return self.norm(block).unflatten(1, (count, size))[:, :, 1:]  # type: ignore[no-any-return]

    def loss(self, batch: Sequence[Example], generator: torch.Generator) -> Tensor:
        """Cross entropy to the target's tokens, early slots weighing more."""
        tokens, features = padded(batch, self.head.device)
        anchors, ends = [], []
        for one in batch:
            first, last = one.prompt_length, len(one.tokens) - 1
            end_of_range = max(last, first + 1)
            anchors.append(torch.randint(first, end_of_range, (ANCHORS,), generator=generator))
            ends.append(len(one.tokens))
        starts = torch.stack(anchors).to(tokens.device)  # [B, A]
        slots = starts[..., None] + torch.arange(1, self.block_size, device=tokens.device)
        end = torch.tensor(ends, device=tokens.device)[:, None, None]
        inside = slots < end  # [B, A, block_size - 1]
        following = tokens[:, None].expand(-1, ANCHORS, -1)
        labels = following.gather(2, slots.clamp(max=tokens.shape[1] - 1))
        labels = self.draft_ids[labels].masked_fill(~inside, -1)
        output = self.outputs(tokens, features, starts)
        chosen = labels >= 0
        logits = (output[chosen] @ self.head.T).float()
        losses = F.cross_entropy(logits, labels[chosen], reduction="none")
        order = torch.arange(self.block_size - 1, device=tokens.device)
        weight = torch.exp(-order / DECAY).expand_as(labels)[chosen]
        return (losses * weight).sum() / weight.sum().clamp(min=1e-9)

    @torch.inference_mode()
    def matches(self, example: Example) -> Tensor:
        """See `Draft`."""
        k = self.num_proposals
        tokens, features = padded([example], self.head.device)
        anchors = torch.arange(
            example.prompt_length, tokens.shape[1] - k, ANCHOR_DISTANCE, device=tokens.device
        )
        if not len(anchors):
            return torch.zeros(0, k, dtype=torch.bool)
        found = self.proposed(self.outputs(tokens, features, anchors[None]))[0]  # [A, K]
        slots = anchors[:, None] + torch.arange(1, k + 1, device=tokens.device)
        return (found == tokens[0][slots]).cpu()

    def config(self) -> dict[str, Any]:
        """See `Draft`."""
        return self._config.to_dict() | {"architectures": ["DFlashDraftModel"]} | self._format
