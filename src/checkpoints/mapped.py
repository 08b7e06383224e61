"""The memory of files that are mapped."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from unispec.checkpoints.stored import StoredMatrix

__all__ = ["forget_pages"]


def forget_pages(weights: Iterable[Any]) -> None:
    """Takes files that weights lie in out of the process's memory; they stay mapped.

    What is looked at again comes from the system's cache of files. Memory that is no file mapped
    read-only, which might be changed, is left alone, and so are locked pages.

    Args:
        weights: arrays or `StoredMatrix`.
    """
    files = {}
    for weight in weights:
        array = weight.blocks if isinstance(weight, StoredMatrix) else weight
        while array is not None and not isinstance(array, mmap.mmap):
            array = getattr(array, "base", None)
        if array is not None:
            files[id(array)] = array
    for file in files.values():
        if hasattr(mmap, "MADV_DONTNEED") and memoryview(file).readonly:
            with suppress(OSError):  # locked
                file.madvise(mmap.MADV_DONTNEED)
