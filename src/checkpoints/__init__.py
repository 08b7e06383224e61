"""Reading checkpoints: safetensors and GGUF files as numpy arrays, without torch."""

from __future__ import annotations

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
