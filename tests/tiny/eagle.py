"""Tiny EAGLE drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import as_llama, decoder_layer, linear, read, write

__all__ = ["agreeing_eagle", "tiny_eagle"]

FC_SCALE = 0.4
"""Weight of `fc`: a draft's outputs, which are its next features, stay as large as features.

With 1 they double with each draft until float32 and float64 disagree on the eighth.
"""

FEATURE_SCALE = 0.7
"""Weight of the feature in an agreeing draft: a wrong one changes many proposals."""

BRANCH_SCALE = 0.15
"""Weight of the decoder layer's branches in an agreeing draft, and with it of what is before."""


def tiny_eagle(
    folder: Path,
    target_folder: Path,
    *,
    layers: int = 1,
    fc_bias: bool = False,
    d2t: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes a random EAGLE draft for the target of ``target_folder`` and returns ``folder``.

    Its decoder layers have the target's shape and its weights the target's stored type.

    Args:
        folder: Created if it does not exist.
        target_folder: A folder that ``tiny_llama`` has written.
        layers: Number of decoder layers; the first has no input norm.
        fc_bias: Whether ``fc`` has a bias.
        d2t: The draft proposes only this many tokens, chosen at random; None proposes all.
        seed: Equal seeds and shapes give equal weights.
    """
    rng = np.random.default_rng(seed)
    target, _ = read(target_folder)
    config: dict[str, Any] = as_llama(target) | {
        "architectures": ["LlamaForCausalLMEagle"],
        "num_hidden_layers": layers,
    }
    hidden = config["hidden_size"]
    tensors = {"fc.weight": FC_SCALE * linear(rng, hidden, 2 * hidden)}
    if fc_bias:
        tensors["fc.bias"] = rng.normal(0, 0.5, hidden)
    for index in range(layers):
        tensors |= decoder_layer(rng, config, index, input_norm=index > 0)
    if d2t is not None:
        config["draft_vocab_size"] = d2t
        chosen = np.sort(rng.choice(config["vocab_size"], d2t, replace=False))
        tensors["d2t"] = chosen - np.arange(d2t)
    return write(folder, config, tensors)


def agreeing_eagle(folder: Path, target_folder: Path, *, seed: int = 0) -> Path:
    """Writes a draft that often agrees with the target that ``agreeing_llama`` has written.

    ``fc`` hands on the embedding, scaled as the target's final norm scales it, so that the
    target's head finds the embedded token's successor; the feature and the layer disturb
    that, enough for wrong ones to show.
    """
    tiny_eagle(folder, target_folder, seed=seed)
    config, tensors = read(folder)
    target_config, target = read(target_folder)
    embedding_half, feature_half = np.split(tensors["fc.weight"], 2, axis=1)  # [H, H] each
    embedding_half[:] = np.diag(target["model.norm.weight"])
    # Granite's own layers do not see more of an embedding than this.
    embedding_half *= target_config.get("embedding_multiplier", 1)
    feature_half *= FEATURE_SCALE / FC_SCALE
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= BRANCH_SCALE
    return write(folder, config, tensors)
