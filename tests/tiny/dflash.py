"""Tiny DFlash drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Array, as_llama, decoder_layer, linear, norm, read, write

__all__ = ["agreeing_dflash", "tiny_dflash"]

SHARPNESS = 2.0
"""Mean weight of the queries' norm, as in trained drafts; 1 makes all slots see much the same."""

BLOCK_SIZE = 6
"""Of an agreeing draft, as are all the following."""

MASK = 3

BRANCH_SCALE = 0.25
"""How strongly the second layer, and with it the context, disturbs."""

ROW_SCALE = 0.002
"""Scale of the block's rows in the first layer; the context's rows have scale 1."""

KEY_BIAS = 0.25
"""Of the first layer's keys: much for the block's rows, little for the context's."""

VISIBILITY = 20.0
"""By how much, nearly, the block's rows outscore the context's in the first layer."""

FARNESS = 2.0
"""By how much the farthest row of the block outscores a slot's own row there."""

PLACE_PAIR = 1
"""RoPE turns this pair of a head by a quarter turn over the block."""

TURN_SCALE = 0.5
"""What the first layer's attention adds, in units of one token's normed embedding."""

STEEPNESS = 30.0
"""Scale of the units' inputs; SiLU(steepness * x) is nearly a ramp max(0, x)."""

RIDGE = 0.01
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
    is_causal: bool | None = None,
    sliding_window_non_causal: bool | None = None,
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
        is_causal: Whether no slot sees those after it, in any layer; None: as the types say.
        sliding_window_non_causal: Whether slots of sliding layers see those after them; None: no.
        seed: Equal seeds and shapes give equal weights.
    """
    rng = np.random.default_rng(seed)
    target = as_llama(read(target_folder)[0])
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
    stated = {
        "sliding_window": sliding_window,
        "is_causal": is_causal,
        "sliding_window_non_causal": sliding_window_non_causal,
    }
    config |= {name: value for name, value in stated.items() if value is not None}
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


def agreeing_dflash(
    folder: Path, target_folder: Path, *, d2t: int | None = None, seed: int = 0
) -> Path:
    """Writes a draft that often agrees with the target that ``agreeing_llama`` has written.

    The first layer sees only the block, and far rows of it more than near ones. That leaves
    two parts in slot ``i``: the mask, and the next token turned by a random rotation, times a
    share that grows with ``i``. The layer's MLP looks up what the slot must hold, the embedding
    of the ``i - 1``-th successor of the next token: the target's head finds that one's
    successor. The second layer, which sees the context too, only disturbs that. With ``d2t``
    it knows only that many tokens, as in ``tiny_dflash``.
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
        attention_bias=True,
        d2t=d2t,
        seed=seed,
    )
    config, tensors = read(folder)
    tensors["norm.weight"] = target["model.norm.weight"]
    for name in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight"):
        tensors[f"layers.1.{name}"] *= BRANCH_SCALE

    layer = {
        name.removeprefix("layers.0."): tensor
        for name, tensor in tensors.items()
        if name.startswith("layers.0.")
    }
    layer["input_layernorm.weight"] *= ROW_SCALE
    shares = _look(layer, config)[1:]  # [B - 1]
    value, output = (
        np.linalg.qr(layer[f"self_attn.{name}_proj.weight"]).Q for name in ("v", "o")
    )  # [H, H] each
    layer["self_attn.v_proj.weight"] = value
    layer["self_attn.o_proj.weight"] = TURN_SCALE / ROW_SCALE * output
    for name in ("v", "o"):
        layer[f"self_attn.{name}_proj.bias"] *= 0
    rows = TURN_SCALE / ROW_SCALE * _unit_rms(embedding) * layer["input_layernorm.weight"]
    turned = rows @ (output @ value).T  # [V, H]
    mask = embedding[MASK] + turned[MASK]  # [H]
    parts = np.stack(np.broadcast_arrays(mask, turned - turned[MASK]), axis=1)  # [V, 2, H]

    successor = (embedding * tensors["norm.weight"] @ target["lm_head.weight"].T).argmax(axis=1)
    chain = [np.arange(vocab_size)]
    while len(chain) < BLOCK_SIZE - 1:
        chain.append(successor[chain[-1]])
    wanted = embedding[np.stack(chain, axis=1)]  # [V, B - 1, H]
    mlp = _lookup(parts, shares, wanted, layer["post_attention_layernorm.weight"])
    layer |= {f"mlp.{name}.weight": tensor for name, tensor in mlp.items()}
    return write(folder, config, tensors | {f"layers.0.{name}": t for name, t in layer.items()})


def _look(layer: dict[str, Array], config: dict[str, Any]) -> Array:
    """Sets what a layer looks at, and returns the share [B] of it that slot 0 has.

    All queries are one, the bias, and so are a block's keys, as its rows are too small to
    matter. Both lie in RoPE's slowest pair, which hardly turns, and in ``PLACE_PAIR``, in which
    they are opposite, so that a slot's own row scores least. The context's rows are large:
    their keys are mostly in the other pairs, and score little.
    """
    heads, width = config["num_attention_heads"], config["head_dim"]
    slowest = width // 2 - 1
    key, query = np.zeros((2, heads, width))
    key[:, [PLACE_PAIR, slowest]] = KEY_BIAS
    query[:, [PLACE_PAIR, slowest]] = -FARNESS, VISIBILITY
    # Once normed, a key has sqrt(width / 2) in either pair.
    query_norm = np.hypot(FARNESS, VISIBILITY) * (2 / width) ** 0.5
    layer |= {
        "self_attn.q_proj.bias": query.ravel(),
        "self_attn.k_proj.bias": key.ravel(),
        "self_attn.q_norm.weight": np.full(width, query_norm),
        "self_attn.k_norm.weight": np.ones(width),
    }
    layer["self_attn.q_proj.weight"] *= 0
    pairs = layer["self_attn.k_proj.weight"].reshape(heads, 2, width // 2, -1)
    pairs[:, :, [PLACE_PAIR, slowest]] = 0

    frequency = config["rope_parameters"]["rope_theta"] ** (-2 * PLACE_PAIR / width)
    slots = np.arange(BLOCK_SIZE)
    weights = np.exp(-FARNESS * np.cos(frequency * (slots[:, None] - slots)))  # [B, B]
    shares: Array = weights[:, 0] / weights.sum(axis=1)
    return shares


def _lookup(parts: Array, shares: Array, wanted: Array, norm_weight: Array) -> dict[str, Array]:
    """An MLP that turns the stream ``parts`` . (1, share) of a slot into what it must hold.

    It has one unit for every token t and every slot: if the next token is t, a ramp that begins
    at the share of the slot before; else nearly silent.

    Args:
        parts: By next token [V, 2, H].
        shares: By slot from 1, ascending [B - 1].
        wanted: By next token and slot from 1 [V, B - 1, H].
        norm_weight: Of the norm before the MLP [H].
    """
    hidden = len(norm_weight)
    ramp = np.append(0, shares[:-1])[:, None]  # [B - 1, 1]
    # Inner products with these are the parts' coefficients.
    dual = np.linalg.pinv(parts)  # [V, H, 2]
    one, share = (dual[:, None, :, i] for i in range(2))  # [V, 1, H] each
    gate = STEEPNESS * (share - ramp * one) / norm_weight
    up = np.broadcast_to(one / norm_weight, gate.shape)
    gate, up = gate.reshape(-1, hidden), up.reshape(-1, hidden)  # [V * (B - 1), H] each

    stream = (parts[:, :1] + shares[:, None] * parts[:, 1:]).reshape(-1, hidden)
    normed = _unit_rms(stream) * norm_weight
    opened = normed @ gate.T
    units = opened / (1 + np.exp(-opened)) * (normed @ up.T)  # [V * (B - 1), V * (B - 1)]
    added = wanted.reshape(-1, hidden) - stream
    ridge = RIDGE * np.eye(len(units))
    down = np.linalg.solve(units.T @ units + ridge, units.T @ added)
    return {"gate_proj": gate, "up_proj": up, "down_proj": np.ascontiguousarray(down.T)}


def _unit_rms(rows: Array) -> Array:
    return rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True))
