"""Checkpoints with random weights: as fast as the real ones, and of no other use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from unispec.checkpoints.gguf_folder import cache_folder, make_once

from .shapes import DraftShape, Shape

__all__ = ["random_draft", "random_target"]

_STANDARD_DEVIATION: Final = 0.02
_CONFIG: Final = "config.json"


def random_target(shape: Shape) -> Path:
    """A folder with the target in bfloat16, made once in the cache; a layer in memory at a time."""

    def write(folder: Path) -> None:
        for name, tensors in shape.files():
            _save(folder / f"{name}.safetensors", tensors)
        words = {f"t{number}": number for number in range(shape.vocabulary)}
        Tokenizer(WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
        names = {"bos_token": shape.vocabulary - 2, "eos_token": shape.vocabulary - 1}
        told = {name: f"t{number}" for name, number in names.items()}
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", **told}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        _configure(folder, shape.config())

    return _made_once(shape.name, write)


def random_draft(shape: Shape, draft: DraftShape) -> Path:
    """A folder with a draft for such a target, likewise."""

    def write(folder: Path) -> None:
        _save(folder / "model.safetensors", draft.tensors(shape))
        _configure(folder, draft.config(shape))

    return _made_once(f"{shape.name}-{draft.method}-{draft.layers}-{draft.draft_tokens}", write)


def _made_once(name: str, write: Callable[[Path], None]) -> Path:
    return make_once(cache_folder() / "benchmarks" / f"random-{name}", (_CONFIG,), write)


def _configure(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def _save(file: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Matrices are random, norms are one, biases zero."""
    # A file has the same weights whichever are made before it.
    seeded = torch.Generator().manual_seed(sum(file.name.encode()))
    made = {}
    for name, shape in tensors.items():
        empty = torch.zeros(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            made[name] = empty.normal_(0, _STANDARD_DEVIATION, generator=seeded)
        else:
            made[name] = empty if name.endswith("bias") else empty + 1
    save_file(made, file, metadata={"format": "pt"})
