"""EAGLE-3: what a draft's config.json says, and that a wrong draft is seen by its proposals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draft_judges import Eagle3Judge, recording
from prompts import random_prompt
from reference.target import TargetReference
from runs import answers, greedy_requests
from tiny import EAGLE3_PAIRS, TinyPair
from torch import Tensor
from transformers import DynamicCache

from unispec.checkpoints.tapped_layers import default_layer_ids
from unispec.engine import Engine
from unispec.errors import InputError
from unispec.pipelines.drafts.eagle3.fields import Eagle3Fields

IDS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = {"speculators_model_type": "eagle3"}


def fields(num_layers: int = 32, **stated: Any) -> Eagle3Fields:
    return Eagle3Fields.from_huggingface(
        SimpleNamespace(**stated), num_layers=num_layers, source="folder"
    )


@pytest.mark.parametrize(
    ("num_layers", "outputs"),
    [(24, [1, 11, 20]), (32, [1, 15, 28]), (36, [1, 17, 32]), (61, [1, 29, 57]), (7, [1, 2, 3])],
)
def test_the_authors_layers(num_layers: int, outputs: list[int]) -> None:
    """Of 32 layers the states before 2, 16 and 29."""
    assert default_layer_ids(num_layers) == outputs
    assert fields(num_layers).target_layer_ids == outputs
    assert fields(num_layers, eagle_config={"use_aux_hidden_state": True})[0] == outputs
    assert fields(num_layers, **SPECULATORS | {IDS: None})[0] == outputs


@pytest.mark.parametrize(
    ("num_layers", "outputs"), [(1, [0]), (2, [0, 1]), (4, [0, 1]), (6, [1, 2])]
)
def test_targets_with_few_layers(num_layers: int, outputs: list[int]) -> None:
    assert default_layer_ids(num_layers) == outputs


# Published ids: who has them, of how many layers, what is read.
PUBLISHED: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "SpecForge, DeepSeek-V3": (61, {"eagle_config": {IDS: [1, 29, 57]}}, [1, 29, 57]),
    "SpecForge, gpt-oss-120b": (36, {"eagle_config": {IDS: [1, 17, 33]}}, [1, 17, 33]),
    "NVIDIA v3, the last layer too": (36, {"eagle_config": {IDS: [24, 30, 36]}}, [23, 29, 35]),
    "AQ-MedAI, Kimi K2": (61, {"eagle_config": {IDS: [2, 30, 58]}}, [1, 29, 57]),
    "top level, no library": (32, {IDS: [1, 15, 28]}, [1, 15, 28]),
    "speculators": (60, SPECULATORS | {IDS: [2, 30, 57]}, [1, 29, 56]),
    "speculators, first layer": (32, SPECULATORS | {IDS: [1, 16, 32]}, [0, 15, 31]),
    "AngelSlim, both keys": (
        36,
        {"aux_hidden_states_layer_ids": [1, 17, 32], IDS: [2, 18, 33]},
        [1, 17, 32],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_id_names_a_layers_output_or_its_input(name: str) -> None:
    num_layers, stated, outputs = PUBLISHED[name]
    assert fields(num_layers, **stated).target_layer_ids == outputs


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({IDS: [1, 40]}, f"^{IDS} of folder has 40, but the target has 32 layers; use a draft"),
        (SPECULATORS | {IDS: [0, 5]}, f"^{IDS} of folder has 0, and what is before the first"),
        ({"eagle_config": "x"}, "^eagle_config 'x' of folder is no object; correct its"),
        ({"target_layer_ids": [0, 4]}, r"^target_layer_ids \[0, 4\] of folder is not supported"),
        ({"layer_types": ["sliding_attention"]}, "^layer_types of folder has 'sliding_attention'"),
        (
            {"aux_hidden_states_layer_ids": [1, 3], IDS: [3, 5]},
            r"^aux_hidden_states_layer_ids \[1, 3\] and .* \[3, 5\] of folder name other layers",
        ),
        ({IDS: "1, 2"}, f"^{IDS} '1, 2' of folder is no list of layers; correct"),
        ({IDS: [1.0, 2]}, r"\[1.0, 2\] of folder is no list of layers"),
        ({IDS: [True, 2]}, r"\[True, 2\] of folder is no list of layers"),
        ({IDS: []}, r"\[\] of folder is no list of layers"),
        ({"norm_output": "yes"}, "^norm_output 'yes' of folder is no boolean; correct its"),
        (
            {"norm_before_fc": True, "fc_norm": True},
            "norm_before_fc and fc_norm of folder are both",
        ),
        (
            {"eagle_config": {"use_aux_hidden_state": False}},
            "^use_aux_hidden_state False of folder is not supported; use a draft without this key",
        ),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm False of folder"),
        ({"eh_proj_before_attn": True}, "eh_proj_before_attn True of folder"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step 4 of folder"),
    ],
)
def test_what_a_config_may_not_say(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fields(**stated)


@pytest.mark.parametrize(
    ("stated", "warned"),
    [
        ({IDS: [5, 6, 7]}, True),
        ({IDS: [2, 16, 29]}, False),
        ({IDS: [1, 15, 28]}, False),
        ({IDS: [24, 28, 32]}, False),
        ({"aux_hidden_states_layer_ids": [5, 6, 7]}, False),
        (SPECULATORS | {IDS: [5, 6, 7]}, False),
    ],
)
def test_ids_that_may_be_read_in_two_ways_are_named(
    stated: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fields(**stated)
    said = f"folder: {IDS} [5, 6, 7] is read as states before these layers; if outputs are meant,"
    assert [said in text for text in caplog.messages] == [True] * warned


def test_what_is_not_said() -> None:
    """Of a file of the speculators library vLLM takes the normed residual for granted."""
    assert fields()[1:] == (False, False, False, False)
    assert fields(**SPECULATORS)[1:] == (True, False, False, False)
    assert fields(**SPECULATORS | {"norm_before_residual": False})[1:] == (False,) * 4
    nested = {"norm_before_fc": True}
    assert fields(eagle_config=nested, norm_before_fc=False).norm_before_fc


class _FinalStates(Eagle3Judge):
    """Gives the draft what EAGLE-1 reads."""

    def read(self, ids: Any, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        hidden, _ = super().read(ids, cache)
        return hidden, hidden


def _swap_norms(judge: Eagle3Judge) -> None:
    layer = judge._draft.layers[0]
    layer.hidden_norm, layer.input_layernorm = layer.input_layernorm, layer.hidden_norm


def _swap_halves(judge: Eagle3Judge) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(judge._draft.layers[0].self_attn, name).weight
        weight.data = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def _norm_apart(judge: Eagle3Judge) -> None:
    """Of all taps at once it is the norm of each."""
    draft = judge._draft
    parts = draft.input_norm.weight.chunk(len(judge.before))
    draft.fc_norm = [torch.nn.RMSNorm(len(part), judge.config.rms_norm_eps) for part in parts]
    for norm, part in zip(draft.fc_norm, parts, strict=True):
        norm.weight.data = part
    draft.flags.update(norm_before_fc=False, fc_norm=True)


def _flag(**flags: bool) -> Callable[[Eagle3Judge], Any]:
    return lambda judge: judge._draft.flags.update(**flags)


AGREEING, SAMPLED, NORMED = "llama_eagle3_agreeing", "llama_eagle3_sampled", "qwen3_eagle3"
FAULTS: dict[tuple[str, str], Callable[[Eagle3Judge], Any]] = {
    (AGREEING, "taps one layer too early"): lambda judge: setattr(
        judge, "before", [k - 1 for k in judge.before]
    ),
    (AGREEING, "taps one layer too late"): lambda judge: setattr(
        judge, "before", [k + 1 for k in judge.before]
    ),
    (AGREEING, "taps in another order"): lambda judge: judge.before.reverse(),
    (AGREEING, "the two norms swapped"): _swap_norms,
    (AGREEING, "the feature before the embedding"): _swap_halves,
    (AGREEING, "a normed residual"): _flag(norm_before_residual=True),
    (AGREEING, "a normed output handed on"): _flag(norm_output=True),
    (AGREEING, "no final norm"): lambda judge: setattr(judge._draft, "norm", torch.nn.Identity()),
    (AGREEING, "the target's head"): lambda judge: setattr(
        judge, "head", judge.target.head[judge.target_ids]
    ),
    (SAMPLED, "the last layer behind the final norm"): lambda judge: setattr(
        judge, "before", [k - (k == 5) for k in judge.before]
    ),
    (SAMPLED, "the taps not normed"): _flag(fc_norm=False),
    (SAMPLED, "the residual not normed"): _flag(norm_before_residual=False),
    (SAMPLED, "the embedding of another token"): lambda judge: setattr(
        judge, "embedding", judge.embedding.roll(1, 0)
    ),
    (NORMED, "the taps not normed"): _flag(norm_before_fc=False),
    (NORMED, "each tap normed"): _norm_apart,
    (NORMED, "no bias of the projection"): lambda judge: judge._draft.fc.bias.data.zero_(),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "fault"),
    [(AGREEING, "the features of EAGLE-1"), *((name, None) for name in EAGLE3_PAIRS), *FAULTS],
)
def test_a_wrong_draft_is_seen(
    tiny_pair: Callable[[str], TinyPair],
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    name: str,
    fault: str | None,
) -> None:
    """By what the graph proposes for prompts of 40 tokens."""
    kind = _FinalStates if fault == "the features of EAGLE-1" else Eagle3Judge
    draft, engine = tiny_pair(name).draft, tiny_engine(name)
    assert draft is not None
    judge = kind(draft, tiny_target(name))
    prompts = [random_prompt(len(judge.target.embedding), 40, seed=seed) for seed in range(4)]
    with recording(engine) as recorded:
        answers(engine, greedy_requests(prompts, 16, ignore_eos=True))
    if fault is None:
        assert all(judge.judge_all(recorded))
        return
    FAULTS.get((name, fault), lambda judge: None)(judge)
    with pytest.raises(AssertionError, match="the reference says"):
        judge.judge_all(recorded)
