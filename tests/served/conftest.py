"""The tiny EAGLE pair as MAX's server runs it, and the engine of the same pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from runs import MAX_LENGTH, PROPOSED
from scheduling import Scheduled
from tiny import TinyPair

from unispec.engine import EngineConfig
from unispec.engine.served_config import Served, served_pipeline
from unispec.pipelines.served.pipeline import ServedPipeline


@pytest.fixture(scope="session")
def loaded(tiny_pair: Callable[[str], TinyPair]) -> tuple[Served, ServedPipeline]:
    """The graph of `eagle_engine`, up to 12 rows, K up to 8 and at first 5."""
    pair = tiny_pair("llama_eagle_agreeing")
    served = served_pipeline(
        EngineConfig(
            model=str(pair.target),
            draft_model=str(pair.draft),
            speculative_method="eagle",
            num_speculative_tokens=8,
            max_batch_size=12,
            max_batch_input_tokens=64,
            max_length=MAX_LENGTH,
        )
    )
    pipeline = served.factory()
    assert pipeline.speculation is not None
    pipeline.speculation.pinned = lambda rows: PROPOSED
    return served, pipeline


@pytest.fixture
def scheduled(loaded: tuple[Served, ServedPipeline]) -> Iterator[Scheduled]:
    """Every test has a scheduler of its own, and leaves nothing behind in the pipeline."""
    made = Scheduled(*loaded)
    yield made
    made.assert_left_empty()
