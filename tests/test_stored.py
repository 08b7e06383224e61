"""Matrices that stay in the blocks of a GGUF file: read, indexed, checked, compared.

Those of 2 bytes a number are in `test_halves.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import refused, tiny_llama, write_gguf
from max.driver import CPU
from max.dtype import DType
from max.graph import Weight as GraphWeight
from max.nn import Module
from random_blocks import KINDS, SCALES, random_blocks, scales_of

from unispec.checkpoints import StoredMatrix, Tensor, check_weight_files, memory, read_gguf
from unispec.checkpoints.block_formats import BLOCKS, join_six_bits, split_six_bits
from unispec.checkpoints.cast import cast_weights
from unispec.checkpoints.quantise import quantise
from unispec.checkpoints.rounding import is_rounded
from unispec.checkpoints.stored import KEPT, as_floats
from unispec.checkpoints.tensors import Weight, bytes_held
from unispec.checkpoints.tied_head import EMBEDDING, HEAD, same_rows, tied_names
from unispec.checkpoints.validation import validated_state_dict
from unispec.kernels.packing import pack
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.eagle3.weights import eagle3_weights
from unispec.pipelines.drafts.weights import DraftTensors, draft_weights
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.llama.weights import decoder_layer_shapes, llama3_state_dict
from unispec.pipelines.unified.weights import load_weights

Q8_0, Q4_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K
SOURCE = "a.gguf"
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


def encoded(tensor: Tensor, encoding: str) -> StoredMatrix:
    blocks = quantise(tensor, encoding, "w")
    assert isinstance(blocks, StoredMatrix)
    return blocks


def test_six_bits_lie_as_the_format_says() -> None:
    """Scale 4 = 0b10_0001 and minimum 7 = 0b11_1010 are in two bytes each, the others in one."""
    scales = np.array([1, 2, 3, 63, 0b100001, 0, 0, 0], np.uint8)
    minima = np.array([0, 0, 0, 9, 0, 0, 0, 0b111010], np.uint8)
    packed = [0b10_000001, 2, 3, 63, 0, 0, 0, 0b11_001001, 0b0001, 0, 0, 0b1010_0000]
    np.testing.assert_array_equal(join_six_bits(scales, minima), packed)
    found = split_six_bits(np.array(packed, np.uint8))
    np.testing.assert_array_equal(found, [scales, minima])


def test_any_six_bits_come_back() -> None:
    packed = np.random.default_rng(1).integers(0, 256, (50, 3, 12), np.uint8)
    scales, minima = split_six_bits(packed)
    assert scales.shape == minima.shape == (50, 3, 8)
    assert max(scales.max(), minima.max()) == 63
    np.testing.assert_array_equal(join_six_bits(scales, minima), packed)


def test_the_formats_that_are_kept() -> None:
    assert set(KEPT) == {*KINDS, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    for kind, dtype in BLOCKS.items():
        assert dtype.itemsize == GGML_QUANT_SIZES[kind][1]


@of_each_kind
def test_it_is_like_an_array_of_its_numbers(kind: GGMLQuantizationType) -> None:
    tensor = random_blocks(kind, 5, 512, origin="a file")
    numbers = gguf.dequantize(tensor.blocks, kind)
    assert (tensor.ndim, tensor.shape, len(tensor), tensor.size) == (2, (5, 512), 5, 2560)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor.floats(), numbers)
    np.testing.assert_array_equal(as_floats(tensor), numbers)
    for rows in (slice(1, 3), slice(3, 99), slice(None, None, -2), np.array([4, 0, 4])):
        taken = tensor[rows]
        assert (taken.kind, taken.shape) == (kind, numbers[rows].shape)
        assert taken.origin is None
        np.testing.assert_array_equal(taken.floats(), numbers[rows])
    assert tensor[:0].floats().shape == (0, 512)
    order = np.array([2, 0, 1, 4, 3])
    moved = tensor.reordered(order, "turned")
    np.testing.assert_array_equal(moved.floats(), numbers[order])
    assert moved.origin == "a file, turned"
    assert dataclasses.replace(tensor, origin=None).reordered(order, "turned").origin is None


@pytest.mark.parametrize("rows", [0, (0, 1), [0, 1], None, np.int64(0)])
def test_it_is_indexed_by_rows_alone(rows: Any) -> None:
    with pytest.raises(TypeError, match="row numbers"):
        random_blocks(Q8_0, 2, 32)[rows]


@pytest.mark.parametrize(
    ("kind", "shape", "blocks", "message"),
    [
        (GGMLQuantizationType.Q5_0, (1, 32), np.zeros((1, 22), np.uint8), "Q5_0 is no format"),
        (Q8_0, (1, 33), np.zeros((1, 34), np.uint8), r"matrix \[1, 33\]"),
        (Q4_K, (1, 32), np.zeros((1, 0), np.uint8), r"matrix \[1, 32\]"),
        (Q8_0, (2, 32), np.zeros((1, 34), np.uint8), r"\[1, 34\].*\[2, 34\]"),
        (Q8_0, (1, 32), np.zeros((1, 34), np.int8), "int8 of shape"),
        (Q8_0, (1, 32), np.zeros(34, np.uint8), r"shape \[34\]"),
    ],
)
def test_bytes_of_another_shape(kind: Any, shape: Any, blocks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoredMatrix(kind, shape, blocks)


@of_each_kind
def test_steps_are_what_one_code_more_makes(kind: GGMLQuantizationType) -> None:
    lower = random_blocks(kind, 3, 512)
    upper = StoredMatrix(kind, lower.shape, lower.blocks.copy())
    codes = {Q8_0: 1}.get(kind, 0x11)
    lower.fields()["codes"] = 0
    upper.fields()["codes"] = codes
    made = np.abs(upper.floats() - lower.floats()).astype(np.float64)
    steps = lower.steps()
    assert steps.dtype == np.float32
    # Two numbers are rounded before they are subtracted.
    largest = np.abs(lower.floats()).max()
    np.testing.assert_allclose(
        np.repeat(steps, 512 // steps.shape[1], axis=1), made, rtol=0, atol=largest * 2**-22
    )
    assert made.max() > 0


def random_bytes(tensor: Tensor, kind: GGMLQuantizationType) -> Tensor:
    rows, columns = tensor.shape
    return random_blocks(kind, rows, columns, seed=columns + rows).blocks


def llama_of_blocks(path: Path, kind: GGMLQuantizationType, **overrides: Any) -> Path:
    """All its rows are whole blocks of K-quants."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = tiny_llama(**sizes, num_key_value_heads=4, num_hidden_layers=1, **overrides)
    return write_gguf(path, model, kind=kind, to_bytes=random_bytes)


@of_each_kind
def test_blocks_are_kept_in_hugging_faces_order_of_rows(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    """Reordered blocks are what reordered numbers are, and other matrices are not copied."""
    path = llama_of_blocks(tmp_path / "a.gguf", kind)
    plain, kept = read_gguf(path).tensors, read_gguf(path, as_stored=True).tensors
    assert list(kept) == list(plain)
    origins = []
    for name, numbers in plain.items():
        assert isinstance(numbers, np.ndarray)
        tensor = kept[name]
        if numbers.ndim == 1:
            assert isinstance(tensor, np.ndarray)
            np.testing.assert_array_equal(tensor, numbers)
            continue
        assert isinstance(tensor, StoredMatrix)
        assert tensor.kind is kind
        np.testing.assert_array_equal(tensor.floats(), numbers, err_msg=name)
        is_moved = "q_proj" in name or "k_proj" in name
        assert tensor.blocks.flags.owndata is is_moved
        assert tensor.origin is not None
        assert "half-split" in tensor.origin if is_moved else "half" not in tensor.origin
        origins.append(tensor.origin)
    assert len(set(origins)) == len(origins) == 9
    assert all(repr(str(path)) in origin for origin in origins)


def test_an_origin_is_that_of_the_same_bytes_alone(tmp_path: Path) -> None:
    path = llama_of_blocks(tmp_path / "a.gguf", Q8_0)
    (tmp_path / "link.gguf").symlink_to(path)

    def origin(path: Path) -> str | None:
        tensor = read_gguf(path, as_stored=True).tensors["model.embed_tokens.weight"]
        assert isinstance(tensor, StoredMatrix)
        return tensor.origin

    first = origin(path)
    assert first == origin(path) == origin(tmp_path / "link.gguf")
    os.utime(path, ns=(1, 1))
    assert origin(path) != first


@pytest.mark.parametrize("name", ["F32", "Q4_1", "Q5_0", "Q5_1"])
def test_other_formats_are_dequantised(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", kind=GGMLQuantizationType[name])
    plain = read_gguf(path).tensors
    for name, tensor in read_gguf(path, as_stored=True).tensors.items():
        assert isinstance(tensor, np.ndarray)
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, plain[name])


@of_each_kind
def test_blocks_take_the_memory_of_the_file(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama_of_blocks(tmp_path / "a.gguf", kind)
    tensors = read_gguf(path).tensors.values()
    block, block_bytes = GGML_QUANT_SIZES[kind]
    matrices = sum(tensor.size for tensor in tensors if tensor.ndim == 2)
    vectors = sum(tensor.size for tensor in tensors if tensor.ndim == 1)
    needed = matrices // block * block_bytes + 4 * vectors
    assert bytes_held([path], as_stored=True) == needed
    assert bytes_held([path]) == 4 * (matrices + vectors)
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_weight_files([path], as_stored=True)
    with refused("a.gguf", "of memory, numbers as float32, and"):
        check_weight_files([path])
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with refused("a.gguf", "of memory, numbers as stored or as float32, and"):
        check_weight_files([path], as_stored=True)


@pytest.mark.parametrize("kept", [False, True])
def test_a_pipelines_weights_are_blocks_where_they_are_asked_for(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama_of_blocks(tmp_path / "a.gguf", Q4_K)
    model: Any = SimpleNamespace(resolved_weight_paths=lambda: [path], model_name="a model")
    tensors, source = read_weights(model, as_stored=kept)
    assert source == "a model"
    assert isinstance(tensors["lm_head.weight"], StoredMatrix if kept else np.ndarray)
    as_blocks = bytes_held([path], as_stored=True)
    monkeypatch.setattr(memory, "available_memory", lambda: as_blocks)
    assert read_weights(model, as_stored=True)[0].keys() == tensors.keys()
    with refused("a.gguf", "numbers as float32"):
        read_weights(model)


def test_a_kept_llama_is_the_state_of_ours(tmp_path: Path) -> None:
    checkpoint = read_gguf(llama_of_blocks(tmp_path / "a.gguf", Q4_K), as_stored=True)
    config: Any = tiny_llama(**{k: checkpoint.config[k] for k in CONFIG}).config
    tensors = dict(checkpoint.tensors)
    state = llama3_state_dict(tensors, config, source=SOURCE)
    assert len(state) == len(tensors)
    assert all(state[name.removeprefix("model.")] is tensors[name] for name in tensors)


CONFIG = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@of_each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(kind: GGMLQuantizationType, value: float) -> None:
    tensor = random_blocks(kind, 3, 512)
    expected = {"w.weight": (3, 512)}

    def check() -> dict[str, StoredMatrix]:
        names = {"w.weight": "model.w.weight"}
        return validated_state_dict(
            {"model.w.weight": tensor}, names, expected, source=SOURCE, model="a model"
        )

    assert check() == {"w.weight": tensor}
    for place in SCALES[kind]:
        scales_of(tensor, place)[0, -1] = value
        scales_of(tensor, place)[2, 0] = value
    count = 2 * len(SCALES[kind])
    assert tensor.bad_numbers() == count
    words = f"has {count} NaN or infinite scales of its {kind.name} blocks, expected none"
    with refused(SOURCE, "'model.w.weight'", words, "download"):
        check()
    expected["w.weight"] = (512, 3)
    with refused(SOURCE, "has shape [3, 512], expected [512, 3]"):
        check()


def test_same_rows_of_blocks() -> None:
    one = random_blocks(Q8_0, 5000, 32)
    equal = StoredMatrix(Q8_0, one.shape, one.blocks.copy())
    other = StoredMatrix(Q8_0, one.shape, one.blocks.copy())
    other.blocks[-1, -1] ^= 1
    assert same_rows(one, equal)
    assert not same_rows(one, other)
    assert not same_rows(one, one[:4999])
    assert not same_rows(one, one.floats())
    assert not same_rows(one.floats(), one)


def test_same_bytes_of_another_format_are_other_rows() -> None:
    """Both have 144 bytes for 256 numbers."""
    one = random_blocks(Q4_K, 2, 256)
    assert not same_rows(one, StoredMatrix(GGMLQuantizationType.Q4_0, one.shape, one.blocks))


def test_a_head_of_blocks_is_tied_where_its_bytes_are_the_embeddings() -> None:
    names = {EMBEDDING: EMBEDDING, HEAD: HEAD}
    rows, others = random_blocks(Q8_0, 4, 32), random_blocks(Q8_0, 4, 32, seed=1)
    mixed: dict[str, Weight] = {EMBEDDING: rows, HEAD: rows.floats()}
    assert tied_names({EMBEDDING: rows, HEAD: rows[:]}, names) == {EMBEDDING: EMBEDDING}
    assert tied_names({EMBEDDING: rows, HEAD: others}, names) == names
    assert tied_names(mixed, names) == names


@pytest.fixture(scope="module")
def table() -> Tensor:
    """An embedding `[V, H]` of 300 tokens."""
    return np.random.default_rng(3).normal(size=(300, 256)).astype(np.float32) * 0.02


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0", "q4_k", "q6_k"])
def test_what_blocks_were_made_of_is_told_from_what_was_trained_on(
    table: Tensor, encoding: str
) -> None:
    blocks = encoded(table, encoding)
    assert is_rounded(table, blocks)
    assert is_rounded(table.astype(np.float64), blocks)
    assert is_rounded(blocks.floats(), blocks)
    assert not is_rounded(table[:299], blocks)
    error = np.sqrt(np.square(blocks.floats() - table).mean())
    noise = np.random.default_rng(4).normal(size=table.shape) * error
    assert is_rounded(table + 0.5 * noise, blocks)
    assert not is_rounded(table + 3 * noise, blocks)
    assert not is_rounded(np.full_like(table, np.nan), blocks)


def test_a_part_of_other_rows_is_not_averaged_away() -> None:
    rows = np.random.default_rng(5).normal(size=(4096 + 4, 32)).astype(np.float32)
    blocks = encoded(rows, "q8_0")
    assert is_rounded(rows, blocks)
    rows[4096:] *= 1.05
    assert not is_rounded(rows, blocks)


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden_size: int = 256
    intermediate_size: int = 20
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    num_hidden_layers: int = 1
    vocab_size: int = 300
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    draft_vocab_size: int | None = None


def eagle3_state(target: Weight, **own: Tensor) -> Any:
    shape = Shape(draft_vocab_size=len(own["d2t"]) if "d2t" in own else None)
    shapes = decoder_layer_shapes(shape, 0) | {
        "layers.0.hidden_norm.weight": (256,),
        "fc.weight": (256, 768),
        "norm.weight": (256,),
        **{f"layers.0.self_attn.{p}_proj.weight": (n, 512) for p, n in HEADS.items()},
    }
    tensors: dict[str, Tensor] = {
        name: np.ones(shape, np.float32) for name, shape in shapes.items()
    }
    named = {name.replace("__", "."): tensor for name, tensor in own.items()}
    return eagle3_weights(
        tensors | named, shape, Shape(), {EMBEDDING: target}, num_taps=3, norms=(), source=SOURCE
    )


HEADS = {"q": 24, "k": 12, "v": 12}


def test_an_eagle3_draft_has_the_rounded_rows_where_it_has_their_copy(table: Tensor) -> None:
    """It keeps an embedding that was trained on; rows that it lacks are dequantised."""
    target = encoded(table, "q4_0")
    assert EMBEDDING not in eagle3_state(target, embed_tokens__weight=table).state
    other = table * 1.3
    state = eagle3_state(target, embed_tokens__weight=other).state
    assert state[EMBEDDING] is not target
    np.testing.assert_array_equal(state[EMBEDDING], other)


def test_a_reduced_head_of_blocks_has_the_rows_of_its_tokens(table: Tensor) -> None:
    target = encoded(table, "q6_k")
    tokens = np.array([299, 3, 7])
    weights = draft_weights(
        DraftTensors({"fc.weight": table}, tokens - np.arange(3)), {EMBEDDING: target}
    )
    head = weights.state[HEAD]
    assert isinstance(head, StoredMatrix)
    np.testing.assert_array_equal(head.floats(), target.floats()[tokens])
    assert weights.num_proposed == 3
    np.testing.assert_array_equal(weights.state["t2d"][tokens], [0, 1, 2])  # type: ignore[index]


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0", "q4_k", "q6_k"])
def test_copies_are_held_against_the_numbers_of_blocks(
    table: Tensor, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = {EMBEDDING: encoded(table, encoding)}
    with caplog.at_level(logging.WARNING):
        check_copies({EMBEDDING: table, HEAD: table}, target, source=SOURCE)
        assert not caplog.records
        check_copies({EMBEDDING: -table}, target, source=SOURCE)
    assert "is not the target's" in caplog.text
    moved = np.insert(table, 3, 1, axis=0)[:300]
    with refused(SOURCE, f"of {EMBEDDING!r} is token", "tokenizer"):
        check_copies({EMBEDDING: moved}, target, source=SOURCE)


def test_blocks_are_dequantised_where_floats_are_computed_with() -> None:
    blocks = random_blocks(Q8_0, 3, 64)
    cast = cast_weights({"w": blocks, "v": np.ones(2, np.float16)}, DType.float32)
    np.testing.assert_array_equal(cast["w"], blocks.floats())
    assert cast["v"].dtype == np.float32


class Layer(Module):  # type: ignore[misc]
    def __init__(self, blocks: StoredMatrix) -> None:
        super().__init__()
        self.bytes = GraphWeight("bytes", DType.uint8, pack(blocks).shape, CPU())
        self.floats = GraphWeight("floats", DType.float32, blocks.shape, CPU())

    def __call__(self) -> None:
        """Nothing: its weights are loaded and no graph is built of it."""


def test_a_module_gets_blocks_as_it_declares_them() -> None:
    blocks = random_blocks(Q4_K, 17, 256)
    module = Layer(blocks)
    load_weights(module, {"bytes": blocks, "floats": blocks})
    loaded = module.state_dict()
    np.testing.assert_array_equal(np.from_dlpack(loaded["bytes"]), pack(blocks))
    np.testing.assert_array_equal(np.from_dlpack(loaded["floats"]), blocks.floats())
