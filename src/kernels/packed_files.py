"""Packed matrices that are kept in files, so that a second start packs nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.gguf_folder import cache_folder
from unispec.checkpoints.stored import StoredMatrix
from unispec.kernels.packing import LAYOUT, pack, packed_bytes, packed_chunks, packed_shape

__all__ = ["packed", "remove_unused"]

_LOGGER: Final = logging.getLogger(__name__)

_LEAST_BYTES: Final = 1_000_000
"""What is smaller is packed sooner than a file is opened."""
_UNUSED_SECONDS: Final = 30 * 24 * 3600
"""After so long a file is removed."""


def packed(tensor: StoredMatrix) -> npt.NDArray[np.uint8]:
    """A quantised matrix as the kernels read it, uint8 of `packed_shape`.

    A large one whose origin is known is written once to the folder `packed` of `cache_folder` and
    mapped read-only from there; where that cannot be written, it is packed in memory.
    """
    size = packed_bytes(tensor.kind, tensor.shape)
    if tensor.origin is None or size <= _LEAST_BYTES:
        return pack(tensor)
    identity = repr((LAYOUT, tensor.kind.name, tensor.shape, tensor.origin))
    name = hashlib.sha256(identity.encode()).hexdigest()
    path = cache_folder() / "packed" / f"{name}.bin"
    try:
        if not path.is_file() or path.stat().st_size != size:
            _write(tensor, path)
        with suppress(OSError):  # of a cache that this user may only read
            os.utime(path)
        mapped = np.memmap(path, np.uint8, "r", shape=packed_shape(tensor.kind, tensor.shape))
    except OSError as error:
        _warn(path.parent, error.strerror or str(error))
        return pack(tensor)
    return np.asarray(mapped)


def remove_unused() -> None:
    """Removes packed files that nobody has used for 30 days; call it when all of a model are."""
    with suppress(OSError):  # no folder, or one that may not be listed
        for path in (cache_folder() / "packed").iterdir():
            with suppress(OSError):  # another process may have removed it
                if path.stat().st_mtime < time.time() - _UNUSED_SECONDS:
                    path.unlink()


def _write(tensor: StoredMatrix, path: Path) -> None:
    """Writes a whole file or none, also when two processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.stem[:16]}.", dir=path.parent)
    unfinished = Path(name)
    try:
        with open(handle, "wb") as file:
            for chunk in packed_chunks(tensor):
                file.write(chunk.data)
            file.flush()
            # Else a power failure may leave a file of the right size without its bytes.
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


@cache
def _warn(folder: Path, reason: str) -> None:
    """Says once that nothing can be kept."""
    _LOGGER.warning(
        "%s cannot be written (%s), so weights are packed at every start: make room, or set"
        " UNISPEC_CACHE to another folder",
        folder,
        reason,
    )
