"""The layer of an EAGLE-3 draft under training, over the rows of several passes."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

__all__ = ["Eagle3Layer", "Heads", "Rows"]

Heads = tuple[Tensor, Tensor]
"""Keys and values `[R, groups, head_dim]` of some rows."""


class Rows(NamedTuple):
    """The rows of a pass, those of all sequences one after the other."""

    counts: list[int]
    """Rows of each sequence."""
    positions: Tensor
    """int64 `[R]`: which row of pass 0 in its sequence each goes on from."""
    rotation: tuple[Tensor, Tensor]
    """Cosine and sine of where its token stands, `[R, head_dim]` each."""


class _Attention(nn.Module):
    """Attention over the rows of pass 0, and one row of each later pass.

    Args:
        config: a Llama's; queries, keys and values read two hidden states side by side.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, self.width = config.hidden_size, config.head_dim
        heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.heads_of_group = heads // self.groups
        self.q_proj = nn.Linear(2 * hidden, heads * self.width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, self.groups * self.width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, self.groups * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, hidden, bias=False)

    def forward(self, x: Tensor, rows: Rows, first: list[Heads], own: list[Heads]) -> Tensor:
        """`[R, H]` of the rows of one pass.

        Args:
            x: `[R, 2H]`.
            rows: where they stand.
            first: of each sequence the keys and values of pass 0, which pass 0 adds.
            own: of each later pass those of the same rows, to which this pass adds its own.
        """
        query, key, value = (
            projection(x).reshape(len(x), -1, self.width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rows.rotation)
        keys = key.split(rows.counts), value.split(rows.counts)
        if first:
            own.append((key, value))
            begins = [0, *accumulate(rows.counts)]
            places = [slice(*ends) for ends in pairwise(begins)]
            attended = [
                self._later(query[at], rows.positions[at], one, [(k[at], v[at]) for k, v in own])
                for at, one in zip(places, first, strict=True)
            ]
        else:
            first.extend(zip(*keys, strict=True))
            attended = [
                self._causal(*one) for one in zip(query.split(rows.counts), *keys, strict=True)
            ]
        output: Tensor = self.o_proj(torch.cat(attended).flatten(1))
        return output

    def _causal(self, *one: Tensor) -> Tensor:
        """`[R, heads, head_dim]` of queries, keys and values of a sequence in pass 0."""
        query, key, value = (each.transpose(0, 1) for each in one)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return seen.transpose(0, 1)

    def _later(self, query: Tensor, positions: Tensor, first: Heads, own: list[Heads]) -> Tensor:
        """`[R, heads, head_dim]` of rows that go on from rows `positions` of pass 0.

        A row sees pass 0 up to there, and of later passes itself: what was proposed on its way.
        """
        key, value = (each.transpose(0, 1)[:, None] for each in first)  # [groups, 1, L, head_dim]
        shape = len(query), self.groups, self.heads_of_group, self.width
        grouped = query.reshape(shape).permute(1, 2, 0, 3)
        scores = grouped @ key.transpose(-1, -2)  # [groups, heads / groups, R, L]
        future = torch.arange(key.shape[2], device=query.device) > positions[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        mine = [(k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]) for k, v in own]
        columns = [(grouped * k).sum(-1, keepdim=True) for k, _ in mine]
        weights = torch.cat([scores, *columns], dim=-1).float() * self.width**-0.5
        weights = weights.softmax(dim=-1).to(value.dtype)
        attended = weights[..., : key.shape[2]] @ value
        for number, (_, own_value) in enumerate(mine):
            attended = attended + weights[..., key.shape[2] + number, None] * own_value
        found: Tensor = attended.permute(2, 0, 1, 3).reshape(query.shape)
        return found


class Eagle3Layer(nn.Module):
    """Attention over embedding and feature, and an MLP; both add to the feature.

    Args:
        config: a Llama's.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(hidden, eps)
        self.hidden_norm = LlamaRMSNorm(hidden, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(self, embedded: Tensor, feature: Tensor, *around: Any) -> Tensor:
        """`[R, H]` of embeddings and features, `[R, H]` each; see `_Attention` for the rest."""
        normed = self.input_layernorm(embedded), self.hidden_norm(feature)
        hidden = feature + self.self_attn(torch.cat(normed, dim=-1), *around)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output
