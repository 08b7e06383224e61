"""The checks of `answer_checks`, which GPUs have to pass, on a CPU; and that they can fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from answer_checks import greedy_answers, proposals, sampled_answers
from draft_judges import JUDGES
from reference.target import TargetReference
from tiny import TinyPair

from unispec.engine import Engine

PAIRS = pytest.mark.parametrize(
    "name", ["llama_eagle_agreeing", "llama_dflash_agreeing", "deepseek_mtp_agreeing"]
)
pytestmark = pytest.mark.usefixtures("one_thread")


@PAIRS
def test_greedy_answers(
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    name: str,
) -> None:
    found = greedy_answers(tiny_engine(name), tiny_target(name))
    for answers in found:
        assert sum(answers) >= 0.95 * len(answers)


@PAIRS
def test_proposals(
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    tiny_pair: Callable[[str], TinyPair],
    name: str,
) -> None:
    pair = tiny_pair(name)
    judge = JUDGES[pair.method](pair.draft or pair.target, tiny_target(name))
    found = proposals(tiny_engine(name), judge, 5)
    assert sum(found) >= 0.99 * len(found) >= 50


@pytest.mark.parametrize("name", ["llama_eagle_agreeing"])
def test_sampled_answers(
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    name: str,
) -> None:
    engine, target = tiny_engine(name), tiny_target(name)
    found = sampled_answers(engine, target, 2.0)
    assert found.accepted > 0.2
    assert found.least_p_value > 1e-3


@pytest.mark.parametrize("name", ["llama_eagle_agreeing"])
def test_another_target_is_seen(
    tiny_engine: Callable[[str], Engine], tiny_pair: Callable[[str], TinyPair], name: str
) -> None:
    """One weight of each eight is lost, as if a kernel left columns out."""
    engine, other = tiny_engine(name), TargetReference(tiny_pair(name).target, rounding=1 / 16)
    other.model.model.layers[0].mlp.down_proj.weight.data[:, ::8] = 0
    other.model.model.layers[1].self_attn.o_proj.weight.data[:, ::8] = 0
    with pytest.raises(AssertionError, match="the target says"):
        greedy_answers(engine, other)
    pair = tiny_pair(name)
    with pytest.raises(AssertionError, match="the reference says"):
        proposals(engine, JUDGES[pair.method](pair.draft or pair.target, other), 5)


@pytest.mark.parametrize("name", ["llama_eagle_agreeing"])
def test_another_temperature_is_seen(
    tiny_engine: Callable[[str], Engine], tiny_pair: Callable[[str], TinyPair], name: str
) -> None:
    other = TargetReference(tiny_pair(name).target)
    other.model.get_output_embeddings().weight.data *= 1.3
    assert sampled_answers(tiny_engine(name), other, 2.0).least_p_value < 1e-6
