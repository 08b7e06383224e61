"""MAX's own Llama pipeline as a contender, through its in-process API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from max.pipelines import AutoModel
from max.pipelines.lib.generate import GenerateIterator

from .answer import Answer, StepClock

__all__ = ["MaxRunner"]


class MaxRunner:
    """Generates with the pipeline that MAX builds for the model on a CPU.

    Args:
        model: the target's folder.
        max_length: longest sequence, in tokens.
    """

    def __init__(self, model: Path, max_length: int) -> None:
        self._clock = StepClock()
        self._model = AutoModel(
            str(model),
            devices="cpu",
            quantization_encoding="float32",
            max_length=max_length,
        )

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """Answers one encoded prompt greedily."""
        self._clock.start()
        with GenerateIterator(
            self._model.pipeline, [prompt], max_new_tokens=max_new_tokens, temperature=0.0
        ) as batch:
            for step in batch:
                self._clock.tick(len(step[0]))
            (sequence,) = batch.sequences
        return self._clock.answer(sequence[len(prompt) :])
