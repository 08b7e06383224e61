"""Tiny pairs as kernels for GPUs take them, by what `tests/gpu/` calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from deepseek_gpus import BLOCKS
from safetensors.torch import load_file, save_file
from tiny import TinyPair, agreeing_deepseek, agreeing_eagle, agreeing_llama, tiny_dflash

__all__ = ["GPU_PAIRS", "ROUNDING"]


def _llama(folder: Path) -> Path:
    """Heads of 64, grouped queries, bfloat16 files: torch reads the weights that the GPU has."""
    return agreeing_llama(
        folder / "target", hidden_size=256, head_dim=64, layers=2, dtype="bfloat16", seed=41
    )


def _llama_eagle(folder: Path) -> TinyPair:
    """A draft that agrees with its target on most tokens."""
    target = _llama(folder)
    return TinyPair(target, agreeing_eagle(folder / "draft", target, seed=51))


def _llama_dflash(folder: Path) -> TinyPair:
    """A random draft of two layers, blocks of six; it proposes three quarters of the tokens."""
    target = _llama(folder)
    draft = tiny_dflash(
        folder / "draft",
        target,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        block_size=6,
        target_layer_ids=(0, 1),
        mask_token_id=3,
        d2t=192,
        seed=52,
    )
    return TinyPair(target, draft, "dflash", draft_proposal="sampled")


def _deepseek_mtp(folder: Path) -> TinyPair:
    """DeepSeek-V3's own widths of attention, in FP8 blocks as it is published.

    The router's bias alone decides which experts a token has: scores are between 0 and 1, and where
    two are close, a rounding would choose other experts and change logits by any amount.
    """
    target = agreeing_deepseek(
        folder / "target", block=(128, 128), branch_scale=0.1, seed=43, **BLOCKS
    )
    file = target / "model.safetensors"
    tensors, seeded = load_file(file), torch.Generator().manual_seed(44)
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias[:] = 2.0 ** (2 + torch.randperm(len(bias), generator=seeded))
    save_file(tensors, file, metadata={"format": "pt"})
    return TinyPair(target, None, "mtp")


GPU_PAIRS: Mapping[str, Callable[[Path], TinyPair]] = {
    "llama_eagle": _llama_eagle,
    "llama_dflash": _llama_dflash,
    "deepseek_mtp": _deepseek_mtp,
}
"""Each writes its pair below a folder and returns where."""

ROUNDING: Mapping[str, float] = {
    "llama_eagle": 1 / 16,
    "llama_dflash": 1 / 8,
    "deepseek_mtp": 1 / 4,
}
"""Of each pair, `TargetReference`'s `rounding`.

What torch says in bfloat16 of the first pair's target moves the distance of two logits by up to
0.056 of the best one from what it says in float32, and of the second pair's draft by 0.08. Where
DeepSeek-V3 also rounds what its FP8 products read, it is 0.2; in bfloat16, 0.04.
"""
