"""JSON objects that others wrote: whole, or refused in one sentence that says which file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unispec.checkpoints.json_object import read_json_object
from unispec.errors import InputError


def test_an_object_is_read_as_it_stands(tmp_path: Path) -> None:
    written = {"a": [1, -2.5, 10**30, None, True], "ü": {"b": "𝄞"}}
    (tmp_path / "a.json").write_text(json.dumps(written), encoding="utf-8")
    assert read_json_object(tmp_path / "a.json", label="a.json", fix="mend it") == written


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[1, 2]", "list"),
        (b"7", "int"),
        (b'{"a": NaN}', "a nan"),
        (b'{"b": {"a": [{}, [1.5, -Infinity]]}}', "a -inf"),
        (b'{"a": 1e999}', "a inf"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 deep"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes, word: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"^a\.json of M .*{word}.*: mend it$"):
        read_json_object(tmp_path / "a.json", label="a.json of M", fix="mend it")


def test_a_file_that_cannot_be_read_or_is_far_too_large(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^a\.json cannot be read \(No such file.*: mend it$"):
        read_json_object(tmp_path / "a.json", label="a.json", fix="mend it")
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 141 * 10**9)
    with pytest.raises(InputError, match=r"^a\.json has 141000000000 bytes, .*: mend it$"):
        read_json_object(tmp_path / "a.json", label="a.json", fix="mend it")
