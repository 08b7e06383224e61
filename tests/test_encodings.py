"""How weights are to be stored: what can be asked, and what is built of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from graph_texts import Built, nothing_compiled
from tiny import TinyPair

from unispec.encodings import WeightEncodings
from unispec.engine import Engine, EngineConfig
from unispec.engine.served_config import served_pipeline
from unispec.errors import InputError

EAGLE = {"speculative_method": "eagle", "num_speculative_tokens": 2}


@pytest.fixture
def pair(tiny_pair: Callable[[str], TinyPair]) -> TinyPair:
    return tiny_pair("llama_eagle")


@pytest.fixture(autouse=True)
def build_only() -> Iterator[None]:
    """A graph that would be compiled is raised instead."""
    with nothing_compiled():
        yield


def config(pair: TinyPair, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(pair.target), draft_model=str(pair.draft), max_length=256, **EAGLE, **options
    )


def stored(pair: TinyPair, **options: Any) -> dict[str, str]:
    """Number format and shape of each weight of the graph."""
    with pytest.raises(Built) as built:
        Engine(config(pair, **options)).load()
    return dict(built.value.weights)


# A tiny target has 64 columns: two blocks of 34 or 18 bytes, 16 rows a tile.
Q8_0, Q4_0 = "uint8 [4, 1088]", "uint8 [4, 576]"
FLOAT32, BFLOAT16 = "float32 [64, 64]", "bfloat16 [64, 64]"
QUERY = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [
        (None, None, (FLOAT32, FLOAT32)),
        ("float32", "bfloat16", (FLOAT32, BFLOAT16)),
        ("q8_0", None, (Q8_0, FLOAT32)),
        ("q4_0", "q8_0", (Q4_0, Q8_0)),
        # Rows of 64 are no whole blocks of 256.
        ("q4_k", "q4_0", (Q8_0, Q4_0)),
        ("bfloat16", "float32", (BFLOAT16, FLOAT32)),
    ],
)
def test_target_and_draft_are_stored_as_asked(
    pair: TinyPair, target: str | None, draft: str | None, expected: tuple[str, str]
) -> None:
    weights = stored(pair, quantization_encoding=target, draft_quantization_encoding=draft)
    assert (weights[f"target.{QUERY}"], weights[f"draft.{QUERY}"]) == expected
    assert weights["target.norm.weight"] == "float32 [64]"


def test_a_server_gets_the_same(pair: TinyPair) -> None:
    served = served_pipeline(
        config(pair, quantization_encoding="q8_0", draft_quantization_encoding="q4_0")
    )
    factory = pickle.loads(pickle.dumps(served.factory))
    assert factory.keywords["encodings"] == WeightEncodings("q8_0", "q4_0")
    with pytest.raises(Built) as built:
        factory()
    assert built.value.weights[f"target.{QUERY}"] == Q8_0
    assert built.value.weights[f"draft.{QUERY}"] == Q4_0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"quantization_encoding": "q5_1"}, ["'q5_1' is unknown", "'q8_0'"]),
        ({"draft_quantization_encoding": "q5_1"}, ["'q5_1' is unknown", "'q8_0'"]),
        (
            {"draft_quantization_encoding": "q8_0", "devices": "gpu"},
            ["'q8_0' is for a CPU", "'gpu'", "leave it out"],
        ),
        ({"draft_quantization_encoding": 8}, ["draft_quantization_encoding is 8"]),
    ],
)
def test_what_cannot_be_asked(pair: TinyPair, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        config(pair, **options)
    assert all(part in str(refused.value) for part in parts)


def test_a_draft_encoding_needs_a_draft(pair: TinyPair) -> None:
    with pytest.raises(InputError, match="'q8_0' is given without a draft model; give one"):
        EngineConfig(model=str(pair.target), draft_quantization_encoding="q8_0")


def test_only_llamas_are_stored_in_blocks(tiny_pair: Callable[[str], TinyPair]) -> None:
    model = str(tiny_pair("deepseek_mtp").target)
    with pytest.raises(InputError, match="'q8_0' is not supported for a deepseek_v3; leave it out"):
        Engine(EngineConfig(model=model, quantization_encoding="q8_0", max_length=256))
