"""Images of prompts, opened as untrusted files: three formats, and a limit of pixels."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image, ImageFile, UnidentifiedImageError

from unispec.errors import InputError

__all__ = ["LARGEST_IMAGE", "check_image", "open_image"]

LARGEST_IMAGE: Final = 40_000_000
"""Most pixels of an image. To decode one takes 4 to 16 bytes a pixel, so up to 640 MB."""

# Pillow reads some forty, one of them by running another program.
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
# What Pillow calls a JPEG file that has further pictures behind the first, as phones write them.
_MULTI_PICTURE_JPEG: Final = "MPO"


def check_image(source: str | Path | bytes) -> None:
    """Checks an image's format and size by the head of its file, without decoding it.

    Args:
        source: a path, or a file's bytes.

    Raises:
        InputError: there is no such file, it is no PNG, JPEG or WebP, or it has too many pixels.
    """
    with _opened(source):
        pass


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Decodes an image to RGB; of an animation, the first picture.

    The content says what format a file has, whatever its name. An image that Pillow opened from a
    file is held to the same formats, as it may not be decoded yet.

    Args:
        source: a path, a file's bytes, or an image.

    Raises:
        InputError: there is no such file, it is no PNG, JPEG or WebP, it is damaged, or it has
            too many pixels.
    """
    with _opened(source) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(source: str | Path | bytes | Image.Image) -> Iterator[Image.Image]:
    name = str(source) if isinstance(source, str | Path) else "it"
    try:
        if isinstance(source, Image.Image):
            _check(name, source)
            yield source
            return
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_FORMATS) as image:
            _check(name, image)
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} cannot be read as PNG, JPEG or WebP; save it as one of them"
        ) from error
    except Image.DecompressionBombError as error:
        # Pillow has a limit of its own, and says in words alone how many pixels it has found.
        found = re.search(r"\d+", str(error))
        raise _too_large(name, f"{int(found.group()):,}" if found else "too many") from error
    # Pillow raises what its decoders stumble over, SyntaxError for a broken PNG included.
    except Exception as error:
        raise InputError(
            f"{name} cannot be read ({error}); give a PNG, JPEG or WebP file that is whole"
        ) from error


def _check(name: str, image: Image.Image) -> None:
    if isinstance(image, ImageFile.ImageFile) and image.format not in (
        *_FORMATS,
        _MULTI_PICTURE_JPEG,
    ):
        raise InputError(
            f"{name} was opened as {image.format}; give a PNG, JPEG or WebP, or decode it yourself"
            " with image.convert('RGB')"
        )
    if image.width * image.height > LARGEST_IMAGE:
        raise _too_large(name, f"{image.width} x {image.height} = {image.width * image.height:,}")


def _too_large(name: str, pixels: str) -> InputError:
    return InputError(
        f"{name} has {pixels} pixels, and an image may have {LARGEST_IMAGE:,}; make it smaller"
    )
