"""Which positions a draft has not read yet, and where the log has the target's features of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from max.driver import Buffer, Device
from max.pipelines.context import TextContext
from max.pipelines.request import RequestID

from unispec.methods import LARGEST_DRAFT_TOKENS

from .rows import Row, in_prefill

__all__ = ["LOG_ROWS_PER_REQUEST", "Deferred"]

LOG_ROWS_PER_REQUEST: Final = 64
"""The log has room for so many positions of each row of the largest batch."""

# Merged tokens of a row in a decode step, at most.
_WIDEST_STEP: Final = 1 + max(LARGEST_DRAFT_TOKENS.values())


class Deferred:
    """What the draft has to read, at the latest when it proposes again.

    A step that lets it wait writes its features behind the last row of the log that a request
    still needs, so the log is empty again when the draft has read all of them.

    Args:
        log: `[L, F]`, see `DeferredInputs`.
        shared_page_size: tokens of a cache page; None: requests share none.
        rows: what is kept of each request; a row that is dropped has nothing deferred.
        device: where the graph runs.
    """

    def __init__(
        self,
        log: Buffer,
        shared_page_size: int | None,
        rows: Mapping[RequestID, Row],
        device: Device,
    ) -> None:
        self._shared_page_size = shared_page_size
        self._rows = rows
        self._device = device
        self._room = log.shape[0]
        # Those who may have something in the log.
        self._behind: set[RequestID] = set()
        self._start, self._count = np.zeros((), np.int64), np.zeros((), np.int64)
        # Of the last step: its requests, and where it writes to the log; None: its draft reads.
        self._step: tuple[list[RequestID], int | None] = [], None
        self._log = {
            "feature_log": log,
            "logged_features": log,
            "log_start": Buffer.from_numpy(self._start),
            "num_logged": Buffer.from_numpy(self._count),
        }
        # Decode steps are few in kind, and making their inputs takes time.
        self._even: dict[tuple[int, int], dict[str, Buffer]] = {}

    def must_read(self, contexts: Sequence[TextContext]) -> bool:
        """Whether the draft has to read in the next step, though it may propose nothing.

        That is where a row is in prefill, where the log has no room for the step, and where a row
        may fill a page that others may share from then on, the draft's part of it too.

        Args:
            contexts: the step's, whose rows have the drafts that it verifies.
        """
        rows = [self._rows.get(context.request_id) for context in contexts]
        width = max((len(row.drafts) for row in rows if row is not None), default=0)
        if self._first_free() + len(rows) * (1 + width) > self._room:
            return True
        return any(
            row is None or in_prefill(context, row) or self._may_fill_page(context, row)
            for context, row in zip(contexts, rows, strict=True)
        )

    def fields(
        self, contexts: Sequence[TextContext], lengths: Sequence[int], count: int
    ) -> dict[str, Buffer]:
        """The inputs of `DEFERRED_INPUTS` by name, good until the next call.

        Args:
            contexts: the step's.
            lengths: merged tokens of each row.
            count: how many tokens the step proposes.
        """
        step = [context.request_id for context in contexts]
        if not count and not self.must_read(contexts):
            start = self._first_free()
            self._step = step, start
            return self._writing(start, sum(lengths)) | self._alone([0] * len(lengths))
        self._step = step, None
        counts = []
        rows: list[int] = []
        tokens: list[int] = []
        for context in contexts:
            deferred = self._rows[context.request_id].deferred
            counts.append(len(deferred))
            if deferred:
                end = context.tokens.processed_length + 1
                rows += deferred
                tokens += context.tokens.all[end - len(deferred) : end].tolist()
        if not rows:
            return self.nothing(lengths)
        return self._writing(0, 0) | _reading(rows, tokens, counts, lengths, self._device)

    def nothing(self, lengths: Sequence[int]) -> dict[str, Buffer]:
        """The inputs of a step whose draft has read all that was before it.

        Args:
            lengths: merged tokens of each row.
        """
        return self._writing(0, 0) | self._alone(lengths)

    def all_read(self, contexts: Sequence[TextContext]) -> None:
        """Takes note of a step that was enqueued ahead, whose draft reads all there is.

        Args:
            contexts: those of its rows that are not finished.
        """
        self._step = [context.request_id for context in contexts], None

    def settle(self, contexts: Sequence[TextContext], num_accepted: Sequence[int]) -> None:
        """Takes note of what a step has logged, or that its draft has read all there was.

        To be called before contexts and rows move on.

        Args:
            contexts: those that `fields` or `all_read` was called with last.
            num_accepted: of each row.
        """
        step, start = self._step
        assert step == [context.request_id for context in contexts]
        rows = [self._rows[name] for name in step]
        if start is None:
            for row in rows:
                row.deferred = []
            return
        width = max(len(row.drafts) for row in rows)
        for index, (row, accepted) in enumerate(zip(rows, num_accepted, strict=True)):
            first = start + index * (1 + width)
            row.deferred += range(first, first + 1 + accepted)
        self._behind |= set(step)

    def _first_free(self) -> int:
        """The log's row behind the last one in use."""
        # Not of all rows: most of their requests may wait for their turn.
        self._behind = {
            name for name in self._behind if name in self._rows and self._rows[name].deferred
        }
        return 1 + max((self._rows[name].deferred[-1] for name in self._behind), default=-1)

    def _writing(self, start: int, count: int) -> dict[str, Buffer]:
        """The inputs that say where the step writes so many features."""
        self._start[...], self._count[...] = start, count
        return self._log

    def _alone(self, lengths: Sequence[int]) -> dict[str, Buffer]:
        """The inputs that say that the draft reads merged tokens only.

        Args:
            lengths: of each row; all 0: it does not read.
        """
        kind = len(lengths), lengths[0]
        is_even = kind[1] <= _WIDEST_STEP and lengths.count(kind[1]) == kind[0]
        if is_even and kind in self._even:
            return self._even[kind]
        made = _reading([], [], [0] * kind[0], lengths, self._device)
        if is_even:
            self._even[kind] = made
        return made

    def _may_fill_page(self, context: TextContext, row: Row) -> bool:
        size = self._shared_page_size
        if size is None:
            return False
        return context.tokens.processed_length % size + 1 + len(row.drafts) >= size


def _reading(
    rows: Sequence[int],
    tokens: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    device: Device,
) -> dict[str, Buffer]:
    """The inputs that say what the draft reads.

    Args:
        rows: `[E]`, the log's rows of the deferred positions.
        tokens: `[E]`, the tokens after them.
        counts: `[B]`, deferred positions of each row.
        lengths: `[B]`, merged tokens of each row.
    """
    before = np.array(counts, np.int64)
    # A row's deferred positions, then its merged ones, which stand behind all deferred ones.
    ends = np.cumsum(before), len(rows) + np.cumsum(lengths)
    both = zip(*ends, before, lengths, strict=True)
    places = np.concatenate(
        [
            np.arange(end - count, end, dtype=np.int64)
            for old, new, deferred, merged in both
            for end, count in ((old, deferred), (new, merged))
        ]
    )
    offsets = np.zeros(len(lengths) + 1, np.uint32)
    np.cumsum(before + lengths, out=offsets[1:])
    return {
        "deferred_rows": Buffer.from_numpy(np.array(rows, np.int64)).to(device),
        "deferred_tokens": Buffer.from_numpy(np.array(tokens, np.int64)).to(device),
        "deferred_counts": Buffer.from_numpy(before.astype(np.uint32)).to(device),
        "max_deferred": Buffer.from_numpy(before.max(keepdims=True).astype(np.uint32)),
        "unread_places": Buffer.from_numpy(places).to(device),
        "unread_offsets": Buffer.from_numpy(offsets).to(device),
    }
