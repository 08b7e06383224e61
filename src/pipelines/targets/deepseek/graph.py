"""The graph of a DeepSeek-V3 target alone."""

from __future__ import annotations

from max.graph import Graph
from max.nn import Module

from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.speculative.target_only import target_only_step
from unispec.sampling.acceptance import Matching

from .config import DeepseekV3Config
from .inputs import DEEPSEEK_ORDER, distributed_types
from .stack import DeepseekV3, TargetOfStep

__all__ = ["DeepseekV3Alone", "build_graph"]


class DeepseekV3Alone(Module):
    """A target that proposes nothing; its weights load under `target.`.

    Args:
        config: the stack.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.target = DeepseekV3(config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step, without drafts."""
        return target_only_step(TargetOfStep(self.target, step), Matching(), step)


def build_graph(config: DeepseekV3Config, module: DeepseekV3Alone) -> Graph:
    """Builds the graph of one step; nothing is compiled.

    Args:
        config: the configuration that the module was made from.
        module: the target.
    """
    inputs = StepSignature(
        config.devices[0],
        config.vocab_size,
        config.kv_params,
        order=DEEPSEEK_ORDER,
        more=distributed_types(config.devices, config.ep),
    )
    with Graph("deepseekV3_target", input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
