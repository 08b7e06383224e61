"""Configuration of a Llama 3 target with an EAGLE draft."""

from __future__ import annotations

from dataclasses import dataclass

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.drafts.config import UnifiedDraftConfig
from unispec.pipelines.speculative.step import MAX_DRAFT_TOKENS
from unispec.pipelines.targets.llama.config import Llama3Config

__all__ = ["UnifiedEagleLlama3Config"]


@dataclass(kw_only=True)
class UnifiedEagleLlama3Config(UnifiedDraftConfig):
    """Target and draft stacks and how they work together."""

    target: Llama3Config
    """The target's stack."""

    def __post_init__(self) -> None:
        width = self.speculative_config.num_speculative_tokens
        if width is None or not 1 <= width <= MAX_DRAFT_TOKENS:
            raise InputError(f"num_speculative_tokens is {width}; choose 1 to {MAX_DRAFT_TOKENS}")
        self.check_hidden_size()

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads both stacks; the draft's vocabulary is `draft_vocab_size` if it states one.

        Args:
            pipeline_config: target, draft and speculative configuration.
            model_config: the target's, by default that of `pipeline_config`.
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len`
                of the target says.

        Raises:
            InputError: no draft or speculative configuration, K outside 1 to 8, or a draft
                of another hidden size.
        """
        target, draft, speculative = cls.read_stacks(pipeline_config, model_config, max_seq_len)
        return cls(target=target, draft=draft, speculative_config=speculative)
