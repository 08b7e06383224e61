"""A target in torch and its answers, collected once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_training import PROMPTS, SETTINGS, SHAPES
from tiny import TinyPair

from unispec.methods import Method
from unispec.training import Collection, CollectSettings, TorchTarget, collect


@pytest.fixture(scope="session")
def target(tiny_pair: Callable[[str], TinyPair]) -> TorchTarget:
    """Its next token is mostly a function of the current one, which can be learnt."""
    return TorchTarget(str(tiny_pair("llama_eagle_agreeing").target))


@pytest.fixture(scope="session")
def collected(
    target: TorchTarget, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Method], Collection]:
    """6,000 tokens of answers with a method's features, collected once each."""
    done: dict[Method, Collection] = {}

    def of(method: Method) -> Collection:
        if method not in done:
            layers = SHAPES[method].tapped_layers(target.config)
            settings = CollectSettings(layers=layers, tokens=6000, **SETTINGS)
            folder = tmp_path_factory.mktemp(f"data_{method}")
            done[method] = collect(target, PROMPTS, settings, folder)
        return done[method]

    return of
