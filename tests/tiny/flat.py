"""Pairs whose laws are flat, so that a draft is near its target whatever it computes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from .checkpoint import read, write
from .presets import TinyPair

__all__ = ["flat_pair"]


def flat_pair(folder: Path, pair: TinyPair, scale: float) -> TinyPair:
    """Copies a pair to ``folder``, its heads times ``scale``; the graph is the same.

    Args:
        folder: Created if it does not exist.
        pair: Its head is not the embedding.
        scale: Less than 1 makes the laws of target and draft flatter.
    """
    target = _flat(pair.target, folder / "target", scale)
    draft = None if pair.draft is None else _flat(pair.draft, folder / "draft", scale)
    return replace(pair, target=target, draft=draft)


def _flat(plain: Path, folder: Path, scale: float) -> Path:
    shutil.copytree(plain, folder)
    config, tensors = read(folder)
    for name, tensor in tensors.items():
        if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
            tensor *= scale
    return write(folder, config, tensors)
