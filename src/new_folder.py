"""A folder that is written whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from unispec.errors import InputError

__all__ = ["check_new_folder", "new_folder"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of files that are written, whatever their names."""


def check_new_folder(output: Path) -> None:
    """Checks that a folder is missing or empty.

    Raises:
        InputError: it is neither.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty; give another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` at the end, if nothing failed.

    Raises:
        InputError: `output` is not empty, or cannot be written.
    """
    check_new_folder(output)
    # An empty folder may be where something is mounted, so it stays.
    place = output.resolve()
    keeps = place.exists()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        parent = place if keeps else place.parent
        working = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); give another folder") from error
    try:
        yield working
        if keeps:
            for path in sorted(working.iterdir()):
                path.rename(place / path.name)
        else:
            working.chmod(0o755)
            working.rename(place)
    except OSError as error:
        # What is written may be read from files, whose errors are their own.
        if error.errno not in _FULL and str(working) not in str(error.filename):
            raise
        raise InputError(
            f"{output} cannot be written ({error}); make room, or give another"
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
