"""What the pipeline models of all Llama 3 targets with a draft share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from max.dtype import DType
from max.graph import DeviceRef
from max.nn import Module
from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import KVCacheConfig, PipelineConfig

from unispec.checkpoints import Tensor
from unispec.checkpoints.tied_head import HEAD
from unispec.pipelines.runtime.model import UnifiedModel
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.targets.llama.weights import llama3_state_dict

from .copies import check_copies
from .weights import DraftWeights, unified_state_dict

__all__ = ["DraftCheckpoint", "UnifiedLlama3Model"]


class DraftCheckpoint(NamedTuple):
    """A draft's checkpoint as it was read."""

    tensors: Mapping[str, Tensor]
    """Every tensor under the name that the file gives it."""
    config: Any
    """Its Hugging Face config."""
    source: str
    """The file or folder, for errors."""


class UnifiedLlama3Model(UnifiedModel):
    """A Llama 3 target and a draft in one compiled graph; see `UnifiedModel`."""

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """The target's cache parameters; `model_config_cls` has those of both.

        Args:
            huggingface_config: the target's.
            pipeline_config: for the method and K, which is the room that drafts need.
            devices: where the cache lies.
            kv_cache_config: page size and prefix caching.
            cache_dtype: of keys and values.
        """
        params = Llama3Config.construct_kv_params(
            huggingface_config, pipeline_config, devices, kv_cache_config, cache_dtype
        )
        width = cls.checkpoint_width(pipeline_config)
        return params if width is None else replace(params, num_draft_tokens=width)

    @classmethod
    def checkpoint_width(cls, pipeline_config: PipelineConfig) -> int | None:
        """K where the draft's checkpoint decides it; None: as it is configured.

        Args:
            pipeline_config: which draft it is.
        """
        return None

    def read_both(self, config: Llama3Config) -> tuple[dict[str, Tensor], DraftCheckpoint]:
        """The target's weights by name, checked, and the draft's checkpoint as it stands.

        Args:
            config: the target's stack; learns whether the head is the embedding.

        Raises:
            InputError: a file is missing or damaged, a tensor of the target is missing,
                unknown, of another shape or not finite, or the draft has other tokens.
        """
        draft_model = self.pipeline_config.draft_model
        assert draft_model is not None
        tensors, source = read_weights(self.pipeline_config.model)
        target = llama3_state_dict(tensors, config, source=source)
        config.tie_word_embeddings = HEAD not in target
        tensors, source = read_weights(draft_model)
        check_copies(tensors, target, source=source)
        return target, DraftCheckpoint(tensors, draft_model.huggingface_config, source)

    @staticmethod
    def load_both(
        module: Module, target: Mapping[str, Tensor], draft: DraftWeights, dtype: DType
    ) -> None:
        """Loads both checkpoints into a module that has them under `target.` and `draft.`.

        Args:
            module: target and draft.
            target: the target's weights by name.
            draft: the draft's weights.
            dtype: of all float weights in the graph.
        """
        module.load_state_dict(unified_state_dict(target, draft, dtype), weight_alignment=1)
