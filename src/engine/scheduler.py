"""Which requests run in the next step: add, next batch, finish."""

from __future__ import annotations

from collections import deque

from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.request import RequestID

from unispec.errors import InputError
from unispec.kv_cache.manager import pages_per_row

__all__ = ["Scheduler", "check_pages"]


def check_pages(params: KVCacheParamInterface, max_length: int, num_pages: int) -> None:
    """Refuses a request that would not fit if it were alone.

    Args:
        params: the cache, or the tree of both.
        max_length: of the request, prompt and answer, in tokens.
        num_pages: what running requests may reserve together.

    Raises:
        InputError: it needs more pages.
    """
    needed = pages_per_row(params, max_length)
    if needed > num_pages:
        raise InputError(
            f"a request of up to {max_length} tokens needs {needed} cache pages, kv_cache_pages"
            f" is {num_pages}: lower max_new_tokens or raise kv_cache_pages"
        )


class Scheduler:
    """Continuous batching, first come first served, prefill in chunks.

    A request is admitted when its longest possible length has pages, so a running
    request never waits for one; until then it waits, and nothing else is disturbed.

    Args:
        kv_manager: has the pages of both caches.
        num_pages: what running requests may reserve together.
        max_batch_size: most rows in one step.
        max_batch_input_tokens: most new tokens in one step.
    """

    def __init__(
        self,
        kv_manager: PagedKVCacheManagerInterface,
        *,
        num_pages: int,
        max_batch_size: int,
        max_batch_input_tokens: int,
    ) -> None:
        self._manager = kv_manager
        self.num_pages = num_pages
        self._max_batch_size = max_batch_size
        self._max_tokens = max(max_batch_input_tokens, max_batch_size)
        self._waiting: deque[TextContext] = deque()
        self._running: dict[RequestID, TextContext] = {}

    def add(self, context: TextContext) -> None:
        """Queues a request.

        Raises:
            InputError: it would not fit if it were alone.
        """
        check_pages(self._manager.params, context.max_length, self.num_pages)
        self._waiting.append(context)

    def next_batch(self) -> list[TextContext]:
        """The rows of the next step, their pages allocated and their prefill cut to size.

        Decoding rows come first; what remains of the step's tokens goes to prefill.
        Empty when every request is finished.
        """
        while self._waiting and self._admits(self._waiting[0]):
            context = self._waiting.popleft()
            self._manager.claim(context)
            self._manager.alloc(context)
            self._running[context.request_id] = context
        budget = self._max_tokens
        batch = []
        for context in sorted(self._running.values(), key=lambda c: c.tokens.generated_length == 0):
            if budget == 0:
                break
            if context.tokens.generated_length:
                self._manager.alloc(context)
            elif context.tokens.active_length > budget:
                context.tokens.chunk(budget)
            budget -= context.tokens.active_length
            batch.append(context)
        return batch

    def finish(self, context: TextContext) -> None:
        """Takes a request out, running or waiting or not there any more, and releases its pages."""
        if self._running.pop(context.request_id, None) is None:
            # Contexts hold arrays, so they are told apart by their ids.
            remaining = [w for w in self._waiting if w.request_id != context.request_id]
            self._waiting = deque(remaining)
        # Also of a request that was claimed and could not be admitted.
        if self._manager.contains(context):
            self._manager.release(context)

    def _admits(self, context: TextContext) -> bool:
        reserved = sum(self._pages(running) for running in self._running.values())
        return (
            len(self._running) < self._max_batch_size
            and reserved + self._pages(context) <= self.num_pages
        )

    def _pages(self, context: TextContext) -> int:
        return pages_per_row(self._manager.params, context.max_length)
