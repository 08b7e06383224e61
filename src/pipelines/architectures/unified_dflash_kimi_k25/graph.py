"""The unified graph: Kimi K2.5 target, acceptance and DFlash draft in one execution."""

from __future__ import annotations

from typing import Any

from max import tree
from max.graph import BufferType, Graph, TensorType
from max.graph import Module as CompilationUnit
from max.nn import Embedding, Module
from max.nn.kv_cache import KVCacheParams

from unispec.pipelines.drafts.config import both_caches
from unispec.pipelines.drafts.dflash.draft import DflashDraft
from unispec.pipelines.drafts.options import acceptance_rule
from unispec.pipelines.drafts.vocabulary import draft_head
from unispec.pipelines.speculative.block import block_step
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.targets.deepseek.stack import DeepseekV3
from unispec.pipelines.targets.kimi.inputs import kimi_types
from unispec.pipelines.targets.kimi.target import SeeingTarget

from .config import UnifiedDflashKimiK25Config
from .inputs import UNIFIED_ORDER

__all__ = ["UnifiedDflashKimiK25", "build_graph"]


class UnifiedDflashKimiK25(Module):
    """Target and draft; their weights load under `target.` and `draft.`.

    Args:
        config: both stacks and how they work together.
    """

    def __init__(self, config: UnifiedDflashKimiK25Config) -> None:
        super().__init__()
        self.config = config
        vocab_size = config.target.vocab_size
        self.target = DeepseekV3(config.target, tapped_layers=config.target_layer_ids)
        embed_tokens = self.target.embed_tokens
        assert isinstance(embed_tokens, Embedding)  # whole, as on every single device
        self.draft = DflashDraft(
            config.draft,
            embed_tokens=embed_tokens,
            lm_head=draft_head(config.draft, self.target.lm_head, vocab_size),
            target_vocab_size=vocab_size,
            num_taps=len(config.target_layer_ids),
            windows=config.windows or [None] * config.draft.num_hidden_layers,
            causal=config.causal or [False] * config.draft.num_hidden_layers,
            block_size=config.resolve_block_size(),
            mask_token_id=config.mask_token_id,
        )
        self.rule = acceptance_rule(config.speculative_config)

    def input_types(
        self, kv_params: KVCacheParams, draft_kv_params: KVCacheParams
    ) -> tuple[TensorType | BufferType, ...]:
        """The graph's input types, in the order of `UnifiedDflashKimiK25Inputs.buffers`.

        Args:
            kv_params: the target's cache.
            draft_kv_params: the draft's cache.
        """
        return tuple(self.signature(kv_params, draft_kv_params).types())

    def signature(self, kv_params: KVCacheParams, draft_kv_params: KVCacheParams) -> StepSignature:
        """The graph's inputs, and the way back from them.

        Args:
            kv_params: the target's cache.
            draft_kv_params: the draft's cache.
        """
        config, speculative = self.config, self.config.speculative_config
        device = config.devices[0]
        both = both_caches(kv_params, draft_kv_params)
        branches: Any = both.get_symbolic_inputs()
        return StepSignature(
            device=device,
            vocab_size=config.target.vocab_size,
            kv_params=both,
            sampled_drafts=speculative.draft_proposal == "sampled",
            thinking_phase=speculative.use_relaxed_acceptance_for_thinking,
            order=UNIFIED_ORDER,
            caches=("target_kv_cache", "draft_kv_cache"),
            more={
                "target_kv_cache": tree.leaves(branches["target"]),
                "draft_kv_cache": tree.leaves(branches["draft"]),
                **kimi_types(config.target.hidden_size, config.target.dtype, device),
            },
        )

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, materialize, propose."""
        return block_step(SeeingTarget(self.target, step), self.draft, self.rule, step)


def build_graph(
    config: UnifiedDflashKimiK25Config, module: UnifiedDflashKimiK25, unit: CompilationUnit
) -> Graph:
    """Builds the graph of one step; nothing is compiled.

    Args:
        config: the configuration that the module was made from.
        module: target and draft.
        unit: what the graph is compiled with.
    """
    params: Any = config.get_kv_params()
    inputs = module.signature(params.children["target"], params.children["draft"])
    with Graph("unified_dflash_kimi_k25", input_types=inputs.types(), module=unit) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
