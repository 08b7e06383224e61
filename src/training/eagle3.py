"""An EAGLE-3 draft under training.

Row i reads the embedding of token i + 1 and a feature of token i; its output predicts token i + 2
and is the feature of the row behind it (EAGLE-3, arXiv 2503.01840). A fit does what decoding does
(training-time test): pass 0 reads features made of the target's layers, and each later pass goes
on by one token from every row, with the output of the pass before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from unispec.checkpoints.tapped_layers import default_layer_ids

from .collection import Example
from .draft import Draft
from .eagle3_layer import Eagle3Layer, Heads, Rows

__all__ = ["Eagle3Draft"]

PASSES: Final = 3
"""Passes of a step of the fit, as in the `speculators` library: K's default."""

DECAY: Final = 0.8
"""Weight of a pass's loss in that of the one before, as in SpecForge."""


class Eagle3Draft(Draft):
    """`fc`, one layer and norms, under SpecForge's names; the head's rows are the target's.

    It is an EAGLE-3.1: each tapped output is normed before `fc`, and the next row reads what the
    head reads. An example's features are the outputs of the tapped layers and, last, of the final
    norm.

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
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        }
        self._config = LlamaConfig(**changed)
        taps = len(default_layer_ids(target.num_hidden_layers))
        eps = self._config.rms_norm_eps
        self.fc_norm = nn.ModuleList(LlamaRMSNorm(hidden, eps) for _ in range(taps))
        self.fc = nn.Linear(taps * hidden, hidden, bias=False)
        self.midlayer = Eagle3Layer(self._config)
        self.norm = LlamaRMSNorm(hidden, eps)
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
        normed = zip(self.fc_norm, taps.chunk(len(self.fc_norm), dim=-1), strict=True)
        # What the layer adds to stays exact where products are taken in bfloat16.
        feature = self.fc(torch.cat([norm(tap) for norm, tap in normed], dim=-1)).float()
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
            where = Rows(
                torch.bincount(begins[index], minlength=len(batch)).tolist(),
                at,
                (cos[0, at + number], sin[0, at + number]),
            )
            # Sequence s has s tokens more before it than rows.
            read = self.embedding[tokens[index + begins[index] + 1 + number]]
            feature = self.norm(self.midlayer(read, feature, where, first, own))
            found.append(feature)
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
            "fc_norm": True,
            "norm_output": True,
        }
