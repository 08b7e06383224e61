"""The kernels' package is compiled once, and found or replaced where it cannot be kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from unispec.errors import InputError
from unispec.kernels import library


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "kernel_package", library.kernel_package.__wrapped__)
    return tmp_path / "cache"


def test_it_is_compiled_once(fresh: Path) -> None:
    package = library.kernel_package()
    assert package.is_relative_to(fresh / "kernels") and package.stat().st_size > 100_000
    made = package.stat().st_mtime_ns
    assert library.kernel_package() == package
    assert package.stat().st_mtime_ns == made
    assert [path.name for path in package.parent.iterdir()] == [package.name]


def test_without_a_place_for_it_the_sources_are_used(
    fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert library.kernel_package() == library._SOURCES
    assert "cannot be written" in caplog.text and "UNISPEC_CACHE" in caplog.text


def test_sources_that_mojo_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "__init__.mojo").write_text("not mojo")
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    with pytest.raises(InputError, match=r"cannot be compiled .*error:.*install unispec again"):
        library.kernel_package()
