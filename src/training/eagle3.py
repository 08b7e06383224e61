"""An EAGLE-3 draft under training.

Row i reads the embedding of token i + 1 and a feature of token i; its output predicts token i + 2
and is the feature of the row behind it (EAGLE-3, arXiv 2503.01840). A fit does what decoding does
(training-time test): pass 0 reads features made of the target's layers, and each later pass goes
on by one token from every row, with the output of the pass before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

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

from unispec.checkpoints.tapped_layers import default_layer_ids

from .collection import Example
from .draft import Draft

__all__ = ["Eagle3Draft"]

PASSES: Final = 3
"""Passes of a step of the fit, as in the `speculators` library: K's default."""

DECAY: Final = 0.8
"""Weight of a pass's loss in that of the one before, as in SpecForge."""

Heads = tuple[Tensor, Tensor]
"""Keys and values `[R, groups, head_dim]` of some rows."""


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

    def forward(self, x: Tensor, rows: _Rows, first: list[Heads], own: list[Heads]) -> Tensor:
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


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(hidden, eps)
        self.hidden_norm = LlamaRMSNorm(hidden, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(self, embedded: Tensor, feature: Tensor, *around: Any) -> Tensor:
        normed = self.input_layernorm(embedded), self.hidden_norm(feature)
        hidden = feature + self.self_attn(torch.cat(normed, dim=-1), *around)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class _Rows(NamedTuple):
    """The rows of a pass, those of all sequences one after the other."""

    counts: list[int]
    """Rows of each sequence."""
    positions: Tensor
    """int64 `[R]`: which row of pass 0 in its sequence each goes on from."""
    rotation: tuple[Tensor, Tensor]
    """Cosine and sine of where its token stands, `[R, head_dim]` each."""


class Eagle3Draft(Draft):
    """`fc`, one layer and a norm, under SpecForge's names; the head's rows are the target's.

    An example's features are the outputs of the tapped layers and, last, of the final norm.

    Args:
        target: the target's configuration, whose shape the layer takes.
        norm: weight of the target's final norm `[H]`, with which the draft's begins.
        **borrowed: see `Draft`.
    """

    num_proposals = 5

    def __init__(self, target: LlamaConfig, norm: Tensor, **borrowed: Tensor | None) -> None:
        super().__init__(**borrowed)  # type: ignore[arg-type]
        hidden = target.hidden_size
        changed: dict[str, Any] = target.to_dict() | {
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
        }
        self._config = LlamaConfig(**changed)
        taps = len(default_layer_ids(target.num_hidden_layers))
        self.fc = nn.Linear(taps * hidden, hidden, bias=False)
        self.midlayer = _Layer(self._config)
        self.norm = LlamaRMSNorm(hidden, self._config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(self._config)
        # At first the draft hands on what the last tapped layer put out.
        nn.init.normal_(self.fc.weight, std=hidden**-0.5 / 10)
        with torch.no_grad():
            self.fc.weight[:, -hidden:] += torch.eye(hidden)
            self.norm.weight.copy_(norm)
            for name, parameter in self.midlayer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(0.1)

    def outputs(self, batch: Sequence[Example], wanted: Sequence[Tensor]) -> list[Tensor]:
        """What the head reads, pass by pass.

        Row i of a sequence of T tokens is one of T - 1, and predicts token i + 2 + p in pass p.

        Args:
            wanted: for each pass p the rows that it has, bool `[R]` over those of all sequences
                one after the other, each a part of the one before; pass 0 has all of them.

        Returns:
            For each pass `[R_p, H]`.
        """
        device, size = self.head.device, self._config.hidden_size
        lengths = [len(one.tokens) - 1 for one in batch]
        tokens = torch.cat([one.tokens for one in batch]).to(device)
        # The first token of each sequence is read by no row.
        begins = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).to(
            device
        )
        index = torch.arange(sum(lengths), device=device)  # [R]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        taps = torch.cat([one.features[:-1, :-size] for one in batch]).to(device)
        # What the layer adds to stays exact where products are taken in bfloat16.
        feature = self.fc(taps).float()
        cos, sin = self.rotary(
            feature, torch.arange(max(lengths) + len(wanted), device=device)[None]
        )
        first: list[Heads] = []
        own: list[Heads] = []
        found = []
        for number, rows in enumerate(wanted):
            kept = rows[index]
            index, feature = index[kept], feature[kept]
            own = [(key[kept], value[kept]) for key, value in own]
            at = positions[index]
            where = _Rows(
                torch.bincount(begins[index], minlength=len(batch)).tolist(),
                at,
                (cos[0, at + number], sin[0, at + number]),
            )
            # Sequence s has s tokens more before it than rows.
            read = self.embedding[tokens[index + begins[index] + 1 + number]]
            feature = self.midlayer(read, feature, where, first, own)
            found.append(self.norm(feature))
        return found

    def loss(self, batch: Sequence[Example], generator: torch.Generator) -> Tensor:
        """Cross entropy to the target's distributions over the tokens that the draft proposes.

        A row counts as long as the answer goes on with such tokens: behind another one no step of
        decoding arrives.
        """
        counted = [rows for rows in self._counted(batch) if rows.any()]
        if not counted:
            return 0 * self.norm.weight.sum()  # answers too short to learn from
        size = self._config.hidden_size
        truth = [one.features[:, -size:] for one in batch]
        outputs = self.outputs(batch, [torch.ones_like(counted[0]), *counted[1:]])
        outputs[0] = outputs[0][counted[0]]
        total = torch.zeros((), device=self.head.device)
        weights = [DECAY**number for number in range(len(counted))]
        for number, weight in enumerate(weights):
            # Row i predicts token i + 2 + p, of which the state of the token before tells.
            ends = torch.cat([F.pad(one[1 + number :], (0, 0, 0, number)) for one in truth])
            states = ends.to(self.head.device)[counted[number]]
            with torch.autocast(states.device.type, enabled=False):
                soft = (states @ self.head.T).softmax(dim=-1)  # [C, N]
            logits = (outputs[number] @ self.head.T).float()
            total = total + weight * F.cross_entropy(logits, soft)
        return total / sum(weights)

    def _counted(self, batch: Sequence[Example]) -> list[Tensor]:
        """Of each pass the rows to learn from, bool over those of all sequences."""
        device = self.head.device
        rows = [torch.ones(0, dtype=torch.bool, device=device) for _ in range(PASSES)]
        for one in batch:
            proposed = self.draft_ids[one.tokens.to(device)] >= 0  # [T]
            proposed[: one.prompt_length] = False
            counts = torch.ones(len(proposed) - 1, dtype=torch.bool, device=device)
            for number in range(PASSES):
                follows = proposed[2 + number :]
                counts = counts & F.pad(follows, (0, len(counts) - len(follows)))
                rows[number] = torch.cat([rows[number], counts])
        return rows

    @torch.inference_mode()
    def matches(self, example: Example) -> Tensor:
        """See `Draft`."""
        k, count = self.num_proposals, len(example.tokens)
        first, last = example.prompt_length - 1, count - k - 1
        if last <= first:
            return torch.zeros(0, k, dtype=torch.bool)
        row = torch.arange(count - 1, device=self.head.device)
        measured = (row >= first) & (row < last)
        everything = torch.ones_like(measured)
        outputs = self.outputs([example], [everything, *[measured] * (k - 1)])
        outputs[0] = outputs[0][measured]
        found = [self.proposed(output).cpu() for output in outputs]
        truth = [example.tokens[first + i + 2 : last + i + 2] for i in range(k)]
        return torch.stack(found, dim=-1) == torch.stack(truth, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """See `Draft`; with the head, which other engines do not take from the target."""
        found = super().tensors() | {"lm_head.weight": self.head}
        return found | {"t2d": self.draft_ids >= 0} if self.reduced else found

    def config(self) -> dict[str, Any]:
        """See `Draft`."""
        return self._config.to_dict() | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(self.target_ids),
        }
