"""Pairs whose laws are flat, so that a draft is near its target whatever it computes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from .checkpoint import read, write
from .presets import TinyPair

__all__ = ["flat_pair"]


def flat_pair(folder: Path, pair: TinyPair, scale: float) -> TinyPair:
    """Copies a pair to ``folder``, its head times ``scale``; the graph is the same.

    Args:
        folder: Created if it does not exist.
        pair: Its head is not the embedding, and its draft has none of its own.
        scale: Less than 1 makes the laws of target and draft flatter.
    """
    target = folder / "target"
    shutil.copytree(pair.target, target)
    config, tensors = read(target)
    for name, tensor in tensors.items():
        if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
            tensor *= scale
    write(target, config, tensors)
    return replace(pair, target=target)
