"""Configuration of a target with an EAGLE-3 draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.methods import Method
from unispec.pipelines.drafts.config import UnifiedDraftConfig

from .fields import Eagle3Fields
from .weights import EMBEDDING, FC_BIAS, Q_NORM, QKV_BIAS

if TYPE_CHECKING:
    from unispec.pipelines.unified.method import DraftWeights

__all__ = ["UnifiedEagle3Config"]


@dataclass(kw_only=True)
class UnifiedEagle3Config(UnifiedDraftConfig):
    """Target and draft stacks and how they work together."""

    draft_method: ClassVar[Method] = "eagle3"

    target_layer_ids: list[int] = field(default_factory=list)
    """Target layers, from 0, whose outputs the draft reads, in this order."""
    norm_before_residual: bool = False
    """Whether the first layer adds to the normed feature."""
    norm_before_fc: bool = False
    """Whether one norm stands before `fc`, over all tapped outputs at once."""
    fc_norm: bool = False
    """Whether each tapped output has a norm before `fc` (EAGLE-3.1)."""
    norm_output: bool = False
    """Whether the final norm is part of what the next row reads (EAGLE-3.1)."""
    fc_bias: bool = False
    """Whether `fc` has a bias."""
    own_head: bool = False
    """Whether the head is the draft's own."""
    own_embedding: bool = False
    """Whether the embedding is the draft's own."""

    def __post_init__(self) -> None:
        self.check_num_speculative_tokens()
        self.check_taps()

    @property
    def norms_before_fc(self) -> list[str]:
        """Names of the norms that tapped outputs pass before `fc`."""
        if self.norm_before_fc:
            return ["input_norm.weight"]
        taps = len(self.target_layer_ids) if self.fc_norm else 0
        return [f"fc_norm.{tap}.weight" for tap in range(taps)]

    @property
    def tapped_layers(self) -> Sequence[int]:
        """Target layers whose outputs the draft reads."""
        return self.target_layer_ids

    def with_draft(self, weights: DraftWeights) -> Self:
        """The configuration, after what only the draft's tensors tell."""
        config, state = super().with_draft(weights), weights.state
        draft = replace(config.draft, qkv_bias=QKV_BIAS in state, qk_norm=Q_NORM in state)
        return replace(
            config,
            draft=draft,
            fc_bias=FC_BIAS in state,
            own_head=weights.own_head,
            own_embedding=EMBEDDING in state,
        )

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads both stacks, and which layers of the target the draft reads.

        Args:
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len`
                of the target says.

        Raises:
            InputError: no draft or speculative configuration, K outside 1 to 8, a layer that the
                target does not have, or what `Eagle3Fields` refuses.
        """
        target, draft, speculative = cls.read_stacks(pipeline_config, model_config, max_seq_len)
        draft_model = pipeline_config.draft_model
        assert draft_model is not None
        fields = Eagle3Fields.from_huggingface(
            draft_model.huggingface_config,
            num_layers=target.num_hidden_layers,
            source=draft_model.model_name,
        )
        return cls(target=target, draft=draft, speculative_config=speculative, **fields._asdict())
