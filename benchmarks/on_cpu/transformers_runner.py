"""Hugging Face transformers as a contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from .answer import Answer, Arrivals

__all__ = ["TransformersRunner"]


class TransformersRunner:
    """Generates with `transformers` in PyTorch.

    Args:
        model: the target's folder.
        dtype: `"float32"` or `"bfloat16"`.
        threads: of PyTorch.
    """

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
        """Answers encoded prompts greedily; the shorter ones are padded on the left."""
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        rows = zip(padding, prompts, strict=True)
        input_ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in rows])  # [B, T]
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])  # [B, T]
        arrivals = Arrivals()
        arrivals.start(len(prompts))
        output = self._model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_Streamer(arrivals, len(prompts)),
        )
        return arrivals.answer(output[:, width:].tolist())


class _Streamer(BaseStreamer):
    """Passes on that each step brought a token to each answer; the first call is the prompt's."""

    def __init__(self, arrivals: Arrivals, rows: int) -> None:
        self._arrivals = arrivals
        self._rows = rows
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for row in range(self._rows):
                self._arrivals.tick(row, 1)
        self._prompt_seen = True

    def end(self) -> None:
        pass
