"""The sizes of a Llama and of its drafts, and names and shapes of all their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal

__all__ = ["LLAMA_8B", "NUMBER_BYTES", "DraftShape", "Shape", "numbers"]

NUMBER_BYTES: Final = 2
"""Of a bfloat16."""

Tensors = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama whose head is not its embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    """Longest sequence, in tokens."""

    @property
    def ends(self) -> Tensors:
        """Embedding, head and the norm before it."""
        matrix = (self.vocabulary, self.hidden)
        return {
            "model.embed_tokens.weight": matrix,
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": matrix,
        }

    def layer(self, index: int) -> Tensors:
        """One decoder layer, without `model.` before its names."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {f"layers.{index}.{name}.weight": shape for name, shape in shapes.items()}

    def files(self) -> Iterator[tuple[str, Tensors]]:
        """The target's weight files: one for the ends, one a layer."""
        yield "ends", self.ends
        for index in range(self.layers):
            layer = self.layer(index).items()
            yield f"layer-{index}", {f"model.{name}": shape for name, shape in layer}

    def config(self) -> dict[str, Any]:
        """The target's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "bos_token_id": self.vocabulary - 2,
            "eos_token_id": self.vocabulary - 1,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class DraftShape:
    """A draft for a `Shape`, whose layers are as wide."""

    method: Literal["eagle", "dflash"]
    layers: int
    draft_tokens: int
    """K, what it proposes in a step."""
    passes: int
    """How often a step goes through it: K times where one token follows the other."""

    def tensors(self, target: Shape) -> Tensors:
        """All of them; the embedding and the head are the target's."""
        hidden = (target.hidden,)
        if self.method == "eagle":
            # MAX's own draft has the bias, and ours where there is one.
            tensors = {"fc.weight": (target.hidden, 2 * target.hidden), "fc.bias": hidden}
        else:
            taps = self.layers * target.hidden
            tensors = {
                "fc.weight": (target.hidden, taps),
                "hidden_norm.weight": hidden,
                "norm.weight": hidden,
            }
        for index in range(self.layers):
            tensors |= target.layer(index)
            if self.method == "eagle" and index == 0:
                del tensors["layers.0.input_layernorm.weight"]
            if self.method == "dflash":
                norms = ("q_norm", "k_norm")
                prefix = f"layers.{index}.self_attn"
                tensors |= {f"{prefix}.{norm}.weight": (target.head_dim,) for norm in norms}
        return tensors

    def config(self, target: Shape) -> dict[str, Any]:
        """The draft's config.json."""
        shared = target.config() | {"num_hidden_layers": self.layers}
        if self.method == "eagle":
            return shared | {"architectures": ["LlamaForCausalLMEagle"]}
        # Evenly spread, as published drafts have them.
        taps = [1 + i * (target.layers - 2) // max(self.layers - 1, 1) for i in range(self.layers)]
        return shared | {
            "architectures": ["DFlashDraftModel"],
            "block_size": self.draft_tokens + 1,
            "num_target_layers": target.layers,
            "dflash_config": {"mask_token_id": 0, "target_layer_ids": taps},
        }


def numbers(tensors: Tensors) -> int:
    """How many numbers they hold."""
    return sum(map(prod, tensors.values()))


LLAMA_8B: Final = Shape(
    name="llama-3.1-8b",
    layers=32,
    hidden=4096,
    heads=32,
    key_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128256,
    positions=8192,
)
