"""The unified graph: Llama 3 target, acceptance and EAGLE draft in one execution."""

from __future__ import annotations

from max.graph import Graph
from max.nn import Linear, Module
from max.pipelines.speculative import SpeculativeConfig

from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.sampling.acceptance import AcceptanceRule, Matching, Rejection, Relaxed, Synthetic

from ..eagle.draft import EagleDraft
from ..llama3.stack import Llama3
from .config import UnifiedEagleLlama3Config

__all__ = ["UnifiedEagleLlama3", "acceptance_rule", "build_graph", "signature"]


class UnifiedEagleLlama3(Module):
    """Target and draft; their weights load under `target.` and `draft.`."""

    def __init__(self, config: UnifiedEagleLlama3Config, *, fc_bias: bool) -> None:
        super().__init__()
        self.target = Llama3(config.target)
        head = self.target.lm_head
        if config.draft.vocab_size < config.target.vocab_size:
            head = Linear(
                config.draft.hidden_size,
                config.draft.vocab_size,
                config.draft.dtype,
                config.draft.devices[0],
            )
        self.draft = EagleDraft(
            config.draft,
            embed_tokens=self.target.embed_tokens,
            lm_head=head,
            fc_bias=fc_bias,
            target_vocab_size=config.target.vocab_size,
        )
        self.rule = acceptance_rule(config.speculative_config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, shift, propose."""
        return sequential_step(self.target, self.draft, self.rule, step)


def signature(config: UnifiedEagleLlama3Config) -> StepSignature:
    """The graph's inputs, which depend on how drafts are proposed and accepted."""
    speculative = config.speculative_config
    return StepSignature(
        device=config.target.devices[0],
        vocab_size=config.target.vocab_size,
        kv_params=config.get_kv_params(),
        sampled_drafts=speculative.draft_proposal == "sampled",
        thinking_phase=speculative.use_relaxed_acceptance_for_thinking,
    )


def acceptance_rule(speculative: SpeculativeConfig) -> AcceptanceRule:
    """The configured rule; the lossy ones only where they are asked for by name."""
    if speculative.synthetic_acceptance_rate is not None:
        return Synthetic(speculative.synthetic_acceptance_rate)
    if speculative.use_relaxed_acceptance_for_thinking:
        return Relaxed(speculative.relaxed_topk, speculative.relaxed_delta)
    return Rejection() if speculative.draft_proposal == "sampled" else Matching()


def build_graph(config: UnifiedEagleLlama3Config, module: UnifiedEagleLlama3) -> Graph:
    """Builds the graph of one step; nothing is compiled."""
    inputs = signature(config)
    with Graph("unified_eagle_llama3", input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
