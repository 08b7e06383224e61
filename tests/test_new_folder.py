"""A folder is written whole or not at all, whatever stands in its place."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from unispec.errors import InputError
from unispec.new_folder import new_folder


def linked(folder: Path) -> Path:
    """A link to an empty folder."""
    (folder / "empty").mkdir()
    (folder / "link").symlink_to(folder / "empty")
    return folder / "link"


def dangling(folder: Path) -> Path:
    """A link to nothing."""
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize("make", [linked, dangling, empty, lambda folder: folder / "a" / "b"])
def test_it_is_there_at_the_end(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    output = make(tmp_path)
    with new_folder(output) as working:
        (working / "file").write_text("text")
    assert [path.name for path in output.iterdir()] == ["file"]
    assert (output / "file").read_text() == "text"
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_the_folder_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(Path(".")) as working:
        (working / "file").write_text("text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [empty, lambda folder: folder / "a"])
def test_nothing_of_it_is_there_if_something_fails(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    output = make(tmp_path)
    with pytest.raises(RuntimeError, match="halfway"), new_folder(output) as working:
        (working / "file").write_text("text")
        raise RuntimeError("halfway")
    assert not output.exists() or not list(output.iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "cannot be written .* room"),
        (FileNotFoundError(errno.ENOENT, "gone", "weights"), FileNotFoundError, "weights"),
    ],
)
def test_an_error_is_the_folder_s_where_writing_failed(
    tmp_path: Path, error: OSError, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), new_folder(tmp_path / "a"):
        raise error
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for output in (tmp_path, tmp_path / "file"):
        with (
            pytest.raises(InputError, match="is there already and not empty; give another"),
            new_folder(output),
        ):
            pass
    assert (tmp_path / "file").read_text() == "text"
