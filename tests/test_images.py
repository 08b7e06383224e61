"""Images of prompts as files of strangers: which are read, which are refused, and at what cost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unispec.errors import InputError
from unispec.images import LARGEST_IMAGE, check_image, open_image

RED, BLUE = (255, 0, 0), (0, 0, 255)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n"


def plain(color: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (40, 30), color)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def empty_png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all black."""
    return encoded(Image.new("1", (width, height)), "PNG")


@pytest.fixture(params=["path", "bytes", "image"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], Any]:
    """A file's content in each way that a request may give it; no name says what is in it."""

    def give(content: bytes) -> Any:
        if request.param == "bytes":
            return content
        if request.param == "image":
            return Image.open(io.BytesIO(content))
        (tmp_path / "image.txt").write_bytes(content)
        return tmp_path / "image.txt"

    return give


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read_by_their_content(
    given: Callable[[bytes], Any], format: str
) -> None:
    image = open_image(given(encoded(plain(), format)))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image, int) - RED).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(given: Callable[[bytes], Any], mode: str) -> None:
    image = open_image(given(encoded(Image.new(mode, (40, 30)), "PNG")))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert not np.asarray(image).any()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "MPO"])
def test_the_first_picture_of_several_is_read(given: Callable[[bytes], Any], format: str) -> None:
    """MPO is how phones write a JPEG with a second picture, of depth for instance."""
    content = encoded(plain(), format, save_all=True, append_images=[plain(BLUE)])
    image = open_image(given(content))
    assert image.size == (40, 30)
    assert np.abs(np.asarray(image, int) - RED).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PCX", "TGA", "PDF"])
def test_another_format_is_refused(tmp_path: Path, format: str) -> None:
    content = encoded(plain(), format)
    (tmp_path / "cat.png").write_bytes(content)
    for source in (content, tmp_path / "cat.png"):
        for use in (check_image, open_image):
            with pytest.raises(InputError, match="PNG, JPEG or WebP"):
                use(source)


def test_postscript_starts_no_other_program(
    given: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", started.append)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_windows_binary", None)
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        open_image(given(EPS))
    assert started == []


def test_an_image_of_another_format_may_be_decoded_by_the_caller() -> None:
    gif = Image.open(io.BytesIO(encoded(plain(), "GIF")))
    with pytest.raises(InputError, match=r"it was opened as GIF; .* image\.convert\('RGB'\)"):
        open_image(gif)
    assert open_image(gif.convert("RGB")).getpixel((3, 3)) == RED


def test_too_many_pixels_are_refused_with_both_numbers(given: Callable[[bytes], Any]) -> None:
    with pytest.raises(
        InputError,
        match=r" has 8000 x 5001 = 40,008,000 pixels, and an image may have 40,000,000; make it",
    ):
        open_image(given(empty_png(8000, 5001)))
    assert open_image(given(empty_png(8000, 5000))).size == (8000, 5000)
    assert LARGEST_IMAGE == 40_000_000


def test_an_image_that_is_decoded_already_is_bounded_too() -> None:
    with pytest.raises(InputError, match="40,008,000 pixels"):
        open_image(Image.new("1", (8000, 5001)))


def test_what_pillow_itself_finds_too_large_is_said_in_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(empty_png(15_000, 12_000))
    for use in (check_image, open_image):
        with pytest.raises(InputError, match=r"huge\.png has 180,000,000 pixels, and an image"):
            use(tmp_path / "huge.png")


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_small_file_with_many_pixels_costs_no_memory(tmp_path: Path) -> None:
    content = empty_png(13_000, 13_000)
    assert len(content) < 25_000
    (tmp_path / "bomb.png").write_bytes(content)
    script = (
        "import re, sys\n"
        "from unispec.images import open_image\n"
        "try:\n    open_image(sys.argv[1])\n"
        "except ValueError as error:\n    print(error, file=sys.stderr)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.png")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "169,000,000 pixels" in done.stderr
    assert int(done.stdout) < 200_000  # kB; the pixels alone would take 660,000


@pytest.mark.parametrize("source", ["/no/such/image.png", Path("/no/such/image.png")])
def test_a_file_that_is_not_there(source: str | Path) -> None:
    for use in (check_image, open_image):
        with pytest.raises(InputError, match=r"/no/such/image\.png does not exist"):
            use(source)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_is_one_sentence(given: Callable[[bytes], Any], format: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)
    content = encoded(Image.fromarray(pixels), format)
    try:
        source = given(content[: len(content) // 2])
    except Exception:  # Pillow, not we, refuses to open it
        return
    with pytest.raises(InputError, match="cannot be read"):
        open_image(source)
