"""The weights of drafts: of EAGLE and DFlash, of smaller vocabularies, and the packaged ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
from states import SOURCE, Shape, change, hugging_face_state, refused

from unispec.checkpoints import Tensor, read_tensors
from unispec.checkpoints.demo import demo_draft_folder
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.dflash.weights import dflash_state_dict
from unispec.pipelines.drafts.eagle.weights import eagle_state_dict
from unispec.pipelines.drafts.eagle3.weights import eagle3_weights
from unispec.pipelines.drafts.weights import draft_weights


def eagle_state(shape: Shape, *, fc_bias: bool = False) -> dict[str, Tensor]:
    """A random EAGLE draft: `fc`, and the layers of a Llama but for layer 0's first norm."""
    state = {
        name: tensor
        for name, tensor in hugging_face_state(shape).items()
        if name.startswith("model.layers.") and name != "model.layers.0.input_layernorm.weight"
    }
    state["fc.weight"] = np.ones((shape.hidden_size, 2 * shape.hidden_size), np.float16)
    if fc_bias:
        state["fc.bias"] = np.ones(shape.hidden_size, np.float16)
    return state


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("fc_bias", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_eagle_state_holds_the_checkpoints_tensors(prefix: str, fc_bias: bool, layers: int) -> None:
    shape = Shape(num_hidden_layers=layers)
    tensors = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in eagle_state(shape, fc_bias=fc_bias).items()
    }
    weights = eagle_state_dict(tensors, shape, Shape(), source=SOURCE)
    assert weights.state.keys() == {name.removeprefix(prefix) for name in tensors}
    assert all(weights.state[name.removeprefix(prefix)] is tensors[name] for name in tensors)
    assert ("fc.bias" in weights.state) is fc_bias
    assert weights.d2t is None
    assert "layers.0.input_layernorm.weight" not in weights.state
    assert ("layers.2.input_layernorm.weight" in weights.state) is (layers == 3)


def test_copies_of_the_targets_embedding_and_head_are_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = eagle_state(Shape())
    copies: dict[str, Tensor] = {
        "model.embed_tokens.weight": np.ones((50, 12), np.float32),
        "lm_head.weight": np.ones((50, 12), np.float32),
        "t2d": np.ones(50, bool),
    }
    with caplog.at_level(logging.WARNING):
        weights = eagle_state_dict(tensors | copies, Shape(), Shape(), source=SOURCE)
    assert len(weights.state) == len(tensors)
    assert "'model.embed_tokens.weight' is ignored" in caplog.text
    assert "'lm_head.weight' is ignored" in caplog.text


@pytest.mark.parametrize("draft_vocab_size", [None, 4])
def test_reduced_vocabulary(draft_vocab_size: int | None) -> None:
    shape = Shape(draft_vocab_size=draft_vocab_size)
    targets = np.array([3, 0, 49, 17])
    reduced: dict[str, Tensor] = {
        "d2t": (targets - np.arange(4)).astype(np.int32),
        "lm_head.weight": np.ones((4, 12), np.float16),
    }
    weights = eagle_state_dict(eagle_state(shape) | reduced, shape, Shape(), source=SOURCE)
    assert weights.d2t is not None
    assert weights.d2t.dtype == np.int64
    np.testing.assert_array_equal(np.arange(4) + weights.d2t, targets)


def test_draft_vocab_size_of_the_full_vocabulary_needs_no_d2t() -> None:
    shape = Shape(draft_vocab_size=50)
    assert eagle_state_dict(eagle_state(shape), shape, Shape(), source=SOURCE).d2t is None


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (change("midlayer.hidden_norm.weight", np.ones(12)), ["midlayer.hidden_norm.weight"]),
        (change("norm.weight", np.ones(12)), ["'norm.weight'", "an EAGLE draft"]),
        (change("model.layers.0.input_layernorm.weight", np.ones(12)), ["input_layernorm"]),
        (change("fc.weight", None), ["lacks tensor 'fc.weight'", "[12, 24]"]),
        (change("fc.weight", np.ones((12, 36))), ["'fc.weight'", "[12, 36]", "[12, 24]"]),
        (change("fc.bias", np.full(12, np.nan)), ["'fc.bias'", "12 NaN"]),
        (
            change("embed_tokens.weight", np.ones((49, 12))),
            ["embed_tokens", "[49, 12]", "[50, 12]"],
        ),
        (change("lm_head.weight", np.ones((4, 12))), ["lm_head", "[4, 12]", "[50, 12]"]),
        (change("d2t", np.array([0, 49])), ["d2t", "draft id 1 to 50", "50 tokens"]),
        (change("d2t", np.array([0, -2])), ["d2t", "draft id 1 to -1"]),
        (change("d2t", np.array([5, 4])), ["d2t", "2 draft ids to the target id 5"]),
        (change("d2t", np.zeros((2, 2), int)), ["d2t", "[2, 2]"]),
        (change("d2t", np.zeros(2, np.float32)), ["d2t", "float32"]),
    ],
)
def test_bad_draft(damage: Callable[[dict[str, Tensor]], None], parts: list[str]) -> None:
    tensors = eagle_state(Shape())
    damage(tensors)
    with refused(SOURCE, *parts):
        eagle_state_dict(tensors, Shape(), Shape(), source=SOURCE)


@pytest.mark.parametrize(
    ("draft", "parts"),
    [
        (Shape(hidden_size=16), ["hidden_size 16", "12", "trained for this target"]),
        (Shape(num_hidden_layers=3), ["lacks", "layers.2."]),
        (Shape(num_hidden_layers=1), ["layers.1.", "does not have"]),
        (Shape(draft_vocab_size=4), ["lacks tensor 'd2t'", "4", "50"]),
    ],
)
def test_draft_config_that_does_not_fit(draft: Shape, parts: list[str]) -> None:
    with refused(SOURCE, *parts):
        eagle_state_dict(eagle_state(Shape()), draft, Shape(), source=SOURCE)


def test_biases_of_an_eagle_draft_for_qwen2_are_used() -> None:
    """Whatever its config.json says: those of q, k and v, in every layer."""
    shape = Shape()
    sizes = {"q_proj": 24, "k_proj": 12, "v_proj": 12}
    biases = {
        f"layers.{layer}.self_attn.{name}.bias": np.full(size, layer + 1.0, np.float32)
        for layer in range(2)
        for name, size in sizes.items()
    }
    weights = eagle_state_dict(eagle_state(shape) | biases, shape, shape, source=SOURCE)
    for name, bias in biases.items():
        np.testing.assert_array_equal(weights.state[name], bias)
    del biases["layers.1.self_attn.v_proj.bias"]
    with refused(SOURCE, "lacks", "layers.1.self_attn.v_proj.bias"):
        eagle_state_dict(eagle_state(shape) | biases, shape, shape, source=SOURCE)


def test_a_draft_that_knows_fewer_tokens_proposes_those() -> None:
    """As that of a model for its fine-tune, which added tokens."""
    draft, target = Shape(vocab_size=40), Shape()
    copies = {"embed_tokens.weight": np.ones((40, 12)), "lm_head.weight": np.ones((40, 12))}
    weights = eagle_state_dict(eagle_state(draft) | copies, draft, target, source=SOURCE)
    assert weights.d2t is not None
    np.testing.assert_array_equal(weights.d2t, np.zeros(40))
    head = np.arange(50 * 12, dtype=np.float32).reshape(50, 12)
    joined = draft_weights(weights, {"lm_head.weight": head})
    assert joined.num_proposed == 40
    np.testing.assert_array_equal(joined.state["lm_head.weight"], head[:40])
    np.testing.assert_array_equal(joined.state["t2d"], [*range(40), *[40] * 10])


def test_a_draft_that_knows_more_tokens_proposes_the_targets() -> None:
    """As that of a padded vocabulary for a target without the padding."""
    draft, target = Shape(vocab_size=64), Shape()
    assert eagle_state_dict(eagle_state(draft), draft, target, source=SOURCE).d2t is None


def test_a_reduced_vocabulary_without_the_tokens_that_the_target_lacks() -> None:
    draft, target = Shape(vocab_size=64), Shape()
    chosen = np.array([3, 49, 50, 63, 7])
    tensors = eagle_state(draft) | {"d2t": chosen - np.arange(5)}
    weights = eagle_state_dict(tensors, draft, target, source=SOURCE)
    assert weights.d2t is not None
    np.testing.assert_array_equal(np.arange(3) + weights.d2t, [3, 49, 7])
    with refused("names none of the target's 50 tokens"):
        eagle_state_dict(tensors | {"d2t": np.array([50])}, draft, target, source=SOURCE)


EMBEDDING = np.random.default_rng(5).normal(size=(50, 12)).astype(np.float32)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    "copy",
    [
        EMBEDDING,
        EMBEDDING.astype(np.float16),
        EMBEDDING[:40],
        np.concatenate([EMBEDDING, np.zeros((14, 12))]),
        EMBEDDING + 0.1 * np.random.default_rng(6).normal(size=(50, 12)),
    ],
    ids=["equal", "rounded", "fewer tokens", "more tokens", "fine-tuned"],
)
def test_a_copy_of_the_targets_embedding_may_be_a_little_off(
    name: str, copy: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    check_copies({name: copy}, {"embed_tokens.weight": EMBEDDING}, source=SOURCE)
    assert not caplog.records


def test_a_copy_of_another_models_embedding_is_told(caplog: pytest.LogCaptureFixture) -> None:
    other: Tensor = np.random.default_rng(7).normal(size=(50, 12))
    check_copies({"lm_head.weight": other}, {"embed_tokens.weight": EMBEDDING}, source=SOURCE)
    assert "'lm_head.weight' is not the target's" in caplog.text


def test_tokens_under_other_ids_are_refused() -> None:
    """A token was put in before id 3, so the rows from there on are those of the token before."""
    moved = np.insert(EMBEDDING, 3, 1, axis=0)[:50]
    with refused(SOURCE, "token 4 of 'embed_tokens.weight' is token 3 of the target"):
        check_copies(
            {"embed_tokens.weight": moved}, {"embed_tokens.weight": EMBEDDING}, source=SOURCE
        )


def test_d2t_of_another_length_than_the_config_says() -> None:
    tensors = eagle_state(Shape()) | {"d2t": np.arange(3)}
    with refused("d2t", "3 entries", "draft_vocab_size is 4"):
        eagle_state_dict(tensors, Shape(draft_vocab_size=4), Shape(), source=SOURCE)


def dflash_state(shape: Shape, taps: int = 3) -> dict[str, Tensor]:
    """An EAGLE draft's layers, with the norms and the projection of a DFlash one."""
    tensors = eagle_state(shape)
    tensors["fc.weight"] = np.ones((12, 12 * taps), np.float32)
    tensors |= {name: np.ones(12, np.float32) for name in ("hidden_norm.weight", "norm.weight")}
    for layer in range(shape.num_hidden_layers):
        prefix = f"layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = np.ones(12, np.float32)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{norm}.weight"] = np.ones(shape.head_dim, np.float32)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def test_dflash_state_holds_the_checkpoints_tensors() -> None:
    tensors = dflash_state(Shape())
    copies: dict[str, Tensor] = {"embed_tokens.weight": np.ones((50, 12), np.float32)}
    weights = dflash_state_dict(tensors | copies, Shape(), Shape(), num_taps=3, source=SOURCE)
    assert weights.state.keys() == tensors.keys()
    assert all(weights.state[name] is tensors[name] for name in tensors)
    assert weights.d2t is None


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (change("hidden_norm.weight", None), ["lacks tensor 'hidden_norm.weight'"]),
        (change("layers.1.self_attn.q_norm.weight", None), ["lacks", "layers.1.self_attn.q_norm"]),
        (change("fc.weight", np.ones((12, 24))), ["'fc.weight'", "[12, 24]", "[12, 36]"]),
        (change("fc.bias", np.ones(12)), ["'fc.bias'", "a DFlash draft"]),
        (change("norm.weight", np.full(12, np.nan)), ["'norm.weight'", "12 NaN"]),
        (change("d2t", np.array([5, 4])), ["d2t", "2 draft ids to the target id 5"]),
    ],
)
def test_bad_dflash_draft(damage: Callable[[dict[str, Tensor]], None], parts: list[str]) -> None:
    tensors = dflash_state(Shape())
    damage(tensors)
    with refused(SOURCE, *parts):
        dflash_state_dict(tensors, Shape(), Shape(), num_taps=3, source=SOURCE)


def test_packaged_draft_loads() -> None:
    """Its head is left out, for it has the target's rows."""
    folder = demo_draft_folder("eagle3")
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{field.name: config[field.name] for field in dataclasses.fields(Shape)})
    tensors = read_tensors([folder / "model.safetensors"])
    head = np.zeros((shape.vocab_size, shape.hidden_size), np.float16)
    weights = eagle3_weights(
        tensors,
        shape,
        shape,
        {"embed_tokens.weight": head},
        num_taps=3,
        norms=[f"fc_norm.{tap}.weight" for tap in range(3)],
        source=str(folder),
    )
    assert not weights.own_head
    assert weights.num_proposed == len(weights.state["d2t"]) == config["draft_vocab_size"]
    numbers = {tensor.dtype for name, tensor in weights.state.items() if name[1:] != "2d"}
    assert {dtype for dtype in numbers if dtype.kind == "f"} == {np.dtype(np.float16)}


def test_unknown_draft_method() -> None:
    with refused("'medusa'", "dflash or eagle3"):
        demo_draft_folder("medusa")
