"""Refuses Hugging Face configurations that no Llama stack here can run, by name and value."""

from __future__ import annotations

from typing import Any, Final

from unispec.checkpoints.quantisation import check_plain
from unispec.errors import InputError
from unispec.pipelines.layers.fields import check_only, positive

__all__ = ["check_stack", "check_window"]

_WITHOUT_WINDOW: Final = ("granite", "llama")
"""Model types that have none in transformers, whatever config.json says."""
_ONLY: Final = {"hidden_act": "silu", "mlp_bias": False}


def check_window(hf: Any, longest: int | None, source: str) -> None:
    """Refuses a sliding window that a sequence may outgrow.

    Args:
        longest: tokens of the longest sequence; None: it is not known.

    Raises:
        InputError: `sliding_window` is shorter than the longest sequence, or no size.
    """
    window = getattr(hf, "sliding_window", None)
    if window is None or longest is None or hf.model_type in _WITHOUT_WINDOW:
        return
    # Qwen's first layers have none; where config.json does not tell layers apart, all have it.
    if "sliding_attention" not in (getattr(hf, "layer_types", None) or ["sliding_attention"]):
        return
    if longest > positive("sliding_window", window, source):
        raise InputError(
            f"sliding_window {window} of {source} is not supported for sequences of up to"
            f" {longest} tokens; choose a max_length of at most {window}"
        )


def check_stack(hf: Any, head_dim: int, source: str) -> None:
    """Refuses what the stacks have no code for, and sizes that do not fit each other.

    Raises:
        InputError: an activation, bias or quantisation that is not supported, or a size that
            does not fit the others.
    """
    check_only(hf, _ONLY, source, model="Llama")
    check_plain(hf, source)
    heads, key_heads = hf.num_attention_heads, hf.num_key_value_heads
    if heads % key_heads:
        raise InputError(
            f"num_attention_heads {heads} of {source} is no multiple of num_key_value_heads"
            f" {key_heads}; correct its config.json"
        )
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"head_dim {head_dim} of {source} is not even, as rotary embeddings need it;"
            " correct its config.json"
        )
