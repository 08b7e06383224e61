"""An EAGLE draft under training.

Row i reads the embedding of token i + 1 and the target's feature of token i; its output predicts
token i + 2 and stands in for the feature of token i + 1 (EAGLE, arXiv 2401.15077). In use,
later rows of a step read the draft's own outputs; so the fit runs the rows again on those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .collection import Example
from .draft import Draft, padded

__all__ = ["EagleDraft"]

PASSES = 2
"""Passes of a step of the fit: on the target's features, then on the draft's own."""

FEATURE_WEIGHT = 0.1
"""Weight of the distance to the target's features, in units of their standard deviation."""


class EagleDraft(Draft):
    """`fc` and decoder layers, the first without input norm.

    Args:
        target: the target's configuration, whose shape the layers take.
        layers: how many decoder layers.
        **borrowed: see `Draft`.
    """

    num_proposals = 5

    def __init__(self, target: LlamaConfig, layers: int, **borrowed: Tensor | None) -> None:
        super().__init__(**borrowed)  # type: ignore[arg-type]
        hidden = target.hidden_size
        changed: dict[str, Any] = target.to_dict() | {
            "num_hidden_layers": layers,
            "attention_dropout": 0.0,
        }
        changed["attn_implementation"] = "sdpa"
        self._config = LlamaConfig(**changed)
        self.fc = nn.Linear(2 * hidden, hidden)
        self.layers = nn.ModuleList(LlamaDecoderLayer(self._config, i) for i in range(layers))
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(self._config)
        # At first the draft hands the feature on, of which its layers change little.
        nn.init.normal_(self.fc.weight, std=hidden**-0.5 / 10)
        nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.weight[:, hidden:] += torch.eye(hidden)
            for name, parameter in self.layers.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(0.1)

    def outputs(self, tokens: Tensor, features: Tensor, passes: int) -> list[Tensor]:
        """Runs all rows, each pass but the first on the outputs of the one before.

        Args:
            tokens: int64 `[B, T]`.
            features: the target's, `[B, T, H]`.

        Returns:
            For each pass, counted from 0, `[B, T - 1, H]`; the first p rows of pass p are void.
        """
        embedded = self.embedding[tokens[:, 1:]]  # [B, T - 1, H]
        rows = embedded.shape[1]
        own, found = features[:, :-1], []
        seen = DynamicCache()  # keys and values of the passes before
        positions = torch.arange(rows, device=tokens.device)[None]
        rotation = self.rotary(embedded, positions)
        for number in range(passes):
            # What layers add to stays exact where products are taken in bfloat16.
            hidden = self.fc(torch.cat([embedded, own], dim=-1)).float()
            mask = _visible(rows, number, hidden)
            for layer in self.layers:
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=rotation,
                    past_key_values=seen,
                )
            found.append(hidden)
            own = F.pad(hidden[:, :-1], (0, 0, 1, 0))  # row j reads the output of row j - 1
        return found

    def loss(self, batch: Sequence[Example], generator: torch.Generator) -> Tensor:
        """Cross entropy to the target's distributions, and distance to its features."""
        tokens, features = padded(batch, self.head.device)
        rows = tokens.shape[1] - 1
        position = torch.arange(rows)
        # Row i predicts token i + 2, which must be part of the answer; the first are void in the
        # last pass.
        counts = torch.stack(
            [
                (position + 2 >= max(one.prompt_length, PASSES + 1))
                & (position + 2 < len(one.tokens))
                for one in batch
            ]
        ).to(tokens.device)  # [B, T - 1]
        if not counts.any():
            return 0 * self.fc.bias.sum()  # answers too short to learn from
        spread = torch.cat([one.features[:-1] for one in batch]).std().to(features.device)
        truth = features[:, 1:][counts]  # [R, H]
        with torch.autocast(truth.device.type, enabled=False):
            soft = (truth @ self.head.T).softmax(dim=-1)  # [R, N]
        losses = []
        for output in self.outputs(tokens, features, PASSES):
            ours = output[counts]  # [R, H]
            losses.append(F.cross_entropy((ours @ self.head.T).float(), soft))
            losses.append(FEATURE_WEIGHT * F.smooth_l1_loss(ours / spread, truth / spread))
        return torch.stack(losses).sum() / PASSES

    @torch.inference_mode()
    def matches(self, example: Example) -> Tensor:
        """See `Draft`."""
        k = self.num_proposals
        tokens, features = padded([example], self.head.device)
        first, last = example.prompt_length - 1, tokens.shape[1] - k - 1
        if last <= first:
            return torch.zeros(0, k, dtype=torch.bool)
        outputs = self.outputs(tokens, features, k)
        found = [self.proposed(row[0, first + i : last + i]) for i, row in enumerate(outputs)]
        truth = [tokens[0, first + i + 2 : last + i + 2] for i in range(k)]
        return (torch.stack(found, dim=-1) == torch.stack(truth, dim=-1)).cpu()

    def config(self) -> dict[str, Any]:
        """See `Draft`."""
        return self._config.to_dict() | {"architectures": ["LlamaForCausalLMEagle"]}


def _visible(rows: int, number: int, like: Tensor) -> Tensor:
    """What the T - 1 rows of pass p see of those before it and of their own, as a mask to add.

    Row j of pass p continues what row j - p of pass 0 began: it sees pass 0 up to there, and of
    each later one the one row on the way; a void row sees itself.

    Args:
        number: p.
        like: has the dtype and the device.

    Returns:
        `[1, 1, T - 1, (p + 1) * (T - 1)]`, 0 or minus infinity.
    """
    position = torch.arange(rows, device=like.device)
    distance = position[:, None] - position  # [T - 1, T - 1]
    on_the_way = [distance == number - key for key in range(1, number + 1)]
    seen = torch.cat([distance >= number, *on_the_way], dim=1)
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~seen, float("-inf"))[None, None]
