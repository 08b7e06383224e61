"""Configuration of a Llama 3 target with an EAGLE draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import ArchConfigWithKVCache
from max.pipelines.speculative import SpeculativeConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.speculative.step import MAX_DRAFT_TOKENS

from ..drafts.config import both_caches, check_hidden_size, read_draft_stack
from ..llama3.config import Llama3Config

__all__ = ["UnifiedEagleLlama3Config"]


@dataclass(kw_only=True)
class UnifiedEagleLlama3Config(ArchConfigWithKVCache):
    """Target and draft stacks and how they work together."""

    target: Llama3Config
    draft: Llama3Config
    speculative_config: SpeculativeConfig

    def __post_init__(self) -> None:
        width = self.speculative_config.num_speculative_tokens
        if width is None or not 1 <= width <= MAX_DRAFT_TOKENS:
            raise InputError(f"num_speculative_tokens is {width}; choose 1 to {MAX_DRAFT_TOKENS}")
        check_hidden_size(self.draft, self.target)

    def get_kv_params(self) -> KVCacheParamInterface:
        """Parameters of both caches, as a tree with the children `target` and `draft`."""
        return both_caches(self.target, self.draft)

    def get_max_seq_len(self) -> int:
        """Longest sequence of a request in tokens, the target's."""
        return self.target.max_seq_len

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: MAXModelConfig) -> int:
        """Longest sequence that the target's positions and `max_length` allow.

        Raises:
            ValueError: `max_length` is beyond the target's `max_position_embeddings`.
        """
        return Llama3Config.calculate_max_seq_len(huggingface_config, model_config)

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads both stacks; the draft's vocabulary is `draft_vocab_size` if it states one.

        Raises:
            InputError: no draft or speculative configuration, K outside 1 to 8, or a draft
                of another hidden size or vocabulary.
        """
        draft_model, speculative = pipeline_config.draft_model, pipeline_config.speculative
        if draft_model is None or speculative is None:
            raise InputError("EAGLE needs a draft model; give --draft-model-path")
        target = Llama3Config.initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        draft = read_draft_stack(pipeline_config, draft_model, target)
        return cls(target=target, draft=draft, speculative_config=speculative)
