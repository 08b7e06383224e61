"""Configuration of a target with an EAGLE draft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.methods import Method
from unispec.pipelines.drafts.config import UnifiedDraftConfig

from .weights import FC_BIAS, QKV_BIAS

if TYPE_CHECKING:
    from unispec.pipelines.unified.method import DraftWeights

__all__ = ["UnifiedEagleConfig"]


@dataclass(kw_only=True)
class UnifiedEagleConfig(UnifiedDraftConfig):
    """Target and draft stacks and how they work together."""

    draft_method: ClassVar[Method] = "eagle"

    fc_bias: bool = False
    """Whether the draft's projection of token and feature has a bias."""

    def __post_init__(self) -> None:
        self.check_num_speculative_tokens()
        self.check_hidden_size()

    def with_draft(self, weights: DraftWeights) -> Self:
        """The configuration, after what only the draft's tensors tell."""
        config = super().with_draft(weights)
        draft = replace(config.draft, qkv_bias=QKV_BIAS in weights.state)
        return replace(config, draft=draft, fc_bias=FC_BIAS in weights.state)

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
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len`
                of the target says.

        Raises:
            InputError: no draft or speculative configuration, K outside 1 to 8, or a draft
                of another hidden size.
        """
        target, draft, speculative = cls.read_stacks(pipeline_config, model_config, max_seq_len)
        return cls(target=target, draft=draft, speculative_config=speculative)
