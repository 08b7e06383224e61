"""The pipeline model of a DeepSeek-V3 target, alone or with its MTP layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef
from max.nn.comm.ep import EPCommInitializer, EPConfig
from max.nn.kv_cache import KVCacheInputs, KVCacheParams
from max.pipelines.context import TextContext
from max.pipelines.lib import KVCacheConfig, ModelInputs, PipelineConfig

from unispec.checkpoints import Tensor
from unispec.checkpoints.tied_head import HEAD
from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.runtime.model import UnifiedModel
from unispec.pipelines.runtime.weights import read_weights

from .config import DeepseekV3Config
from .graph import DeepseekV3Alone, build_graph
from .inputs import DeepseekV3Inputs
from .weights import cast_stack, dequantised, target_state_dict

__all__ = ["DeepseekV3Model"]


class DeepseekV3Model(UnifiedModel):
    """A DeepSeek-V3 target that decodes one token a step; see `UnifiedModel`."""

    model_config_cls: ClassVar[type[Any]] = DeepseekV3Config
    """The class that reads `PipelineConfig`."""
    several_devices: ClassVar[bool] = True
    inputs_cls: ClassVar[type[StepModelInputs]] = DeepseekV3Inputs
    _connected: EPCommInitializer | None = None
    _ep_inputs: tuple[Buffer, ...] = ()

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """Parameters of the target's cache, with room for drafts; the instance has the draft's too.

        Args:
            huggingface_config: the target's.
            pipeline_config: for the method and K, which is the room that drafts need.
            devices: where the cache lies.
            kv_cache_config: page size and prefix caching.
            cache_dtype: of the cached rows.
        """
        return DeepseekV3Config.construct_kv_params(
            huggingface_config.get_text_config(),
            pipeline_config,
            devices,
            kv_cache_config,
            cache_dtype,
        )

    def load_model(self, session: InferenceSession) -> Model:
        """Reads the checkpoint, builds the graph and compiles it with the session.

        Args:
            session: compiles and runs the graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: DeepseekV3Config = self.arch_config
        tensors, source = self.read_tensors(config)
        state = target_state_dict(tensors, config, source=source)
        config.tie_word_embeddings = HEAD not in state
        module = DeepseekV3Alone(config)
        module.load_state_dict(
            cast_stack({f"target.{name}": value for name, value in state.items()}, config.dtype),
            weight_alignment=1,
        )
        self.connect_experts(session, config.ep)
        return self.compile(session, build_graph(config, module), module.state_dict())

    def read_tensors(self, config: DeepseekV3Config) -> tuple[Mapping[str, Tensor], str]:
        """The target's checkpoint as the stack takes it, and what to call it in errors.

        Args:
            config: the stack.

        Raises:
            InputError: a file is missing or damaged, or scales do not fit.
        """
        model = self.pipeline_config.model
        tensors, source = read_weights(model, float8_stays=config.fp8 is not None)
        return dequantised(tensors, config, source=source), source

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        draft_tokens: Buffer | None = None,
        draft_kv_cache_buffers: list[Buffer] | None = None,
        **kwargs: Any,
    ) -> StepModelInputs:
        """Builds one step's inputs from requests, new and running ones alike.

        Args:
            replica_batches: of each replica the requests in row order; one batch but where
                attention is data-parallel.
            kv_cache_inputs: pages of the same requests in the same order.
            return_n_logits: 1; the number of logit rows follows from the drafts.
            draft_tokens: int64 `[B, K]` to verify in place of what the last step proposed.
            draft_kv_cache_buffers: not taken, the draft's pages are in `kv_cache_inputs`.
            **kwargs: none is known.

        Raises:
            InputError: another number of replicas, more tokens of one than there is room for,
                another `return_n_logits`, drafts of another shape than the last step's, or an
                argument that is not taken.
        """
        if draft_kv_cache_buffers is not None:
            kwargs["draft_kv_cache_buffers"] = draft_kv_cache_buffers
        if kwargs:
            raise InputError(
                f"{sorted(kwargs)[0]} is set, but the graph does not take it: unset it"
            )
        inputs = super().prepare_initial_token_inputs(
            replica_batches, kv_cache_inputs, return_n_logits
        )
        self._check_room(replica_batches, inputs)
        if draft_tokens is not None:
            assert inputs.draft_tokens is not None
            expected = tuple(inputs.draft_tokens.shape)
            if tuple(draft_tokens.shape) != expected:
                raise InputError(
                    f"draft_tokens has shape {list(draft_tokens.shape)}, the step verifies"
                    f" {list(expected)}: give as many as the last step proposed"
                )
            inputs.draft_tokens = draft_tokens
        return inputs

    def _check_room(
        self, replica_batches: Sequence[Sequence[TextContext]], inputs: StepModelInputs
    ) -> None:
        """Refuses more tokens of a replica than there is room for in what GPUs send each other."""
        if self._connected is None:
            return
        assert inputs.draft_tokens is not None
        room, drafts = self._connected.config.max_tokens_per_rank, inputs.draft_tokens.shape[1]
        for replica, batch in enumerate(replica_batches):
            tokens = sum(len(context.tokens.active) + drafts for context in batch)
            if tokens > room:
                raise InputError(
                    f"the batch of replica {replica} has {tokens} tokens, drafts included, there"
                    f" is room for {room}: give it fewer, or raise max_batch_input_tokens"
                )

    def more_fields(
        self, replica_batches: Sequence[Sequence[TextContext]], num_drafts: int
    ) -> dict[str, Any]:
        """The fields of `DistributedInputs`.

        Args:
            replica_batches: of each replica the requests in row order.
            num_drafts: draft tokens that the step verifies in every row.
        """
        counts = [len(context.tokens.active) for batch in replica_batches for context in batch]
        rows = [len(batch) for batch in replica_batches]
        page = self.kv_params.page_size
        expanded = []
        for batch in replica_batches:
            ends = [context.tokens.current_position + num_drafts for context in batch]
            expanded.append(sum(-(-end // page) * page for end in ends))
        if len(expanded) < len(self.devices):
            expanded *= len(self.devices)
        return {
            "signal_buffers": self.signal_buffers,
            "host_input_row_offsets": Buffer.from_numpy(np.cumsum([0, *counts], dtype=np.uint32)),
            "batch_context_lengths": [
                Buffer.from_numpy(np.array([tokens], np.int32)) for tokens in expanded
            ],
            "data_parallel_splits": Buffer.from_numpy(np.cumsum([0, *rows], dtype=np.int64)),
            "ep_inputs": self._ep_inputs,
        }

    def connect_experts(self, session: InferenceSession, ep: EPConfig | None) -> None:
        """Sets up where GPUs send tokens to each other's experts, if each has some of them.

        Args:
            session: runs what sets it up.
            ep: the stack's.
        """
        if ep is None:
            return
        # The buffers live as long as what made them.
        self._connected = connected = EPCommInitializer(ep)
        connected.ep_init(session)
        self._ep_inputs = tuple(connected.model_inputs())

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> DeepseekV3Inputs:
        """As `UnifiedModel.prepare_next_token_inputs`, with the fields of `DistributedInputs`.

        Args:
            next_tokens: int64 `[B]`.
            prev_model_inputs: the inputs of the step that produced them.

        Raises:
            InputError: the previous inputs have another number of rows, or the model runs on
                GPUs, which must be told how many tokens each row has.
        """
        if not self.devices[0].is_host:
            raise InputError(
                "prepare_next_token_inputs does not know the rows' lengths, which a GPU needs:"
                " use prepare_initial_token_inputs"
            )
        inputs = super().prepare_next_token_inputs(next_tokens, prev_model_inputs)
        assert isinstance(inputs, DeepseekV3Inputs)
        rows = inputs.tokens.shape[0]
        return replace(
            inputs,
            host_input_row_offsets=Buffer.from_numpy(np.arange(rows + 1, dtype=np.uint32)),
        )
