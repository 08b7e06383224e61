"""A folder that is written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unispec.errors import InputError

__all__ = ["check_new_folder", "new_folder"]


def check_new_folder(output: Path) -> None:
    """Checks that a folder is missing or empty.

    Raises:
        InputError: it is neither.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty; give another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to, which takes its place at the end, if nothing failed.

    Raises:
        InputError: `output` is not empty, or cannot be written.
    """
    check_new_folder(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); give another folder") from error
    try:
        yield working
        working.chmod(0o755)
        working.rename(output)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error}); make room, or give another"
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
