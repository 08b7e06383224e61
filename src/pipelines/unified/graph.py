"""The graph of one step, composed of a target and a draft method."""

from __future__ import annotations

from typing import Any

from max.graph import Graph
from max.nn import Module
from max.nn.kv_cache import KVCacheParamInterface

from unispec.kernels.library import kernels_for
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.speculative.target_only import target_only_step
from unispec.sampling.acceptance import Matching

from .method import DraftMethod
from .target import TargetFamily

__all__ = ["UnifiedStep", "build_graph"]


class UnifiedStep(Module):
    """Target and draft; their weights load under `target.` and `draft.`.

    Args:
        config: a `UnifiedConfig`, or the target's own where it runs alone.
        method: the draft method; None: the target alone.
        inputs: what a step takes; None: as the family's model has it.
    """

    def __init__(
        self,
        config: Any,
        family: TargetFamily,
        method: DraftMethod | None,
        inputs: type[StepModelInputs] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.family = family
        self.method = method
        self.inputs = inputs or family.model.inputs_cls
        if method is None:
            self.target = family.stack(config)
        else:
            self.target = family.stack(config.target, tapped_layers=config.tapped_layers)
            self.draft = method.build(config, self.target)

    @property
    def name(self) -> str:
        """The graph's."""
        if self.method is None:
            return f"{self.family.name}_target"
        return f"unified_{self.method.name}_{self.family.name}"

    def signature(self, kv_params: KVCacheParamInterface | None = None) -> StepSignature:
        """The graph's inputs, and the way back from them.

        Args:
            kv_params: the caches, by default the configuration's.
        """
        config, order = self.config, self.inputs.GRAPH_ORDER
        if self.method is None:
            return StepSignature(
                config.devices[0],
                config.vocab_size,
                config.kv_params,
                order=order,
                extra=self.family.extra_types(config),
            )
        speculative = config.speculative_config
        return StepSignature(
            device=config.devices[0],
            vocab_size=config.target.vocab_size,
            kv_params=kv_params or config.get_kv_params(),
            sampled_drafts=speculative.draft_proposal == "sampled",
            thinking_phase=speculative.use_relaxed_acceptance_for_thinking,
            features=config.features,
            order=config.input_order(order),
            extra=config.extra_types(),
        )

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, propose."""
        target: Any = self.target
        if self.method is None:
            return target_only_step(target.at(step), Matching(), step)
        draft: Any = self.draft
        return self.method.step(target.at(step), draft.at(step), self.config.rule(step), step)


def build_graph(module: UnifiedStep) -> Graph:
    """Builds the graph of one step; nothing is compiled."""
    inputs = module.signature()
    with kernels_for(inputs.device), Graph(module.name, input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
