"""What a server counts: for Prometheus under MAX's and vLLM's names, and for a line of its log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    disable_created_metrics,
    generate_latest,
)

from .max_server import METRICS
from .refusal import Refused

__all__ = ["Meter", "Place", "Statistics"]

_PREFIX: Final = "vllm:spec_decode_num_"


@dataclass
class _Window:
    """What was counted since the last line of the log."""

    began: float
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


class Statistics:
    """Counts over all requests.

    Args:
        model_name: label of the counters.
        max_queue_size: most requests that wait for their first token; None: any number.

    Attributes:
        running: answers that have begun and not ended.
        waiting: requests without a token yet.
    """

    def __init__(self, model_name: str, max_queue_size: int | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, help, ["model_name", *labels], registry=self._registry)

        self._drafts = counter("drafts", "Verifications of drafts.").labels(model_name)
        self._drafted = counter("draft_tokens", "Draft tokens verified.").labels(model_name)
        self._accepted = counter("accepted_tokens", "Draft tokens accepted.").labels(model_name)
        self._accepted_at = counter(
            "accepted_tokens_per_pos", "Draft tokens accepted, by their position.", "position"
        )
        self._model_name = model_name
        self._window = _Window(time.monotonic())
        self._max_queue_size = max_queue_size
        self.running = 0
        self.waiting = 0

    def queue(self) -> Place:
        """Lets a request wait for its first token.

        Raises:
            Refused: as many wait as may; with 429.
        """
        if self._max_queue_size is not None and self.waiting >= self._max_queue_size:
            raise Refused(
                f"{self.waiting} requests wait already, as many as this server takes; try again"
                " later",
                status=429,
                headers={"Retry-After": "1"},
            )
        return Place(self)

    def request(self) -> Meter:
        """Counts one answer, from now on."""
        return Meter(self)

    def took(self, tokens: int, drafted: int, accepted: int) -> None:
        """Counts what a step brought for one row."""
        window = self._window
        window.tokens += tokens
        if not drafted:
            return
        window.drafts += 1
        window.drafted += drafted
        window.accepted += accepted
        self._drafts.inc()
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
        for position in range(drafted):
            at = self._accepted_at.labels(self._model_name, str(position))
            at.inc(1 if position < accepted else 0)

    def line(self) -> str | None:
        """What happened since the last call, in one line; None if nothing did."""
        window, self._window = self._window, _Window(time.monotonic())
        if not window.tokens and not self.running:
            return None
        rate = window.tokens / max(self._window.began - window.began, 1e-9)
        running = self.running - self.waiting
        parts = [f"{running} running", f"{self.waiting} waiting", f"{rate:.1f} tokens/s"]
        if window.drafts:
            length = 1 + window.accepted / window.drafts
            share = window.accepted / window.drafted
            parts += [f"acceptance length {length:.2f}", f"{share:.0%} of drafts accepted"]
        return ", ".join(parts)

    def exposition(self) -> bytes:
        """The counters as Prometheus reads them."""
        return generate_latest(self._registry)


class Place:
    """A request's, among those that wait."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics: Statistics | None = statistics
        statistics.waiting += 1

    def leave(self) -> None:
        """Makes room for another, once."""
        if self._statistics is not None:
            self._statistics.waiting -= 1
            self._statistics = None


class Meter:
    """One answer's part in MAX's metrics."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._began = self._last = time.monotonic()
        self._first: float | None = None
        self._tokens = 0
        statistics.running += 1
        METRICS.reqs_running(1)

    def took(self, tokens: int, drafted: int, accepted: int) -> None:
        """Counts what a step brought."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            METRICS.ttft((now - self._began) * 1e3)
        else:
            METRICS.itl((now - self._last) * 1e3)
        self._last = now
        self._tokens += tokens
        self._statistics.took(tokens, drafted, accepted)

    def end(self) -> None:
        """Counts the whole answer."""
        self._statistics.running -= 1
        METRICS.reqs_running(-1)
        METRICS.output_tokens(self._tokens)
        if self._first is not None and self._tokens > 1:
            METRICS.time_per_output_token((self._last - self._first) * 1e3 / (self._tokens - 1))
