"""What a DeepSeek-V3 target brings to a step on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from max.driver import Buffer
from max.engine import InferenceSession
from max.graph import Graph
from max.nn.comm.ep import EPCommInitializer, EPConfig
from max.nn.kv_cache import KVCacheInputs
from max.pipelines.context import TextContext
from max.pipelines.lib import ModelInputs

from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.unified.model import UnifiedModel

from .inputs import DeepseekV3Inputs

__all__ = ["DeepseekV3Model"]


class DeepseekV3Model(UnifiedModel):
    """A DeepSeek-V3 target on one device or several; see `UnifiedModel`."""

    several_devices: ClassVar[bool] = True
    inputs_cls: ClassVar[type[StepModelInputs]] = DeepseekV3Inputs
    _connected: EPCommInitializer | None = None
    _ep_inputs: tuple[Buffer, ...] = ()

    def compile(
        self,
        session: InferenceSession,
        build: Callable[[], Graph],
        weights: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> Any:
        """As `StepModel.compile`, after GPUs were connected that have some of the experts each."""
        config: Any = self.arch_config
        self.connect_experts(session, config.ep if self.method is None else config.target.ep)
        return super().compile(session, build, weights, facts)

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

    def extra_fields(
        self, replica_batches: Sequence[Sequence[TextContext]], num_drafts: int
    ) -> dict[str, Any]:
        """The fields of `DistributedInputs`."""
        counts = [len(context.tokens.active) for batch in replica_batches for context in batch]
        rows = [len(batch) for batch in replica_batches]
        expanded = []
        for batch in replica_batches:
            ends = [context.tokens.current_position + num_drafts for context in batch]
            expanded.append(_in_pages(ends, self.kv_params.page_size))
        if len(expanded) < len(self.devices):
            expanded *= len(self.devices)
        return {
            "signal_buffers": self.signal_buffers,
            "host_input_row_offsets": Buffer.from_numpy(np.cumsum([0, *counts], dtype=np.uint32)),
            "batch_context_lengths": [_on_host(tokens) for tokens in expanded],
            "data_parallel_splits": Buffer.from_numpy(np.cumsum([0, *rows], dtype=np.int64)),
            "ep_inputs": self._ep_inputs,
        }

    def following_fields(self, limits: Sequence[int]) -> dict[str, Any]:
        """The cached tokens that a step may read, of one device."""
        return {"batch_context_lengths": [_on_host(_in_pages(limits, self.kv_params.page_size))]}

    def connect_experts(self, session: InferenceSession, ep: EPConfig | None) -> None:
        """Sets up where GPUs send tokens to each other's experts, if each has some of them."""
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


def _in_pages(ends: Sequence[int], page: int) -> int:
    """Tokens that rows of these lengths have room for in their pages."""
    return sum(-(-end // page) * page for end in ends)


def _on_host(tokens: int) -> Buffer:
    return Buffer.from_numpy(np.array([tokens], np.int32))
