"""A Llama 3 target alone, on the same machinery as the unified graphs."""

from __future__ import annotations

from typing import Any, ClassVar

from max.engine import InferenceSession, Model
from max.graph import Graph
from max.nn import Module

from unispec.checkpoints.cast import cast_weights
from unispec.checkpoints.tied_head import HEAD
from unispec.pipelines.runtime.model import UnifiedModel
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.speculative.target_only import target_only_step
from unispec.sampling.acceptance import Matching

from .config import Llama3Config
from .stack import Llama3
from .stack_config import StackConfig
from .weights import llama3_state_dict

__all__ = ["Llama3TargetModel"]


class _TargetOnly(Module):
    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.target = Llama3(config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        return target_only_step(self.target, Matching(), step)


class Llama3TargetModel(UnifiedModel):
    """A Llama 3 target that decodes one token a step; see `UnifiedModel`."""

    model_config_cls: ClassVar[type[Any]] = StackConfig
    """The class that reads `PipelineConfig`."""

    def load_model(self, session: InferenceSession) -> Model:
        """Reads the checkpoint, builds the graph and compiles it with the session.

        Args:
            session: compiles and runs the graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: Llama3Config = self.arch_config
        tensors, source = read_weights(self.pipeline_config.model)
        weights = llama3_state_dict(tensors, config, source=source)
        config.tie_word_embeddings = HEAD not in weights
        module = _TargetOnly(config)
        module.load_state_dict(
            cast_weights(
                {f"target.{name}": value for name, value in weights.items()}, config.dtype
            ),
            weight_alignment=1,
        )
        inputs = StepSignature(self.device_ref, config.vocab_size, config.kv_params)
        with Graph("llama3_target", input_types=inputs.types()) as graph:
            graph.output(*module(inputs.take(graph.inputs)).values())
        return self.compile(session, graph, module.state_dict())
