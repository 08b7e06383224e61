"""States of tiny models as their checkpoints have them, and how they are damaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from unispec.checkpoints import Tensor
from unispec.errors import InputError

__all__ = ["SOURCE", "Shape", "change", "hugging_face_state", "refused"]

SOURCE = "folder/model.safetensors"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The smallest Llama in which no two sizes are equal by chance."""

    hidden_size: int = 12
    intermediate_size: int = 20
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    num_hidden_layers: int = 2
    vocab_size: int = 50
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    draft_vocab_size: int | None = None


def hugging_face_state(shape: Shape) -> dict[str, Tensor]:
    """The weights of a random Llama of Hugging Face, as its checkpoint has them."""
    fields = dataclasses.asdict(shape)
    del fields["draft_vocab_size"]
    state = LlamaForCausalLM(LlamaConfig(**fields)).state_dict()
    if shape.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.numpy() for name, tensor in state.items()}


def refused(*parts: str) -> Any:
    """Expect an InputError of one line that has these parts, in any order."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(InputError, match=f"^{pattern}.*$")


def change(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return apply
