"""Hugging Face transformers as a contender: greedy, or assisted by prompt lookup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from .answer import Answer, StepClock

__all__ = ["TransformersRunner"]


class TransformersRunner:
    """Generates with `transformers` in PyTorch.

    Assisted generation proper needs a smaller model with the same tokenizer; there is
    none for this target, so the assistance is prompt lookup, which needs no model: the
    drafts are the tokens that followed the last n-gram where it stood before.

    Args:
        model: the target's folder.
        draft_tokens: most tokens looked up in a step; 0 is plain greedy decoding.
    """

    def __init__(self, model: Path, draft_tokens: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._options: dict[str, Any] = {"do_sample": False}
        if draft_tokens:
            self._options["prompt_lookup_num_tokens"] = draft_tokens

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """Answers one encoded prompt greedily."""
        clock = StepClock()
        input_ids = torch.tensor([list(prompt)])  # [1, T]
        clock.start()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            streamer=_Arrivals(clock),
            **self._options,
        )
        return clock.answer(output[0, len(prompt) :].tolist())


class _Arrivals(BaseStreamer):
    """Passes on how many tokens each step brought; the first call brings the prompt."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._clock.tick(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass
