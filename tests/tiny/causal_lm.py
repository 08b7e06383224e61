"""Tiny random models of any causal architecture of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from .checkpoint import GAIN

__all__ = ["tiny_causal_lm"]


def tiny_causal_lm(
    folder: Path, config: PretrainedConfig, *, layer_norm: bool = False, seed: int = 0
) -> Any:
    """Writes a random checkpoint to ``folder`` and returns the model, float32, eager attention.

    Args:
        folder: Created if it does not exist.
        config: Of the model; it gets the one entry of ``architectures``.
        layer_norm: Whether every norm is replaced by torch's layer norm, weight and bias.
        seed: Equal seeds and shapes give equal weights.
    """
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    if layer_norm:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name.endswith("norm"):
                    setattr(parent, name, nn.LayerNorm(len(child.weight), eps=1e-5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, GAIN * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model.eval()
