"""Our operations for a CPU, compiled once for each version of their sources and of Mojo."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

from max.graph import DeviceRef, default_custom_extensions_scope
from mojo.run import subprocess_run_mojo

from unispec.checkpoints.gguf_folder import cache_folder
from unispec.errors import InputError

__all__ = ["kernel_package", "kernels_for"]

_SOURCES: Final = Path(__file__).parent / "mojo"
_NAME: Final = "unispec_kernels.mojoc"
_BUILDING: Final = threading.RLock()
_LOGGER: Final = logging.getLogger(__name__)


@contextmanager
def kernels_for(device: DeviceRef) -> Iterator[None]:
    """Lets graphs that are built within, and their subgraphs, use the operations of `operations`.

    Args:
        device: where the graph runs; a GPU needs none of them.
    """
    if device.is_cpu():
        # MAX keeps the scope in one place for all threads.
        with _BUILDING, default_custom_extensions_scope(kernel_package()):
            yield
    else:
        yield


@cache
def kernel_package() -> Path:
    """The compiled package, in the folder `kernels` of `cache_folder`.

    Where that cannot be written it is the folder of the sources, which MAX compiles for each graph.

    Raises:
        InputError: the sources cannot be compiled.
    """
    digest = hashlib.sha256(version("mojo-compiler").encode())
    for source in sorted(_SOURCES.glob("*.mojo")):
        digest.update(source.name.encode() + source.read_bytes())
    package = cache_folder() / "kernels" / digest.hexdigest()[:16] / _NAME
    if package.is_file():
        return package
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / _NAME
        _compile(made)
        # Another process may write it at the same time.
        unfinished = package.with_suffix(f".{os.getpid()}")
        try:
            package.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, unfinished)
            os.replace(unfinished, package)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            _LOGGER.warning(
                "%s cannot be written (%s), so the kernels are compiled for each graph: make room,"
                " or set UNISPEC_CACHE to another folder",
                package.parent,
                error.strerror or error,
            )
            return _SOURCES
    return package


def _compile(package: Path) -> None:
    command = ["precompile", str(_SOURCES), "-o", str(package)]
    try:
        subprocess_run_mojo(command, capture_output=True, check=True, text=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error:" in line] or [str(error)]
        raise InputError(
            f"the kernels in {_SOURCES} cannot be compiled ({lines[0].strip()}): install unispec"
            " again, with the versions of its constraints.txt, and make room in TMPDIR"
        ) from error
