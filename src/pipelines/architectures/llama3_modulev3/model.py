"""The pipeline model: loads a checkpoint, compiles the graph and runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession
from max.experimental import functional as F
from max.experimental.nn import Module
from max.experimental.tensor import Tensor, default_device, default_dtype
from max.graph import BufferType, DeviceRef, TensorType
from max.graph.weights import Weights, WeightsAdapter
from max.nn.kv_cache import KVCacheInputs
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.context import TextContext
from max.pipelines.lib import (
    KVCacheConfig,
    MAXModelConfig,
    MemoryPlan,
    ModelInputs,
    ModelOutputs,
    ModuleV3Outputs,
    PipelineConfig,
    PipelineModelWithKVCache,
)
from max.pipelines.lib.log_probabilities import LogProbabilitiesMixin

from unispec.checkpoints.cast import cast_weights
from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import wait_for_copies
from unispec.pipelines.runtime.plan import default_memory_plan
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.llama.checks import check_window
from unispec.pipelines.targets.llama.config import Llama3Config

from .graph import Llama3
from .inputs import Llama3Inputs
from .weights import state_dict

__all__ = ["Llama3Model"]


class Llama3Model(LogProbabilitiesMixin, PipelineModelWithKVCache[TextContext]):
    """A Llama 3 target alone, for MAX's own text generation pipeline.

    A subclass serves a relative of Llama by naming its norm, bias or configuration.

    Args:
        pipeline_config: the target's configuration.
        session: compiles and runs the graph.
        devices: one CPU or one GPU.
        kv_cache_config: page size and prefix caching.
        weights: the checkpoint; its files are read as `pipeline_config` names them.
        adapter: not used, the checkpoint's names are known.
        return_logits: of which tokens the graph returns logits.
        return_hidden_states: which hidden states the graph returns.
        memory_plan: sizes planned by a server; without one, those of `pipeline_config`.
        max_batch_size: most rows in one step.

    Attributes:
        kv_params: parameters of the cache.

    Raises:
        InputError: more than one device, a configuration that the stack has no code for, a
            sliding window that sequences may outgrow, or a checkpoint that does not fit.
    """

    model_config_cls: ClassVar[type[Any]] = Llama3Config
    """The class that reads `PipelineConfig`."""
    config_class: type[Any] = Llama3Config
    """Reads the configuration of the graph."""
    norm_method: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Of all norms of the stack."""
    attention_bias: bool = False
    """Whether projections have a bias though the checkpoint's config does not say so."""
    model: Callable[..., ModuleV3Outputs]
    """The compiled graph: takes `Llama3Inputs.buffers`, gives one step's outputs."""

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        *,
        memory_plan: MemoryPlan | None = None,
        max_batch_size: int = 1,
    ) -> None:
        if len(devices) != 1:
            raise InputError(f"{len(devices)} devices were given; this model runs on one")
        plan = memory_plan or default_memory_plan(max_batch_size, _longest(pipeline_config.model))
        model = pipeline_config.model
        check_window(model.huggingface_config, plan.planned_max_length, model.model_name)
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter,
            return_logits,
            memory_plan=plan,
            return_hidden_states=return_hidden_states,
            max_batch_size=max_batch_size,
        )
        self.kv_params = self.arch_config.get_kv_params()
        self._session = session
        self.model = self.load_model()

    def load_model(self) -> Callable[..., Any]:
        """Reads the checkpoint, traces the graph and compiles it.

        Returns:
            What runs one step: takes `Llama3Inputs.buffers`, gives `ModuleV3Outputs`.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        tensors, source = read_weights(self.pipeline_config.model)
        config = self.config_class.initialize(self.pipeline_config, max_seq_len=self.max_seq_len)
        config.finalize(
            self.huggingface_config,
            tensors,
            self.return_logits,
            self.return_hidden_states,
            self.norm_method,
            self.attention_bias,
        )
        with F.lazy(), default_dtype(config.dtype), default_device(self.devices[0]):
            module: Module[..., ModuleV3Outputs] = Llama3(config)
        weights = cast_weights(state_dict(tensors, config, source=source), config.dtype)
        # On a CPU the compiled graph reads the weights where they lie and does not own them.
        self.weights_registry = weights
        return module.compile(*input_types(config), weights=weights, session=self._session)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """Runs one step.

        Args:
            model_inputs: a `Llama3Inputs` with its cache.

        Returns:
            `logits` and `next_token_logits`, both float32 `[B, V]` with `LAST_TOKEN`; the other
            outputs as `Llama3.forward` says.

        Raises:
            InputError: an input is set that the graph does not take, or the cache is not set.
        """
        buffers = model_inputs.buffers
        wait_for_copies(self.devices[0])
        outputs = self.model(*buffers)
        last = outputs.next_token_logits.driver_tensor
        return ModelOutputs(
            logits=_buffer(outputs.logits) or last,
            next_token_logits=last,
            logit_offsets=_buffer(outputs.logit_offsets),
            hidden_states=_buffer(outputs.hidden_states),
        )

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
    ) -> Llama3Inputs:
        """Builds one step's inputs from requests, new and running ones alike.

        Args:
            replica_batches: one batch, the requests in row order.
            kv_cache_inputs: pages of the same requests in the same order.
            return_n_logits: logit rows per row, with `ReturnLogits.VARIABLE`; else not used.

        Raises:
            InputError: more than one replica, or more logit rows than a row has new tokens.
        """
        if len(replica_batches) != 1:
            raise InputError(f"{len(replica_batches)} replicas were given; this model has one")
        active = [context.tokens.active for context in replica_batches[0]]
        shortest = min(map(len, active))
        variable = self.return_logits == ReturnLogits.VARIABLE
        if variable and not 1 <= return_n_logits <= shortest:
            raise InputError(
                f"return_n_logits is {return_n_logits}, but the shortest row has {shortest} new"
                " tokens; choose 1 to as many"
            )
        device = self.devices[0]
        offsets = np.cumsum([0, *map(len, active)], dtype=np.uint32)
        return Llama3Inputs(
            tokens=Buffer.from_numpy(np.concatenate(active).astype(np.int64)).to(device),
            input_row_offsets=Buffer.from_numpy(offsets).to(device),
            return_n_logits=Buffer.from_numpy(np.array([return_n_logits], np.int64)),
            kv_cache_inputs=kv_cache_inputs,
        )


def input_types(config: Llama3Config) -> list[TensorType | BufferType]:
    """The graph's inputs, in the order of `Llama3.forward`."""
    device = config.devices[0]
    return [
        TensorType(DType.int64, ["num_tokens"], device),
        TensorType(DType.uint32, ["num_row_offsets"], device),
        TensorType(DType.int64, [1], DeviceRef.CPU()),
        *config.kv_params.flattened_kv_inputs(),
    ]


def _longest(model_config: MAXModelConfig) -> int:
    """Longest sequence that the model's positions and `max_length` allow."""
    hf: Any = model_config.huggingface_config
    return Llama3Config.calculate_max_seq_len(hf, model_config)


def _buffer(tensor: Tensor | None) -> Buffer | None:
    return None if tensor is None else tensor.driver_tensor
