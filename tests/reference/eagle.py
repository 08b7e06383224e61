"""An EAGLE draft for Llama targets in torch, and greedy speculative decoding with it.

Row ``i`` of the draft takes (embedding of token ``i + 1``, feature of token ``i``) at position
``i``; its output predicts token ``i + 2`` and stands in for the feature of token ``i + 1``.
Formats and alignment: EAGLE, arXiv 2401.15077.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .target import TargetReference

__all__ = ["DraftStep", "EagleReference", "acceptance_per_position", "mean_acceptance_length"]


@dataclass(frozen=True)
class DraftStep:
    """One step of greedy speculative decoding.

    Attributes:
        verified_length: Number of tokens whose features the draft could use.
        next_token: The token after those, chosen by the target and not yet run through it.
        proposals: The draft's K guesses for the tokens after ``next_token``.
        num_accepted: How many leading proposals the target agrees with, 0 to K.
    """

    verified_length: int
    next_token: int
    proposals: list[int]
    num_accepted: int


def acceptance_per_position(steps: Sequence[DraftStep]) -> list[float]:
    """Share of steps that accept proposal 1, 2, ..., K; ``steps`` must not be empty."""
    k = len(steps[0].proposals)
    return [sum(step.num_accepted > i for step in steps) / len(steps) for i in range(k)]


def mean_acceptance_length(steps: Sequence[DraftStep]) -> float:
    """Tokens that one step yields: 1 + accepted proposals; ``steps`` must not be empty."""
    return 1 + sum(step.num_accepted for step in steps) / len(steps)


class _Draft(nn.Module):
    """The tensors of a draft checkpoint under their own names, and the pass over rows."""

    def __init__(self, config: LlamaConfig, *, fc_bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embeddings: Tensor, features: Tensor, cache: DynamicCache) -> Tensor:
        """[R, H] and [R, H] of the rows after those in ``cache``, to their outputs [R, H]."""
        start, rows = cache.get_seq_length(), embeddings.shape[0]
        positions = torch.arange(start, start + rows)  # [R]
        hidden: Tensor = self.fc(torch.cat([embeddings, features], dim=-1))[None]  # [1, R, H]
        rotation = self.rotary(hidden, positions[None])
        future = torch.arange(start + rows) > positions[:, None]  # [R, start + R]
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotation,
            )
        return hidden[0]


class EagleReference:
    """An EAGLE draft checkpoint together with the target that it was made for.

    The embedding and the head are the target's unless the checkpoint has its own. With
    ``d2t`` the draft proposes only the tokens ``i + d2t[i]``. Unknown or missing tensors
    raise torch's ``RuntimeError``.
    """

    def __init__(self, draft_folder: Path | str, target: TargetReference) -> None:
        """Loads the draft in float32."""
        self.target = target
        folder = Path(draft_folder)
        self.config = LlamaConfig.from_pretrained(folder, attn_implementation="eager")
        tensors = load_file(folder / "model.safetensors")
        offsets = tensors.pop("d2t", None)  # [N] int64
        self.target_ids = (
            torch.arange(self.config.vocab_size)
            if offsets is None
            else torch.arange(len(offsets)) + offsets
        )  # [N]
        own_embedding = tensors.pop("embed_tokens.weight", None)
        own_head = tensors.pop("lm_head.weight", None)
        self.embedding = target.embedding if own_embedding is None else own_embedding.float()
        self.head = target.head[self.target_ids] if own_head is None else own_head.float()
        self._draft = _Draft(self.config, fc_bias="fc.bias" in tensors).eval()
        self._draft.load_state_dict({name: t.float() for name, t in tensors.items()})

    def read(self, ids: Sequence[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Runs ``ids`` through the target, after those in ``cache``.

        Returns:
            What the target's head reads [T, H], and what the draft reads of it [T, H].
        """
        hidden = self.target.extend(ids, cache)
        return hidden, hidden

    @torch.inference_mode()
    def _rows(
        self, next_ids: Sequence[int], features: Tensor, cache: DynamicCache
    ) -> tuple[int, Tensor]:
        """Adds rows for ``next_ids`` [R] and ``features`` [R, H].

        Returns:
            The proposal of the last row and its output [1, H].
        """
        output = self._draft(self.embedding[list(next_ids)], features, cache)[-1:]  # [1, H]
        return int(self.target_ids[self.logits(output).argmax()]), output

    def logits(self, output: Tensor) -> Tensor:
        """The logits [..., N] of outputs [..., H], divided as the target's are."""
        return output @ self.head.T / self.target.logits_scaling

    @torch.inference_mode()
    def propose(self, token_ids: Sequence[int], features: Tensor, k: int) -> list[int]:
        """The K proposals after ``token_ids``, every row computed anew for each of them.

        Args:
            token_ids: t_0 ... t_n: the verified tokens, then the target's next token.
            features: What ``read`` says of t_0 ... t_{n-1} [n, H].
            k: The number of proposals.
        """
        if len(features) != len(token_ids) - 1:
            raise ValueError(f"{len(token_ids)} tokens need one feature less, not {len(features)}")
        next_ids = list(token_ids[1:])
        proposals: list[int] = []
        for _ in range(k):
            token, output = self._rows(next_ids, features, DynamicCache(config=self.config))
            proposals.append(token)
            next_ids.append(token)
            features = torch.cat([features, output])
        return proposals

    def simulate(
        self, prompt_ids: Sequence[int], n_steps: int, k: int, eos: Collection[int] = ()
    ) -> list[DraftStep]:
        """Decodes greedily with speculation, both caches kept from step to step.

        Rejected tokens and rows made from the draft's own outputs are cut off the caches
        before the next step. Stops after ``n_steps`` steps, or before a step whose verified
        tokens after the prompt, or next token, hold one of ``eos``.
        """
        target_cache = self.target.new_cache()
        draft_cache = DynamicCache(config=self.config)
        hidden, features = self.read(prompt_ids, target_cache)  # of rows new to the draft
        ids = [*prompt_ids, int(self.target.logits(hidden[-1]).argmax())]  # t_0 ... t_n
        steps: list[DraftStep] = []
        while len(steps) < n_steps and not set(eos).intersection(ids[len(prompt_ids) :]):
            verified = len(ids) - 1
            proposals = self._propose_on(draft_cache, ids, features, k)
            hidden, features = self.read([ids[-1], *proposals], target_cache)  # [K + 1, H]
            choices = self.target.logits(hidden).argmax(dim=-1).tolist()  # [K + 1]
            accepted = next((i for i in range(k) if proposals[i] != choices[i]), k)
            steps.append(DraftStep(verified, ids[-1], proposals, accepted))
            ids += choices[: accepted + 1]
            features = features[: accepted + 1]
            target_cache.crop(verified + 1 + accepted)
        return steps

    def _propose_on(
        self, cache: DynamicCache, ids: Sequence[int], features: Tensor, k: int
    ) -> list[int]:
        """K proposals after ``ids``; leaves ``cache`` with the rows of true features only."""
        token, output = self._rows(ids[cache.get_seq_length() + 1 :], features, cache)
        true_rows = cache.get_seq_length()
        proposals = [token]
        while len(proposals) < k:
            token, output = self._rows([token], output, cache)
            proposals.append(token)
        cache.crop(true_rows)
        return proposals
