"""Tiny EAGLE-3 drafts in the three forms in which they are published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .checkpoint import Array, as_llama, decoder_layer, linear, norm, read, write

__all__ = ["Dialect", "agreeing_eagle3", "tiny_eagle3"]

Dialect = Literal["authors", "specforge", "speculators"]

FEATURE_SCALE = 0.25
"""Weight of the tapped outputs in an agreeing draft: wrong ones change many proposals."""

SHARPNESS = 2.2
"""Scale of an agreeing draft's queries and keys, by which a row sees mostly itself."""

MLP_SCALE = 0.15
"""Weight of the MLP in an agreeing draft."""


def tiny_eagle3(
    folder: Path,
    target_folder: Path,
    *,
    dialect: Dialect = "specforge",
    taps: Sequence[int] | None = None,
    d2t: int | None = 100,
    layers: int = 1,
    own_embedding: bool = False,
    own_head: bool = True,
    qk_norm: bool = False,
    biased: bool = False,
    hidden_size: int | None = None,
    heads: tuple[int, int, int] | None = None,
    seed: int = 0,
    **flags: bool,
) -> Path:
    """Writes a random EAGLE-3 draft for the target of ``target_folder`` and returns ``folder``.

    Args:
        folder: Created if it does not exist.
        target_folder: A folder that ``tiny_llama`` has written, of at least seven layers if no
            taps are given.
        dialect: Whose form config.json and the tensors' names have.
        taps: Layers whose outputs it reads; None: config.json does not say.
        d2t: The draft proposes only this many tokens, chosen at random; None proposes all.
        layers: Number of decoder layers; the speculators library alone trains more than one.
        own_embedding: Whether it has an embedding that is not the target's.
        own_head: Whether it has a head.
        qk_norm: Whether heads are normed, as in Qwen3's layers.
        biased: Whether ``fc`` and the q, k and v projections have a bias.
        hidden_size: Width of the draft, which then has both matrices; None: the target's.
        heads: Query heads, key and value heads, and their width; None: as the target.
        seed: Equal seeds and shapes give equal weights.
        flags: ``norm_before_residual``, ``norm_before_fc``, ``fc_norm``, ``norm_output``.
    """
    rng = np.random.default_rng(seed)
    target, _ = read(target_folder)
    layer = as_llama(target) | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    if heads is not None:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        layer |= dict(zip(names, heads, strict=True))
    del layer["architectures"]
    wide, vocab = layer["hidden_size"], layer["vocab_size"]
    count = 3 if taps is None else len(taps)
    hidden = layer["hidden_size"] = hidden_size or wide
    kind = {"model_type": "qwen3" if qk_norm else "llama"}
    tensors: dict[str, Array] = {"fc.weight": linear(rng, hidden, count * wide)}
    for index in range(layers):
        tensors |= decoder_layer(rng, layer | kind, index)
    for projection in "qkv":
        name = f"layers.0.self_attn.{projection}_proj.weight"
        tensors[name] = linear(rng, len(tensors[name]), 2 * hidden)
        if biased:
            bias = rng.normal(0, 0.5, len(tensors[name]))
            tensors[name.replace("weight", "bias")] = bias
    if biased:
        tensors["fc.bias"] = rng.normal(0, 0.5, hidden)
    tensors["layers.0.hidden_norm.weight"] = norm(rng, hidden)
    tensors["norm.weight"] = norm(rng, hidden)
    if flags.get("norm_before_fc"):
        tensors["input_norm.weight"] = norm(rng, count * wide)
    if flags.get("fc_norm"):
        tensors |= {f"fc_norm.{tap}.weight": norm(rng, wide) for tap in range(count)}
    if own_embedding:
        tensors["embed_tokens.weight"] = rng.normal(0, 1, (vocab, hidden))
    if own_head:
        tensors["lm_head.weight"] = rng.normal(0, 0.5, (d2t or vocab, hidden))
    if d2t is not None:
        chosen = np.sort(rng.choice(vocab, d2t, replace=False))
        tensors["d2t"] = chosen - np.arange(d2t)
        tensors["t2d"] = np.isin(np.arange(vocab), chosen)
    if dialect != "speculators":
        tensors = {name.replace("layers.0.", "midlayer."): t for name, t in tensors.items()}
    config = _config(dialect, layer | kind, taps, d2t or vocab, flags)
    return write(folder, config, tensors)


def agreeing_eagle3(folder: Path, target_folder: Path, *, d2t: int, seed: int = 0) -> Path:
    """Writes a draft that often agrees with the target that ``agreeing_llama`` has written.

    A row's queries and keys are of its token, so it sees mostly itself, and its value is the
    token's embedding less the feature, which takes the feature's place. The head is the
    target's, whose rows find the token's successor, and a little noise.
    """
    rng = np.random.default_rng(seed)
    target_config, target = read(target_folder)
    hidden = target_config["hidden_size"]
    groups, width = 4, hidden // 4
    heads = 2 * groups
    tiny_eagle3(folder, target_folder, d2t=d2t, heads=(heads, groups, width), seed=seed)
    config, tensors = read(folder)
    seen = SHARPNESS * rng.normal(0, hidden**-0.5, (groups, width, hidden))
    turn = np.linalg.qr(rng.normal(0, 1, (hidden, hidden)))[0]  # [groups * width, H]
    attention = "midlayer.self_attn."
    for name, rows in (("q_proj", np.repeat(seen, 2, axis=0)), ("k_proj", seen)):
        tensor = tensors[f"{attention}{name}.weight"]
        tensor[:, :hidden] = rows.reshape(-1, hidden)
        tensor[:, hidden:] *= 0.2
    tensors[f"{attention}v_proj.weight"][:] = np.concatenate([turn, -turn], axis=1)
    back = np.repeat(turn.reshape(groups, width, hidden), 2, axis=0).reshape(-1, hidden)
    tensors[f"{attention}o_proj.weight"][:] = back.T / 2
    tensors["midlayer.mlp.down_proj.weight"] *= MLP_SCALE
    tensors["fc.weight"] *= FEATURE_SCALE
    tensors["norm.weight"][:] = target["model.norm.weight"]
    rows = target["lm_head.weight"][np.arange(d2t) + tensors["d2t"]]
    tensors["lm_head.weight"][:] = rows * rng.normal(1, 0.2, rows.shape)
    return write(folder, config, tensors)


def _config(
    dialect: Dialect,
    layer: dict[str, Any],
    taps: Sequence[int] | None,
    draft_vocab_size: int,
    flags: dict[str, bool],
) -> dict[str, Any]:
    dtype = layer["dtype"]
    if dialect == "authors":
        assert taps is None and not flags, "the authors' files do not say"
        return layer | {
            "architectures": ["LlamaForCausalLM"],
            "draft_vocab_size": draft_vocab_size,
        }
    if dialect == "specforge":
        config = layer | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": draft_vocab_size,
            **flags,
        }
        if taps is not None:
            assert min(taps) == 1, "other ids are states before layers"
            config["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": list(taps),
                "use_aux_hidden_state": True,
            }
        return config
    before = None if taps is None else [tap + 1 for tap in taps]
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "draft_vocab_size": draft_vocab_size,
        "dtype": dtype,
        "eagle_aux_hidden_state_layer_ids": before,
        "embed_requires_grad": False,
        "has_no_defaults_at_init": False,
        "norm_before_fc": False,
        "norm_before_residual": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/model"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        **flags,
    }
