"""How options of models and of sampling reach the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine, run, save_checkpoint
from max.pipelines.context import SamplingParams
from safetensors.numpy import save_file

from unispec import engine as engine_package


def sampling(engine: type[FakeEngine], *arguments: str | Path) -> SamplingParams:
    """The sampling parameters that reach the engine."""
    assert run("--prompt", "hello", *arguments).exit_code == 0
    return engine.made[-1].requests[0].sampling


def test_model_options_reach_the_engine(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    draft = save_checkpoint(tmp_path / "draft")
    weights = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in weights:
        save_file({file.stem: np.zeros(1, np.float32)}, file)
    arguments = f"""--model-path {model} --weight-path {weights[0]} --weight-path {weights[1]}
        --draft-model-path {draft} --speculative-method eagle --num-speculative-tokens 8
        --devices gpu:1 --max-length 256 --max-batch-size 4 --max-batch-input-tokens 128
        --quantization-encoding bfloat16 --no-enable-prefix-caching --kv-cache-pages 9
        --device-graph-capture"""
    assert run("--prompt", "hello", *arguments.split()).exit_code == 0
    assert engine.made[0].config == engine_package.EngineConfig(
        model=str(model),
        weight_path=tuple(weights),
        draft_model=str(draft),
        speculative_method="eagle",
        num_speculative_tokens=8,
        devices="gpu:1",
        max_length=256,
        max_batch_size=4,
        quantization_encoding="bfloat16",
        enable_prefix_caching=False,
        max_batch_input_tokens=128,
        kv_cache_pages=9,
        device_graph_capture=True,
    )


def test_model_defaults_are_the_engines(engine: type[FakeEngine], model: Path) -> None:
    assert run("--prompt", "hello", "--model", model).exit_code == 0
    assert engine.made[0].config == engine_package.EngineConfig(model=str(model))


@pytest.mark.parametrize(("method", "k"), [("eagle", 5), ("dflash", 15)])
def test_no_speculation_leaves_the_draft_out(
    engine: type[FakeEngine], model: Path, method: str, k: int
) -> None:
    draft = f"--draft-model-path draft --speculative-method {method} --num-speculative-tokens {k}"
    result = run("--prompt", "hello", "--model", model, *draft.split(), "--no-speculation")
    assert result.exit_code == 0
    assert engine.made[0].config.draft_model is None
    assert engine.made[0].config.speculative_method is None


@pytest.mark.parametrize(("count", "batch"), [(3, 3), (20, 8)])
def test_a_batch_runs_together(
    engine: type[FakeEngine], model: Path, tmp_path: Path, count: int, batch: int
) -> None:
    (tmp_path / "prompts").write_text("hello\n" * count)
    assert run("--model", model, "--prompt-file", tmp_path / "prompts").exit_code == 0
    assert engine.made[0].config.max_batch_size == batch
    assert len(engine.made[0].requests) == count


def test_sampling_options_reach_the_request(engine: type[FakeEngine], model: Path) -> None:
    arguments = """--max-new-tokens 7 --temperature 0.5 --top-k 40 --top-p 0.9 --min-p 0.05
        --presence-penalty 0.1 --frequency-penalty -0.2 --repetition-penalty 1.3 --seed 11
        --stop END --stop STOP --ignore-eos"""
    assert sampling(engine, "--model", model, *arguments.split()) == SamplingParams(
        max_new_tokens=7,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.3,
        seed=11,
        stop=["END", "STOP"],
        ignore_eos=True,
    )


def test_sampling_defaults_are_those_of_max(engine: type[FakeEngine], model: Path) -> None:
    params = sampling(engine, "--model", model)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1, -1, 1, 0)
    assert params.max_new_tokens == 100
    assert not params.ignore_eos


def test_the_checkpoint_overrides_defaults_and_options_override_both(
    engine: type[FakeEngine], model: Path
) -> None:
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 3})
    )
    params = sampling(engine, "--model", model, "--top-p", "0.5")
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.6, 0.5, 100)


def test_a_checkpoint_that_does_not_sample_is_greedy(engine: type[FakeEngine], model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert sampling(engine, "--model", model).temperature == 0


GREEDY: list[dict[str, object]] = [
    {"do_sample": False},
    {"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
    {"temperature": 0},
    {"do_sample": True, "top_k": 1, "top_p": 0.001},
]


@pytest.mark.parametrize("stated", GREEDY)
@pytest.mark.parametrize(
    ("asked", "temperature", "top_k", "top_p", "min_p"),
    [
        ("", 0, 1, 1, 0),
        ("--temperature 0", 0, 1, 1, 0),
        ("--temperature 1", 1, -1, 1, 0),
        ("--temperature 0.7 --top-p 0.95", 0.7, -1, 0.95, 0),
        ("--top-k 40", 1, 40, 1, 0),
        ("--top-k -1", 1, -1, 1, 0),
        ("--top-p 0.8", 1, -1, 0.8, 0),
        ("--min-p 0.1", 1, -1, 1, 0.1),
    ],
)
def test_who_asks_a_greedy_checkpoint_to_sample_gets_exactly_that(
    engine: type[FakeEngine],
    model: Path,
    stated: dict[str, object],
    asked: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    penalty = {"repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(json.dumps(stated | penalty))
    params = sampling(engine, "--model", model, *asked.split())
    assert (params.temperature, params.top_k) == (temperature, top_k)
    assert (params.top_p, params.min_p) == (top_p, min_p)
    assert params.repetition_penalty == 1.1


def test_requests_share_a_given_seed_and_no_drawn_one(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("hello\n" * 8)
    batch: list[str | Path] = ["--model", model, "--prompt-file", tmp_path / "prompts"]
    for flags, seeds in ([], 8), (["--seed", "5"], 1):
        assert run(*batch, *flags).exit_code == 0
        requests = engine.made[-1].requests
        assert len({request.sampling.seed for request in requests}) == seeds


def test_a_grammar_reaches_every_request(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("hello\nworld\n")
    (tmp_path / "schema").write_text('{"type": "object"}')
    batch: list[str | Path] = ["--model", model, "--prompt-file", tmp_path / "prompts"]
    for flags, kind, text in (
        (["--json-schema", str(tmp_path / "schema")], "json_schema", '{"type": "object"}'),
        (["--regex", "[a-z]+"], "regex", "[a-z]+"),
    ):
        assert run(*batch, *flags).exit_code == 0
        for request in engine.made[-1].requests:
            assert request.grammar is not None
            assert (request.grammar.kind, request.grammar.text) == (kind, text)
