"""The unified graph: Llama 3 target, acceptance and EAGLE draft in one execution."""

from __future__ import annotations

from max.graph import Graph
from max.nn import Module

from unispec.pipelines.drafts.eagle.draft import EagleDraft
from unispec.pipelines.drafts.options import acceptance_rule, signature
from unispec.pipelines.drafts.vocabulary import draft_head
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.speculative.step import StepInputs, StepOutputs
from unispec.pipelines.targets.llama.stack import Llama3

from .config import UnifiedEagleLlama3Config

__all__ = ["UnifiedEagleLlama3", "build_graph"]


class UnifiedEagleLlama3(Module):
    """Target and draft; their weights load under `target.` and `draft.`.

    Args:
        config: both stacks and how they work together.
        fc_bias: whether the checkpoint has `fc.bias`.
    """

    def __init__(self, config: UnifiedEagleLlama3Config, *, fc_bias: bool) -> None:
        super().__init__()
        self.target = Llama3(config.target)
        self.draft = EagleDraft(
            config.draft,
            embed_tokens=self.target.embed_tokens,
            lm_head=draft_head(config.draft, self.target.lm_head, config.target.vocab_size),
            fc_bias=fc_bias,
            target_vocab_size=config.target.vocab_size,
        )
        self.rule = acceptance_rule(config.speculative_config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, shift, propose."""
        return sequential_step(self.target, self.draft, self.rule, step)


def build_graph(config: UnifiedEagleLlama3Config, module: UnifiedEagleLlama3) -> Graph:
    """Builds the graph of one step; nothing is compiled.

    Args:
        config: the configuration that the module was made from.
        module: target and draft.
    """
    inputs = signature(config.target, config.get_kv_params(), config.speculative_config)
    with Graph("unified_eagle_llama3", input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
