"""Which targets there are, with which drafts, and what is said of others: before MAX is asked."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig, model_files, pipeline_config
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.methods import Method
from unispec.pipelines.architectures.registry import pipeline_model

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.fixture
def max_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*arguments: Any, **options: Any) -> None:
        raise AssertionError("MAX was asked")

    monkeypatch.setattr(pipeline_config, "MAXModelConfig", ask)
    monkeypatch.setattr(pipeline_config.PipelineConfig, "from_args", ask)


def changed(source: Path, folder: Path, **fields: Any) -> str:
    """A copy of a checkpoint whose config.json says something else."""
    file = Path(shutil.copytree(source, folder)) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(folder)


@pytest.mark.usefixtures("max_is_not_asked")
@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("deepseek_v2", None),
        ("deepseek_v3", "dflash"),
        ("deepseek_v3", "eagle"),
        ("deepseek_v32", None),
        ("gemma2", None),
        ("granitemoe", None),
        ("granitemoehybrid", "eagle"),
        ("kimi_k25", "eagle"),
        ("kimi_k25", "mtp"),
        ("llama", "mtp"),
        ("llama4", None),
        ("mistral", "mtp"),
        ("mistral3", None),
        ("mixtral", None),
        ("mllama", None),
        ("of tomorrow", None),
        ("phi3", None),
        ("qwen2_5_vl", None),
        ("qwen2_moe", "eagle"),
        ("qwen2_vl", "dflash"),
        ("qwen3", "mtp"),
        ("qwen3_5", "mtp"),
        ("qwen3_moe", "dflash"),
        ("qwen3_next", None),
        (None, None),
        (["llama"], None),
    ],
)
def test_a_pair_that_nothing_runs_is_refused_with_those_that_run(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, model_type: Any, method: Method | None
) -> None:
    """Although the config.json has Llama's fields only: the type alone decides."""
    pair = tiny_pair("llama_eagle_agreeing")
    config = EngineConfig(
        model=changed(pair.target, tmp_path / "model", model_type=model_type),
        draft_model=str(pair.draft) if method in ("dflash", "eagle") else None,
        speculative_method=method,
    )
    with pytest.raises(InputError) as refused:
        make_pipeline_config(config)
    assert str(refused.value) == (
        f"{tmp_path}/model: model_type {model_type} with {method or 'no draft'} is not supported;"
        " supported: deepseek_v3 with mtp or no draft, granite with eagle, eagle3, dflash or "
        "no draft, kimi_k25 with dflash or no draft, llama with eagle, eagle3, dflash or no "
        "draft, ministral with eagle, eagle3, dflash or no draft, mistral with eagle, eagle3,"
        " dflash or no draft, qwen2 with eagle, eagle3, dflash or no draft, qwen3 with eagle,"
        " eagle3, dflash or no draft"
    )


@pytest.mark.usefixtures("max_is_not_asked")
@pytest.mark.parametrize("stated", ["LlamaForSequenceClassification", "LlamaForCausalLMEagle"])
def test_a_llama_that_writes_no_text_is_no_target(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, stated: str
) -> None:
    model = changed(
        tiny_pair("llama_eagle_agreeing").target, tmp_path / "model", architectures=[stated]
    )
    with pytest.raises(InputError, match=f"is a {stated}.* is a LlamaForCausalLM; use a model"):
        make_pipeline_config(EngineConfig(model=model))


@pytest.mark.parametrize(
    ("method", "preset", "draft_fields", "expected"),
    [
        (None, "llama_eagle_agreeing", {}, "MistralModel"),
        ("eagle", "llama_eagle_agreeing", {}, "MistralEagleModel"),
        ("eagle", "llama_eagle_agreeing", MISTRAL, "MistralEagleModel"),
        ("eagle", "llama_eagle3_agreeing", {}, "MistralEagle3Model"),
        ("eagle3", "llama_eagle3_agreeing", {}, "MistralEagle3Model"),
        ("dflash", "llama_dflash_agreeing", {}, "MistralDflashModel"),
        ("dflash", "llama_dflash_agreeing", {"model_type": "mistral"}, "MistralDflashModel"),
    ],
)
def test_a_mistral_is_a_llama_by_another_name(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    method: Method | None,
    preset: str,
    draft_fields: dict[str, Any],
    expected: str,
) -> None:
    """MAX configures it for a CPU in float32, its draft too, whose config.json may say Mistral."""
    pair = tiny_pair(preset)
    assert pair.draft is not None
    config = EngineConfig(
        model=changed(pair.target, tmp_path / "model", **MISTRAL, sliding_window=None),
        draft_model=changed(pair.draft, tmp_path / "draft", **draft_fields) if method else None,
        speculative_method=method,
    )
    engine = Engine(config)
    assert engine.max_length == 512
    resolved = make_pipeline_config(config)
    assert resolved.model.quantization_encoding == "float32"
    assert pipeline_model(resolved).__name__ == expected
    if method == "dflash":
        assert resolved.speculative is not None
        assert resolved.speculative.num_speculative_tokens == 5  # a block of 6


@pytest.mark.parametrize(
    ("stated", "max_length", "refused"),
    [
        ({"sliding_window": None}, None, False),
        ({"sliding_window": 512}, None, False),
        ({"sliding_window": 511}, None, True),
        ({"sliding_window": 100}, 100, False),
        ({"sliding_window": 100}, 101, True),
        # What transformers' Mistral has where config.json does not say.
        ({"max_position_embeddings": 4096}, None, False),
        ({"max_position_embeddings": 4097}, None, True),
    ],
)
def test_a_mistral_within_its_window(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    stated: dict[str, Any],
    max_length: int | None,
    refused: bool,
) -> None:
    model = changed(
        tiny_pair("llama_eagle_agreeing").target, tmp_path / "model", **MISTRAL, **stated
    )
    config = EngineConfig(model=model, max_length=max_length)
    if not refused:
        Engine(config)
        return
    window = stated.get("sliding_window", 4096)
    longest = max_length or stated.get("max_position_embeddings", 512)
    with pytest.raises(InputError) as refusal:
        Engine(config)
    assert str(refusal.value) == (
        f"sliding_window {window} of {model} is not supported for sequences of up to {longest}"
        f" tokens; choose a max_length of at most {window}"
    )


def test_a_llama_has_no_window_whatever_its_config_says(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    """Nor has transformers' Llama; such a key is left over from a conversion."""
    Engine(
        EngineConfig(
            model=changed(
                tiny_pair("llama_eagle_agreeing").target, tmp_path / "model", sliding_window=100
            )
        )
    )


@pytest.mark.parametrize("names", [["MyModel"], [], None, ["LlamaForCausalLM"]])
@pytest.mark.parametrize(
    ("method", "preset"), [("eagle", "llama_eagle_agreeing"), ("dflash", "llama_dflash_agreeing")]
)
def test_a_draft_may_have_a_class_of_any_name(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    method: Method,
    preset: str,
    names: list[str] | None,
) -> None:
    """MAX does not know it and need not: the method and the tensors say what it is."""
    pair = tiny_pair(preset)
    assert pair.draft is not None
    draft = changed(pair.draft, tmp_path / "draft", architectures=names)
    Engine(EngineConfig(model=str(pair.target), draft_model=draft, speculative_method=method))


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize(
    ("preset", "part", "taken"),
    [
        ("llama_eagle", "target", ["default", "llama3"]),
        ("llama_eagle", "draft", ["default", "llama3"]),
        ("deepseek_mtp_sampled", "target", ["default", "yarn"]),
        ("kimi_dflash", "draft", ["default", "llama3", "yarn"]),
    ],
)
def test_a_rope_that_is_refused_is_told_which_are_not(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    preset: str,
    part: str,
    taken: list[str],
    kind: str,
) -> None:
    """Each type that the sentence names is taken by the same target or draft."""
    pair = tiny_pair(preset)
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    folders = {"target": str(pair.target), "draft": None if pair.draft is None else str(pair.draft)}
    # transformers 4 wrote it under the other name, with theta beside it.
    fields = {"rope_scaling": rope, "rope_parameters": rope}
    folders[part] = changed(getattr(pair, part), tmp_path / part, **fields)
    assert folders["target"] is not None
    config = EngineConfig(
        model=folders["target"], draft_model=folders["draft"], speculative_method=pair.method
    )
    if kind in taken:
        Engine(config)
        return
    with pytest.raises(InputError) as refused:
        Engine(config)
    assert str(refused.value) == (
        f"rope type {kind!r} of {folders[part]} is not supported; use a checkpoint of type"
        f" {' or '.join(map(repr, taken))}"
    )


def test_the_files_of_a_draft_are_looked_at_once(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny_pair("llama_eagle_agreeing")
    looked: list[str] = []
    for name in ("weight_files", "check_draft_files", "check_weight_files"):
        function = getattr(model_files, name)

        def counted(*given: Any, function: Any = function, **named: Any) -> Any:
            looked.append(function.__name__)
            return function(*given, **named)

        monkeypatch.setattr(model_files, name, counted)
    config = EngineConfig(
        model=str(pair.target), draft_model=str(pair.draft), speculative_method="eagle"
    )
    Engine(config)
    # Of the target and of the draft.
    assert Counter(looked) == {"weight_files": 2, "check_draft_files": 1, "check_weight_files": 2}
