"""What only a program can ask for is refused in one sentence: configurations and requests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from max.pipelines.context import SamplingParams
from max.pipelines.lib import PipelineArgs, PipelineConfig
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig, Request
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens is 0", "choose 1 to 8"]),
        ({"num_speculative_tokens": 9}, ["num_speculative_tokens is 9", "choose 1 to 8"]),
        ({"speculative_method": "oracle"}, ["'oracle'", "known: dflash, eagle"]),
        ({"speculative_method": None}, ["draft model draft", "give both"]),
        ({"draft_model": None}, ["'eagle' needs a draft model"]),
        ({"speculative_method": "mtp"}, ["draft model draft", "'mtp'", "leave it out"]),
        ({"draft_proposal": "guess"}, ["'guess'", "argmax, sampled"]),
        (
            {"draft_proposal": "sampled", "use_relaxed_acceptance_for_thinking": True},
            ["'sampled'", "exclude each other", "use 'argmax'"],
        ),
        (
            {
                "draft_model": None,
                "speculative_method": None,
                "use_relaxed_acceptance_for_thinking": True,
            },
            ["use_relaxed_acceptance_for_thinking needs", "leave it out"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_topk": 0},
            ["relaxed_topk is 0", "at least 1"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_delta": 1.5},
            ["relaxed_delta is 1.5", "choose 0 to 1"],
        ),
        ({"synthetic_acceptance_rate": 1.5}, ["synthetic_acceptance_rate is 1.5", "0 to 1"]),
        (
            {"draft_model": None, "speculative_method": None, "synthetic_acceptance_rate": 0.5},
            ["synthetic_acceptance_rate needs", "leave it out"],
        ),
        (
            {"draft_proposal": "sampled", "synthetic_acceptance_rate": 0.5},
            ["takes the place of every other", "leave out"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "thinking_tokens": ("<a>", "<a>")},
            ["thinking_tokens is ('<a>', '<a>')", "two different tokens"],
        ),
        (
            {"draft_model": None, "speculative_method": None, "num_speculative_tokens": 3},
            ["num_speculative_tokens is 3", "no speculative method", "leave it out"],
        ),
        ({"max_batch_size": 0}, ["max_batch_size is 0", "at least 1"]),
        ({"max_batch_input_tokens": 0}, ["max_batch_input_tokens is 0", "at least 1"]),
        ({"max_length": 0}, ["max_length is 0", "at least 1"]),
        ({"kv_cache_pages": -1}, ["kv_cache_pages is -1", "at least 1"]),
        *[
            ({name: value}, [f"{name} is {value!r}; give an integer"])
            for name in ("max_length", "max_batch_size", "max_batch_input_tokens", "kv_cache_pages")
            for value in ("3", 2.5, math.nan, [1], True)
        ],
        ({"max_batch_size": None}, ["max_batch_size is None; give an integer"]),
        ({"num_speculative_tokens": 2.5}, ["num_speculative_tokens is 2.5; give an integer"]),
        ({"enable_prefix_caching": "no"}, ["enable_prefix_caching is 'no'; give True or False"]),
        ({"device_graph_capture": 1}, ["device_graph_capture is 1; give True or False"]),
        ({"device_graph_capture": True}, ["device_graph_capture needs a GPU", "devices 'gpu'"]),
        ({"devices": None}, ["devices is None; give a text"]),
        ({"devices": 0}, ["devices is 0; give a text"]),
        ({"draft_model": Path("draft")}, ["draft_model is", "Path('draft')", "give a text"]),
        ({"quantization_encoding": 32}, ["quantization_encoding is 32; give a text"]),
        ({"weight_path": "a.gguf"}, ["weight_path is 'a.gguf'; give a tuple of Paths"]),
        ({"weight_path": ("a.gguf",)}, ["weight_path is ('a.gguf',); give a tuple of Paths"]),
        ({"speculative_method": ["eagle"]}, ["['eagle'] is unknown", "dflash, eagle"]),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_delta": "half"},
            ["relaxed_delta is 'half'; give a number"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "thinking_tokens": 5},
            ["thinking_tokens is 5", "two different tokens"],
        ),
    ],
)
def test_engine_configuration(changes: dict[str, Any], words: list[str]) -> None:
    fields: dict[str, Any] = {"draft_model": "draft", "speculative_method": "eagle", **changes}
    with pytest.raises(InputError) as refused:
        EngineConfig(model="target", **fields)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": "tpu"}, ["devices 'tpu'", "use 'cpu'"]),
        ({"devices": "cpu:1"}, ["devices 'cpu:1'", "use 'cpu'"]),
        (
            {"quantization_encoding": "float8_e4m3fn"},
            ["'float8_e4m3fn' is not supported on a CPU", "use 'float32'", "'q4_k'"],
        ),
        ({"weight_path": (Path("/nowhere/w.gguf"),)}, ["/nowhere/w.gguf", "correct the path"]),
    ],
)
def test_pipeline_configuration(pair: TinyPair, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        make_pipeline_config(EngineConfig(model=str(pair.target), **changes))
    for word in words:
        assert word in str(refused.value)


def test_what_only_max_knows_to_be_wrong(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known gets there; its own words then stand in a sentence with a fix."""

    def refuse(options: PipelineArgs) -> None:
        PipelineArgs(model_path="x", max_length="far\n")  # type: ignore[arg-type]

    monkeypatch.setattr(PipelineConfig, "from_args", refuse)
    with pytest.raises(InputError) as refused:
        make_pipeline_config(EngineConfig(model=str(pair.target)))
    expected = f"{pair.target} cannot run with max_length 'far\\n', which MAX refuses ("
    assert str(refused.value).startswith(expected)
    assert str(refused.value).endswith(
        "; leave the option out, or use the checkpoint's own config.json"
    )


def test_thinking_tokens_that_the_tokenizer_lacks(pair: TinyPair) -> None:
    config = EngineConfig(
        model=str(pair.target),
        draft_model=str(pair.draft),
        speculative_method="eagle",
        use_relaxed_acceptance_for_thinking=True,
        thinking_tokens=("<s>", "[/THINK]"),
    )
    with pytest.raises(InputError, match=r"'\[/THINK\]' is not in the tokenizer.*give the tokens"):
        Engine(config)


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"token_ids": []}, ["prompt 2 is empty", "give"]),
        ({"token_ids": [5, 256]}, ["prompt 2", "token id 256", "vocabulary of 256", "use"]),
        ({"token_ids": [-1, 5]}, ["prompt 2", "token id -1", "vocabulary of 256", "use"]),
        ({"logit_bias": {300: 1.0}}, ["prompt 2", "token id 300", "vocabulary of 256", "use"]),
        ({"token_ids": [5] * 512}, ["prompt 2 has 512 tokens", "max_length is 512", "shorten"]),
        (
            {"sampling": SamplingParams(max_new_tokens=0)},
            ["max_new_tokens is 0", "choose at least 1"],
        ),
    ],
)
def test_requests(pair: TinyPair, request_fields: dict[str, Any], words: list[str]) -> None:
    engine = Engine(EngineConfig(model=str(pair.target)))
    fields: dict[str, Any] = {"token_ids": [5], "sampling": SamplingParams(max_new_tokens=4)}
    requests = [Request(**fields), Request(**{**fields, **request_fields})]
    with pytest.raises(InputError) as refused:
        engine.generate(requests)
    for word in words:
        assert word in str(refused.value)
