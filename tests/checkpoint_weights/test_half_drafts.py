"""Drafts in float16 and bfloat16 keep that format, and are known as what they are copies of."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from states import SOURCE, Shape, hugging_face_state, refused

from unispec.checkpoints import StoredMatrix, read_tensors
from unispec.checkpoints.quantise import encode_state
from unispec.checkpoints.tensors import Weight
from unispec.checkpoints.tied_head import EMBEDDING, HEAD
from unispec.pipelines.drafts.dflash.method import DFLASH
from unispec.pipelines.drafts.eagle.method import EAGLE
from unispec.pipelines.drafts.eagle3.method import EAGLE3
from unispec.pipelines.drafts.mtp.method import MTP
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod

TAPS = 3
CONFIG: Any = SimpleNamespace(
    target=Shape(), target_layer_ids=list(range(TAPS)), norms_before_fc=["input_norm.weight"]
)
METHODS: dict[str, DraftMethod] = {"eagle": EAGLE, "eagle3": EAGLE3, "dflash": DFLASH}
DTYPES = [torch.float16, torch.bfloat16]
of_each_method = pytest.mark.parametrize("name", METHODS)
of_both = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])

Tensors = dict[str, torch.Tensor]


def table(rows: int = 50, seed: int = 1) -> torch.Tensor:
    """An embedding or a head, in float32."""
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


def draft_tensors(name: str) -> Tensors:
    """All that a draft of two layers needs, under our names, in float32."""
    shape = Shape()
    found = {
        name.removeprefix("model."): torch.from_numpy(np.array(tensor))
        for name, tensor in hugging_face_state(shape).items()
        if name.startswith("model.layers.")
    }
    width = {"eagle": 24, "eagle3": 12 * TAPS, "dflash": 12 * TAPS}[name]
    found["fc.weight"] = torch.ones(12, width)
    if name == "eagle":
        del found["layers.0.input_layernorm.weight"]
    else:
        found["norm.weight"] = torch.ones(12)
    if name == "eagle3":
        found["layers.0.hidden_norm.weight"] = torch.ones(12)
        found["input_norm.weight"] = torch.ones(12 * TAPS)
        for projection in "qkv":
            key = f"layers.0.self_attn.{projection}_proj.weight"
            found[key] = torch.cat([found[key], found[key]], dim=1)
    if name == "dflash":
        found["hidden_norm.weight"] = torch.ones(12)
        for layer in range(2):
            for norm in ("q_norm", "k_norm"):
                found[f"layers.{layer}.self_attn.{norm}.weight"] = torch.ones(6)
    return found


def read(path: Path, tensors: Tensors, dtype: torch.dtype) -> dict[str, Weight]:
    """Tensors as they are read from a file that has their floats in a format."""
    stored = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file(stored, path)
    return read_tensors([path], as_stored=True)


def state(
    name: str, tensors: dict[str, Weight], target: dict[str, Weight], config: Any = CONFIG
) -> Any:
    shape = Shape(draft_vocab_size=len(tensors["d2t"]) if "d2t" in tensors else None)
    return METHODS[name].state(Checkpoint(tensors, shape, SOURCE), config, target)


def assert_bytes(weight: Any, tensor: torch.Tensor) -> None:
    """A weight is a stored matrix of torch's very bytes."""
    assert isinstance(weight, StoredMatrix)
    assert weight.kind.name == {torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
    assert weight.shape == tuple(tensor.shape)
    assert weight.blocks.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@of_both
@of_each_method
def test_matrices_keep_their_format(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Vectors are arrays, as without it."""
    written = draft_tensors(name)
    tensors = read(tmp_path / "draft.safetensors", written, dtype)
    target: dict[str, Weight] = {EMBEDDING: table().numpy(), HEAD: table(seed=2).numpy()}
    found = state(name, tensors, target).state
    assert found.keys() == written.keys()
    for key, tensor in written.items():
        assert found[key] is tensors[key]
        if tensor.ndim == 2:
            assert_bytes(found[key], tensor.to(dtype))
        else:
            assert isinstance(found[key], np.ndarray)
            np.testing.assert_array_equal(found[key], tensor.to(dtype).float().numpy())


@of_both
@of_each_method
def test_copies_and_a_smaller_vocabulary(
    name: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The draft's head is the target's rows, in the target's format, but EAGLE-3's is its own."""
    tokens = torch.tensor([3, 0, 49, 17])
    mask = torch.zeros(50, dtype=torch.bool)
    mask[tokens] = True
    own_head = table(4, seed=3)
    written = draft_tensors(name) | {
        EMBEDDING: table(),
        HEAD: own_head,
        "d2t": tokens - torch.arange(4),
        "t2d": mask,
    }
    target: dict[str, Weight] = {EMBEDDING: table().numpy(), HEAD: table(seed=2).numpy()}
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    encoded = read(tmp_path / "target.safetensors", {HEAD: table(seed=2)}, other)
    with caplog.at_level(logging.WARNING):
        tensors = read(tmp_path / "draft.safetensors", written, dtype)
        target[EMBEDDING] = tensors[EMBEDDING]
        weights = state(name, tensors, target | encoded)
    assert "is not the target's" not in caplog.text
    assert weights.num_proposed == 4
    assert EMBEDDING not in weights.state
    np.testing.assert_array_equal(weights.state["d2t"], written["d2t"].numpy())
    np.testing.assert_array_equal(weights.state["t2d"][tokens.numpy()], np.arange(4))
    if name == "eagle3":
        assert weights.own_head
        assert_bytes(weights.state[HEAD], own_head.to(dtype))
    else:
        assert_bytes(weights.state[HEAD], table(seed=2).to(other)[tokens])
    assert_bytes(weights.state["fc.weight"], written["fc.weight"].to(dtype))


@of_each_method
def test_numbers_that_are_not_finite(name: str, tmp_path: Path) -> None:
    written = draft_tensors(name)
    written["fc.weight"][3, 5:7] = torch.nan
    tensors = read(tmp_path / "draft.safetensors", written, torch.bfloat16)
    with refused(SOURCE, "'fc.weight' has 2 NaN or infinite values, expected none"):
        state(name, tensors, {EMBEDDING: table().numpy()})


@of_each_method
def test_tokens_under_other_ids_are_refused(name: str, tmp_path: Path) -> None:
    moved = torch.cat([table()[:3], torch.ones(1, 12), table()[3:49]])
    written = draft_tensors(name) | {EMBEDDING: moved}
    tensors = read(tmp_path / "draft.safetensors", written, torch.bfloat16)
    target = read(tmp_path / "target.safetensors", {EMBEDDING: table()}, torch.bfloat16)
    with refused(SOURCE, f"of {EMBEDDING!r} is token", "the target"):
        state(name, tensors, target)


def wide_enough_for_blocks() -> tuple[Any, Tensors]:
    """An EAGLE-3 draft and its target with embeddings of 32 columns, of which blocks are made."""
    shape = Shape(hidden_size=32)
    written = draft_tensors("eagle3")
    for key, tensor in written.items():
        sizes = [{12: 32, 24: 64, 36: 96}.get(size, size) for size in tensor.shape]
        if "self_attn" in key:
            heads = {"q": 24, "k": 12, "v": 12}.get(key.split(".")[3][0])
            columns = 64 if "layers.0" in key else 32
            sizes = [heads, columns] if heads else [32, 24]
        written[key] = torch.ones(sizes)
    config = SimpleNamespace(**(vars(CONFIG) | {"target": shape}))
    return config, written


@pytest.mark.parametrize("draft", DTYPES)
@pytest.mark.parametrize(
    "encoding", ["float32", "as it is", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"]
)
def test_an_embedding_that_is_the_targets_is_left_out(
    draft: torch.dtype, encoding: str, tmp_path: Path
) -> None:
    """Whatever format the target's was brought into."""
    config, written = wide_enough_for_blocks()
    embedding = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    tensors = read(tmp_path / "draft.safetensors", written | {EMBEDDING: embedding}, draft)
    stored = read(tmp_path / "target.safetensors", {EMBEDDING: embedding}, draft)
    target = encode_state(stored, None if encoding == "as it is" else encoding, "a target")
    shape = Shape(hidden_size=32)
    weights = EAGLE3.state(Checkpoint(tensors, shape, SOURCE), config, target)
    assert weights.state.keys() == written.keys()
    # A fine-tuned one is the draft's own, and keeps its format.
    embedding[7] *= 1.5
    tensors = read(tmp_path / "tuned.safetensors", written | {EMBEDDING: embedding}, draft)
    weights = EAGLE3.state(Checkpoint(tensors, shape, SOURCE), config, target)
    assert_bytes(weights.state[EMBEDDING], embedding.to(draft))


@of_both
def test_an_embedding_in_float32_is_that_of_a_target_in_halves(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """The target was rounded, the draft has the rows of before."""
    written = draft_tensors("eagle3")
    tensors = read(tmp_path / "draft.safetensors", written | {EMBEDDING: table()}, torch.float32)
    target = read(tmp_path / "target.safetensors", {EMBEDDING: table()}, dtype)
    assert EMBEDDING not in state("eagle3", tensors, target).state
    other = table()
    other[49, 11] *= 1.5
    tensors = read(tmp_path / "other.safetensors", written | {EMBEDDING: other}, torch.float32)
    np.testing.assert_array_equal(state("eagle3", tensors, target).state[EMBEDDING], other.numpy())


@of_both
def test_rows_that_the_draft_lacks_are_in_its_format(dtype: torch.dtype, tmp_path: Path) -> None:
    """The target added 4 tokens; they follow the draft's own 46, rounded."""
    own, added = table(46, seed=7), table(4, seed=8)
    written = draft_tensors("eagle3") | {EMBEDDING: own}
    tensors = read(tmp_path / "draft.safetensors", written, dtype)
    target: dict[str, Weight] = {EMBEDDING: torch.cat([table(46), added]).numpy()}
    checkpoint = Checkpoint(tensors, Shape(vocab_size=46), SOURCE)
    weights = EAGLE3.state(checkpoint, CONFIG, target)
    assert_bytes(weights.state[EMBEDDING], torch.cat([own, added]).to(dtype))
    # And a draft of more tokens has those of the target.
    written[EMBEDDING] = table(64, seed=7)
    tensors = read(tmp_path / "more.safetensors", written, dtype)
    checkpoint = Checkpoint(tensors, Shape(vocab_size=64), SOURCE)
    weights = EAGLE3.state(checkpoint, CONFIG, target)
    assert_bytes(weights.state[EMBEDDING], table(64, seed=7)[:50].to(dtype))


MTP_SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 5,
    "cache_width": 8,
    "qk_nope_head_dim": 4,
    "query_head_dim": 7,
    "v_head_dim": 6,
    "moe_intermediate_size": 9,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "fp8": None,
    "on_gpus": False,
    "has_experts": lambda layer: True,
}


@of_both
def test_a_layer_of_multi_token_prediction_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    """Experts are stacked, and keys and values are made by two parts of one matrix."""
    sizes = {
        "enorm.weight": (12,),
        "hnorm.weight": (12,),
        "eh_proj.weight": (12, 24),
        "shared_head.norm.weight": (12,),
        "input_layernorm.weight": (12,),
        "post_attention_layernorm.weight": (12,),
        "self_attn.q_proj.weight": (14, 12),
        "self_attn.kv_a_proj_with_mqa.weight": (8, 12),
        "self_attn.kv_a_layernorm.weight": (5,),
        "self_attn.kv_b_proj.weight": (20, 5),
        "self_attn.o_proj.weight": (12, 12),
        "mlp.gate.weight": (3, 12),
        "mlp.gate.e_score_correction_bias": (3,),
    }
    for part in ("experts.0", "experts.1", "experts.2", "shared_experts"):
        sizes |= {f"mlp.{part}.{name}_proj.weight": (9, 12) for name in ("gate", "up")}
        sizes[f"mlp.{part}.down_proj.weight"] = (12, 9)
    generator = torch.Generator().manual_seed(4)
    written = {
        f"model.layers.1.{name}": torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }
    tensors = read(tmp_path / "target.safetensors", written, dtype)
    config: Any = SimpleNamespace(target=SimpleNamespace(**MTP_SIZES))
    found = MTP.state(Checkpoint(tensors, None, SOURCE), config, {}).state
    assert all(isinstance(tensor, np.ndarray) for tensor in found.values())

    def rounded(name: str) -> torch.Tensor:
        return written[f"model.layers.1.{name}"].to(dtype).float()

    for name in ("eh_proj.weight", "self_attn.q_proj.weight", "mlp.gate.weight"):
        ours: Any = found[name if name == "eh_proj.weight" else f"layer.{name}"]
        np.testing.assert_array_equal(ours, rounded(name).numpy())
    heads = rounded("self_attn.kv_b_proj.weight").reshape(2, 10, 5)
    keys: Any = found["layer.self_attn.k_b_proj"]
    values: Any = found["layer.self_attn.v_b_proj"]
    np.testing.assert_array_equal(keys, heads[:, :4].numpy())
    np.testing.assert_array_equal(values, heads[:, 4:].transpose(1, 2).numpy())
    down: Any = found["layer.mlp.experts.down_proj"]
    np.testing.assert_array_equal(down[2], rounded("mlp.experts.2.down_proj.weight").numpy())
