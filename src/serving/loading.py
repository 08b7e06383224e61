"""What takes time before a server answers: MAX, the model's configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unispec.batch_schedule import BatchSchedule
from unispec.engine import Engine, EngineConfig
from unispec.engine.served_config import Served, served_pipeline
from unispec.pipelines.runtime.speculating import DraftCount

from .config import ServeConfig, name_of
from .frontend import Frontend

__all__ = ["Loaded", "load"]


@dataclass(frozen=True)
class Loaded:
    """A model that is known, and not in memory yet."""

    frontend: Frontend
    """Checks what clients ask."""
    served: Served
    """Makes the pipeline, in a process of its own."""

    @property
    def phase(self) -> str:
        """What its process does first, as a log says it."""
        if self.frontend.config.compiled is None:
            return "loading weights and compiling the graph, which takes minutes for a new model"
        return "loading weights and the compiled graph"

    @property
    def about(self) -> dict[str, Any]:
        """What clients may know of it."""
        config, engine = self.frontend.config, self.frontend.engine
        draft = config.draft_model
        return {
            "model": self.frontend.model_name,
            "target": name_of(config.model),
            "draft": None if draft is None else name_of(draft),
            "speculative_method": engine.speculative_method,
            "num_speculative_tokens": _count(engine.num_speculative_tokens),
            "max_length": engine.max_length,
            "max_batch_size": config.max_batch_size,
        }


def _count(count: DraftCount) -> int | str | None:
    """K as clients read it."""
    if isinstance(count, BatchSchedule):
        return ", ".join(f"{k} for {first} to {last}" for first, last, k in count.ranges)
    return count or None


def load(
    config: EngineConfig, serve_config: ServeConfig, on_progress: Callable[[str], None]
) -> Loaded:
    """Reads configuration and tokenizer; weights of a repository are downloaded.

    Raises:
        InputError: a model or draft that cannot be used.
    """
    engine = Engine(config, on_progress=on_progress)
    frontend = Frontend(config, serve_config.served_model_name, engine)
    return Loaded(frontend, served_pipeline(config))
