"""Compiled models that the tests share: each graph is compiled once a session at most."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import own_processors
import pytest
import torch
from reference.target import TargetReference
from runs import MAX_LENGTH, assert_left_empty, load_tiny
from tiny import PRESETS, TinyPair

from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model
from unispec.engine import Engine, EngineConfig
from unispec.methods import Method

torch.set_num_threads(own_processors.COUNT)
# max 26.7 names another Python in the native environment; pytest's workers would run that.
os.unsetenv("PYTHONEXECUTABLE")

EXACT = "exact"
"""A property of tests: which answers of a model are identical to the target's."""


COMPILED = frozenset(
    {
        "llama_eagle_agreeing",
        "llama_eagle3_agreeing",
        "llama_dflash_agreeing",
        "deepseek_mtp_agreeing",
        "kimi_model",
        "graph",
        "random_graph",
        "kernels",
        "attention_kernel",
        "stored_forms",
    }
)
"""What `make test` compiles: each draft method, each family of targets, all rules and kernels.

Tests of other models have the mark `rest`.
"""


@pytest.hookimpl(wrapper=True)  # ahead of the hook with which xdist reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Tests of one compiled model go to one worker; those come first, compiling takes longest."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        if not _models(item) <= COMPILED:
            item.add_marker(pytest.mark.rest)
    items.sort(key=lambda item: not _models(item))
    yield
    if getattr(config.option, "loadgroup", False):
        ungrouped = [item.nodeid for item in items if "@" not in item.nodeid]
        assert not ungrouped, "this pytest-xdist does not see the groups"


def _models(item: pytest.Item) -> set[str]:
    """The models that a test compiles, by preset or fixture, or as it says: none for most tests."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    fixtures = set(getattr(item, "fixturenames", ()))
    models = {name for name in fixtures - {"demo_model"} if name.endswith("_model")}
    models |= fixtures & {"target_only_engine", "graph", "random_graph"}
    if fixtures & {"eagle_engine", "other_config"}:
        models.add("llama_eagle_agreeing")
    elif "tiny_engine" in fixtures and not any(item.iter_markers("compiles")):
        models.add(str(params["engine" if "engine" in params else "name"]))
    for mark in item.iter_markers("compiles"):
        models.add(mark.args[0])
    if "demo_engines" in fixtures:
        models.add(f"SmolLM2 {params.get('method', 'eagle3')}")
    return models


def _group(item: pytest.Item) -> str:
    """The model that a test compiles, or else its file; a target alone is compared with a pair."""
    models = _models(item)
    if "target_only_engine" in models:
        return "llama_eagle_agreeing"
    return min(models, default=item.path.stem)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    exact: defaultdict[str, list[bool]] = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == EXACT:
                name, answers = cast("tuple[str, list[bool]]", value)
                exact[name] += answers
    for name, answers in sorted(exact.items()):
        terminalreporter.write_line(f"{name}: {sum(answers)} of {len(answers)} prompts exact")


@pytest.fixture
def exact(
    record_property: Callable[[str, object], None],
) -> Callable[[str, Iterable[bool]], None]:
    """Takes what ``assert_same_greedy`` says of a model's answers; the summary counts it."""
    return lambda name, answers: record_property(EXACT, (name, list(answers)))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, converted once and kept between sessions."""
    return ensure_demo_model(demo_model_folder())


@pytest.fixture(scope="session")
def demo_engines(demo_model: Path) -> Callable[[Method], Engine]:
    """SmolLM2 and its draft of a method, up to 8 rows and K = 5, loaded once each."""
    engines: dict[Method, Engine] = {}

    def engine(method: Method) -> Engine:
        if method not in engines:
            engines[method] = Engine(
                EngineConfig(
                    model=str(demo_model),
                    draft_model=str(demo_draft_folder(method)),
                    speculative_method=method,
                    num_speculative_tokens=5,
                    max_batch_size=8,
                    max_length=2048,
                )
            )
        return engines[method]

    return engine


@pytest.fixture(scope="session")
def demo_engine(demo_engines: Callable[[Method], Engine]) -> Engine:
    """SmolLM2 and its EAGLE-3 draft."""
    return demo_engines("eagle3")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyPair]:
    """Builds a tiny target and its draft by preset name, once each."""
    pairs: dict[str, TinyPair] = {}

    def pair(name: str) -> TinyPair:
        if name not in pairs:
            pairs[name] = PRESETS[name](tmp_path_factory.mktemp(f"tiny_{name}"))
        return pairs[name]

    return pair


@pytest.fixture(scope="session")
def tiny_engine(tiny_pair: Callable[[str], TinyPair]) -> Callable[[str], Engine]:
    """The engine of a tiny pair, by preset name, loaded once each."""
    engines: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in engines:
            engines[name] = load_tiny(tiny_pair(name))
        return engines[name]

    return engine


@pytest.fixture(scope="session")
def target_only_engine(tiny_pair: Callable[[str], TinyPair]) -> Engine:
    """The target of `llama_eagle_agreeing` without its draft, up to 64 rows."""
    return Engine(
        EngineConfig(
            model=str(tiny_pair("llama_eagle_agreeing").target),
            max_batch_size=64,
            max_length=MAX_LENGTH,
        )
    )


@pytest.fixture(scope="session")
def demo_target(demo_model: Path) -> TargetReference:
    """SmolLM2 in torch."""
    return TargetReference(demo_model)


@pytest.fixture(scope="session")
def tiny_target(tiny_pair: Callable[[str], TinyPair]) -> Callable[[str], TargetReference]:
    """A tiny pair's target in torch, by preset name, loaded once each."""
    targets: dict[str, TargetReference] = {}

    def target(name: str) -> TargetReference:
        if name not in targets:
            targets[name] = TargetReference(tiny_pair(name).target)
        return targets[name]

    return target


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices lose time when torch shares them among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    params=[
        pytest.param("llama_eagle_agreeing", id="eagle"),
        pytest.param("llama_dflash_agreeing", id="dflash"),
    ]
)
def engine(
    request: pytest.FixtureRequest, tiny_engine: Callable[[str], Engine]
) -> Iterator[Engine]:
    """Pairs of one target whose drafts are mostly accepted; those of DFlash are sampled.

    Every test leaves nothing behind in it.
    """
    yield from _left_empty(tiny_engine(request.param))


@pytest.fixture
def eagle_engine(tiny_engine: Callable[[str], Engine]) -> Iterator[Engine]:
    """As ``engine``, but EAGLE only: for what no draft can change, or for argmax drafts."""
    yield from _left_empty(tiny_engine("llama_eagle_agreeing"))


def _left_empty(engine: Engine) -> Iterator[Engine]:
    engine.reset_prefix_cache()
    yield engine
    assert_left_empty(engine)
