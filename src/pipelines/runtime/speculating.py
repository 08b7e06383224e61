"""How an engine or a server speculates, as its user asks for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from unispec.batch_schedule import BatchSchedule
from unispec.checkpoints.gguf_folder import cache_folder
from unispec.methods import AUTO
from unispec.pipelines.lookup.options import LookupOptions
from unispec.pipelines.policy.costs import StepCosts

from . import processor
from .measuring import measure_step_costs, still_hold
from .pipeline import SpeculativePipeline
from .speculation import Speculation

__all__ = ["DraftCount", "SpeculationOptions", "pinned_by", "speculate"]

DraftCount = int | Literal["auto"] | BatchSchedule
"""K of every step; `"auto"`: each step chooses; or by the number of requests."""


@dataclass(frozen=True)
class SpeculationOptions:
    """What is asked for."""

    count: DraftCount
    """How many tokens are proposed and verified."""
    lookup: LookupOptions | None = None
    """None: nothing is looked up."""


def pinned_by(count: DraftCount) -> Callable[[int], int] | None:
    """K for a number of rows; None where each step chooses."""
    if isinstance(count, BatchSchedule):
        return count
    return None if count == AUTO else lambda rows: int(count)


def speculate(
    pipeline: SpeculativePipeline,
    options: SpeculationOptions,
    *,
    num_pages: int,
    max_length: int,
    vocab_size: int,
    on_measure: Callable[[], None] = lambda: None,
) -> None:
    """Lets a pipeline speculate; where steps choose, it measures what they cost, once a machine.

    Args:
        num_pages: of the caches.
        max_length: longest sequence, in tokens.
        vocab_size: V.
        on_measure: called before something is measured.
    """
    costs = None
    if options.count == AUTO:
        path = _path(pipeline, num_pages, max_length)
        costs = None if path is None else StepCosts.read(path)
        sizes = {"max_length": max_length, "vocab_size": vocab_size}
        if costs is None or not still_hold(costs, pipeline, **sizes):
            on_measure()
            costs = measure_step_costs(pipeline, num_pages=num_pages, **sizes)
            if path is not None:
                # A cache that cannot be written costs time at the next start, nothing else.
                with suppress(OSError):
                    costs.save(path)
    model = pipeline.model
    pipeline.speculation = Speculation(
        most_verified=model.kv_params.num_draft_tokens,
        most_proposed=model.most_proposed,
        pinned=pinned_by(options.count),
        lookup=options.lookup,
        costs=costs,
    )


def _path(pipeline: SpeculativePipeline, num_pages: int, max_length: int) -> Path | None:
    """Where the costs of these steps on this machine are kept; None of a graph without a name."""
    model = pipeline.model
    if not model.graph_digest:
        return None
    identity = (
        version("unispec"),
        version("max"),
        model.graph_digest,
        [str(device) if device.is_host else device.architecture_name for device in model.devices],
        processor.name(),
        len(os.sched_getaffinity(0)),
        pipeline.max_batch_size,
        model.kv_params.num_draft_tokens,
        num_pages,
        max_length,
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    return cache_folder() / "step_costs" / f"{digest[:32]}.json"
