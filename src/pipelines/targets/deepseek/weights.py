"""A Hugging Face DeepSeek-V3 checkpoint as the state dictionaries of target and MTP layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from unispec.checkpoints import Tensor
from unispec.checkpoints.block_fp8 import dequantise_blocks
from unispec.checkpoints.packed_int4 import dequantise_packed
from unispec.checkpoints.tied_head import EMBEDDING, HEAD, tied_names
from unispec.checkpoints.validation import canonical_names, validated_state_dict

from .config import DeepseekV3Config
from .fp8 import BLOCK, as_stored, rounded, with_scales
from .layouts import in_layout
from .quantisation import USE_QUANTISED

__all__ = [
    "Shapes",
    "dequantised",
    "layer_shapes",
    "target_state_dict",
]

Shapes = dict[str, tuple[int, ...]]
"""Names of tensors and their shapes."""

_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")


def dequantised(
    tensors: Mapping[str, Tensor], config: DeepseekV3Config, *, source: str
) -> Mapping[str, Tensor]:
    """The tensors as the stack takes them: multiplied by their scales if they are quantised.

    A stack that computes in FP8 takes matrices and scales as they are stored in the blocks of its
    kernels, and rounds to these what is stored in another way.

    Args:
        config: the stack, for the size of blocks or groups.

    Raises:
        InputError: scales that do not fit, or not those that FP8 layers need.
    """
    if config.fp8 is not None and config.fp8_block == BLOCK:
        return as_stored(tensors, source=source)
    plain = tensors
    if config.fp8_block is not None:
        plain = dequantise_blocks(tensors, config.fp8_block, source=source)
    elif config.int4_group_size is not None:
        plain = dequantise_packed(tensors, config.int4_group_size, source=source)
    return plain if config.fp8 is None else rounded(plain)


def target_state_dict(
    tensors: Mapping[str, Tensor], config: DeepseekV3Config, *, source: str
) -> dict[str, Tensor]:
    """Checks the target's part of a checkpoint and brings it into the stack's form.

    Layers after the last one are those of multi-token prediction and are left out.

    Args:
        tensors: of `dequantised`, under Hugging Face's names, with or without `model.`.
        config: the shape of the model; whether its head is the embedding is what config.json
            asks for, see `tied_names`.

    Returns:
        Tensors under the names of `DeepseekV3`; `lm_head.weight` is among them only where the
        head is not the embedding.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or not finite.
    """
    beyond = tuple(
        f"layers.{config.num_hidden_layers + offset}."
        for offset in range(config.num_nextn_predict_layers)
    )
    names = {
        name: original
        for name, original in canonical_names(tensors, source=source).items()
        if not (beyond and name.startswith(beyond))
    }
    if config.tie_word_embeddings:
        names = tied_names(tensors, names)
    embedding = (config.vocab_size, config.hidden_size)
    expected: Shapes = {EMBEDDING: embedding, "norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings or HEAD in names:
        expected[HEAD] = embedding
    for layer in range(config.num_hidden_layers):
        expected |= layer_shapes(config, layer)
    state = validated_state_dict(
        tensors,
        names,
        expected,
        source=source,
        model="a DeepSeek-V3",
        use_unquantised=USE_QUANTISED,
    )
    for layer in range(config.num_hidden_layers):
        state = in_layout(state, config, layer, f"layers.{layer}")
    return state


def layer_shapes(config: DeepseekV3Config, layer: int) -> Shapes:
    """Names and shapes of one decoder layer as the checkpoint has it, without `model.`.

    Args:
        layer: from 0; the MTP layer comes after the last one.
    """
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * config.query_head_dim
    attention: Shapes = {
        "kv_a_proj_with_mqa": (config.cache_width, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        attention["q_proj"] = (query, hidden)
    else:
        attention["q_a_proj"] = (config.q_lora_rank, hidden)
        attention["q_a_layernorm"] = (config.q_lora_rank,)
        attention["q_b_proj"] = (query, config.q_lora_rank)
    prefix = f"layers.{layer}"
    shapes: Shapes = {
        f"{prefix}.{name}.weight": (hidden,)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= _mlp_or_experts(config, layer, f"{prefix}.mlp")
    return shapes if config.fp8 is None else with_scales(shapes)


def _mlp_or_experts(config: DeepseekV3Config, layer: int, prefix: str) -> Shapes:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if not config.has_experts(layer):
        return _mlp_shapes(prefix, hidden, config.intermediate_size)
    shapes: Shapes = {
        f"{prefix}.gate.weight": (config.n_routed_experts, hidden),
        f"{prefix}.gate.e_score_correction_bias": (config.n_routed_experts,),
    }
    for expert in range(config.n_routed_experts):
        shapes |= _mlp_shapes(f"{prefix}.experts.{expert}", hidden, inner)
    return shapes | _mlp_shapes(f"{prefix}.shared_experts", hidden, inner * config.n_shared_experts)


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    return {
        f"{prefix}.{name}.weight": shape for name, shape in zip(_PROJECTIONS, shapes, strict=True)
    }
