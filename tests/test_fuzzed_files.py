"""Files with bytes that nobody wrote: each is read, or refused in one sentence, in little memory.

Hypothesis changes, cuts and lengthens small valid files. Whatever comes out, reading it ends with
a result or an `InputError`; any other exception is the fault that is looked for.
"""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from tiny import TinyPair

from unispec.checkpoints import StoredMatrix, check_weight_files, read_gguf, read_tensors
from unispec.checkpoints.draft_kinds import check_draft_files
from unispec.checkpoints.generation_config import read_eos_token_ids, read_generation_config
from unispec.checkpoints.model_config import read_model_config
from unispec.checkpoints.repository import weight_files
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError
from unispec.methods import DRAFT_METHODS
from unispec.training.collection import Collection, read_num_shards

Read: TypeAlias = Callable[[Path], object]

FUZZED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Valid files have less than 100 kB; what reads them may make copies of the headers.
MOST_MEMORY = 20_000_000

NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
)
"""Counts, sizes and places that overflow something, or that memory would not hold."""


HEADER = 8000
"""Bytes from the beginning on that hold what the rest of a file is."""


@lru_cache(maxsize=8)
def number_places(content: bytes) -> list[int]:
    """Where small numbers seem to be: a byte that is not zero before three that are."""
    header = content[:HEADER]
    return [i for i in range(len(header) - 3) if header[i] and not any(header[i + 1 : i + 4])]


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few changes, mostly in its header."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["number", "number", "bytes", "insert", "cut", "end"]))
        places = number_places(content)
        if kind == "number" and places:
            place, width = draw(st.sampled_from(places)), draw(st.sampled_from([4, 8]))
            number = draw(NUMBERS) % 2 ** (8 * width)
            changed[place : place + width] = number.to_bytes(width, "little")
            continue
        place = draw(st.integers(0, min(len(changed), HEADER)))
        if kind == "insert":
            changed[place:place] = draw(st.binary(max_size=40))
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 40))]
        elif kind == "end":
            del changed[place:]
        else:
            new = draw(st.binary(min_size=1, max_size=4))
            changed[place : place + len(new)] = new
    return bytes(changed)


@st.composite
def other_headers(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with other values in its header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = draw(other_values(json.loads(content[8:end])))
    return len(header).to_bytes(8, "little") + header + content[end:]


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from([-1, 10**9, 10**30, -(2**63)]),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
) | st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)
"""JSON of any type; a text of brackets stands for itself, so that it may be nested deep."""


@st.composite
def other_values(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """The object's text with a few values changed, at any depth, or left out."""
    changed = json.loads(json.dumps(value))
    nested: dict[str, str] = {}
    for _ in range(draw(st.integers(1, 3))):
        where: Any = changed
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(where[key], dict | list) and draw(st.booleans()):
                where = where[key]
                continue
            if draw(st.integers(0, 9)) == 0:
                del where[key]
                break
            where[key] = draw(VALUES)
            if isinstance(where[key], str) and where[key].startswith("["):
                mark = f"nested {len(nested)}"
                nested[json.dumps(mark)], where[key] = where[key], mark
            break
    text = json.dumps(changed)
    for mark, brackets in nested.items():
        text = text.replace(mark, brackets)
    return text.encode()


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def read_or_refused(read: Read, path: Path) -> None:
    with little_memory():
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error)
            assert str(path.name) in str(error) or str(path.parent) in str(error)


# --- weights ---------------------------------------------------------------------------


def all_of_gguf(path: Path) -> None:
    for as_stored in (True, False):
        checkpoint = read_gguf(path, as_stored)
        for name in checkpoint.tensors:
            checkpoint.tensors[name]
    checkpoint.tokenizer()
    _ = checkpoint.chat_template


def read_stored(paths: list[Path]) -> None:
    for tensor in read_tensors(paths, as_stored=True).values():
        if isinstance(tensor, StoredMatrix):
            tensor.bad_numbers()
            tensor.floats()


def safetensors(folder: Path) -> Path:
    path = folder / "a.safetensors"
    tensors = {"w.weight": torch.ones(4, 6, dtype=torch.bfloat16), "scalar": torch.tensor(1.0)}
    tensors |= {"ids": torch.arange(5), "fc.weight": torch.ones(0, 4)}
    save_torch_file(tensors, path, {"format": "pt"})
    return path


def check_draft(paths: list[Path]) -> None:
    check_draft_files("eagle", paths, source=str(paths[0]))


def gguf_file(folder: Path) -> Path:
    return write_gguf(folder / "a.gguf", kind=GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (safetensors, [check_weight_files, read_tensors, read_stored, check_draft]),
        (gguf_file, [check_weight_files, None]),
    ],
    ids=["safetensors", "gguf"],
)
@FUZZED
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # dequantised infinities
def test_weight_files(
    tmp_path: Path, make: Callable[[Path], Path], reads: list[Any], data: st.DataObject
) -> None:
    if not (tmp_path / "sound").exists():
        (tmp_path / "sound").write_bytes(make(tmp_path).read_bytes())
    path = next(tmp_path.glob("a.*"))
    sound = (tmp_path / "sound").read_bytes()
    other = damages(sound) | other_headers(sound) if make is safetensors else damages(sound)
    path.write_bytes(data.draw(other))
    for read in reads:
        read_or_refused(all_of_gguf if read is None else lambda p, r=read: r([p]), path)


SMALL = st.integers(0, 12)
SHAPES = st.tuples(SMALL, SMALL) | st.lists(SMALL | NUMBERS | LEAVES, max_size=4) | VALUES
DRAFT_NAMES = st.sampled_from(["fc.weight", "model.fc.weight", "layers.0.weight", "0.0.weight"])


@FUZZED
@given(
    shapes=st.dictionaries(DRAFT_NAMES, SHAPES, max_size=2), method=st.sampled_from(DRAFT_METHODS)
)
def test_shapes_of_drafts(tmp_path: Path, shapes: dict[str, Any], method: Any) -> None:
    """The header alone says what kind of draft it is, whatever shapes it states."""
    header, end = {}, 0
    for name, shape in shapes.items():
        whole = isinstance(shape, list | tuple) and all(type(n) is int for n in shape)
        size = math.prod(shape) if whole else 1
        begin, end = end, end + (size if 0 <= size <= 144 else 1)
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "draft.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * end)
    read_or_refused(lambda file: check_draft_files(method, [file], source=str(file)), path)


# --- what describes a model ------------------------------------------------------------


def model_config(path: Path) -> None:
    read_model_config(str(path.parent))


def ends(path: Path) -> None:
    class Config:
        vocab_size = 256
        eos_token_id = 2

        def get_text_config(self) -> Config:
            return self

    read_generation_config(str(path.parent))
    read_eos_token_ids(str(path.parent), Config())


def tokenizer(path: Path) -> None:
    read_tokenizer(str(path.parent), "llama").encode("Hello <s> wörld")


def index(path: Path) -> None:
    weight_files(str(path.parent))


JSON_FILES: dict[str, tuple[dict[str, Any] | None, Read]] = {
    "config.json": (None, model_config),
    "generation_config.json": ({"eos_token_id": [2, 1], "temperature": 0.6, "top_k": 5}, ends),
    "tokenizer.json": (None, tokenizer),
    "tokenizer_config.json": (None, tokenizer),
    "model.safetensors.index.json": (
        {"metadata": {"total_size": 9}, "weight_map": {"w": "model.safetensors"}},
        index,
    ),
}


@pytest.mark.parametrize("name", JSON_FILES)
@FUZZED
@given(data=st.data())
def test_json_files(
    tmp_path: Path, tiny_pair: Callable[[str], TinyPair], name: str, data: st.DataObject
) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(tiny_pair("llama_eagle").target, folder)
    stated, read = JSON_FILES[name]
    sound = stated or json.loads((tiny_pair("llama_eagle").target / name).read_text())
    content = data.draw(other_values(sound) | damages(json.dumps(sound).encode()))
    (folder / name).write_bytes(content)
    read_or_refused(read, folder / name)


# --- training folders ------------------------------------------------------------------


def collection(path: Path) -> None:
    for place in (found := Collection(path.parent, {"seed": 1})).training:
        found.read(place)
    list(found.prompts())
    found.count_tokens(256)


def training_folder(folder: Path) -> None:
    Collection(folder, {"seed": 1})
    columns = {
        "tokens": np.arange(9, dtype=np.int32),
        "features": np.ones((9, 4), np.float16),
        "lengths": np.array([5, 4], np.int32),
        "prompt_lengths": np.array([2, 3], np.int32),
        "held_out": np.array([0, 1], np.uint8),
    }
    save_file(columns, folder / "shard-00000.safetensors", {"prompts": json.dumps(["a", "b"])})
    (folder / "collected.json").write_text(json.dumps({"shards": 1}))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("collection.json", collection),
        ("shard-00000.safetensors", collection),
        ("collected.json", read_num_shards),
    ],
)
@FUZZED
@given(data=st.data())
def test_training_folders(tmp_path: Path, name: str, read: Read, data: st.DataObject) -> None:
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    training_folder(folder)
    sound = (folder / name).read_bytes()
    is_shard = name.endswith(".safetensors")
    (folder / name).write_bytes(
        data.draw(damages(sound) | other_headers(sound) if is_shard else damages(sound))
    )
    read_or_refused(read, folder / name)
