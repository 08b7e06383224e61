"""The tiny EAGLE pair as MAX's server runs it, and its target alone with n-grams."""

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


@pytest.fixture(scope="session")
def loaded_with_ngrams(tiny_pair: Callable[[str], TinyPair]) -> tuple[Served, ServedPipeline]:
    """The graph of `target_only_engine`, up to 12 rows; a match of one token is enough."""
    served = served_pipeline(
        EngineConfig(
            model=str(tiny_pair("llama_eagle_agreeing").target),
            speculative_method="ngram",
            num_speculative_tokens=4,
            prompt_lookup_min=1,
            max_batch_size=12,
            max_batch_input_tokens=64,
            max_length=MAX_LENGTH,
        )
    )
    return served, served.factory()


@pytest.fixture
def looking_up(loaded_with_ngrams: tuple[Served, ServedPipeline]) -> Iterator[Scheduled]:
    """As `scheduled`."""
    made = Scheduled(*loaded_with_ngrams)
    yield made
    made.assert_left_empty()
