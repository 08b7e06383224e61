"""The unified graph: Llama 3 target, acceptance and DFlash draft in one execution."""

from __future__ import annotations

from max.graph import Graph
from max.nn import Module

from unispec.pipelines.drafts.dflash.draft import DflashDraft
from unispec.pipelines.drafts.options import acceptance_rule, signature
from unispec.pipelines.drafts.vocabulary import draft_head
from unispec.pipelines.speculative.block import block_step
from unispec.pipelines.speculative.step import StepInputs, StepOutputs
from unispec.pipelines.targets.llama.stack import Llama3

from .config import UnifiedDflashLlama3Config

__all__ = ["UnifiedDflashLlama3", "build_graph"]


class UnifiedDflashLlama3(Module):
    """Target and draft; their weights load under `target.` and `draft.`.

    Args:
        config: both stacks and how they work together.
    """

    def __init__(self, config: UnifiedDflashLlama3Config) -> None:
        super().__init__()
        vocab_size = config.target.vocab_size
        self.target = Llama3(config.target, tapped_layers=config.target_layer_ids)
        self.draft = DflashDraft(
            config.draft,
            embed_tokens=self.target.embed_tokens,
            lm_head=draft_head(config.draft, self.target.lm_head, vocab_size),
            target_vocab_size=vocab_size,
            num_taps=len(config.target_layer_ids),
            windows=config.windows or [None] * config.draft.num_hidden_layers,
            causal=config.causal or [False] * config.draft.num_hidden_layers,
            block_size=config.resolve_block_size(),
            mask_token_id=config.mask_token_id,
        )
        self.rule = acceptance_rule(config.speculative_config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, materialize, propose."""
        return block_step(self.target, self.draft, self.rule, step)


def build_graph(config: UnifiedDflashLlama3Config, module: UnifiedDflashLlama3) -> Graph:
    """Builds the graph of one step; nothing is compiled.

    Args:
        config: the configuration that the module was made from.
        module: target and draft.
    """
    inputs = signature(config.target, config.get_kv_params(), config.speculative_config)
    with Graph("unified_dflash_llama3", input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
