"""Reading a draft's stack so that it fits its target."""

from __future__ import annotations

from dataclasses import replace

from max.nn.kv_cache import KVCacheParamInterface, MultiKVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig

from unispec.errors import InputError

from ..llama3.config import Llama3Config

__all__ = ["both_caches", "check_hidden_size", "read_draft_stack"]


def read_draft_stack(
    pipeline_config: PipelineConfig, draft_model: MAXModelConfig, target: Llama3Config
) -> Llama3Config:
    """Reads a draft's stack; its vocabulary is `draft_vocab_size` if it states one.

    Args:
        pipeline_config: what both belong to.
        draft_model: the draft's checkpoint.
        target: the target's stack.

    Raises:
        InputError: the draft's configuration is wrong or its vocabulary is not the target's.
    """
    draft = Llama3Config.initialize(pipeline_config, draft_model, max_seq_len=target.max_seq_len)
    if draft.vocab_size != target.vocab_size:
        raise InputError(
            f"the draft's vocab_size {draft.vocab_size} is not the target's"
            f" {target.vocab_size}; use a draft that was trained for this target"
        )
    reduced = getattr(draft_model.huggingface_config, "draft_vocab_size", None)
    # The draft lives on the target's device and in its dtype, whatever its own says.
    kv_params = replace(
        draft.kv_params, devices=target.kv_params.devices, dtype=target.kv_params.dtype
    )
    return replace(
        draft,
        vocab_size=reduced or draft.vocab_size,
        devices=target.devices,
        dtype=target.dtype,
        kv_params=kv_params,
    )


def check_hidden_size(draft: Llama3Config, target: Llama3Config) -> None:
    """Refuses a draft that cannot read the target's embedding.

    Raises:
        InputError: the hidden sizes differ.
    """
    if draft.hidden_size != target.hidden_size:
        raise InputError(
            f"the draft's hidden_size {draft.hidden_size} is not the target's"
            f" {target.hidden_size}; use a draft that was trained for this target"
        )


def both_caches(target: Llama3Config, draft: Llama3Config) -> KVCacheParamInterface:
    """Parameters of both caches, as a tree with the children `target` and `draft`."""
    return MultiKVCacheParams.from_params({"target": target.kv_params, "draft": draft.kv_params})
