"""Our operations for a CPU, compiled once for each version of their sources and of Mojo."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

from max.graph import DeviceRef, default_custom_extensions_scope
from mojo.run import subprocess_run_mojo

from unispec.checkpoints.gguf_folder import cache_folder

__all__ = ["kernel_package", "kernels_for"]

_SOURCES: Final = Path(__file__).parent / "mojo"
_NAME: Final = "unispec_kernels.mojoc"


@contextmanager
def kernels_for(device: DeviceRef) -> Iterator[None]:
    """Lets graphs that are built within, and their subgraphs, use the operations of `operations`.

    Args:
        device: where the graph runs; a GPU needs none of them.
    """
    if device.is_cpu():
        with default_custom_extensions_scope(kernel_package()):
            yield
    else:
        yield


@cache
def kernel_package() -> Path:
    """The compiled package, in the folder `kernels` of `cache_folder`.

    Where that cannot be written it is the folder of the sources, which MAX compiles for each graph.
    """
    digest = hashlib.sha256(version("mojo-compiler").encode())
    for source in sorted(_SOURCES.glob("*.mojo")):
        digest.update(source.name.encode() + source.read_bytes())
    package = cache_folder() / "kernels" / digest.hexdigest()[:16] / _NAME
    if package.is_file():
        return package
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        # Another process may make it at the same time.
        with tempfile.TemporaryDirectory(dir=package.parent) as folder:
            made = Path(folder) / _NAME
            command = ["precompile", str(_SOURCES), "-o", str(made)]
            subprocess_run_mojo(command, capture_output=True, check=True)
            os.replace(made, package)
    except OSError:
        return _SOURCES
    return package
