"""A compiled graph, and what a step of it needs on the host."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from max.driver import CPU, Buffer, Device, is_virtual_device_mode
from max.engine import InferenceSession, Model
from max.graph import Graph
from max.graph.weights import Weights, WeightsAdapter
from max.nn.kv_cache import KVCacheInputs
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.context import TextContext
from max.pipelines.lib import (
    KVCacheConfig,
    MemoryPlan,
    ModelInputs,
    PipelineConfig,
    PipelineModelWithKVCache,
)

from unispec.encodings import WeightEncodings
from unispec.errors import InputError
from unispec.kv_cache.manager import with_room
from unispec.pipelines.speculative.deferred import DEFERRED_INPUTS, FeatureType
from unispec.pipelines.speculative.step import VOID_TOKEN

from .batch import BatchBuilder
from .compiled import Identity, read_compiled, write_compiled
from .deferred import LOG_ROWS_PER_REQUEST
from .inputs import StepModelInputs, needed_input, refuse_inputs, wait_for_copies
from .lengths import longest_sequence
from .outputs import StepModelOutputs
from .plan import default_memory_plan
from .prompts import Prompt

__all__ = ["StepModel", "digest_of"]


def digest_of(graph: Graph) -> str:
    """SHA-256 of the text of a graph and of its subgraphs, in hexadecimal."""
    # `str(graph)` leaves the subgraphs out, where the layers' number formats are.
    return hashlib.sha256(str(graph.module.mlir_module).encode()).hexdigest()


class StepModel(PipelineModelWithKVCache[TextContext]):
    """Runs the compiled graph of a target, and of a draft if there is one, step by step.

    A subclass names its inputs and builds its graph in `load_model`.

    Args:
        pipeline_config: target, draft and speculative configuration.
        session: compiles and runs the graph.
        devices: one CPU or one GPU, or several where `several_devices` says so.
        kv_cache_config: page size and prefix caching.
        weights: the target's weights; their files are read as `pipeline_config` names them.
        adapter: not used, the checkpoint's names are known.
        return_logits: the graph keeps its logits to itself, whatever is requested.
        return_hidden_states: likewise.
        memory_plan: sizes planned by a server; without one, those of `pipeline_config`.
        max_batch_size: most rows of a replica in one step.
        encodings: how matrices are stored on a CPU; None: as the checkpoints have them.
        num_looked_up: most drafts of a row that are looked up where there is no draft.
        compiled: folder of `write_compiled` to take the compiled graph from; None: compile it.
        compile_to: new or empty folder to write the compiled graph to; None: nowhere.

    Attributes:
        kv_params: parameters of the caches, see `get_kv_params` of the configuration.
        most_proposed: K of the draft, at most; 0 without one.
        batch: builds a step's inputs and keeps what is known of each request.
        weights_registry: the graph's weights by name, kept alive as long as this model.
        graph_digest: SHA-256 of the graph's text, in hexadecimal; empty of a graph that a subclass
            compiled by itself.

    Raises:
        InputError: more devices than the graph is built for, a checkpoint that does not fit, or a
            graph that was compiled for something else.
    """

    inputs_cls: ClassVar[type[StepModelInputs]] = StepModelInputs
    """The class of a step's inputs."""
    reads_images: ClassVar[bool] = False
    """Whether requests may have images; see `read_prompt`."""
    several_devices: ClassVar[bool] = False
    """Whether the graph may be built for several devices; the batch's inputs are on the first."""
    model: Model
    """The compiled graph."""

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
        encodings: WeightEncodings | None = None,
        num_looked_up: int = 0,
        compiled: Path | None = None,
        compile_to: Path | None = None,
    ) -> None:
        if len(devices) != 1 and not self.several_devices:
            raise InputError(f"{len(devices)} devices were given; a unified graph runs on one")
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter,
            return_logits,
            memory_plan=memory_plan
            or default_memory_plan(
                max_batch_size,
                self.calculate_max_seq_len(
                    pipeline_config, pipeline_config.model.huggingface_config
                ),
            ),
            return_hidden_states=return_hidden_states,
            max_batch_size=max_batch_size,
        )
        self.kv_params = with_room(self.arch_config.get_kv_params(), num_looked_up)
        self.encodings = encodings or WeightEncodings()
        self.graph_digest = ""
        self._compiled, self._compile_to = compiled, compile_to
        loaded = self.load_model(session)
        self.model = loaded[-1] if isinstance(loaded, tuple) else loaded
        speculative = pipeline_config.speculative
        sampled_drafts = speculative is not None and speculative.draft_proposal == "sampled"
        self._optional_inputs = {
            "draft_probs_full": sampled_drafts,
            "in_thinking_phase": speculative is not None
            and speculative.use_relaxed_acceptance_for_thinking,
            **dict.fromkeys(DEFERRED_INPUTS, self.features is not None),
        }
        hf: Any = self.huggingface_config
        self.most_proposed = 0 if speculative is None else self.kv_params.num_draft_tokens
        replicas = self.kv_params.data_parallel_degree
        # A virtual device runs no step and has no memory.
        device = CPU() if is_virtual_device_mode() else devices[0]
        self.batch = BatchBuilder(
            max_batch_size=replicas * max_batch_size,
            max_batch_input_tokens=replicas
            * max(pipeline_config.runtime.max_batch_input_tokens, max_batch_size),
            vocab_size=int(hf.get_text_config().vocab_size),
            most_verified=self.kv_params.num_draft_tokens,
            num_speculative_tokens=self.most_proposed,
            device=device,
            sampled_drafts=sampled_drafts,
            thinking_phase=self._optional_inputs["in_thinking_phase"],
            feature_log=self._feature_log(max_batch_size, device),
            shared_page_size=self.kv_params.page_size
            if pipeline_config.model.kv_cache.enable_prefix_caching
            else None,
        )

    @property
    def features(self) -> FeatureType | None:
        """What the draft reads of a position; None: no draft, or it reads in each step."""
        return None

    @abstractmethod
    def load_model(self, session: InferenceSession) -> Any:
        """Reads the checkpoints, builds the graph and compiles it with the session.

        Returns:
            The graph of one step, which takes the inputs of `inputs_cls.buffers`; of several
            graphs, it is the last.

        Raises:
            InputError: a checkpoint that does not fit.
        """

    @classmethod
    def calculate_max_seq_len(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> int:
        """Longest sequence, prompt and output, that the target and `max_length` allow.

        Args:
            pipeline_config: its model's `max_length`, if that is not None.
            huggingface_config: the target's, for `max_position_embeddings`.

        Returns:
            Tokens.

        Raises:
            InputError: `max_length` is beyond the target's `max_position_embeddings`.
        """
        model = pipeline_config.model
        return longest_sequence(huggingface_config, model.max_length, source=model.model_name)

    @classmethod
    def read_prompt(
        cls, huggingface_config: Any, tokens: Sequence[int], images: Sequence[Any], *, name: str
    ) -> Prompt:
        """The prompt as the model reads it; this one reads no images.

        Raises:
            InputError: there are images.
        """
        if images:
            raise InputError(
                f"{name} has {len(images)} images, this model reads none: leave them out"
            )
        return Prompt(tokens)

    def execute(self, model_inputs: ModelInputs) -> StepModelOutputs:
        """Runs one step.

        Args:
            model_inputs: a `StepModelInputs` with all that the graph takes.

        Returns:
            `num_accepted_draft_tokens` int64 `[B]`, `next_tokens` int64 `[B]`,
            `next_draft_tokens` int64 `[B, K]`, from a graph with sampled drafts
            `next_draft_probs_full` float32 `[B, K, V]`, what `num_logprobs` asks for, and of all
            rows `next_lengths` and `report`.

        Raises:
            InputError: an input is missing, or set though the graph does not take it.
        """
        assert isinstance(model_inputs, StepModelInputs)
        for name, takes in self._optional_inputs.items():
            if takes:
                needed_input(model_inputs, name)
            else:
                refuse_inputs(model_inputs, [name])
        buffers = model_inputs.buffers
        wait_for_copies(self.devices[0])
        return self.outputs_of(self.model.execute(*buffers))

    @staticmethod
    def outputs_of(outputs: Sequence[Buffer]) -> StepModelOutputs:
        """The graph's outputs by name."""
        accepted, following, drafts, *probs, tokens, top_tokens, top, lengths, report = outputs
        return StepModelOutputs(
            num_accepted_draft_tokens=accepted,
            next_tokens=following,
            next_draft_tokens=drafts,
            next_draft_probs_full=probs[0] if probs else None,
            token_logprobs=tokens,
            top_tokens=top_tokens,
            top_logprobs=top,
            next_lengths=lengths,
            report=report,
        )

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
    ) -> StepModelInputs:
        """Builds one step's inputs from requests, new and running ones alike.

        Args:
            replica_batches: of each replica the requests in row order; one batch but where
                attention is data-parallel.
            kv_cache_inputs: pages of the same requests in the same order.
            return_n_logits: 1; the number of logit rows follows from the drafts.

        Raises:
            InputError: another number of replicas than the graph has, or another
                `return_n_logits`.
        """
        replicas = self.kv_params.data_parallel_degree
        if len(replica_batches) != replicas:
            raise InputError(
                f"batches of {len(replica_batches)} replicas were given; this graph has {replicas}:"
                " give one for each, empty ones too"
            )
        if return_n_logits != 1:
            raise InputError(
                f"return_n_logits is {return_n_logits}, but it follows from the drafts: leave it 1"
            )
        fields: dict[str, Any] = {**self.batch.fields(list(chain(*replica_batches)))}
        num_drafts = int(fields["draft_tokens"].shape[1])
        extra = self.extra_fields(replica_batches, num_drafts)
        return self.inputs_cls(**fields, **extra, kv_cache_inputs=kv_cache_inputs)

    def _feature_log(self, max_batch_size: int, device: Device) -> Buffer | None:
        """`[L, F]` where a draft need not read in each step."""
        if self.features is None:
            return None
        rows = LOG_ROWS_PER_REQUEST * max_batch_size
        return Buffer.zeros([rows, self.features.width], self.features.dtype, device)

    def extra_fields(
        self, replica_batches: Sequence[Sequence[TextContext]], num_drafts: int
    ) -> dict[str, Any]:
        """Fields that only this model's inputs have, by name; none here."""
        return {}

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> StepModelInputs:
        """Builds the inputs of a plain decode step: one new token a row, void drafts.

        The caller sets `kv_cache_inputs` anew, for the caches have grown. The number of
        draft tokens stays; a step that verifies others is built with
        `prepare_initial_token_inputs`.

        Args:
            next_tokens: int64 `[B]`.
            prev_model_inputs: the inputs of the step that produced them.

        Raises:
            InputError: the previous inputs have another number of rows, or leave the draft
                positions to read.
        """
        assert isinstance(prev_model_inputs, StepModelInputs)
        logged = prev_model_inputs.num_logged
        if logged is not None and int(logged.to_numpy()):
            raise InputError(
                "the draft did not read what the previous step verified: build this step with"
                " prepare_initial_token_inputs"
            )
        count = next_tokens.shape[0]
        rows = prev_model_inputs.input_row_offsets.shape[0] - 1
        if count != rows:
            raise InputError(f"next_tokens has {count} rows, the previous inputs have {rows}")
        assert prev_model_inputs.draft_tokens is not None
        width = prev_model_inputs.draft_tokens.shape[1]
        device = self.devices[0]
        void = np.full((count, width), VOID_TOKEN, np.int64)
        return replace(
            prev_model_inputs,
            tokens=next_tokens,
            input_row_offsets=Buffer.from_numpy(np.arange(count + 1, dtype=np.uint32)).to(device),
            draft_tokens=Buffer.from_numpy(void).to(device),
            known_next_tokens=Buffer.from_numpy(np.full(count, VOID_TOKEN)).to(device),
            **self.batch.nothing_deferred([1 + width] * count),
        )

    def following_inputs(
        self, inputs: StepModelInputs, caches: Any, limits: Sequence[int]
    ) -> StepModelInputs:
        """The inputs of a decode step like the last one.

        Its tokens, drafts and cache lengths are to be copied in on the device.

        Args:
            inputs: of the last step, one new token a row; its draft has read all there is.
            caches: the step's, with memory for the lengths.
            limits: how long each row is at its end, at most.
        """
        assert inputs.draft_tokens is not None
        rows, width = inputs.draft_tokens.shape
        return replace(
            inputs,
            kv_cache_inputs=caches,
            **self.batch.nothing_deferred([1 + width] * rows),
            **self.following_fields(limits),
        )

    def following_fields(self, limits: Sequence[int]) -> dict[str, Any]:
        """Fields of `extra_fields` that change from one decode step to the next; none here.

        Args:
            limits: how long each row is at the step's end, at most.
        """
        return {}

    def compile(
        self,
        session: InferenceSession,
        build: Callable[[], Graph],
        weights: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> Any:
        """Compiles a graph, or takes it as it was compiled, and keeps its weights alive.

        Args:
            build: builds the graph; not called where it is compiled already.
            weights: by name.
            facts: `facts_of` what the graph is built from beside the weights' shapes.

        Raises:
            InputError: the graph was compiled for something else.
        """
        (model,) = self.compile_all(session, build, weights, facts).values()
        return model

    def compile_all(
        self,
        session: InferenceSession,
        build: Callable[[], Graph],
        weights: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> dict[str, Model]:
        """As `compile`, of all graphs in the module of the one that is built: by name."""
        # On a CPU the compiled graphs read the weights where they lie and do not own them.
        self.weights_registry = weights
        made_of = facts, weights, self.devices[0]
        if self._compiled is not None:
            code, self.graph_digest = read_compiled(self._compiled, Identity.of(*made_of))
            return session.init_all(code, weights_registry=weights)
        graph = build()
        self.graph_digest = digest_of(graph)
        several = len(graph.module.top_level_graph_names()) > 1
        # MAX takes what kernels a graph has from a graph alone, not from a unit of several.
        kernels = graph.kernel_libraries_paths
        if self._compile_to is not None:
            code = session.compile(graph.module, custom_extensions=kernels)
            write_compiled(self._compile_to, code, self.graph_digest, Identity.of(*made_of))
            return session.init_all(code, weights_registry=weights)
        if several:
            return session.load_all(
                graph.module, custom_extensions=kernels, weights_registry=weights
            )
        return {graph.name: session.load(graph, weights_registry=weights)}

    @classmethod
    def draft_reads_next_token(cls) -> bool:
        """Whether the draft's cache entry of a position depends on the token after it."""
        return False
