"""Compiled models that the tests share: each graph is compiled once a session at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reference.eagle import EagleReference
from reference.target import TargetReference
from tiny import PRESETS, TinyPair

from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model
from unispec.pipelines.runtime import Engine, EngineConfig

EXACT = pytest.StashKey[dict[str, list[bool]]]()
"""By model: which answers are identical to the target's, not only up to a near-tie."""

MAX_LENGTH = 512
"""Of the tiny engines; short enough that requests reach it."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXACT] = defaultdict(list)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for name, exact in config.stash[EXACT].items():
        terminalreporter.write_line(f"{name}: {sum(exact)} of {len(exact)} prompts exact")


@pytest.fixture
def exact(pytestconfig: pytest.Config) -> dict[str, list[bool]]:
    """Takes what ``assert_same_greedy`` says, by model; the summary shows it."""
    return pytestconfig.stash[EXACT]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, converted once and kept between sessions."""
    return ensure_demo_model(demo_model_folder())


@pytest.fixture(scope="session")
def demo_engine(demo_model: Path) -> Engine:
    """SmolLM2 and its EAGLE draft, up to 8 rows and K = 5."""
    return Engine(
        EngineConfig(
            model=str(demo_model),
            draft_model=str(demo_draft_folder()),
            speculative_method="eagle",
            num_speculative_tokens=5,
            max_batch_size=8,
            max_length=2048,
        )
    )


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyPair]:
    """Builds a tiny target and its draft by preset name, A to D, once each."""
    pairs: dict[str, TinyPair] = {}

    def pair(name: str) -> TinyPair:
        if name not in pairs:
            pairs[name] = PRESETS[name](tmp_path_factory.mktemp(f"tiny_{name}"))
        return pairs[name]

    return pair


@pytest.fixture(scope="session")
def tiny_engine(tiny_pair: Callable[[str], TinyPair]) -> Callable[[str], Engine]:
    """The engine of a tiny pair, up to 8 rows and K = 5, chunks of 64 tokens."""
    engines: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in engines:
            pair = tiny_pair(name)
            engines[name] = Engine(
                EngineConfig(
                    model=str(pair.target),
                    draft_model=str(pair.draft),
                    speculative_method="eagle",
                    num_speculative_tokens=5,
                    max_batch_size=8,
                    max_batch_input_tokens=64,
                    max_length=MAX_LENGTH,
                )
            )
        return engines[name]

    return engine


@pytest.fixture(scope="session")
def target_only_engine(tiny_pair: Callable[[str], TinyPair]) -> Engine:
    """Pair D's target without its draft, up to 64 rows."""
    return Engine(
        EngineConfig(
            model=str(tiny_pair("D").target),
            max_batch_size=64,
            max_length=MAX_LENGTH,
        )
    )


@pytest.fixture(scope="session")
def demo_reference(demo_model: Path) -> EagleReference:
    """SmolLM2 and its draft in torch."""
    return EagleReference(demo_draft_folder(), TargetReference(demo_model))


@pytest.fixture(scope="session")
def tiny_reference(tiny_pair: Callable[[str], TinyPair]) -> Callable[[str], EagleReference]:
    """A tiny pair in torch, by preset name, loaded once each."""
    references: dict[str, EagleReference] = {}

    def reference(name: str) -> EagleReference:
        if name not in references:
            pair = tiny_pair(name)
            references[name] = EagleReference(pair.draft, TargetReference(pair.target))
        return references[name]

    return reference


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices lose time when torch shares them among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def engine(tiny_engine: Callable[[str], Engine]) -> Iterator[Engine]:
    """Pair D, most of whose drafts are accepted; every test leaves nothing behind in it."""
    engine = tiny_engine("D")
    manager = engine.pipeline.kv_manager
    manager.reset_prefix_cache()
    yield engine
    assert engine.pipeline.model.batch.rows == {}
    assert manager.block_count().free == engine.num_pages
