"""GGUF files are read as transformers reads them: names, shapes, numbers, RoPE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import gguf_name, interleaved, refused, rope_divisors, tiny_llama, write_gguf
from transformers import LlamaConfig

from unispec.checkpoints import read_gguf, read_tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_names_config_and_row_order_are_hugging_faces(
    tmp_path: Path, tied: bool, bias: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=bias)
    checkpoint = read_gguf(write_gguf(tmp_path / "a.gguf", model))
    parameters = dict(model.named_parameters())
    assert set(checkpoint.tensors) == parameters.keys()
    assert len(checkpoint.tensors) == len(parameters)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(tensor, parameters[name].detach(), err_msg=name)
    read, written = LlamaConfig(**checkpoint.config).to_dict(), model.config.to_dict()
    assert {key for key in written if read[key] != written[key]} <= {"dtype", "architectures"}


def test_f16_is_widened_exactly(tmp_path: Path) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", model, kind=GGMLQuantizationType.F16)
    tensors = read_gguf(path).tensors
    for name, parameter in model.named_parameters():
        expected = parameter.half() if parameter.ndim == 2 else parameter
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], expected.detach().float(), err_msg=name)


def test_q8_0_is_within_half_a_step(tmp_path: Path) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", model, kind=GGMLQuantizationType.Q8_0)
    tensors = read_gguf(path).tensors
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            written = parameter.detach().numpy().reshape(-1, 32)
            read = tensors[name].reshape(-1, 32)
            step = np.abs(written).max(axis=1, keepdims=True) / 127
            # float16 scales add 2^-11 of a value.
            assert np.all(np.abs(read - written) <= 0.5 * step + 2.0**-11 * np.abs(written) + 1e-6)
            assert not np.array_equal(read, written)


def test_read_tensors_keeps_names_and_rows_of_the_file(tmp_path: Path) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "model.bin", model)
    tensors = read_tensors([path])
    assert tensors.keys() == {gguf_name(name) for name, _ in model.named_parameters()}
    query = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"], interleaved(query))
    with refused("2 weight files", "GGUF"):
        read_tensors([path, path])


def test_missing_optional_keys_get_llama_cpps_defaults(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=4, head_dim=16)
    left_out = [
        *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("rope.dimension_count", "rope.freq_base"),
    ]
    path = write_gguf(
        tmp_path / "a.gguf", model, metadata={f"llama.{key}": None for key in left_out}
    )
    config = read_gguf(path).config
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 16)
    assert config["rope_theta"] == 10000.0


@pytest.mark.parametrize(("eot", "expected"), [(None, 257), (257, 257), (258, [257, 258])])
def test_end_of_turn_ends_an_answer_too(tmp_path: Path, eot: int | None, expected: object) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"tokenizer.ggml.eot_token_id": eot})
    assert read_gguf(path).config["eos_token_id"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_divisors_become_llama3_scaling(tmp_path: Path, factor: float) -> None:
    path = write_gguf(
        tmp_path / "a.gguf",
        metadata={"llama.rope.freq_base": 500000.0},
        tensors={"rope_freqs.weight": rope_divisors(factor, theta=500000.0)},
    )
    checkpoint = read_gguf(path)
    rope = checkpoint.config["rope_parameters"]
    assert rope == {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": pytest.approx(factor, rel=1e-5),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_divisors_are_refused(tmp_path: Path) -> None:
    divisors = rope_divisors(8.0, theta=500000.0, original=4096)
    path = write_gguf(
        tmp_path / "a.gguf",
        metadata={"llama.rope.freq_base": 500000.0},
        tensors={"rope_freqs.weight": divisors},
    )
    with refused("a.gguf", "rope_freqs.weight", "8192"):
        read_gguf(path)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "a.gguf", metadata=metadata)
    rope = read_gguf(path).config["rope_parameters"]
    assert rope == {"rope_theta": 20000.0, "rope_type": "linear", "factor": 4.0}
