"""A server that the tests of its interface share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator

import pytest
from servers import PRESET, TEMPLATE, Served, serving
from tiny import TinyPair


@pytest.fixture(scope="session")
def chat_pair(
    tiny_pair: Callable[[str], TinyPair], tmp_path_factory: pytest.TempPathFactory
) -> TinyPair:
    """The tiny pair with a chat template; its graph is the same."""
    pair = tiny_pair(PRESET)
    target = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(pair.target, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    # As real models have it.
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return TinyPair(target, pair.draft, pair.method)


@pytest.fixture(scope="session")
def server(chat_pair: TinyPair) -> Iterator[Served]:
    with serving(chat_pair) as served:
        yield served
