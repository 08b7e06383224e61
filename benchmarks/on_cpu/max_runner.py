"""MAX's own Llama pipeline as a contender, through its in-process API."""

from __future__ import annotations

from collections.abc import Sequence

from max.pipelines import AutoModel
from max.pipelines.lib.generate import GenerateIterator

from .answer import Answer, Arrivals

__all__ = ["MaxRunner"]


class MaxRunner:
    """Generates with the pipeline that MAX builds for the model on a CPU, in float32.

    Args:
        model: the target's folder.
        rows: most prompts at a time.
        max_length: longest sequence, in tokens.
    """

    def __init__(self, model: str, rows: int, max_length: int) -> None:
        self._model = AutoModel(
            model,
            devices="cpu",
            quantization_encoding="float32",
            max_batch_size=rows,
            max_length=max_length,
        )

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
        """Answers encoded prompts greedily."""
        arrivals = Arrivals()
        arrivals.start(len(prompts))
        with GenerateIterator(
            self._model.pipeline, prompts, max_new_tokens=max_new_tokens, temperature=0.0
        ) as batch:
            for step in batch:
                for row, tokens in step.items():
                    arrivals.tick(row, len(tokens))
            sequences = batch.sequences
        return arrivals.answer(
            [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)]
        )
