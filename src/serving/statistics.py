"""What a server counts: for Prometheus under MAX's and vLLM's names, and for a line of its log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    disable_created_metrics,
    generate_latest,
)

from unispec.pipelines.runtime.proposals import Source

from .max_server import METRICS
from .refusal import Refused

__all__ = ["Meter", "Places", "Statistics"]

_PREFIX: Final = "vllm:spec_decode_num_"
_OWN_PREFIX: Final = "unispec:"


@dataclass
class _Window:
    """What was counted since the last line of the log."""

    began: float
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


class Statistics:
    """Counts over all answers.

    Args:
        model_name: label of the counters.
        max_queue_size: most answers that wait for their first token; None: any number.

    Attributes:
        waiting: answers without a token yet.
        running: answers that have begun and not ended.
    """

    def __init__(self, model_name: str, max_queue_size: int | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str, prefix: str = _PREFIX) -> Counter:
            return Counter(prefix + name, help, ["model_name", *labels], registry=self._registry)

        self._drafts = counter("drafts", "Verifications of drafts.").labels(model_name)
        self._drafted = counter("draft_tokens", "Draft tokens verified.").labels(model_name)
        self._accepted = counter("accepted_tokens", "Draft tokens accepted.").labels(model_name)
        self._accepted_at = counter(
            "accepted_tokens_per_pos", "Draft tokens accepted, by their position.", "position"
        )
        own = partial(counter, prefix=_OWN_PREFIX)
        self._drafted_by = own("draft_tokens", "Draft tokens verified, by who proposed.", "source")
        self._accepted_by = own("accepted_tokens", "Likewise, accepted.", "source")
        self._steps = own("steps", "Steps of answers, by the drafts they verified.", "num_drafts")
        self._model_name = model_name
        self._window = _Window(time.monotonic())
        self._max_queue_size = max_queue_size
        self.waiting = 0
        self.running = 0

    def queue(self, answers: int) -> Places:
        """Lets a request's answers wait for their first tokens.

        Raises:
            Refused: as many wait as may; with 429.
        """
        if self._max_queue_size is not None and self.waiting >= self._max_queue_size:
            raise Refused(
                f"{self.waiting} answers wait for their first token already, as many as this server"
                " lets wait; try again later",
                status=429,
                headers={"Retry-After": "1"},
            )
        return Places(self, answers)

    def took(self, tokens: int, drafted: int, accepted: int, source: Source | None = None) -> None:
        """Counts what a step brought for one answer."""
        window = self._window
        window.tokens += tokens
        self._steps.labels(self._model_name, str(drafted)).inc()
        if not drafted:
            return
        if source is not None:
            self._drafted_by.labels(self._model_name, source).inc(drafted)
            self._accepted_by.labels(self._model_name, source).inc(accepted)
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
        if not (window.tokens or self.running or self.waiting):
            return None
        rate = window.tokens / max(self._window.began - window.began, 1e-9)
        parts = [f"{self.running} running", f"{self.waiting} waiting", f"{rate:.1f} tokens/s"]
        if window.drafts:
            length = 1 + window.accepted / window.drafts
            share = window.accepted / window.drafted
            parts += [f"acceptance length {length:.2f}", f"{share:.0%} of drafts accepted"]
        return ", ".join(parts)

    def exposition(self) -> bytes:
        """The counters as Prometheus reads them."""
        return generate_latest(self._registry)


class Places:
    """Those of one request's answers among all that wait.

    Attributes:
        statistics: what they are counted in.
    """

    def __init__(self, statistics: Statistics, answers: int) -> None:
        self.statistics = statistics
        self._open = answers
        statistics.waiting += answers
        METRICS.reqs_running(1)

    def take(self) -> None:
        """One of the answers begins."""
        self._open -= 1
        self.statistics.waiting -= 1

    def leave(self) -> None:
        """The request has ended; what has not begun waits no longer."""
        if self._open >= 0:
            self.statistics.waiting -= self._open
            METRICS.reqs_running(-1)
        self._open = -1


class Meter:
    """One answer's part in the counts."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._began = self._last = time.monotonic()
        self._first: float | None = None
        self._tokens = 0

    def took(self, tokens: int, drafted: int, accepted: int, source: Source | None = None) -> None:
        """Counts what a step brought."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._places.take()
            self._places.statistics.running += 1
            METRICS.ttft((now - self._began) * 1e3)
        else:
            METRICS.itl((now - self._last) * 1e3)
        self._last = now
        self._tokens += tokens
        self._places.statistics.took(tokens, drafted, accepted, source)

    def end(self) -> None:
        """Counts the whole answer."""
        METRICS.output_tokens(self._tokens)
        if self._first is None:
            return
        self._places.statistics.running -= 1
        if self._tokens > 1:
            METRICS.time_per_output_token((self._last - self._first) * 1e3 / (self._tokens - 1))
