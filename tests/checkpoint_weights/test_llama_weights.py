"""The weights of a Llama: all of them, of the right shapes, and finite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from states import SOURCE, Shape, change, hugging_face_state, refused

from unispec.checkpoints import Tensor
from unispec.pipelines.targets.llama.weights import expected_shapes, llama3_state_dict

SHAPES = [
    Shape(),
    Shape(tie_word_embeddings=True),
    Shape(attention_bias=True, num_key_value_heads=4),
    Shape(head_dim=8, num_key_value_heads=1, num_hidden_layers=3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_hugging_faces(shape: Shape) -> None:
    reference = {
        name.removeprefix("model."): tensor.shape
        for name, tensor in hugging_face_state(shape).items()
    }
    assert expected_shapes(shape) == reference


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_state_holds_the_checkpoints_tensors(shape: Shape, prefix: str) -> None:
    tensors = hugging_face_state(shape)
    named = {name.replace("model.", prefix): tensor for name, tensor in tensors.items()}
    state = llama3_state_dict(named, shape, source=SOURCE)
    assert len(state) == len(tensors)
    for name, tensor in tensors.items():
        assert state[name.removeprefix("model.")] is tensor


def test_computed_buffers_and_a_tied_head_are_dropped() -> None:
    shape = Shape(tie_word_embeddings=True)
    tensors = hugging_face_state(shape)
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    state = llama3_state_dict(tensors | extra, shape, source=SOURCE)
    assert len(state) == len(tensors)
    assert "lm_head.weight" not in state


def poisoned(value: float, dtype: str) -> Tensor:
    tensor = np.ones((20, 12), dtype)
    tensor[3, 4] = value
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (change(UP, None), ["lacks tensor 'layers.1.mlp.up_proj.weight'", "[20, 12]"]),
        (change("lm_head.weight", None), ["lacks", "lm_head.weight", "[50, 12]"]),
        (change(UP, np.ones((12, 20), np.float32)), [UP, "[12, 20]", "[20, 12]", "config.json"]),
        (change(UP, np.ones((20, 12), np.int8)), [UP, "int8", "floating point"]),
        (change("model.layers.2.mlp.up_proj.weight", poisoned(1, "f4")), ["layers.2.mlp", "has"]),
        (change("model.layers.0.self_attn.q_proj.bias", np.ones(24)), ["q_proj.bias"]),
        (change(UP, poisoned(np.nan, "f4")), [UP, "1 NaN", "again"]),
        (change(UP, poisoned(np.inf, "f2")), [UP, "1 NaN or infinite"]),
        (change(UP.removeprefix("model."), poisoned(1, "f4")), [UP, "both"]),
    ],
)
def test_bad_llama_checkpoint(
    damage: Callable[[dict[str, Tensor]], None], parts: list[str]
) -> None:
    tensors = hugging_face_state(Shape())
    damage(tensors)
    with refused(SOURCE, *parts):
        llama3_state_dict(tensors, Shape(), source=SOURCE)


def test_opposite_infinities_are_found() -> None:
    tensors = hugging_face_state(Shape())
    tensors[UP] = poisoned(np.inf, "f4")
    tensors[UP][0, 0] = -np.inf
    with refused(UP, "2 NaN or infinite"):
        llama3_state_dict(tensors, Shape(), source=SOURCE)


def test_large_finite_values_are_accepted() -> None:
    tensors = hugging_face_state(Shape())
    tensors[UP] = np.full((20, 12), np.finfo(np.float64).max)
    assert (
        llama3_state_dict(tensors, Shape(), source=SOURCE)["layers.1.mlp.up_proj.weight"]
        is (tensors[UP])
    )


def test_a_long_list_of_tensors_is_cut() -> None:
    with refused("lacks tensors 'embed_tokens.weight'", "and 16 more"):
        llama3_state_dict({}, Shape(), source=SOURCE)
