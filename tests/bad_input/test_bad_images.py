"""Images that cannot be read, or do not belong to the prompt, are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from damages import CompileReachedError, assert_refused, run
from PIL import Image
from tiny import TinyPair
from tiny.kimi import MEDIA_PAD, tiny_kimi

from unispec.cli import unispec


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound Kimi K2.5 with a chat template."""
    return tiny_kimi(tmp_path_factory.mktemp("seeing"))


def png(path: Path, size: tuple[int, int] = (30, 30), mode: str = "RGB") -> Path:
    Image.new(mode, size).save(path, "PNG")
    return path


def look(model: Path, prompt: str, *images: Path, flags: Sequence[str] = ()) -> Result:
    """Runs `unispec generate` with images."""
    given = [flag for image in images for flag in ("--image", str(image))]
    arguments = ["generate", "--model", str(model), "--prompt", prompt, *given, *flags]
    return CliRunner().invoke(unispec, arguments, catch_exceptions=False)


@pytest.mark.parametrize("count", [1, 2])
def test_images_with_their_placeholders_reach_the_compile(
    seeing: Path, tmp_path: Path, count: int
) -> None:
    files = [png(tmp_path / f"{index}.png") for index in range(count)]
    with pytest.raises(CompileReachedError):
        look(seeing, "what is it?", *files)
    with pytest.raises(CompileReachedError):
        look(seeing, "what" + MEDIA_PAD * count, *files, flags=["--no-chat-template"])


def test_images_that_cannot_be_read(seeing: Path, tmp_path: Path) -> None:
    whole = png(tmp_path / "whole.png", (300, 300))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.png"
    text.write_text("hello")
    (tmp_path / "empty.png").touch()
    for file, words in (
        (cut, ["image 2 of prompt 1", "cannot be read", "that is whole"]),
        (text, ["cannot be read as PNG, JPEG or WebP"]),
        (tmp_path / "empty.png", ["cannot be read as PNG, JPEG or WebP"]),
    ):
        result = look(seeing, "what is it?", whole, file)
        words.append(str(file))
        assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_a_huge_image(seeing: Path, tmp_path: Path) -> None:
    """It is not decoded. Pillow itself refuses 2 * 89,478,485 pixels or more."""
    for size, pixels in (((20000, 9000), "180,000,000"), ((8000, 5001), "40,008,000")):
        huge = png(tmp_path / "huge.png", size, "1")
        result = look(seeing, "what is it?", huge)
        words = [str(huge), f"{pixels} pixels", "may have 40,000,000", "make it smaller"]
        assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_an_image_that_leaves_no_room_for_an_answer(seeing: Path, tmp_path: Path) -> None:
    large = png(tmp_path / "large.png", (560, 560))  # 20 * 20 features
    result = look(seeing, "x", large, flags=["--max-length", "256"])
    words = ["prompt 1 has", "max_length is 256", "shorten"]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)


@pytest.mark.parametrize(("given", "placeholders"), [(1, 0), (0, 1), (1, 2), (2, 1)])
def test_more_or_fewer_images_than_placeholders(
    seeing: Path, tmp_path: Path, given: int, placeholders: int
) -> None:
    files = [png(tmp_path / f"{index}.png") for index in range(given)]
    result = look(seeing, "see " + MEDIA_PAD * placeholders, *files, flags=["--no-chat-template"])
    words = [
        f"prompt 1 has {placeholders} image placeholders",
        f"{given} images",
        "one image for each",
    ]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_an_image_for_a_model_that_reads_none(pair: TinyPair, tmp_path: Path) -> None:
    result = run(pair, "--image", str(png(tmp_path / "cat.png")))
    words = ["--image", str(pair.target), "reads no images"]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)
