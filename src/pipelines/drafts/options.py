"""What a speculative configuration makes of a unified graph, whatever the draft."""

from __future__ import annotations

from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.speculative import SpeculativeConfig

from unispec.pipelines.speculative.step import StepSignature
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.sampling.acceptance import AcceptanceRule, Matching, Rejection, Relaxed, Synthetic

__all__ = ["acceptance_rule", "signature"]


def signature(
    target: Llama3Config, kv_params: KVCacheParamInterface, speculative: SpeculativeConfig
) -> StepSignature:
    """The graph's inputs, which depend on how drafts are proposed and accepted.

    Args:
        target: the target's stack.
        kv_params: the cache, or a tree with the children `target` and `draft`.
        speculative: how drafts are proposed and accepted.
    """
    return StepSignature(
        device=target.devices[0],
        vocab_size=target.vocab_size,
        kv_params=kv_params,
        sampled_drafts=speculative.draft_proposal == "sampled",
        thinking_phase=speculative.use_relaxed_acceptance_for_thinking,
    )


def acceptance_rule(speculative: SpeculativeConfig) -> AcceptanceRule:
    """The configured rule; the lossy ones only where they are asked for by name.

    Args:
        speculative: `synthetic_acceptance_rate` comes first, then
            `use_relaxed_acceptance_for_thinking`, then `draft_proposal`.
    """
    if speculative.synthetic_acceptance_rate is not None:
        return Synthetic(speculative.synthetic_acceptance_rate)
    if speculative.use_relaxed_acceptance_for_thinking:
        return Relaxed(speculative.relaxed_topk, speculative.relaxed_delta)
    return Rejection() if speculative.draft_proposal == "sampled" else Matching()
