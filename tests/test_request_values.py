"""What a user may put into a request: other types and numbers get one sentence, nothing runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from numpy_graph import NumpyGraph, continuation, numpy_engine
from tiny import TinyPair
from transformers import BatchEncoding

from unispec.engine import Engine, Request
from unispec.errors import InputError
from unispec.pipelines.runtime.sampling_params import HANDLED_FIELDS, check_sampling

NOT_DONE = {"thinking_temperature": 0.5, "detokenize": False, "logits_processors": [print]}
"""Fields of MAX's class that this engine does not do."""


@pytest.fixture
def made(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, NumpyGraph]]:
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as both:
        yield both


def sampling(**changed: Any) -> SamplingParams:
    """Set after it was built, where MAX checks no more, and where it would refuse some."""
    params = SamplingParams(temperature=0, max_new_tokens=5)
    for name, value in changed.items():
        setattr(params, name, value)
    return params


def good() -> Request:
    return Request(token_ids=[5], sampling=sampling())


def assert_refused(
    made: tuple[Engine, NumpyGraph], bad: Any, message: str, *, name: str = "prompt 2"
) -> None:
    """Refused in one sentence before anything runs, also while others run; those are answered."""
    engine, graph = made
    with pytest.raises(InputError, match=message) as error:
        engine.generate([good(), bad])
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert graph.steps == []
    with pytest.raises(InputError, match=message):
        engine.add(bad)
    refused: list[str] = []

    def submit(index: int, text: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            engine.generate([bad])
        refused.append(str(error.value))

    [result] = engine.generate([good()], on_text=submit).results
    assert result.token_ids == continuation(5, 5)
    assert refused
    graph.steps.clear()


PROMPTS: dict[str, tuple[Any, str]] = {
    "what apply_chat_template returns by default": (
        BatchEncoding({"input_ids": [5, 6], "attention_mask": [1, 1]}),
        "is of type BatchEncoding; .*return_dict=False",
    ),
    "a dict": ({"input_ids": [5, 6]}, "is of type dict; .*return_dict=False"),
    "a text": ("hello", "is the text 'hello'; .*encode it"),
    "bytes": (b"hello", "is of type bytes; give a list of integers"),
    "nothing": (None, "is of type NoneType; give a list of integers"),
    "a number": (5, "is of type int; give a list of integers"),
    "a tensor": (torch.tensor([5, 6]), r"is of type Tensor; call \.tolist\(\)"),
    "a tensor of a batch": (torch.tensor([[5, 6]]), r"is of type Tensor; call \.tolist\(\)"),
    "a set": ({5, 6}, "is of type set; give a list of integers"),
    "an array of a batch": (np.array([[5, 6]]), r"int64 and shape \[1, 2\]; .*one dimension"),
    "an array of floats": (np.array([5.0, 6.0]), r"float64 and shape \[2\]; .*integers"),
    "an array of truth values": (np.array([True]), r"bool and shape \[1\]; .*integers"),
    "a list of lists": ([[5, 6], [7]], r"has \[5, 6\] among .*; give a Request for each prompt"),
    "a list of arrays": ([np.array([5])], "among its token ids; give a list of integers"),
    "floats": ([5, 6.0], "has 6.0 among its token ids; give a list of integers"),
    "truth values": ([5, True], "has True among its token ids; give a list of integers"),
    "texts": (["5"], "has '5' among its token ids; give a list of integers"),
    "a hole": ([5, None], "has None among its token ids; give a list of integers"),
    "beyond 64 bits": ([5, 2**70], f"token id {2**70} is outside"),
    "negative": (np.array([-1]), "token id -1 is outside"),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_token_ids_that_are_no_list_of_integers(
    made: tuple[Engine, NumpyGraph], prompt: str
) -> None:
    token_ids, message = PROMPTS[prompt]
    assert_refused(made, Request(token_ids=token_ids, sampling=sampling()), message)


@pytest.mark.parametrize(
    "token_ids",
    [
        (7, 5),
        range(4, 6),
        [np.int64(7), np.uint8(5)],
        np.array([7, 5]),
        np.array([7, 5], np.uint16),
        np.array([5, 0, 7])[::-2],
    ],
    ids=repr,
)
def test_sequences_and_arrays_of_integers(made: tuple[Engine, NumpyGraph], token_ids: Any) -> None:
    engine, _ = made
    [result] = engine.generate([Request(token_ids=token_ids, sampling=sampling())]).results
    assert result.token_ids == continuation(5, 5)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        pytest.param(good(), r"a single Request was given; give a list: \[request\]", id="one"),
        pytest.param("hello", "requests is 'hello'; give a list of Requests", id="text"),
        pytest.param(None, "requests is None; give a list of Requests", id="none"),
        pytest.param(["hello"], "prompt 1 is 'hello'; give a Request", id="texts"),
        pytest.param([[5, 6]], r"prompt 1 is \[5, 6\]; give a Request", id="tokens"),
        pytest.param([good(), {"token_ids": [5]}], "prompt 2 is .*; give a Request", id="dict"),
    ],
)
def test_requests_that_are_none(
    made: tuple[Engine, NumpyGraph], requests: Any, message: str
) -> None:
    engine, graph = made
    with pytest.raises(InputError, match=message):
        engine.generate(requests)
    assert graph.steps == []


def test_requests_of_a_generator(made: tuple[Engine, NumpyGraph]) -> None:
    engine, _ = made
    requests: Any = (good() for _ in range(2))
    found = [result.token_ids for result in engine.generate(requests).results]
    assert found == [continuation(5, 5)] * 2


FIELDS: list[tuple[str, Any, str]] = [
    ("sampling", {"temperature": 0}, "sampling is .*; give a SamplingParams"),
    ("sampling", None, "sampling is None; give a SamplingParams"),
    ("grammar", "[0-9]+", r"grammar is '\[0-9\]\+'; give a Grammar"),
    ("logit_bias", None, "logit_bias is None; give a dict"),
    ("logit_bias", [(5, 1.0)], "logit_bias is .*; give a dict"),
    ("logit_bias", {"5": 1.0}, "logit_bias is .*; give a dict"),
    ("logit_bias", {True: 1.0}, "logit_bias is .*; give a dict"),
    ("logit_bias", {5: "1"}, "logit_bias of token 5 is '1'; give a number"),
    ("logit_bias", {5: 1e39}, r"logit_bias of token 5 is 1e\+39; give a finite number"),
    ("logit_bias", {5: -1e39}, r"logit_bias of token 5 is -1e\+39; give a finite number"),
    ("logit_bias", {5: 10**400}, "logit_bias of token 5 is 10000.*; give a finite number"),
    ("logit_bias", {5: math.nan}, "logit_bias of token 5 is nan; give a finite number"),
    ("logit_bias", {256: 1.0}, "token id 256 is outside"),
    ("images", "cat.png", r"images is 'cat.png'; give a list, \[image\]"),
    ("images", Path("cat.png"), r"images is .*; give a list, \[image\]"),
    ("images", None, r"images is None; give a list, \[image\]"),
    *(
        ("logprobs", value, f"logprobs is {re.escape(repr(value))}; give an integer, 0 to 20, or")
        for value in (-1, 21, 2.0, math.nan, "5", True, [3])
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), FIELDS)
def test_a_field_of_a_request(
    made: tuple[Engine, NumpyGraph], name: str, value: Any, message: str
) -> None:
    assert_refused(made, dataclasses.replace(good(), **{name: value}), message)


PARAMS: list[tuple[str, Any, str]] = [
    # What a float32 or an int64 does not hold.
    ("temperature", 1e-46, "temperature is 1e-46; choose 0, .* or 1e-37 to 2"),
    ("temperature", 1e-39, "temperature is 1e-39; choose 0, .* or 1e-37 to 2"),
    ("repetition_penalty", 1e-38, "repetition_penalty is 1e-38; choose 1e-06 to 1e\\+06"),
    ("repetition_penalty", 1e-46, "repetition_penalty is 1e-46; choose 1e-06 to 1e\\+06"),
    ("repetition_penalty", 1e38, "repetition_penalty is 1e\\+38; choose 1e-06 to 1e\\+06"),
    ("repetition_penalty", 1e39, "repetition_penalty is 1e\\+39; choose 1e-06 to 1e\\+06"),
    ("top_k", 2**63, f"top_k is {2**63}; choose at most {2**63 - 1}"),
    # What is no number, or out of its range.
    ("temperature", math.nan, "temperature is nan; choose 0, "),
    ("temperature", math.inf, "temperature is inf; choose 0, "),
    ("temperature", -0.5, "temperature is -0.5; choose 0, "),
    ("temperature", "1", "temperature is '1'; give a number"),
    ("temperature", None, "temperature is None; give a number"),
    ("temperature", True, "temperature is True; give a number"),
    ("top_p", 1.5, "top_p is 1.5; choose 0 to 1"),
    ("top_p", math.nan, "top_p is nan; choose 0 to 1"),
    ("min_p", -0.5, "min_p is -0.5; choose 0 to 1"),
    ("presence_penalty", 3, "presence_penalty is 3; choose -2 to 2"),
    ("frequency_penalty", -math.inf, "frequency_penalty is -inf; choose -2 to 2"),
    ("repetition_penalty", 0, "repetition_penalty is 0; choose 1e-06"),
    ("repetition_penalty", 10**400, "repetition_penalty is 10000.*; choose 1e-06"),
    ("top_k", -2, "top_k is -2; choose at least -1"),
    ("top_k", 5.0, "top_k is 5.0; give an integer"),
    ("max_new_tokens", 0, "max_new_tokens is 0; choose at least 1"),
    ("max_new_tokens", 5.0, "max_new_tokens is 5.0; give an integer"),
    ("max_new_tokens", True, "max_new_tokens is True; give an integer"),
    ("min_new_tokens", -1, "min_new_tokens is -1; choose at least 0"),
    ("min_new_tokens", None, "min_new_tokens is None; give an integer"),
    ("ignore_eos", "no", "ignore_eos is 'no'; give True or False"),
    ("stop", "END", r"stop is the text 'END'; give a list: \['END'\]"),
    ("stop", 5, "stop is 5; give a list of texts"),
    ("stop", [5], r"stop is \[5\]; give a list of texts"),
    ("stop", ["END", ""], "stop has an empty text; give at least one character"),
    ("stop_token_ids", 5, "stop_token_ids is 5; give a list of integers"),
    ("stop_token_ids", [5.0], r"stop_token_ids is \[5.0\]; give a list of integers"),
    ("stop_token_ids", [256], "token id 256 is outside"),
    ("seed", 1.5, "seed is 1.5; give an integer"),
    ("seed", None, "seed is None; give an integer"),
    *(
        (name, value, f"{name} of the SamplingParams .*leave it out")
        for name, value in NOT_DONE.items()
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), PARAMS)
def test_a_sampling_parameter(
    made: tuple[Engine, NumpyGraph], name: str, value: Any, message: str
) -> None:
    params = sampling(**{name: value})
    assert_refused(made, Request(token_ids=[6], sampling=params), message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e-37),
        ("temperature", np.float32(0.5)),
        ("temperature", Fraction(1, 2)),
        ("top_p", 1e-46),
        ("top_p", 0),
        ("min_p", 1e-46),
        ("frequency_penalty", -1e-46),
        ("repetition_penalty", 1e-6),
        ("repetition_penalty", 1e6),
        ("top_k", 2**63 - 1),
        ("top_k", np.int32(5)),
        ("seed", -1),
        ("seed", np.int64(-1)),
        ("seed", 2**200),
        ("max_new_tokens", 2**70),
        ("stop", ["END"]),
        ("stop", ()),
        ("stop_token_ids", [np.int64(5)]),
    ],
)
def test_sampling_parameters_at_their_limits(
    made: tuple[Engine, NumpyGraph], name: str, value: Any
) -> None:
    """And numbers of NumPy; they reach the graph's buffers without a warning."""
    engine, _ = made
    params = sampling(**{name: value})
    engine.generate([Request(token_ids=[6], sampling=params, logit_bias={5: 3.4e38})])


@pytest.mark.parametrize(("ignore_eos", "length"), [(False, 1), (True, 3)])
def test_a_stop_token_ends_an_answer_that_ignores_eos(
    made: tuple[Engine, NumpyGraph], ignore_eos: bool, length: int
) -> None:
    """The first token of this answer is an EOS of the model, the third a stop token."""
    engine, _ = made
    first, _, third, *_ = expected = continuation(5, 5)
    engine.eos_token_ids = {first}
    params = sampling(ignore_eos=ignore_eos, stop_token_ids=[third])
    [result] = engine.generate([Request(token_ids=[5], sampling=params)]).results
    assert (result.token_ids, result.finish_reason) == (expected[:length], "stop")


def test_seeds_are_taken_modulo_2_to_the_64(made: tuple[Engine, NumpyGraph]) -> None:
    engine, _ = made
    seeds = []
    model = engine.pipeline.model
    execute = model.execute

    def recording(inputs: Any) -> Any:
        seeds.append(inputs.seed.to_numpy().tolist())
        return execute(inputs)

    given = (3, 3 + 2**64, 3 - 2**64, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "execute", recording)
        engine.generate([Request(token_ids=[6], sampling=sampling(seed=seed)) for seed in given])
    assert seeds[0] == [3, 3, 3, 2**64 - 1]


def test_every_field_of_maxs_class_is_done_or_refused() -> None:
    """A field that a later MAX adds fails here, and is refused where a user sets it."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == HANDLED_FIELDS.keys() | NOT_DONE.keys()
    assert not HANDLED_FIELDS.keys() & NOT_DONE.keys()
    check_sampling(SamplingParams())

    @dataclasses.dataclass
    class Later(SamplingParams):
        new_thing: int = 0
        new_list: list[int] = dataclasses.field(default_factory=list)

    check_sampling(Later())
    with pytest.raises(InputError, match=r"new_thing of the SamplingParams is 1.*leave it out"):
        check_sampling(Later(new_thing=1))
    with pytest.raises(InputError, match=r"new_list of the SamplingParams is \[1\]"):
        check_sampling(Later(new_list=[1]))


def test_a_program_that_calls_the_pipeline_itself(made: tuple[Engine, NumpyGraph]) -> None:
    """Its requests are checked where their rows are made."""
    engine, _ = made
    for name, value in (("repetition_penalty", 1e-38), ("logits_processors", [print])):
        context = TextContext(
            max_length=40,
            tokens=TokenBuffer(np.array([5, 6], np.int64)),
            sampling_params=sampling(**{name: value}),
        )
        with pytest.raises(InputError, match=name):
            engine.pipeline.model.batch.row(context)
