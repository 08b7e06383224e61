"""Tiny DFlash drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Array, decoder_layer, linear, norm, read, write

__all__ = ["agreeing_dflash", "tiny_dflash"]

SHARPNESS = 2.0
"""Mean weight of the queries' norm, as in trained drafts; 1 makes all slots see much the same."""

BLOCK_SIZE = 6
"""Of an agreeing draft, as are all the following."""

MASK = 3

CONTEXT_SCALE = 0.05
"""How strongly the context disturbs."""

UNEVENNESS = 0.025
"""How far the first layer's attention is from even."""

BRANCH_SCALE = 0.05
"""How strongly the second layer disturbs."""

TURN_SCALE = 0.25
"""What the first layer's attention adds, in units of one token's normed embedding."""

MARGIN = 6.0
"""What keeps a unit of the first layer's MLP silent for other tokens than its own."""

STEEPNESS = 4.0
"""Scale of the units' inputs; SiLU(steepness * x) is nearly a ramp max(0, x)."""

RIDGE = 0.1
"""Keeps the solution for ``down_proj`` from relying on small differences of units."""


def tiny_dflash(
    folder: Path,
    target_folder: Path,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    target_layer_ids: Sequence[int],
    mask_token_id: int,
    intermediate_size: int | None = None,
    attention_bias: bool = False,
    d2t: int | None = None,
    sliding_window: int | None = None,
    layer_types: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a random DFlash draft for the target of ``target_folder`` and returns ``folder``.

    Its width, RoPE and stored type are the target's.

    Args:
        folder: Created if it does not exist.
        target_folder: A folder that ``tiny_llama`` has written.
        layers: Number of decoder layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head; need not be ``hidden_size / heads``.
        block_size: Slots of a block: the target's next token and the proposals.
        target_layer_ids: The target's layers whose outputs the draft reads.
        mask_token_id: The token that stands in the slots to be predicted.
        intermediate_size: Width of the MLP; None takes the target's.
        attention_bias: Whether the four attention projections have a bias.
        d2t: The draft proposes only this many tokens, chosen at random; None proposes all.
        sliding_window: Positions that a layer of type ``sliding_attention`` sees.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; None: all full.
        seed: Equal seeds and shapes give equal weights.
    """
    rng = np.random.default_rng(seed)
    target, _ = read(target_folder)
    rope_parameters = {"rope_type": "default", "rope_theta": target.pop("rope_theta")}
    rope_parameters |= target.pop("rope_scaling") or {}
    config: dict[str, Any] = target | {
        "architectures": ["DFlashDraftModel"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size or target["intermediate_size"],
        "attention_bias": attention_bias,
        "rope_parameters": rope_parameters,
        "block_size": block_size,
        "num_target_layers": target["num_hidden_layers"],
        "dflash_config": {
            "mask_token_id": mask_token_id,
            "target_layer_ids": list(target_layer_ids),
        },
    }
    if sliding_window is not None:
        config["sliding_window"] = sliding_window
    if layer_types is not None:
        config["layer_types"] = list(layer_types)
    hidden = config["hidden_size"]
    tensors = {
        "fc.weight": linear(rng, hidden, len(target_layer_ids) * hidden),
        "hidden_norm.weight": norm(rng, hidden),
        "norm.weight": norm(rng, hidden),
    }
    for index in range(layers):
        tensors |= decoder_layer(rng, config, index)
        attention = f"layers.{index}.self_attn"
        tensors[f"{attention}.q_norm.weight"] = SHARPNESS * norm(rng, head_dim)
        tensors[f"{attention}.k_norm.weight"] = norm(rng, head_dim)
    if d2t is not None:
        config["draft_vocab_size"] = d2t
        chosen = np.sort(rng.choice(config["vocab_size"], d2t, replace=False))
        tensors["d2t"] = chosen - np.arange(d2t)
    return write(folder, config, tensors)


def agreeing_dflash(folder: Path, target_folder: Path, *, seed: int = 0) -> Path:
    """Writes a draft that often agrees with the target that ``agreeing_llama`` has written.

    The first layer attends evenly to a window of one block. That leaves in slot ``i`` three
    parts: the mask, ``i`` times the mask turned by a random rotation, and the next token
    turned likewise. The layer's MLP looks up what the slot must hold, the embedding of the
    ``i - 1``-th successor of the next token: the target's head finds that one's successor.
    The context and the second layer, which sees everything, only disturb that.
    """
    target_config, target = read(target_folder)
    embedding = target["model.embed_tokens.weight"]  # [V, H]
    vocab_size, hidden = embedding.shape
    heads = target_config["num_attention_heads"]
    tiny_dflash(
        folder,
        target_folder,
        layers=2,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        block_size=BLOCK_SIZE,
        target_layer_ids=range(target_config["num_hidden_layers"]),
        mask_token_id=MASK,
        intermediate_size=vocab_size * (BLOCK_SIZE - 1),
        sliding_window=BLOCK_SIZE,
        layer_types=["sliding_attention", "full_attention"],
        seed=seed,
    )
    config, tensors = read(folder)
    tensors["norm.weight"] = target["model.norm.weight"]
    tensors["hidden_norm.weight"] *= CONTEXT_SCALE
    tensors["layers.0.self_attn.q_norm.weight"] *= UNEVENNESS
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.1.{name}.weight"] *= BRANCH_SCALE

    value, output = (
        np.linalg.qr(tensors[f"layers.0.self_attn.{name}.weight"]).Q
        for name in ("v_proj", "o_proj")
    )  # [H, H] each
    tensors["layers.0.self_attn.v_proj.weight"] = value
    tensors["layers.0.self_attn.o_proj.weight"] = TURN_SCALE * BLOCK_SIZE * output
    normed = _unit_rms(embedding) * tensors["layers.0.input_layernorm.weight"]
    turned = TURN_SCALE * normed @ (output @ value).T  # [V, H]
    parts = np.stack(np.broadcast_arrays(embedding[MASK], turned[MASK], turned), axis=1)

    successor = (embedding * tensors["norm.weight"] @ target["lm_head.weight"].T).argmax(axis=1)
    chain = [np.arange(vocab_size)]
    while len(chain) < BLOCK_SIZE - 1:
        chain.append(successor[chain[-1]])
    wanted = embedding[np.stack(chain, axis=1)]  # [V, B - 1, H]
    mlp = _lookup(parts, wanted, tensors["layers.0.post_attention_layernorm.weight"])
    tensors |= {f"layers.0.mlp.{name}.weight": tensor for name, tensor in mlp.items()}
    return write(folder, config, tensors)


def _lookup(parts: Array, wanted: Array, norm_weight: Array) -> dict[str, Array]:
    """An MLP that turns the stream ``parts`` . (1, i, 1) of slot ``i`` into ``wanted``.

    It has one unit for every token t and every r < B - 1, the ramp max(0, i - r), silent
    unless the next token is t.

    Args:
        parts: By next token [V, 3, H].
        wanted: By next token and slot 1 to B - 1 [V, B - 1, H].
        norm_weight: Of the norm before the MLP [H].
    """
    hidden = len(norm_weight)
    ramp = np.arange(wanted.shape[1])[:, None]  # [B - 1, 1]
    # Inner products with these are the parts' coefficients.
    dual = np.linalg.pinv(parts)  # [V, H, 3]
    one, slot, is_token = (dual[:, None, :, i] for i in range(3))  # [V, 1, H] each
    gate = STEEPNESS * (MARGIN * (is_token - one) + slot - ramp * one) / norm_weight
    up = np.broadcast_to(one / norm_weight, gate.shape)
    gate, up = gate.reshape(-1, hidden), up.reshape(-1, hidden)  # [V * (B - 1), H] each

    stream = (parts[:, :1] + (ramp + 1) * parts[:, 1:2] + parts[:, 2:]).reshape(-1, hidden)
    normed = _unit_rms(stream) * norm_weight
    opened = normed @ gate.T
    units = opened / (1 + np.exp(-opened)) * (normed @ up.T)  # [V * (B - 1), V * (B - 1)]
    added = wanted.reshape(-1, hidden) - stream
    ridge = RIDGE * np.eye(len(units))
    down = np.linalg.solve(units.T @ units + ridge, units.T @ added)
    return {"gate_proj": gate, "up_proj": up, "down_proj": np.ascontiguousarray(down.T)}


def _unit_rms(rows: Array) -> Array:
    return rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True))
