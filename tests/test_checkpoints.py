"""Safetensors files, and the weights of targets and EAGLE drafts."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.dtype import DType
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from transformers import LlamaConfig, LlamaForCausalLM

from unispec.checkpoints import Tensor, check_weight_files, memory, read_tensors
from unispec.checkpoints.demo import demo_draft_folder
from unispec.errors import InputError
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.dflash.weights import dflash_state_dict
from unispec.pipelines.drafts.eagle.weights import eagle_state_dict
from unispec.pipelines.drafts.weights import unified_state_dict
from unispec.pipelines.targets.llama.weights import expected_shapes, llama3_state_dict

SOURCE = "folder/model.safetensors"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The smallest Llama in which no two sizes are equal by chance."""

    hidden_size: int = 12
    intermediate_size: int = 20
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    num_hidden_layers: int = 2
    vocab_size: int = 50
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    draft_vocab_size: int | None = None


def hugging_face_state(shape: Shape) -> dict[str, Tensor]:
    """The weights of a random Llama of Hugging Face, as its checkpoint has them."""
    fields = dataclasses.asdict(shape)
    del fields["draft_vocab_size"]
    state = LlamaForCausalLM(LlamaConfig(**fields)).state_dict()
    if shape.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.numpy() for name, tensor in state.items()}


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


def write_raw(path: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refused(*parts: str) -> Any:
    """Expect an InputError of one line that has these parts, in any order."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(InputError, match=f"^{pattern}.*$")


# --- safetensors -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "uint8"])
def test_safetensors_keep_values_and_dtypes(tmp_path: Path, dtype: str) -> None:
    written = {
        "matrix": np.arange(15).reshape(3, 5).astype(dtype),
        "scalar": np.array(7, dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    save_file(written, tmp_path / "a.safetensors")
    read = read_tensors([tmp_path / "a.safetensors"])
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_bool_tensors(tmp_path: Path) -> None:
    mask = torch.tensor([True, False, True])
    save_torch_file({"t2d": mask}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_tensors([tmp_path / "a.safetensors"])["t2d"], mask.numpy())


def test_bfloat16_becomes_exactly_the_same_float32(tmp_path: Path) -> None:
    every_bit_pattern = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    tensor = every_bit_pattern.view(torch.bfloat16).reshape(256, 256)
    save_torch_file({"w": tensor}, tmp_path / "a.safetensors")
    read = read_tensors([tmp_path / "a.safetensors"])["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensor.float().numpy())


def test_shards_are_joined(tmp_path: Path) -> None:
    a, b = np.array([1, 2], np.float32), np.array([[3]], np.float32)
    save_file({"a": a}, tmp_path / "1.safetensors")
    save_file({"b": b}, tmp_path / "2.safetensors")
    read = read_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert read.keys() == {"a", "b"}
    np.testing.assert_array_equal(read["b"], b)


def test_views_are_lazy_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(1024, np.float32)}, path)
    tensor = read_tensors([path])["w"]
    assert not tensor.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensor[:] = 1
    # A private mapping that could be written would count as memory that this process asks for.
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    assert tensor[-1] == 7


ITEM_BYTES = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "I8": 1}


def sparse(path: Path, name: str, dtype: str, num_bytes: int) -> Path:
    """A safetensors file with one tensor of zeros that takes no room on the disk."""
    shape = [num_bytes // (2 * ITEM_BYTES[dtype]), 2]
    write_raw(path, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}, b"")
    os.truncate(path, path.stat().st_size + num_bytes)
    return path


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("w.weight", "BF16", 2),
        ("w.weight", "F16", 2),
        # Multiplied by their scales, in one matrix of float32.
        ("w.weight", "F8_E4M3", 4),
        ("w.weight_packed", "I32", 8),
        ("w.ids", "I32", 1),
        ("w.codes", "I8", 1),
    ],
)
def test_what_the_memory_must_hold_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, factor: int
) -> None:
    path = sparse(tmp_path / "a.safetensors", name, dtype, 141 * 10**9)
    needed = 141 * factor
    monkeypatch.setattr(memory, "available_memory", lambda: needed * 10**9)
    check_weight_files([path])
    monkeypatch.setattr(memory, "available_memory", lambda: (needed - 1) * 10**9)
    for look in (check_weight_files, read_tensors):
        with refused(str(path), f"need {needed}.0 GB", f"{needed - 1}.0 GB", "smaller model"):
            look([path])


def test_float8_that_is_computed_with_takes_what_the_file_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse(tmp_path / "a.safetensors", "w.weight", "F8_E4M3", 141 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda: 142 * 10**9)
    assert read_tensors([path], float8_stays=True)["w.weight"].nbytes == 141 * 10**9
    monkeypatch.setattr(memory, "available_memory", lambda: 140 * 10**9)
    for look in (check_weight_files, read_tensors):
        with refused("need 141.0 GB", "140.0 GB"):
            look([path], float8_stays=True)


def test_codes_and_float32_count_as_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = np.zeros((256, 512), np.int8), np.zeros(64, np.float32)
    save_file({"codes": codes, "scales": scales}, tmp_path / "a.safetensors")
    found: list[int] = []
    monkeypatch.setattr(
        "unispec.checkpoints.tensors.check_memory", lambda needed, source: found.append(needed)
    )
    check_weight_files([tmp_path / "a.safetensors"])
    assert found == [256 * 512 + 4 * 64]


def test_the_memory_of_this_machine_is_known() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert pages / 100 < memory.available_memory() <= pages


def test_unaligned_data_are_copied_to_an_aligned_array(tmp_path: Path) -> None:
    values = np.array([1.5, -2.5], np.float32)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    tensor = read_tensors([write_raw(tmp_path / "a", header, b"\x07" + values.tobytes())])["w"]
    assert tensor.flags.aligned
    np.testing.assert_array_equal(tensor, values)


def test_no_file() -> None:
    with refused("no weight file", "name at least one"):
        read_tensors([])


def test_missing_file(tmp_path: Path) -> None:
    with refused("absent.safetensors", "does not exist"):
        read_tensors([tmp_path / "absent.safetensors"])


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.ones(8, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused("a.safetensors", "again"):
        read_tensors([path])


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip archive of torch",
        struct.pack("<Q", 4) + b"abcd",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 800) + b'{"a":' * 130 + b"{}" + b"}" * 130 + b" " * 18,
        struct.pack("<Q", 10) + b'{"w": 1e9}'.replace(b"1e9", b"NaN"),
        struct.pack("<Q", 12) + b'{"w": 1e999}',
        struct.pack("<Q", 7) + b'{"\xff":1}',
    ],
)
def test_file_of_another_format(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with refused("pytorch_model.bin", "not a safetensors file"):
        read_tensors([tmp_path / "pytorch_model.bin"])


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}, ["F8_E5M2", "not quantised"]),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, ["[2]", "8 bytes", "[0, 4)"]),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, ["[-4, 0]"]),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ["truncated", "8", "4"]),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, ["[-1, -1]"]),
        ({"dtype": "F32", "shape": [1]}, ["malformed"]),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, ["malformed"]),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, ["F32"]),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, ["[1.0]", "malformed"]),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, ["[True]", "malformed"]),
        ({"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}, [str(10**30)]),
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, ["[1, 1"]),
        ({"dtype": "F32", "shape": [10**4000] * 60, "data_offsets": [0, 4]}, ["[1000"]),
        ("F32", ["malformed"]),
    ],
)
def test_bad_header_entry(tmp_path: Path, entry: object, parts: list[str]) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"w": entry}, b"\0" * 4)
    with refused("a.safetensors", "'w'", *parts):
        read_tensors([path])


def test_tensor_in_two_files(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path in paths:
        save_file({"w": np.zeros(1, np.float32)}, path)
    with refused("'w'", "1.safetensors", "2.safetensors"):
        read_tensors(paths)


# --- Llama -----------------------------------------------------------------------------

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


def change(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return apply


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


# --- EAGLE -----------------------------------------------------------------------------


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


def test_a_draft_that_knows_fewer_tokens_proposes_those() -> None:
    """As that of a model for its fine-tune, which added tokens."""
    draft, target = Shape(vocab_size=40), Shape()
    copies = {"embed_tokens.weight": np.ones((40, 12)), "lm_head.weight": np.ones((40, 12))}
    weights = eagle_state_dict(eagle_state(draft) | copies, draft, target, source=SOURCE)
    assert weights.d2t is not None
    np.testing.assert_array_equal(weights.d2t, np.zeros(40))
    head = np.arange(50 * 12, dtype=np.float32).reshape(50, 12)
    state = unified_state_dict({"lm_head.weight": head}, weights, DType.float32)
    np.testing.assert_array_equal(state["draft.lm_head.weight"], head[:40])
    np.testing.assert_array_equal(state["draft.t2d"], [*range(40), *[40] * 10])


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


# --- DFlash ----------------------------------------------------------------------------


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
    assert (weights.d2t, weights.num_proposed(50)) == (None, 50)


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


# --- the packaged drafts ---------------------------------------------------------------


def test_packaged_draft_loads() -> None:
    folder = demo_draft_folder("eagle")
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{field.name: config[field.name] for field in dataclasses.fields(Shape)})
    tensors = read_tensors([folder / "model.safetensors"])
    weights = eagle_state_dict(tensors, shape, shape, source=str(folder))
    assert weights.d2t is not None
    assert weights.d2t.size == config["draft_vocab_size"]
    assert {tensor.dtype for tensor in weights.state.values()} == {np.dtype(np.float16)}


def test_unknown_draft_method() -> None:
    with refused("'medusa'", "eagle"):
        demo_draft_folder("medusa")


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, unispec.checkpoints.demo, unispec.pipelines.drafts.eagle.weights;"
        "sys.exit('torch' in sys.modules)"
    )
    # The environment is named, because importing max changes it behind Python's back.
    done = subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ))
    assert done.returncode == 0
