"""Where an answer begins, ends, or is refused: at every limit, within a step of many tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from reference.target import TargetReference, assert_same_greedy
from runs import greedy_requests, observing, proposing

from unispec.engine import Engine, Request, Result
from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import PersistentInputBuffers
from unispec.sampling.grammar import Grammar

EOS = 2
K = 5
LENGTH = 40
"""Tokens of an answer from which the cases are cut."""
CODE = Grammar("regex", "[0-9]{3}-[0-9]{4}")


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens that are no special ones."""
    return list(np.random.default_rng(seed).integers(3, 256, length).tolist())


def ask(engine: Engine, tokens: Sequence[int], **options: Any) -> Result:
    """Answers one prompt, greedily unless told otherwise."""
    bias, grammar = options.pop("logit_bias", {}), options.pop("grammar", None)
    sampling = SamplingParams(**{"temperature": 0, "max_new_tokens": LENGTH, **options})
    request = Request(token_ids=tokens, sampling=sampling, logit_bias=bias, grammar=grammar)
    return engine.generate([request]).results[0]


def runs(engine: Engine, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """An answer, and how many tokens each step added to it."""
    accepted = [0]
    with observing(engine, lambda step: accepted.append(step.rows[0].row.acceptance.accepted)):
        answer = ask(engine, tokens).token_ids
    return answer, [after - before + 1 for before, after in pairwise(accepted)]


def test_a_prompt_that_leaves_no_room(engine: Engine) -> None:
    """As long as max_length: refused, with both numbers and what to do."""
    with pytest.raises(InputError, match=r"512 tokens, max_length is 512.*shorten the prompt"):
        ask(engine, prompt(512))


@pytest.mark.parametrize("k", [1, 3, K])
def test_answers_are_cut_at_max_length(
    engine: Engine, tiny_target: Callable[[str], TargetReference], k: int
) -> None:
    """From room for one token on, which is less than a step's drafts, none is lost or added."""
    prompts = [prompt(512 - room, room) for room in range(1, 13)]
    with proposing(engine, k):
        results = engine.generate(greedy_requests(prompts, 100, ignore_eos=True)).results
    for room, (tokens, result) in enumerate(zip(prompts, results, strict=True), start=1):
        assert len(result.token_ids) == room
        assert result.finish_reason == "length"
        trace = tiny_target("llama_eagle_agreeing").greedy(tokens, 100, max_length=512)
        assert_same_greedy(result.token_ids, trace)


@pytest.mark.parametrize("k", [1, 3, K])
def test_answers_are_cut_at_max_new_tokens(engine: Engine, k: int) -> None:
    """So they are by the request's own limit."""
    with proposing(engine, k):
        whole = ask(engine, prompt(9), ignore_eos=True).token_ids
        for limit in range(1, 13):
            result = ask(engine, prompt(9), max_new_tokens=limit, ignore_eos=True)
            assert (result.token_ids, result.finish_reason) == (whole[:limit], "length")


def test_eos_as_the_first_token(engine: Engine) -> None:
    """The answer is that token and no text; nothing was drafted."""
    result = ask(engine, prompt(9), logit_bias={EOS: 100.0})
    assert result == Result(token_ids=[EOS], finish_reason="stop")
    first = ask(engine, prompt(9)).token_ids[0]
    stopped = ask(engine, prompt(9), stop_token_ids=[first])
    assert (stopped.token_ids, stopped.finish_reason) == ([first], "stop")


def test_eos_within_an_accepted_run(engine: Engine) -> None:
    """Nothing that the step accepted after it is part of the answer."""
    places = set()
    for seed in range(8):
        answer, steps = runs(engine, prompt(9, seed))
        starts = np.cumsum([0, *steps[:-1]])
        for start, size in zip(starts, steps, strict=True):
            for at in range(start, min(start + size, LENGTH)):
                token = answer[at]
                if token in answer[:at]:
                    continue
                stopped = ask(engine, prompt(9, seed), stop_token_ids=[token])
                assert stopped.token_ids == answer[: at + 1]
                assert stopped.finish_reason == "stop"
                assert stopped.text == engine.tokenizer.decode(
                    stopped.token_ids, skip_special_tokens=True
                )
                places.add((at - start, size))
    # At each place of the longest runs, the first and the last included.
    assert {(place, K + 1) for place in range(K + 1)} <= places


@pytest.mark.parametrize("least", range(9))
def test_eos_is_banned_before_min_new_tokens(engine: Engine, least: int) -> None:
    """However much the model wants to end, also in the middle of a step."""
    unended = ask(engine, prompt(9), max_new_tokens=12).token_ids
    assert EOS not in unended
    result = ask(engine, prompt(9), min_new_tokens=least, logit_bias={EOS: 100.0})
    assert result.token_ids == [*unended[:least], EOS]
    assert result.finish_reason == "stop"


def test_eos_is_ignored_where_asked(engine: Engine) -> None:
    """The answer goes on to its limit and shows no special tokens."""
    result = ask(engine, prompt(9), logit_bias={EOS: 100.0}, ignore_eos=True, max_new_tokens=8)
    assert (result.token_ids, result.text) == ([EOS] * 8, "")
    assert result.finish_reason == "length"


def test_min_new_tokens_beyond_the_room(engine: Engine) -> None:
    """It cannot be met, and the error says by how much."""
    with pytest.raises(InputError, match=r"min_new_tokens is 20.*room for 12"):
        ask(engine, prompt(9), min_new_tokens=20, max_new_tokens=12)


@pytest.mark.parametrize("token", [-1, 256, 9999])
def test_a_stop_token_outside_the_vocabulary(engine: Engine, token: int) -> None:
    """It names the token, whether or not EOS has to be banned."""
    for least in (0, 3):
        with pytest.raises(InputError, match=f"token id {token} is outside.*256"):
            ask(engine, prompt(9), stop_token_ids=[token], min_new_tokens=least)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_bias_that_is_no_number(engine: Engine, bias: float) -> None:
    """It would empty a grammar's mask, or poison the row."""
    with pytest.raises(InputError, match=f"logit_bias of token 2 is {bias}"):
        ask(engine, prompt(9), logit_bias={EOS: bias})


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_complete_grammar_ends_before_min_new_tokens(engine: Engine, temperature: float) -> None:
    """Only EOS may follow, so it does; the requests beside it get their answers."""
    mates = greedy_requests([prompt(5, 1), prompt(70, 2)], LENGTH)
    alone = [engine.generate([mate]).results[0].token_ids for mate in mates]
    sampling = SamplingParams(
        temperature=temperature, seed=3, max_new_tokens=LENGTH, min_new_tokens=12
    )
    request = Request(token_ids=prompt(9), sampling=sampling, grammar=CODE)
    constrained, *others = engine.generate([request, *mates]).results
    assert re.fullmatch(CODE.text, constrained.text)
    assert constrained.token_ids[-1] == EOS
    assert constrained.finish_reason == "stop"
    assert [result.token_ids for result in others] == alone


def test_a_refused_request_disturbs_nothing(engine: Engine) -> None:
    """One prompt that is not the model's leaves no rows of the others."""
    good, bad = greedy_requests([prompt(9), [256]], 4)
    with pytest.raises(InputError, match="prompt 2: token id 256"):
        engine.generate([good, bad])
    assert engine.num_requests == 0


@pytest.fixture
def inputs(eagle_engine: Engine) -> Iterator[Any]:
    """The first step of one request of `llama_eagle_agreeing`."""
    model, manager = eagle_engine.pipeline.model, eagle_engine.pipeline.kv_manager
    context = TextContext(
        max_length=40,
        tokens=TokenBuffer(np.array(prompt(9), np.int64)),
        sampling_params=SamplingParams(temperature=0),
    )
    manager.claim(context)
    manager.alloc(context)
    yield model.prepare_initial_token_inputs([[context]], manager.runtime_inputs([[context]]))
    manager.release(context)
    eagle_engine.pipeline.release(context.request_id)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_ids", Buffer.zeros([1], DType.uint32)),
        ("lora_ranks", Buffer.zeros([1], DType.uint32)),
        ("draft_kv_blocks", [Buffer.zeros([1, 4], DType.float32)]),
        ("hidden_states", Buffer.zeros([9, 64], DType.float32)),
        ("in_thinking_phase", Buffer.zeros([1], DType.bool)),
        ("draft_probs_full", Buffer.zeros([1, 0, 256], DType.float32)),
    ],
)
def test_an_input_that_the_graph_does_not_take(
    eagle_engine: Engine, inputs: Any, name: str, value: Any
) -> None:
    """It is named instead of being dropped or shifting the others."""
    with pytest.raises(InputError, match=f"{name} is set, but the compiled graph does not take"):
        eagle_engine.pipeline.model.execute(replace(inputs, **{name: value}))


@pytest.mark.parametrize(
    "name", ["draft_tokens", "kv_cache_inputs", "seed", "temperature", "max_k", "token_bitmask"]
)
def test_an_input_that_is_missing(inputs: Any, name: str) -> None:
    """It is named too."""
    with pytest.raises(InputError, match=f"{name} is not set"):
        _ = replace(inputs, **{name: None}).buffers


@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (5, 4)])
def test_buffers_for_steps_that_cannot_be(rows: int, tokens: int) -> None:
    """Every row brings a token, and a step has at least one row."""
    with pytest.raises(InputError, match=rf"size {rows} is not .*_tokens {tokens}:"):
        PersistentInputBuffers.alloc(rows, tokens, CPU())


def test_buffers_are_written_in_place() -> None:
    """A step is a view of what was reserved; a larger one is refused."""
    buffers = PersistentInputBuffers.alloc(2, 4, CPU())
    tokens, offsets = buffers.write(np.array([7, 8, 9]), np.array([0, 1, 3], np.uint32))
    assert tokens.to_numpy().tolist() == buffers.tokens.to_numpy()[:3].tolist() == [7, 8, 9]
    assert offsets.to_numpy().tolist() == buffers.input_row_offsets.to_numpy().tolist() == [0, 1, 3]
    with pytest.raises(InputError, match="2 rows and 5 tokens is larger than the 2 rows and 4"):
        buffers.write(np.arange(5), np.array([0, 1, 5], np.uint32))
    with pytest.raises(InputError, match="3 rows and 3 tokens is larger than the 2 rows and 4"):
        buffers.write(np.arange(3), np.array([0, 1, 2, 3], np.uint32))
