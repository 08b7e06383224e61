"""Drafts in the forms in which other projects publish them run as the same draft in our form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.engine import InferenceSession
from safetensors.torch import load_file, save_file
from tiny import Dialect, TinyPair, tiny_dflash, tiny_eagle, tiny_eagle3, tiny_llama

from unispec.checkpoints.draft_config import flat_config
from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.methods import Method
from unispec.pipelines.architectures.registry import pipeline_model
from unispec.pipelines.architectures.unified_dflash_llama3 import UnifiedDflashLlama3Config
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Config
from unispec.pipelines.drafts.dflash.weights import dflash_state_dict
from unispec.pipelines.drafts.eagle.weights import eagle_state_dict
from unispec.pipelines.drafts.eagle3.method import EAGLE3
from unispec.pipelines.drafts.weights import DraftTensors
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.unified.checkpoint import read_checkpoint
from unispec.pipelines.unified.method import DraftWeights

Tensors = dict[str, torch.Tensor]


class CompileReachedError(BaseException):
    """Nothing on the way catches it."""


@pytest.fixture(autouse=True)
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise CompileReachedError

    monkeypatch.setattr(InferenceSession, "load", load)


def engine_config(target: Path, draft: Path, method: Method) -> EngineConfig:
    return EngineConfig(
        model=str(target), draft_model=str(draft), speculative_method=method, max_length=256
    )


def understood(target: Path, draft: Path, method: Method) -> tuple[Any, DraftTensors]:
    """What a draft's files are read as: the configuration of the graph, and the weights."""
    config = make_pipeline_config(engine_config(target, draft, method))
    assert config.draft_model is not None
    tensors, source = read_weights(config.draft_model)
    hf = config.draft_model.huggingface_config
    if method == "eagle":
        eagle = UnifiedEagleLlama3Config.initialize(config)
        return eagle, eagle_state_dict(tensors, hf, eagle.target, source=source)
    dflash = UnifiedDflashLlama3Config.initialize(config)
    taps = len(dflash.target_layer_ids)
    return dflash, dflash_state_dict(tensors, hf, dflash.target, num_taps=taps, source=source)


def assert_same(target: Path, plain: Path, other: Path, method: Method) -> None:
    """Both folders are one draft, and the other's graph can be built."""
    expected, weights = understood(target, plain, method)
    found, other_weights = understood(target, other, method)
    assert found == expected
    assert other_weights.state.keys() == weights.state.keys()
    for name, tensor in weights.state.items():
        np.testing.assert_array_equal(other_weights.state[name], tensor)
    np.testing.assert_array_equal(other_weights.d2t, weights.d2t)
    with pytest.raises(CompileReachedError):
        Engine(engine_config(target, other, method)).pipeline  # noqa: B018 - builds the graph


def rewrite(
    plain: Path,
    folder: Path,
    config: Callable[[dict[str, Any]], dict[str, Any]],
    tensors: Callable[[Tensors], Mapping[str, torch.Tensor]],
) -> Path:
    """A draft in another form."""
    folder.mkdir()
    stated = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(stated)))
    stored = {name: t.clone() for name, t in load_file(plain / "model.safetensors").items()}
    save_file(dict(tensors(stored)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def speculators(kind: str, layer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config.json as the `speculators` library writes it; `layer` is a plain draft's."""
    own = ("block_size", "num_target_layers", "dflash_config", "draft_vocab_size", "architectures")
    own += ("sliding_window_non_causal",)
    return {
        "architectures": [f"{kind}Speculator"],
        "auto_map": {"": f"{kind.lower()}.{kind}SpeculatorConfig"},
        "has_no_defaults_at_init": False,
        "speculators_config": {
            "algorithm": kind.lower(),
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/model"},
        },
        "speculators_model_type": kind.lower(),
        "speculators_version": "0.5.0",
        "transformer_layer_config": {k: v for k, v in layer.items() if k not in own},
        **more,
    }


@pytest.fixture
def target(tiny_pair: Callable[[str], TinyPair]) -> Path:
    """256 tokens, hidden 64, four layers."""
    return tiny_pair("llama_dflash_windowed").target


@pytest.mark.parametrize("fc_bias", [False, True])
def test_eagle_of_the_speculators_library(target: Path, tmp_path: Path, fc_bias: bool) -> None:
    """As nm-testing/eagle-llama3.1-8b-instruct: other names, and copies of the target's tensors."""
    plain = tiny_eagle(tmp_path / "plain", target, fc_bias=fc_bias, seed=1)
    copies = {name: torch.zeros(256, 64) for name in ("embed_tokens.weight", "lm_head.weight")}
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: speculators(
            "Eagle",
            stated,
            fusion_bias=fc_bias,
            layernorms=False,
            transformer_layer_architecture="LlamaDecoderLayer",
        ),
        lambda tensors: (
            {
                name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): tensor
                for name, tensor in tensors.items()
            }
            | copies
        ),
    )
    assert_same(target, plain, other, "eagle")


def test_eagle_of_vllms_first_form(target: Path, tmp_path: Path) -> None:
    plain = tiny_eagle(tmp_path / "plain", target, seed=1)
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: {"model_type": "eagle", "model": stated},
        lambda tensors: {
            name if name.startswith("fc") else f"model.{name}": tensor
            for name, tensor in tensors.items()
        },
    )
    assert_same(target, plain, other, "eagle")


@pytest.mark.parametrize(("d2t", "model_type"), [(None, "qwen3"), (100, "llama"), (100, None)])
def test_dflash_of_the_speculators_library(
    target: Path, tmp_path: Path, d2t: int | None, model_type: str | None
) -> None:
    """As RedHatAI/*-speculator.dflash: no model type, and a self-contained checkpoint."""
    plain = tiny_dflash(
        tmp_path / "plain",
        target,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        block_size=6,
        target_layer_ids=(3, 0, 1),
        mask_token_id=255,
        d2t=d2t,
        seed=15,
    )

    def config(stated: dict[str, Any]) -> dict[str, Any]:
        stated["model_type"] = model_type
        layer = {name: value for name, value in stated.items() if value is not None}
        return speculators(
            "DFlash",
            layer,
            aux_hidden_state_layer_ids=[4, 1, 2],
            mask_token_id=255,
            block_size=6,
            draft_vocab_size=d2t or 256,
            target_hidden_size=None,
            sliding_window_non_causal=False,
            projector_type="dflash",
            sample_from_anchor=False,
            shift_label=False,
        )

    more = {
        "embed_tokens.weight": torch.zeros(256, 64),
        "lm_head.weight": torch.zeros(d2t or 256, 64),
        "verifier_lm_head.weight": torch.zeros(d2t or 256, 64),
        "verifier_norm.weight": torch.ones(64),
    }

    def with_more(tensors: Tensors) -> Tensors:
        offsets = tensors.get("d2t", torch.zeros(256, dtype=torch.int64))
        mask = torch.zeros(256, dtype=torch.bool)
        mask[torch.arange(len(offsets)) + offsets] = True
        return tensors | more | {"t2d": mask}

    other = rewrite(plain, tmp_path / "other", config, with_more)
    assert_same(target, plain, other, "dflash")


def test_dflash_with_its_keys_at_the_top(target: Path, tmp_path: Path) -> None:
    plain = tiny_dflash(
        tmp_path / "plain",
        target,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=16,
        block_size=4,
        target_layer_ids=(1, 2),
        mask_token_id=7,
        seed=3,
    )
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: stated | stated.pop("dflash_config"),
        lambda tensors: tensors,
    )
    assert_same(target, plain, other, "dflash")


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, True), ({"sliding_window_non_causal": False}, False)]
)
def test_an_older_speculators_draft_sees_its_block_both_ways(
    keys: dict[str, bool], expected: bool
) -> None:
    """As vLLM takes it; versions that could train another mask write the key."""
    found = flat_config(speculators("DFlash", {}, **keys), "dflash", source="folder")
    assert found["sliding_window_non_causal"] is expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"speculators_model_type": "eagle"}, "transformer_layer_config of config.json is no"),
        ({"model_type": "eagle", "model": "llama"}, "model of config.json is no object"),
    ],
)
def test_a_nested_configuration_that_is_missing(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"folder: {said}"):
        flat_config(config, "eagle", source="folder")


def test_a_config_that_changed_is_read_again(target: Path, tmp_path: Path) -> None:
    """MAX keeps what it once read of a folder for the process."""
    draft = tiny_eagle(tmp_path / "draft", target, seed=1)
    path = draft / "config.json"
    stated = json.loads(path.read_text())
    for eps in (1e-5, 1e-3):
        path.write_text(json.dumps(stated | {"rms_norm_eps": eps}))
        found, _ = understood(target, draft, "eagle")
        assert found.draft.rms_norm_eps == eps


def eagle3(target: Path, draft: Path, method: Method = "eagle") -> tuple[Any, DraftWeights]:
    """The configuration of the graph of an EAGLE-3 draft, and its weights."""
    config = make_pipeline_config(engine_config(target, draft, method))
    model: Any = pipeline_model(config)
    assert model.method is EAGLE3
    assert config.draft_model is not None
    arch = model.model_config_cls.initialize(config)
    weights = LLAMA.state(*read_checkpoint(config.model)[:1], arch.target, source="target")
    found = EAGLE3.state(read_checkpoint(config.draft_model), arch, weights)
    return arch.with_draft(found), found


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A target of nine layers, of which a draft reads the outputs of 1, 3 and 5 by default."""
    return tiny_llama(
        tmp_path / "deep",
        hidden_size=64,
        intermediate_size=160,
        layers=9,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=256,
        tie=False,
        seed=3,
    )


@pytest.mark.parametrize("own_embedding", [False, True])
@pytest.mark.parametrize("d2t", [None, 100])
@pytest.mark.parametrize("dialect", ["specforge", "speculators"])
def test_eagle3_in_each_dialect_is_the_same_draft(
    deep: Path, tmp_path: Path, dialect: Dialect, d2t: int | None, own_embedding: bool
) -> None:
    """The authors' files do not say what they read; the others say it, in their own ways."""
    shape: dict[str, Any] = {"d2t": d2t, "own_embedding": own_embedding, "seed": 5}
    plain = tiny_eagle3(tmp_path / "plain", deep, dialect="authors", **shape)
    other = tiny_eagle3(tmp_path / "other", deep, dialect=dialect, taps=(1, 3, 5), **shape)
    (expected, weights), (found, other_weights) = eagle3(deep, plain), eagle3(deep, other)
    assert found == expected
    assert found.target_layer_ids == [1, 3, 5]
    assert found.own_embedding is own_embedding
    assert found.own_head
    assert found.draft.vocab_size == (d2t or 256)
    assert other_weights.state.keys() == weights.state.keys()
    for name, tensor in weights.state.items():
        np.testing.assert_array_equal(other_weights.state[name], tensor)
    for draft, method in ((plain, "eagle"), (other, "eagle"), (other, "eagle3")):
        with pytest.raises(CompileReachedError):
            Engine(engine_config(deep, draft, method)).pipeline  # noqa: B018 - builds the graph


def test_the_layers_of_newer_nvidia_files_are_numbered(deep: Path, tmp_path: Path) -> None:
    plain = tiny_eagle3(tmp_path / "plain", deep, seed=5)
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: (
            stated
            | {
                "eagle_config": {
                    "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
                    "use_aux_hidden_state": True,
                    "use_input_layernorm_in_first_layer": True,
                    "use_last_layernorm": True,
                    "use_mtp_layernorm": False,
                    "parallel_draft_step": 1,
                    "norm_before_fc": False,
                }
            }
        ),
        lambda tensors: {
            f"model.{name.replace('midlayer.', 'layers.0.')}": t for name, t in tensors.items()
        },
    )
    (expected, weights), (found, other_weights) = eagle3(deep, plain), eagle3(deep, other)
    assert found == expected
    for name, tensor in weights.state.items():
        np.testing.assert_array_equal(other_weights.state[name], tensor)


def test_the_authors_code_has_one_layer_whatever_the_file_says(deep: Path, tmp_path: Path) -> None:
    """yuhuili/EAGLE3-Vicuna1.3-13B states the target's forty."""
    plain = tiny_eagle3(tmp_path / "plain", deep, dialect="authors", seed=5)
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: stated | {"num_hidden_layers": 40},
        lambda tensors: tensors,
    )
    assert eagle3(deep, other)[0] == eagle3(deep, plain)[0]


def test_a_copied_embedding_and_a_missing_head_are_the_targets(deep: Path, tmp_path: Path) -> None:
    plain = tiny_eagle3(tmp_path / "plain", deep, own_head=False, seed=5)
    embedding = load_file(deep / "model.safetensors")["model.embed_tokens.weight"]
    other = rewrite(
        plain,
        tmp_path / "other",
        lambda stated: stated,
        lambda tensors: tensors | {"embed_tokens.weight": embedding},
    )
    found, weights = eagle3(deep, other)
    assert not found.own_embedding
    assert not found.own_head
    head = load_file(deep / "model.safetensors")["lm_head.weight"].numpy()
    ids = np.arange(100) + weights.state["d2t"]
    np.testing.assert_array_equal(weights.state["lm_head.weight"], head[ids])


@pytest.mark.parametrize("known", [250, 262])
def test_a_draft_of_a_padded_or_a_shorter_vocabulary(
    deep: Path, tmp_path: Path, known: int
) -> None:
    """Tokens that only one of them has: the target's rows embed them, and none is proposed."""
    plain = tiny_eagle3(tmp_path / "plain", deep, d2t=None, own_embedding=True, seed=5)
    sizes = {"vocab_size": known, "draft_vocab_size": known}

    def resized(tensors: Tensors) -> Tensors:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(6, 64)])[:known].contiguous()
        return tensors

    other = rewrite(plain, tmp_path / "other", lambda stated: stated | sizes, resized)
    found, weights = eagle3(deep, other)
    proposed = min(known, 256)
    assert found.draft.vocab_size == proposed
    stored = load_file(other / "model.safetensors")
    rows = stored["lm_head.weight"].numpy()[:proposed]
    np.testing.assert_array_equal(weights.state["lm_head.weight"], rows)
    embedding = weights.state["embed_tokens.weight"]
    assert embedding.shape == (256, 64)
    np.testing.assert_array_equal(
        embedding[:proposed], stored["embed_tokens.weight"].numpy()[:proposed]
    )
    own = load_file(deep / "model.safetensors")["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(embedding[proposed:], own[proposed:])


def stored(folder: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> None:
    """Changes the tensors of a draft in its folder."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    save_file(dict(change(tensors)), path, metadata={"format": "pt"})


def test_an_eagle3_head_whose_tokens_are_in_another_order(deep: Path, tmp_path: Path) -> None:
    """All of the target's tokens, and some more: the rows stand in the target's order then."""
    draft = tiny_eagle3(tmp_path / "draft", deep, d2t=256, seed=5)
    order = torch.arange(256).roll(1)
    stored(
        draft,
        lambda tensors: (
            tensors | {"d2t": order - torch.arange(256), "t2d": torch.arange(300) < 256}
        ),
    )
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    found, weights = eagle3(deep, draft)
    assert found.draft.vocab_size == 256
    assert "d2t" not in weights.state
    head = load_file(draft / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(weights.state["lm_head.weight"], head.roll(-1, 0).numpy())


def test_an_eagle3_draft_of_another_width(deep: Path, tmp_path: Path) -> None:
    """As yuhuili's for Llama 3.3 70B: it has both matrices, and reads wider states."""
    shape: dict[str, Any] = {"hidden_size": 32, "heads": (4, 2, 8), "seed": 5}
    draft = tiny_eagle3(tmp_path / "draft", deep, own_embedding=True, fc_norm=True, **shape)
    _, weights = eagle3(deep, draft)
    assert weights.state["fc.weight"].shape == (32, 192)
    assert weights.state["fc_norm.1.weight"].shape == (64,)
    with pytest.raises(CompileReachedError):
        Engine(engine_config(deep, draft, "eagle")).pipeline  # noqa: B018 - builds the graph


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda t: t | {"t2d": t["t2d"].roll(1)}, {}, "'t2d' and 'd2t' contradict each other for"),
        (
            lambda t: t | {"t2d": t["t2d"][:7].clone()},
            {},
            r"'t2d' is bool of shape \[7\], expected",
        ),
        (lambda t: t, {"draft_vocab_size": "100"}, "draft_vocab_size '100' of .* is no positive"),
        (lambda t: t, {"draft_vocab_size": 99}, "'d2t' has 100 entries and draft_vocab_size is 99"),
        (
            lambda t: t,
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4]}},
            r"'fc.weight' reads 3 layers of the target, and config.json has 2: state as many in",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "midlayer.hidden_norm.weight"},
            {},
            r"lacks tensor 'layers.0.hidden_norm.weight', the first of shape \[64\]",
        ),
        (
            lambda t: t | {"fc_norm.0.weight": torch.ones(64)},
            {},
            "has tensor 'fc_norm.0.weight' that an EAGLE-3 draft of its config.json does not have",
        ),
        (lambda t: t, {"norm_before_fc": True}, "lacks tensor 'input_norm.weight'"),
        (
            lambda t: t | {"layers.0.hidden_norm.weight": torch.ones(64)},
            {},
            "has both 'layers.0.hidden_norm.weight' and 'midlayer.hidden_norm.weight': remove one",
        ),
        (
            lambda t: (
                {k: v for k, v in t.items() if k != "lm_head.weight"}
                | {"embed_tokens.weight": torch.ones(256, 64)}
            ),
            {"tie_word_embeddings": True},
            "the head is the draft's own embedding, which is not supported: store it as",
        ),
        (
            lambda t: t | {"embed_tokens.weight": torch.ones(200, 32)},
            {},
            r"'embed_tokens.weight' has shape \[200, 32\], expected \[256, 64\]",
        ),
    ],
)
def test_an_eagle3_draft_that_is_wrong(
    deep: Path, tmp_path: Path, change: Any, config: dict[str, Any], said: str
) -> None:
    draft = tiny_eagle3(tmp_path / "draft", deep, seed=5)
    stored(draft, change)
    stated = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(stated | config))
    with pytest.raises(InputError, match=said):
        eagle3(deep, draft, "eagle3")


def test_an_eagle3_draft_for_another_target(
    deep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = tiny_llama(
        tmp_path / "narrow",
        hidden_size=32,
        intermediate_size=64,
        layers=9,
        heads=4,
        kv_heads=2,
        head_dim=8,
        vocab_size=256,
        tie=False,
    )
    draft = tiny_eagle3(tmp_path / "draft", deep, seed=5)
    with pytest.raises(
        InputError, match=r"hidden_size 64, the target 32, and the draft no 'embed_tokens"
    ):
        eagle3(narrow, draft)
    embedding = load_file(deep / "model.safetensors")["model.embed_tokens.weight"]
    other = embedding.flip(0).contiguous()
    stored(draft, lambda tensors: tensors | {"embed_tokens.weight": other})
    with pytest.raises(InputError, match="is token 255 of the target: use a draft"):
        eagle3(deep, draft)
    stored(draft, lambda tensors: tensors | {"embed_tokens.weight": torch.randn(256, 64)})
    eagle3(deep, draft)
    assert "is not the target's, so the draft was trained for another model" in caplog.text


def test_what_a_wrong_config_says_does_not_outweigh_the_tensors(deep: Path, tmp_path: Path) -> None:
    draft = tiny_eagle3(tmp_path / "draft", deep, dialect="authors", seed=5)
    stated = json.loads((draft / "config.json").read_text())
    path = draft / "config.json"
    path.write_text(json.dumps(stated | {"architectures": ["LlamaForCausalLMEagle"]}))
    eagle3(deep, draft)
    path.write_text(json.dumps(stated | {"target_layer_ids": [1, 2]}))
    with pytest.raises(InputError, match=r"target_layer_ids \[1, 2\] of .* is not supported"):
        eagle3(deep, draft)
    plain = tiny_eagle(tmp_path / "plain", deep, seed=1)
    with pytest.raises(InputError, match=r"is an EAGLE draft; give --speculative-method eagle$"):
        make_pipeline_config(engine_config(deep, plain, "eagle3"))


def test_one_layer_of_two_generations_each_says_which_it_is(deep: Path, tmp_path: Path) -> None:
    for write, method in ((tiny_eagle, "eagle"), (tiny_eagle3, "eagle3")):
        write_any: Any = write
        draft = write_any(tmp_path / method, deep)
        assert Engine(engine_config(deep, draft, "eagle")).speculative_method == method
    assert Engine(EngineConfig(model=str(deep))).speculative_method is None
