"""A Hugging Face Llama checkpoint as the state dictionary of our Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from unispec.checkpoints.tensors import Weight
from unispec.checkpoints.tied_head import EMBEDDING, HEAD, tied_names
from unispec.checkpoints.validation import canonical_names, validated_state_dict

__all__ = ["LlamaShape", "decoder_layer_shapes", "expected_shapes", "llama3_state_dict"]

_W = TypeVar("_W", bound=Weight)


class LlamaShape(Protocol):
    """The part of a Llama configuration that decides the shapes of its weights."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""

    @property
    def attention_bias(self) -> bool:
        """Whether q, k, v and o projections have a bias."""


def expected_shapes(config: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's weights.

    The names are Hugging Face's without `model.`; `lm_head.weight` is among them
    only where the head is not tied to the embedding.
    """
    vocab_by_hidden = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocab_by_hidden}
    for layer in range(config.num_hidden_layers):
        shapes |= decoder_layer_shapes(
            config,
            layer,
            qkv_bias=getattr(config, "qkv_bias", False),
            qk_norm=getattr(config, "qk_norm", False),
        )
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = vocab_by_hidden
    return shapes


def decoder_layer_shapes(
    config: LlamaShape,
    layer: int,
    *,
    input_norm: bool = True,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer.

    Args:
        input_norm: whether it has a norm before its attention.
        qkv_bias: whether q, k and v projections have a bias, whatever `attention_bias` says.
        qk_norm: whether each query and key head is normed.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    prefix = f"layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {}
    if input_norm:
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    if qk_norm:
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
    biased = [name for name in projections if name.startswith("self_attn.")]
    if not config.attention_bias:
        biased = biased[:3] if qkv_bias else []
    for name, (rows, columns) in projections.items():
        shapes[f"{prefix}.{name}.weight"] = (rows, columns)
        if name in biased:
            shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes


def llama3_state_dict(
    tensors: Mapping[str, _W], config: LlamaShape, *, source: str
) -> dict[str, _W]:
    """Checks a Llama checkpoint and renames its tensors; dtypes are left as they are.

    Args:
        config: the shape of the model; whether its head is the embedding is what
            config.json asks for, see `tied_names`.

    Returns:
        The tensors of `expected_shapes`, under those names; `lm_head.weight` is among
        them only where the head is not the embedding.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, not of floating point or
            not finite.
    """
    names = canonical_names(tensors, source=source)
    expected = expected_shapes(config)
    if config.tie_word_embeddings:
        names = tied_names(tensors, names)
        if HEAD in names:
            expected[HEAD] = expected[EMBEDDING]
    return validated_state_dict(tensors, names, expected, source=source, model="a Llama")
