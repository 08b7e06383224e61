"""Which positions a draft has not read yet, and where the log has the target's features of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from max.driver import Buffer, Device
from max.pipelines.context import TextContext
from max.pipelines.request import RequestID

from .rows import Row

__all__ = ["LOG_ROWS_PER_REQUEST", "Deferred", "deferred_fields"]

LOG_ROWS_PER_REQUEST: Final = 32
"""The log has room for so many positions of each row of the largest batch."""


class Deferred:
    """What the draft has to read when it runs again.

    A step that proposes nothing writes its features behind the last row of the log that a request
    still needs, so the log is empty again when a step has proposed for all of them.

    Args:
        log: `[L, F]`, see `DeferredInputs`.
        page_size: tokens of a cache page.
        rows: what is kept of each request; a row that is dropped has nothing deferred.
    """

    def __init__(self, log: Buffer, page_size: int, rows: Mapping[RequestID, Row]) -> None:
        self.log = log
        self._page_size = page_size
        self._rows = rows

    def must_run(self, contexts: Sequence[TextContext]) -> bool:
        """Whether the next step has to run the draft.

        That is where a row is in prefill, where the log has no room for the step, and where a row
        may fill a cache page: others may share that page from then on, the draft's part of it too.

        Args:
            contexts: the step's, whose rows have the drafts that it verifies.
        """
        rows = [self._rows.get(context.request_id) for context in contexts]
        width = max((len(row.drafts) for row in rows if row is not None), default=0)
        if self._first_free() + len(rows) * (1 + width) > self.log.shape[0]:
            return True
        return any(
            row is None or _in_prefill(context, row) or self._may_fill_page(context, row)
            for context, row in zip(contexts, rows, strict=True)
        )

    def fields(
        self, contexts: Sequence[TextContext], lengths: Sequence[int], count: int, device: Device
    ) -> dict[str, Buffer]:
        """The inputs of `DEFERRED_INPUTS` by name.

        Args:
            contexts: the step's.
            lengths: merged tokens of each row.
            count: how many tokens the step proposes.
        """
        if not count:
            return deferred_fields(self.log, [], [], [], lengths, device, self._first_free())
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
        return deferred_fields(self.log, rows, tokens, counts, lengths, device)

    def settle(
        self, contexts: Sequence[TextContext], num_accepted: Sequence[int], *, proposed: bool
    ) -> None:
        """Takes note of what a step has logged, or that its draft has read all there was.

        To be called before contexts and rows move on.

        Args:
            contexts: the step's.
            num_accepted: of each row.
            proposed: whether the step proposed tokens.
        """
        rows = [self._rows[context.request_id] for context in contexts]
        if proposed:
            for row in rows:
                row.deferred = []
            return
        start, width = self._first_free(), max(len(row.drafts) for row in rows)
        for index, (row, accepted) in enumerate(zip(rows, num_accepted, strict=True)):
            first = start + index * (1 + width)
            row.deferred += range(first, first + 1 + accepted)

    def _first_free(self) -> int:
        """The log's row behind the last one in use."""
        return 1 + max(
            (row.deferred[-1] for row in self._rows.values() if row.deferred), default=-1
        )

    def _may_fill_page(self, context: TextContext, row: Row) -> bool:
        in_page = context.tokens.processed_length % self._page_size
        return in_page + 1 + len(row.drafts) >= self._page_size


def deferred_fields(
    log: Buffer,
    rows: Sequence[int],
    tokens: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    device: Device,
    start: int = -1,
) -> dict[str, Buffer]:
    """The inputs of `DEFERRED_INPUTS` by name.

    Args:
        log: `[L, F]`.
        rows: `[E]`, the log's rows of the deferred positions.
        tokens: `[E]`, the tokens after them.
        counts: `[B]`, positions of each row; empty: the draft does not run.
        lengths: `[B]`, merged tokens of each row.
        start: the log's row where the step writes its features, if it proposes nothing.
    """
    batch = len(lengths)
    before = np.zeros(batch, np.int64) if not counts else np.array(counts, np.int64)
    if rows:
        # A row's deferred positions, then its merged ones, which stand behind all deferred ones.
        ends = np.cumsum(before), len(rows) + np.cumsum(lengths)
        both = zip(*ends, before, lengths, strict=True)
        places = np.concatenate(
            [
                np.arange(end - count, end)
                for old, new, deferred, merged in both
                for end, count in ((old, deferred), (new, merged))
            ]
        )
    else:
        places = np.arange(sum(lengths) if counts else 0)
    offsets = np.zeros(batch + 1, np.uint32)
    if counts:
        np.cumsum(before + lengths, out=offsets[1:])
    return {
        "feature_log": log,
        "log_start": Buffer.from_numpy(np.array(start, np.int64)),
        "deferred_rows": Buffer.from_numpy(np.array(rows, np.int64)).to(device),
        "deferred_tokens": Buffer.from_numpy(np.array(tokens, np.int64)).to(device),
        "deferred_counts": Buffer.from_numpy(before.astype(np.uint32)).to(device),
        "max_deferred": Buffer.from_numpy(before.max(keepdims=True).astype(np.uint32)),
        "unread_places": Buffer.from_numpy(places.astype(np.int64)).to(device),
        "unread_offsets": Buffer.from_numpy(offsets).to(device),
    }


def _in_prefill(context: TextContext, row: Row) -> bool:
    """Whether the step reads more than one token: of a prompt, or anew of a preempted answer."""
    tokens = context.tokens
    return not row.generated or tokens.actively_chunked or tokens.active_length > 1
