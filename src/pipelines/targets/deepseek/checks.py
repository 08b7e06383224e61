"""Refuses DeepSeek-V3 configurations that the stack cannot run, by name and value."""

from __future__ import annotations

from typing import Any, Final

from unispec.errors import InputError
from unispec.pipelines.layers.fields import check_only, positive_integer

__all__ = ["check_routing", "check_stack"]

_SIZES: Final = (
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "topk_group",
    "v_head_dim",
)
_ONLY: Final = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def check_stack(hf: Any, source: str) -> None:
    """Refuses sizes that no stack has, and what this one has no code for.

    Raises:
        InputError: a size is missing or not positive, or another activation, bias, scoring or
            choice of experts than DeepSeek-V3's.
    """
    for name in _SIZES:
        positive_integer(name, getattr(hf, name, None), source)
    positive_integer("first_k_dense_replace", hf.first_k_dense_replace, source, least=0)
    if hf.q_lora_rank is not None:
        positive_integer("q_lora_rank", hf.q_lora_rank, source)
    if hf.qk_rope_head_dim % 2:
        raise InputError(
            f"qk_rope_head_dim {hf.qk_rope_head_dim} of {source} is not even, as rotary embeddings"
            " need it; correct its config.json"
        )
    check_only(hf, _ONLY, source, model="DeepSeek-V3")


def check_routing(hf: Any, source: str) -> None:
    """Refuses numbers of experts and groups that do not fit each other.

    Raises:
        InputError: groups of unequal or fewer than two experts, more groups chosen than there
            are, or more experts chosen than the chosen groups have.
    """
    experts, groups = hf.n_routed_experts, hf.n_group
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise InputError(
            f"n_routed_experts {experts} of {source} cannot be split into n_group {groups} equal"
            " groups of at least two; correct its config.json"
        )
    if hf.topk_group > groups:
        raise InputError(
            f"topk_group {hf.topk_group} of {source} is beyond n_group {groups}; correct its"
            " config.json"
        )
    reachable = experts // groups * hf.topk_group
    if hf.num_experts_per_tok > reachable:
        raise InputError(
            f"num_experts_per_tok {hf.num_experts_per_tok} of {source} is beyond the {reachable}"
            f" experts of topk_group {hf.topk_group} groups; correct its config.json"
        )
