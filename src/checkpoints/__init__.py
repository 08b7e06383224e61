"""Reading checkpoints: safetensors and GGUF files as numpy arrays, without torch.

In all functions `model` and `draft` are a folder or the name of a repository of the hub, and
`source` is the file or folder that errors name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from unispec.checkpoints.gguf import GGUFCheckpoint, read_gguf
    from unispec.checkpoints.gguf_file import is_gguf
    from unispec.checkpoints.stored import StoredMatrix
    from unispec.checkpoints.tensors import Tensor, Weight, check_weight_files, read_tensors

__all__ = [
    "GGUFCheckpoint",
    "StoredMatrix",
    "Tensor",
    "Weight",
    "check_weight_files",
    "is_gguf",
    "read_gguf",
    "read_tensors",
]

_MODULES: Final = {
    "GGUFCheckpoint": "gguf",
    "StoredMatrix": "stored",
    "Tensor": "tensors",
    "Weight": "tensors",
    "check_weight_files": "tensors",
    "is_gguf": "gguf_file",
    "read_gguf": "gguf",
    "read_tensors": "tensors",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `repository` shall not wait for numpy and gguf."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
