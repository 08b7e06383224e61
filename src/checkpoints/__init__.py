"""Reading checkpoints: safetensors and GGUF files as numpy arrays, without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unispec.checkpoints.gguf import GGUFCheckpoint, is_gguf, read_gguf
    from unispec.checkpoints.tensors import Tensor, check_weight_files, read_tensors

__all__ = [
    "GGUFCheckpoint",
    "Tensor",
    "check_weight_files",
    "is_gguf",
    "read_gguf",
    "read_tensors",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `repository` shall not wait for numpy and gguf."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "gguf" if name in ("GGUFCheckpoint", "is_gguf", "read_gguf") else "tensors"
    return getattr(import_module(f"{__name__}.{module}"), name)
