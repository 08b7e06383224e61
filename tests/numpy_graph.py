"""A graph made of numpy in place of a compiled one: an engine with a draft, nothing compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from max.driver import Buffer
from runs import assert_left_empty
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Model
from unispec.pipelines.speculative.step import INPUT_ORDER

__all__ = ["NumpyGraph", "continuation", "numpy_engine", "step_outputs"]

_NO_LOGPROBS = (np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))
"""Which have no meaning where nobody asks."""


def step_outputs(accepted: Any, following: Any, drafts: Any, lengths: Any) -> list[Buffer]:
    """A graph's outputs, of [B], [B], [B, P] and [B]."""
    report = np.concatenate([np.stack([accepted, following], axis=1), drafts], axis=1)
    arrays = accepted, following, drafts, *_NO_LOGPROBS, lengths.astype(np.uint32), report
    return [Buffer.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def _next(token: int) -> int:
    return 3 + (7 * token + 5) % 250  # no special token


def continuation(token: int, count: int) -> list[int]:
    """The greedy answer to any prompt that ends with the token."""
    tokens = [token]
    for _ in range(count):
        tokens.append(_next(tokens[-1]))
    return tokens[1:]


class NumpyGraph:
    """The next token follows from the last one; of the drafts, one is wrong.

    Attributes:
        before: Called in each step with the last token of each row.
    """

    def __init__(self) -> None:
        self.before: Callable[[list[int]], None] = lambda last: None
        self.steps: list[int] = []
        """How many rows each step had."""

    def execute(self, *buffers: Buffer) -> list[Buffer]:
        assert INPUT_ORDER[3:6] == (
            "draft_tokens",
            "known_next_tokens",
            "num_speculative_tokens",
        )
        tokens, offsets, _, drafts, _, count = (buffer.to_numpy() for buffer in buffers[:6])
        cached = buffers[7].to_numpy()  # behind the target's pages
        last = tokens[offsets[1:].astype(np.int64) - 1].tolist()
        self.before(last)
        self.steps.append(len(last))
        rows = [self._row(*row, int(count)) for row in zip(last, drafts.tolist(), strict=True)]
        outputs = [np.array([row[at] for row in rows], np.int64) for at in range(3)]
        new = np.diff(offsets.astype(np.int64))
        return step_outputs(*outputs, cached + new + outputs[0])

    def _row(self, last: int, drafts: Sequence[int], count: int) -> tuple[int, int, list[int]]:
        answer = continuation(last, len(drafts) + 1)
        agrees = [draft == token for draft, token in zip(drafts, answer, strict=False)]
        accepted = agrees.index(False) if False in agrees else len(drafts)
        following = answer[accepted]
        proposals = continuation(following, count)
        if proposals:
            proposals[following % count] += 1
        return accepted, following, proposals


@contextmanager
def numpy_engine(
    pair: TinyPair, patch: pytest.MonkeyPatch, **options: Any
) -> Iterator[tuple[Engine, NumpyGraph]]:
    """An engine of a pair's configuration and K = 3; it must be left empty."""
    graph = NumpyGraph()
    patch.setattr(UnifiedEagleLlama3Model, "load_model", lambda model, session: graph)
    sizes = {"max_batch_size": 4, "max_batch_input_tokens": 32, "max_length": 256, **options}
    engine = Engine(
        EngineConfig(
            model=str(pair.target),
            draft_model=str(pair.draft),
            speculative_method="eagle",
            num_speculative_tokens=3,
            **sizes,
        )
    )
    yield engine, graph
    assert_left_empty(engine)
