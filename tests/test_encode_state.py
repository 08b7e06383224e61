"""The weights of a model in the number format that is asked for, and what cannot be in it."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import refused
from random_blocks import KINDS, random_blocks

from unispec.checkpoints import StoredMatrix, Tensor
from unispec.checkpoints.quantise import encode_state
from unispec.checkpoints.tensors import Weight
from unispec.encodings import BLOCK_ENCODINGS, DRAFT_ENCODINGS

F16, BF16 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_0, Q4_K, Q5_K, Q6_K = KINDS
SOURCE = "a/model"
TABLES = ("embed_tokens.weight", "lm_head.weight")
PROJECTIONS = (
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.down_proj.weight",
    "fc.weight",
    "target.layers.0.self_attn.o_proj.weight",
)
MATRICES = (*TABLES, *PROJECTIONS)

NUMBERS: Tensor = np.random.default_rng(8).normal(size=(6, 512)).astype(np.float32) * 0.03


def in_halves(numbers: Tensor, dtype: torch.dtype) -> StoredMatrix:
    rows, columns = numbers.shape
    data = torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy()
    kind = F16 if dtype == torch.float16 else BF16
    return StoredMatrix(kind, (rows, columns), data)


FORMS: dict[str, Weight] = {
    "float32": NUMBERS,
    "float64": NUMBERS.astype(np.float64),
    "float16 array": NUMBERS.astype(np.float16),
    "float16": in_halves(NUMBERS, torch.float16),
    "bfloat16": in_halves(NUMBERS, torch.bfloat16),
    "blocks": random_blocks(Q8_0, 6, 512),
}


def numbers_of(weight: Weight) -> Tensor:
    return weight.floats() if isinstance(weight, StoredMatrix) else weight.astype(np.float32)


def others() -> dict[str, Weight]:
    """What no encoding touches."""
    return {
        "norm.weight": NUMBERS[0],
        "layers.0.self_attn.q_proj.bias": NUMBERS[0].astype(np.float16),
        "layers.0.mlp.gate.weight": NUMBERS,
        "layers.0.mlp.up_proj.weight": NUMBERS.view(np.uint8),
        "k_b_proj": NUMBERS,
        "experts.down_proj.weight": NUMBERS.reshape(2, 3, 512),
        "d2t": np.arange(4),
        "t2d": np.ones(4, np.bool_),
    }


def state_of(weight: Weight) -> dict[str, Weight]:
    return dict.fromkeys(MATRICES, weight) | others()


@pytest.mark.parametrize("form", FORMS)
def test_as_found(form: str) -> None:
    state = state_of(FORMS[form])
    found = encode_state(state, None, SOURCE)
    assert found is not state
    assert list(found) == list(state)
    assert all(found[name] is state[name] for name in state)


@pytest.mark.parametrize("form", FORMS)
def test_float32(form: str) -> None:
    """All stored matrices are widened, also one that no linear layer has."""
    weight = FORMS[form]
    state = state_of(weight) | {"router.weight": weight}
    found = encode_state(state, "float32", SOURCE)
    assert list(found) == list(state)
    for name in (*MATRICES, "router.weight"):
        tensor = found[name]
        assert isinstance(tensor, np.ndarray)
        if isinstance(weight, StoredMatrix):
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor, weight.floats())
        else:
            assert tensor is weight
    assert all(found[name] is state[name] for name in others())


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form: str) -> None:
    """As torch rounds; what is in the format is not copied."""
    weight = FORMS[form]
    state = state_of(weight) | {"router.weight": weight}
    found = encode_state(state, "bfloat16", SOURCE)
    assert list(found) == list(state)
    expected = torch.from_numpy(numbers_of(weight)).to(torch.bfloat16).view(torch.uint8).numpy()
    for name in MATRICES:
        tensor = found[name]
        assert isinstance(tensor, StoredMatrix)
        assert (tensor.kind, tensor.shape, tensor.origin) == (BF16, (6, 512), None)
        np.testing.assert_array_equal(tensor.blocks, expected)
        assert (tensor is weight) == (form == "bfloat16")
    assert all(found[name] is state[name] for name in [*others(), "router.weight"])


def test_numbers_that_bfloat16_has_keep_their_bits() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(64, 1024)
    finite = np.where((bits & 0x7F80) == 0x7F80, np.uint16(0), bits)
    wide = (finite.astype(np.uint32) << 16).view(np.float32)
    found = encode_state({"fc.weight": wide}, "bfloat16", SOURCE)["fc.weight"]
    assert isinstance(found, StoredMatrix)
    np.testing.assert_array_equal(found.blocks.view(np.uint16), finite)


def test_a_matrix_of_many_chunks() -> None:
    wide = np.random.default_rng(3).normal(size=(700, 500)).astype(np.float32)
    found = encode_state({"fc.weight": wide}, "bfloat16", SOURCE)["fc.weight"]
    assert isinstance(found, StoredMatrix)
    expected = torch.from_numpy(wide).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found.floats(), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -3.4e38])
def test_numbers_that_bfloat16_has_not(value: float) -> None:
    """Its largest is 3.39e38."""
    wide = np.zeros((3, 5), np.float32)
    wide[2, 1] = value
    parts = (SOURCE, "tensor 'fc.weight'", "beyond bfloat16: use float32")
    with refused(*parts):
        encode_state({"fc.weight": wide}, "bfloat16", SOURCE)
    wide[2, 1] = 3.38e38
    encode_state({"fc.weight": wide}, "bfloat16", SOURCE)


@pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)
def test_numbers_that_no_scale_reaches(encoding: str) -> None:
    wide = NUMBERS.copy()
    wide[5, 500] = -1e9
    parts = (f"{SOURCE}: tensor 'fc.weight' has", f"float16 scales of {encoding}", "1e+09")
    with refused(*parts):
        encode_state({"fc.weight": wide, "norm.weight": wide[0]}, encoding, SOURCE)


KINDS_OF = {
    "q8_0": (Q8_0, Q8_0),
    "q4_0": (Q4_0, Q8_0),
    "q4_k": (Q4_K, Q6_K),
    "q6_k": (Q6_K, Q6_K),
}
"""Of projections, and of embedding and head."""


@pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "blocks"])
def test_blocks_of_floats(form: str, encoding: str) -> None:
    """Halves are quantised as their numbers are."""
    state = state_of(FORMS[form])
    found = encode_state(state, encoding, SOURCE)
    assert list(found) == list(state)
    for names, kind in zip((PROJECTIONS, TABLES), KINDS_OF[encoding], strict=True):
        for name in names:
            tensor = found[name]
            assert isinstance(tensor, StoredMatrix)
            assert (tensor.kind, tensor.shape, tensor.origin) == (kind, (6, 512), None)
            if kind in (Q8_0, Q4_0):
                expected = gguf.quantize(numbers_of(FORMS[form]), kind)
                np.testing.assert_array_equal(tensor.blocks, expected)
            # 3 to 6 bits at least remain of numbers of 0.03.
            error = tensor.floats() - numbers_of(FORMS[form])
            assert np.sqrt(np.square(error).mean()) < 0.003
    assert all(found[name] is state[name] for name in others())


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_rows_that_are_no_whole_blocks(form: str) -> None:
    """512 columns are blocks of 256, 96 are blocks of 32, and 40 are none."""
    dtype = torch.bfloat16
    state: dict[str, Weight] = {
        f"layers.0.{columns}_proj.weight": (
            NUMBERS[:, :columns]
            if form == "float32"
            else in_halves(np.ascontiguousarray(NUMBERS[:, :columns]), dtype)
        )
        for columns in (512, 96, 40)
    }
    found: dict[str, Any] = encode_state(state, "q4_k", SOURCE)
    assert found["layers.0.512_proj.weight"].kind is Q4_K
    assert found["layers.0.96_proj.weight"].kind is Q8_0
    assert found["layers.0.40_proj.weight"] is state["layers.0.40_proj.weight"]


@pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)
def test_blocks_stay_beside_some_in_the_encoding(encoding: str) -> None:
    """As in llama.cpp's files, which mix formats."""
    kept, asked = random_blocks(Q5_K, 6, 512), random_blocks(KINDS_OF[encoding][0], 6, 512)
    state: dict[str, Weight] = {
        "embed_tokens.weight": kept,
        "layers.0.mlp.up_proj.weight": kept,
        "layers.0.mlp.down_proj.weight": asked,
    }
    found = encode_state(state, encoding, SOURCE)
    assert all(found[name] is state[name] for name in state)


@pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)
def test_a_draft_keeps_the_rows_of_a_quantised_head(encoding: str) -> None:
    """Its own projections are in the encoding, or in Q8_0 where their rows are."""
    state: dict[str, Weight] = {
        "fc.weight": in_halves(np.ascontiguousarray(NUMBERS[:, :96]), torch.bfloat16),
        "lm_head.weight": random_blocks(Q5_K, 6, 512),
    }
    found = encode_state(state, encoding, SOURCE)
    assert found["lm_head.weight"] is state["lm_head.weight"]
    fc = found["fc.weight"]
    assert isinstance(fc, StoredMatrix)
    assert fc.kind is (Q4_0 if encoding == "q4_0" else Q8_0)


@pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)
@pytest.mark.parametrize("embedding", ["blocks", "float32"])
def test_a_quantised_model_in_other_formats_is_refused(encoding: str, embedding: str) -> None:
    """An embedding in floats, as some files have, is not the model."""
    first, second = [kind for kind in KINDS if kind not in KINDS_OF[encoding]][:2]
    state: dict[str, Weight] = {
        "layers.0.mlp.down_proj.weight": random_blocks(first, 6, 512),
        "layers.0.mlp.up_proj.weight": random_blocks(second, 6, 512),
        # As in llama.cpp's Q4_0 files, whose head is Q6_K.
        "lm_head.weight": random_blocks(KINDS_OF[encoding][0], 6, 512),
        "norm.weight": NUMBERS[0],
    }
    table = NUMBERS if embedding == "float32" else random_blocks(second, 6, 512)
    if encoding in ("q4_0", "q4_k") or embedding == "blocks":
        state["embed_tokens.weight"] = table
    head = KINDS_OF[encoding][0]
    names = " and ".join(sorted((first.name, second.name, head.name)))
    with refused(
        f"{SOURCE} is quantised already, to {names}, and cannot be brought into {encoding}: leave"
        " quantization_encoding out, or give the model's float checkpoint"
    ):
        encode_state(state, encoding, SOURCE)


@pytest.mark.parametrize("encoding", ["q5_0", "Q8_0", "", "float16", "float8_e4m3fn"])
def test_unknown_encodings(encoding: str) -> None:
    given: list[dict[str, Weight]] = [{}, {"lm_head.weight": NUMBERS}]
    for state in given:
        with refused(
            f"{SOURCE}: weights cannot be stored as {encoding!r}: use one of float32, bfloat16,"
            " q8_0, q4_0, q4_k, q6_k"
        ):
            encode_state(state, encoding, SOURCE)


@pytest.mark.parametrize("encoding", [None, *DRAFT_ENCODINGS])
def test_a_state_without_matrices(encoding: str | None) -> None:
    state: dict[str, Weight] = {"norm.weight": NUMBERS[0]}
    assert encode_state(state, encoding, SOURCE) == state
