"""The pipeline model: loads both checkpoints and compiles the unified graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from max.driver import Device
from max.engine import InferenceSession, Model
from max.graph.weights import Weights, WeightsAdapter
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.lib import KVCacheConfig, MemoryPlan, PipelineConfig

from unispec.pipelines.drafts.dflash.config import DflashDraftHFConfig
from unispec.pipelines.drafts.dflash.weights import dflash_state_dict
from unispec.pipelines.drafts.model import UnifiedLlama3Model

from .config import UnifiedDflashLlama3Config
from .graph import UnifiedDflashLlama3, build_graph
from .inputs import UnifiedDflashLlama3Inputs

__all__ = ["UnifiedDflashLlama3Model"]


class UnifiedDflashLlama3Model(UnifiedLlama3Model):
    """Llama 3 target and DFlash draft in one compiled graph; see `UnifiedModel`.

    Args:
        pipeline_config: target, draft and speculative configuration.
        session: compiles and runs the graph.
        devices: one CPU or one GPU.
        kv_cache_config: page size and prefix caching.
        weights: the target's weights; their files are read as `pipeline_config` names them.
        adapter: not used, the checkpoint's names are known.
        return_logits: the graph keeps its logits to itself, whatever is asked.
        return_hidden_states: likewise.
        max_batch_size: most rows in one step.
        memory_plan: sizes planned by a server; without one, those of `pipeline_config`.

    Raises:
        InputError: more than one device, or a checkpoint that does not fit.
    """

    model_config_cls: ClassVar[type[Any]] = UnifiedDflashLlama3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls = UnifiedDflashLlama3Inputs

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
        max_batch_size: int = 1,
        *,
        memory_plan: MemoryPlan | None = None,
    ) -> None:
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter,
            return_logits,
            return_hidden_states,
            memory_plan=memory_plan,
            max_batch_size=max_batch_size,
        )

    @classmethod
    def checkpoint_width(cls, pipeline_config: PipelineConfig) -> int | None:
        """One less than the block of the draft's checkpoint.

        Args:
            pipeline_config: which draft it is.
        """
        draft = pipeline_config.draft_model
        hf = None if draft is None else draft.huggingface_config
        size = None if hf is None else DflashDraftHFConfig.from_huggingface(hf).block_size
        return size - 1 if size else None

    def load_model(self, session: InferenceSession) -> Model:
        """Reads both checkpoints, builds the graph and compiles it with the session.

        Args:
            session: compiles and runs the graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: UnifiedDflashLlama3Config = self.arch_config
        target, (tensors, draft_hf, source) = self.read_both(config.target)
        draft = dflash_state_dict(
            tensors,
            draft_hf,
            config.target,
            num_taps=len(config.target_layer_ids),
            source=source,
        )
        stack = replace(config.draft, vocab_size=draft.num_proposed(config.target.vocab_size))
        config = replace(config, draft=stack)
        module = UnifiedDflashLlama3(config)
        self.load_both(module, target, draft, config.target.dtype)
        return self.compile(session, build_graph(config, module), module.state_dict())
