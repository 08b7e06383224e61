"""What the target model alone computes, by HF transformers in float32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from .block_fp8 import write_dequantised

__all__ = ["TIE_GAP", "GreedyTrace", "TargetReference", "assert_same_greedy"]

TIE_GAP = 1e-3
"""Logits closer than this may swap rank between two correct float32 implementations."""


@dataclass(frozen=True)
class GreedyTrace:
    """One greedy continuation, step by step.

    Attributes:
        token_ids: The generated tokens, end-of-sequence token included.
        top2_gap: Top-1 minus top-2 logit of each step, float32.
        contenders: The tokens of each step whose logit is nearly the best one's.
    """

    token_ids: list[int] = field(default_factory=list)
    top2_gap: list[float] = field(default_factory=list)
    contenders: list[frozenset[int]] = field(default_factory=list)

    def append(self, logits: Tensor, tie_gap: float = TIE_GAP) -> int:
        """Adds the step that has these logits, float32 [V], and returns its token.

        Args:
            tie_gap: How far below the best logit that of a contender is, at most.
        """
        top = torch.topk(logits, 2).values  # [2]
        token = int(logits.argmax())
        close = torch.nonzero(logits > top[0] - tie_gap).flatten().tolist()
        self.token_ids.append(token)
        self.top2_gap.append(float(top[0] - top[1]))
        self.contenders.append(frozenset(close))
        return token


class TargetReference:
    """A causal language model from a checkpoint folder in HF format, in float32 on the CPU."""

    def __init__(self, folder: Path | str, rounding: float = 0.0) -> None:
        """Loads the checkpoint; weights stored in another type are widened to float32.

        Args:
            rounding: Share of the best logit by which the distance of two logits may differ in the
                number format of what is compared with this; 0 for float32.
        """
        self._rounding = rounding
        with TemporaryDirectory() as copy:
            if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
                folder = write_dequantised(Path(folder), Path(copy))
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @property
    def embedding(self) -> Tensor:
        """The token embedding, float32 [V, H]."""
        weight: Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    @property
    def head(self) -> Tensor:
        """The language model head, float32 [V, H]; the embedding itself where they are tied."""
        weight: Tensor = self.model.get_output_embeddings().weight.detach()
        return weight

    @property
    def logits_scaling(self) -> float:
        """What the head's products are divided by: 1, but in Granite."""
        return float(getattr(self.model.config, "logits_scaling", 1))

    def tie_gap(self, best: float | Tensor) -> float:
        """How far below the best logit another one may be that is taken for the best."""
        return max(TIE_GAP, self._rounding * abs(float(best)))

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for ``extend``."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def extend(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """Runs ``ids`` after the tokens that ``cache`` holds, and adds them to it.

        Returns:
            The features after the final norm, float32 [T, H].
        """
        tokens = torch.tensor([list(ids)])  # [1, T]
        output = self.model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
        features: Tensor = output.last_hidden_state[0]  # [T, H]
        return features

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """The logits [..., V] of ``features`` [..., H]."""
        return features @ self.head.T / self.logits_scaling

    def features_and_logits(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features after the final norm [T, H] and logits [T, V] of ``ids``, in one pass."""
        features = self.extend(ids, self.new_cache())
        return features, self.logits(features)

    def greedy(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        eos: Collection[int] | None = None,
        max_length: int | None = None,
        guess: Sequence[int] = (),
    ) -> GreedyTrace:
        """Continues ``prompt_ids`` greedily with a KV cache.

        Args:
            prompt_ids: The prompt, at least one token.
            max_new_tokens: The largest number of tokens to generate.
            eos: Tokens that end the continuation; they are part of it.
            max_length: The largest number of tokens of prompt and continuation together.
            guess: What may come out. One pass serves all tokens of it that are right; from the
                first wrong one on, each token takes a pass of its own.
        """
        budget = max_new_tokens
        if max_length is not None:
            budget = min(budget, max_length - len(prompt_ids))
        trace = GreedyTrace()
        cache = self.new_cache()
        pending = [*prompt_ids, *guess]
        first = len(prompt_ids) - 1
        while len(trace.token_ids) < budget:
            for logits in self.logits(self.extend(pending, cache)[first:]):
                token = trace.append(logits, self.tie_gap(logits.max()))
                done = len(trace.token_ids)
                if done == budget or (eos is not None and token in eos):
                    return trace
                if list(guess[done - 1 : done]) != [token]:
                    break
            cache.crop(len(prompt_ids) + done - 1)
            pending, first = [token], 0
        return trace


def assert_same_greedy(ours: Sequence[int], trace: GreedyTrace) -> bool:
    """Asserts that ``ours`` is a greedy continuation of the target, near-ties allowed.

    At the first difference our token must be a contender of the target's own step, that is
    a token whose logit is nearly the best one's. What follows such a swap is
    another continuation and is not compared.

    Returns:
        True if the tokens are identical, False if they part at a near-tie.

    Raises:
        AssertionError: A token is not the target's, or one continuation is a proper prefix
            of the other.
    """
    theirs = trace.token_ids
    for step, (our_token, their_token) in enumerate(zip(ours, theirs, strict=False)):
        if our_token != their_token:
            assert our_token in trace.contenders[step], (
                f"token {step} is {our_token}, the target says {their_token}"
                f" with a top-2 gap of {trace.top2_gap[step]:.2e}"
            )
            return False
    assert len(ours) == len(theirs), f"{len(ours)} tokens, the target has {len(theirs)}"
    return True
