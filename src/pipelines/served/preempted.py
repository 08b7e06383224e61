"""Rows of requests that the scheduler has taken out of the batch and may bring back."""

from __future__ import annotations

import weakref

from max.pipelines.context import TextContext
from max.pipelines.request import RequestID

from unispec.pipelines.runtime.rows import Row

__all__ = ["PreemptedRows"]


class PreemptedRows:
    """Keeps a row as long as somebody keeps its context.

    MAX preempts by `release`, and then makes prompt and answer one new prompt: what a row counts
    of its answer could not be found again. A request that was cancelled is released in the same
    way, and the scheduler lets its context go.
    """

    def __init__(self) -> None:
        self._contexts: weakref.WeakValueDictionary[RequestID, TextContext] = (
            weakref.WeakValueDictionary()
        )
        self._rows: dict[RequestID, tuple[weakref.ref[TextContext], Row]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def watch(self, context: TextContext) -> None:
        """Remembers which context a running row belongs to."""
        self._contexts[context.request_id] = context

    def keep(self, request_id: RequestID, row: Row) -> None:
        """Keeps the row of a request that is not done and has begun its answer.

        Its drafts are dropped, and what the draft has not read: they follow a cache that is gone.
        """
        context = self._contexts.pop(request_id, None)
        if context is None or context.is_done or not row.generated:
            return
        row.drafts, row.draft_probs, row.deferred = [], None, []
        gone = weakref.ref(context, lambda _: self._rows.pop(request_id, None))
        self._rows[request_id] = (gone, row)

    def take(self, context: TextContext) -> Row | None:
        """Gives a kept row back, if this request has one."""
        found = self._rows.pop(context.request_id, None)
        return None if found is None or found[0]() is not context else found[1]

    def forget(self, request_id: RequestID) -> None:
        """Keeps nothing of a request."""
        self._contexts.pop(request_id, None)
        self._rows.pop(request_id, None)
