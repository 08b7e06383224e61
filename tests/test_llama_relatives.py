"""Qwen2, Qwen3, Mistral and Granite: Llama's stack with other options, alone and with drafts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_texts import Built, build_pair, describe
from logits_graph import LogitsGraph, Stack, assert_logits, compile_logits
from max.nn import Module
from reference.target import TargetReference
from runs import MAX_LENGTH
from safetensors.numpy import save_file
from test_graph_texts import EXPECTED
from tiny import (
    RELATIVE_PAIRS,
    TinyPair,
    agreeing_dflash,
    agreeing_eagle,
    agreeing_llama,
    tiny_dflash,
    tiny_eagle3,
    tiny_llama,
)
from tiny.checkpoint import read, write
from tiny.tokenizer import write_tokenizer

from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.methods import Method
from unispec.pipelines.architectures import registry
from unispec.pipelines.layers.stack import LayerGroup, run_layers, weight_prefix
from unispec.pipelines.targets.llama import stack

RELATIVES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie": True, "seed": 41},
    "qwen3": {"tie": False, "head_dim": 32, "seed": 42},
    "mistral": {"tie": False, "seed": 43},
    "granite": {"tie": True, "seed": 44},
}
"""By model type: options of `write_relative`."""


def write_relative(folder: Path, model_type: str, **options: Any) -> Path:
    """A tiny checkpoint in the form in which the model type is published."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    }
    return tiny_llama(folder, model_type=model_type, **shape | RELATIVES[model_type] | options)


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("relatives")
    return {name: write_relative(root / name, name) for name in RELATIVES}


def read_stack(folder: Path, model_type: str) -> Stack:
    """The target as the composed pipeline model reads it."""
    family = registry.find(model_type, None, source=str(folder)).family
    pipeline_config = make_pipeline_config(EngineConfig(model=str(folder), max_length=MAX_LENGTH))
    config = family.config.initialize(pipeline_config)
    checkpoint = family.read(pipeline_config.model, config)
    weights = family.state(checkpoint.tensors, config, source=checkpoint.source)
    return Stack(config, family.stack(config), weights)


def run_layers_apart(layers: Sequence[Module], *given: Any, **named: Any) -> Any:
    """`run_layers`, whose subgraph has a name of its own in each stack."""
    prefix = weight_prefix(layers[0])
    groups = [LayerGroup(prefix + group.name, group.layers) for group in named.pop("groups")]
    return run_layers(layers, *given, **named, groups=groups)


@pytest.fixture(scope="module")
def relatives_model(relatives: dict[str, Path]) -> LogitsGraph:
    stacks = {name: read_stack(folder, name) for name, folder in relatives.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stack, "run_layers", run_layers_apart)
        return compile_logits("llama_relatives_logits", stacks)


@pytest.mark.usefixtures("one_thread")
def test_logits_of_every_relative(relatives_model: LogitsGraph, relatives: dict[str, Path]) -> None:
    assert_logits(relatives_model, {n: TargetReference(f) for n, f in relatives.items()})


WRITERS: dict[Method, Callable[[Path, Path], Path]] = {
    "eagle": agreeing_eagle,
    "eagle3": partial(tiny_eagle3, dialect="speculators", taps=(0, 1)),
    "dflash": agreeing_dflash,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Method | None], Built]:
    """The graph of a tiny pair of Llama's size, by model type and method; nothing is compiled."""
    root = tmp_path_factory.mktemp("built")

    @cache
    def build(model_type: str, method: Method | None) -> Built:
        target = root / model_type / "target"
        if not target.exists():
            agreeing_llama(target, model_type=model_type)
        if method is None:
            return build_pair(TinyPair(target, None), alone=True)
        draft = WRITERS[method](root / model_type / method, target)
        return build_pair(TinyPair(target, draft, method))

    return build


def difference(one: Built, other: Built) -> Counter[str]:
    """How many operations and weights of each name `one` has more than `other`."""
    counts = []
    for built in (one, other):
        described = describe(built.text, built.weights)
        weights = {"weights": described["weights"]}
        counts.append(Counter(described["operations"] | weights))
    counts[0].subtract(counts[1])
    # Constants and types say nothing of their own.
    return Counter(
        {
            name: count
            for name, count in counts[0].items()
            if count and name not in ("mo.constant", "mo.constant.external", "mo.tensor")
        }
    )


COMPOSED = [
    (pair.family.model_type, pair.method.name)
    for pair in registry.pairs()
    if pair.method is not None and pair.family.model_type in RELATIVES
]


def test_every_draft_method_of_llama_is_composed_with_every_relative() -> None:
    drafting = [
        pair.method.name
        for pair in registry.pairs()
        if pair.method and pair.family.model_type == "llama"
    ]
    assert set(COMPOSED) == {
        (model_type, method) for model_type in RELATIVES for method in drafting
    }


@pytest.mark.parametrize(("model_type", "method"), COMPOSED)
def test_a_relative_with_a_draft_differs_from_llama_as_it_does_alone(
    built: Callable[[str, Method | None], Built], model_type: str, method: Method
) -> None:
    """The draft is the same, but that a Granite's divides its logits wherever it has some."""
    alone = difference(built(model_type, None), built("llama", None))
    together = difference(built(model_type, method), built("llama", method))
    if model_type == "granite":
        # EAGLE has logits in its loop, DFlash of a block at once; EAGLE-3 has a head of its own.
        alone["rmo.div"] += {"eagle": 1, "eagle3": 0, "dflash": 1}[method]
    assert together == alone


@pytest.mark.parametrize("method", [None, *WRITERS])
def test_a_mistral_has_the_graph_of_a_llama(
    built: Callable[[str, Method | None], Built], method: Method | None
) -> None:
    """So what is proved of the one is proved of the other."""
    mistral, llama = built("mistral", method), built("llama", method)
    assert mistral.text == llama.text
    assert mistral.weights == llama.weights


def test_what_the_relatives_compute_more_than_llama(
    built: Callable[[str, Method | None], Built],
) -> None:
    """In a layer, which is there once; and what its weights are in two layers."""
    llama = built("llama", None)
    biased = difference(built("qwen2", None), llama)
    # Between projections and attention: two operations then, and two more for output and MLP.
    assert biased == {"rmo.concat": 1, "rmo.add": 1, "mo.custom": 3, "weights": 2 * 3}
    normed = difference(built("qwen3", None), llama)
    assert (normed["mo.reduce.rms_norm"], normed["weights"]) == (2, 2 * 2)
    # Embedding and logits; those of attention and MLP are parameters of operations.
    assert difference(built("granite", None), llama) == {"rmo.mul": 1, "rmo.div": 1}


@pytest.mark.parametrize("name", RELATIVE_PAIRS)
def test_a_preset_is_what_its_name_says(tiny_pair: Callable[[str], TinyPair], name: str) -> None:
    model_type, _, method = name.partition("_")
    pair = tiny_pair(name)
    assert json.loads((pair.target / "config.json").read_text())["model_type"] == model_type
    assert pair.method == method


def test_the_presets_of_mistral_and_llama_have_one_graph() -> None:
    assert EXPECTED["mistral_eagle"] == EXPECTED["llama_eagle_agreeing"]


def without(part: str) -> Callable[[dict[str, Any]], None]:
    def remove(tensors: dict[str, Any]) -> None:
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            del tensors[name]

    return remove


def added(name: str, like: str) -> Callable[[dict[str, Any]], None]:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = np.ones_like(tensors[like])

    return add


LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [
        ("qwen2", without("q_proj.bias"), "lacks tensors 'layers.0.self_attn.q_proj.bias'"),
        ("qwen2", without(".bias"), "lacks tensors 'layers.0.self_attn.q_proj.bias'"),
        (
            "qwen2",
            added(f"{LAYER}.o_proj.bias", "model.norm.weight"),
            f"has tensor '{LAYER}.o_proj.bias'",
        ),
        ("qwen3", without("q_norm"), "lacks tensors 'layers.0.self_attn.q_norm.weight'"),
        ("qwen3", without("k_norm"), "lacks tensors 'layers.0.self_attn.k_norm.weight'"),
        ("mistral", added(f"{LAYER}.q_proj.bias", "model.norm.weight"), "q_proj.bias"),
        ("mistral", added(f"{LAYER}.q_norm.weight", "model.norm.weight"), "q_norm.weight"),
        ("granite", without("input_layernorm"), "lacks tensors 'layers.0.input_layernorm.weight'"),
    ],
)
def test_tensors_that_another_relative_has(
    tmp_path: Path, model_type: str, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    folder = write_relative(tmp_path / "model", model_type)
    config, tensors = read(folder)
    change(tensors)
    write(folder, config, tensors)
    with pytest.raises(InputError, match=re.escape(said)):
        Engine(EngineConfig(model=str(folder), max_length=MAX_LENGTH)).load()


WINDOW = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("mistral", {"sliding_window": 511}, "sliding_window 511"),
        ("mistral", {"sliding_window": 512}, None),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", WINDOW, "sliding_window 100"),
        ("qwen3", WINDOW, "sliding_window 100"),
        ("qwen2", WINDOW | {"use_sliding_window": False}, None),
        ("qwen3", WINDOW | {"use_sliding_window": False}, None),
        # The first layers have no window, and here there are no others.
        ("qwen2", WINDOW | {"max_window_layers": 2}, None),
        ("qwen3", WINDOW | {"max_window_layers": 2}, None),
        # transformers' Granite has no window.
        ("granite", {"sliding_window": 100}, None),
        ("granite", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("granite", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier 0.0"),
        ("granite", {"logits_scaling": -1.0}, "logits_scaling -1.0"),
        ("qwen2", {"embedding_multiplier": 2.0}, "embedding_multiplier .* is 2.0"),
        ("qwen2", {"attention_multiplier": 0.5}, "attention_multiplier .* is 0.5"),
        # transformers' Qwen2 has no bias of the output, whatever is stated.
        ("qwen2", {"attention_bias": True}, None),
        ("qwen2", {"head_dim": "16"}, "head_dim '16' .* no positive integer"),
        ("granite", {"head_dim": 16.5}, "head_dim 16.5 .* no positive integer"),
        ("qwen2", {"is_causal": False}, "is_causal False"),
        ("qwen3", {"rope_theta": 0, "rope_parameters": None}, "rope_theta 0"),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 512}, None),
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}, "window 5"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "is a Qwen3ForCausalLM"),
    ],
)
def test_what_a_config_may_say(
    tmp_path: Path, model_type: str, fields: dict[str, Any], said: str | None
) -> None:
    folder = write_relative(tmp_path / "model", model_type)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    config = EngineConfig(model=str(folder), max_length=MAX_LENGTH)
    if said is None:
        Engine(config)
        return
    with pytest.raises(InputError, match=said):
        Engine(config)


QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""config.json of Qwen/Qwen3-8B."""

QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
"""config.json of Qwen/Qwen3-4B."""

DFLASH: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 5,
    "max_window_layers": 5,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
}
"""What z-lab's drafts for Qwen3 state otherwise than their targets."""


@pytest.mark.parametrize("target", [QWEN3_4B, QWEN3_8B], ids=["4B", "8B"])
def test_published_dflash_drafts_for_qwen3(tmp_path: Path, target: dict[str, Any]) -> None:
    """z-lab/Qwen3-4B-DFlash-b16 and z-lab/Qwen3-8B-DFlash-b16: only config.json is read."""
    stated = {key: value for key, value in (target | DFLASH).items() if key != "torch_dtype"}
    for name, fields in {"target": target, "draft": stated}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        save_file({}, tmp_path / name / "model.safetensors")
    asked = EngineConfig(
        model=str(tmp_path / "target"),
        draft_model=str(tmp_path / "draft"),
        speculative_method="dflash",
    )
    pipeline_config = make_pipeline_config(asked)
    model = registry.pipeline_model(pipeline_config)
    config: Any = model.model_config_cls.initialize(pipeline_config)
    assert config.speculative_config.num_speculative_tokens == 15
    assert config.resolve_block_size() == 16
    assert config.mask_token_id == 151669
    assert list(config.tapped_layers) == [1, 9, 17, 25, 33]
    assert config.windows == [None] * 5
    assert config.causal == [False] * 5
    assert config.target.qk_norm
    assert config.target.tie_word_embeddings == target["tie_word_embeddings"]
    assert config.draft.rope_theta == config.target.rope_theta == 1e6
    assert config.draft.head_dim == config.target.head_dim == 128
    assert config.draft.hidden_size == target["hidden_size"]


def test_a_tiny_dflash_draft_in_the_form_of_z_lab_s(tmp_path: Path) -> None:
    """Config and tensors, as far as the graph."""
    target = write_relative(tmp_path / "target", "qwen3", tie=True, layers=4)
    draft = tiny_dflash(
        tmp_path / "draft",
        target,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        block_size=16,
        target_layer_ids=(1, 3),
        mask_token_id=250,
    )
    config, tensors = read(draft)
    assert set(tensors) == {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        *(
            f"layers.{layer}.{name}.weight"
            for layer in range(2)
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
                *(f"self_attn.{part}_proj" for part in "qkvo"),
                *(f"self_attn.{part}_norm" for part in "qk"),
            )
        ),
    }
    sizes = {key: config[key] for key in (*SIZES, "dtype", "bos_token_id", "eos_token_id")}
    own = {
        "dflash_config": config["dflash_config"],
        "layer_types": ["full_attention"] * 2,
        "num_hidden_layers": 2,
        "num_target_layers": 4,
        "rope_theta": 10000,
    }
    stated = {key: value for key, value in (QWEN3_8B | DFLASH).items() if key != "torch_dtype"}
    write(draft, stated | sizes | own, tensors)
    graph = build_pair(TinyPair(target, draft, "dflash"))
    assert graph.weights["draft.fc.weight"] == "float32 [64, 128]"
    assert graph.weights["draft.layers.1.self_attn.q_norm.weight"] == "float32 [32]"


SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


TOKENIZERS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    },
    "mistral": {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    },
    "granite": {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": "<|end_of_text|>",
        "eos_token": "<|end_of_text|>",
        "errors": "replace",
        "pad_token": "<|end_of_text|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|end_of_text|>",
    },
}
TOKENIZERS["qwen3"] = TOKENIZERS["qwen2"]
"""What tokenizer_config.json says, beside a list of added tokens and a chat template."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>")
"""Ids 250 to 253; published models have room for more tokens than their tokenizers know, too."""

ENDS = {"qwen2": [252, 250], "qwen3": [252, 250], "mistral": 2, "granite": 253}
"""Tokens that end a text, as generation_config.json has them."""


@pytest.mark.parametrize("model_type", RELATIVES)
def test_tokenizers_as_they_are_published(tmp_path: Path, model_type: str) -> None:
    folder = write_relative(tmp_path / "model", model_type)
    write_tokenizer(folder, 250, beyond=SPECIAL)
    # Those of Qwen and Granite begin a text with nothing; config.json names a token all the same.
    begins = {"qwen2": 250, "qwen3": 250, "mistral": 1, "granite": 253}[model_type]
    ends = ENDS[model_type]
    for name, fields in {
        "config.json": {
            "bos_token_id": begins,
            "eos_token_id": ends[0] if isinstance(ends, list) else ends,
        },
        "generation_config.json": {"bos_token_id": begins, "eos_token_id": ends},
    }.items():
        file = folder / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | fields))
    listed = {
        str(250 + index): {"content": token, "special": True} for index, token in enumerate(SPECIAL)
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(TOKENIZERS[model_type] | {"added_tokens_decoder": listed})
    )
    engine = Engine(EngineConfig(model=str(folder), max_length=MAX_LENGTH))
    assert set(engine.eos_token_ids) == (set(ends) if isinstance(ends, list) else {ends})
    text = " a  line\nand é"
    ids = engine.tokenizer.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (251, 252)
    assert engine.tokenizer.decode(ids[1:-1]) == text
