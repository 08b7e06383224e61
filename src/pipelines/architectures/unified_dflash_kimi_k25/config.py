"""Configuration of a Kimi K2.5 target with a DFlash draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.pipelines.drafts.dflash.unified import UnifiedDflashConfig
from unispec.pipelines.layers.rope import RopeType
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.placement import check_one_cpu
from unispec.pipelines.targets.kimi.config import VisionConfig
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.targets.llama.stack_config import StackConfig

__all__ = ["DFlashKimiK25DraftConfig", "UnifiedDflashKimiK25Config"]


class DFlashKimiK25DraftConfig(StackConfig):
    """The draft's stack: ordinary attention, rotated in halves, scaled as YaRN does."""

    ROPE_TYPES: ClassVar[Sequence[RopeType]] = (*StackConfig.ROPE_TYPES, "yarn")


@dataclass(kw_only=True)
class UnifiedDflashKimiK25Config(UnifiedDflashConfig):
    """Target and draft stacks and how they work together."""

    target_stack: ClassVar[type[Any]] = DeepseekV3Config
    """Reads the target's stack."""
    draft_stack: ClassVar[type[Llama3Config]] = DFlashKimiK25DraftConfig
    """Reads the draft's stack."""

    target: DeepseekV3Config
    """The target's stack."""
    draft: DFlashKimiK25DraftConfig
    """The draft's stack, on the target's device and in its dtype."""
    vision: VisionConfig | None = None
    """The vision tower; None where only the language graph is built."""

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads both stacks and the vision tower; K is the draft's `block_size` less one.

        Args:
            pipeline_config: target, draft and speculative configuration.
            model_config: the target's, by default that of `pipeline_config`.
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len`
                of the target says.

        Raises:
            InputError: no draft or speculative configuration, a DFlash field missing, a tower
                of another kind, or what `validate_dflash_fields` refuses.
        """
        config = super().initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        check_one_cpu(config.devices, "Kimi K2.5")
        model_config = model_config or pipeline_config.model
        vision = VisionConfig.read(
            model_config.huggingface_config,
            text_hidden_size=config.target.hidden_size,
            dtype=config.target.dtype,
            device=config.devices[0],
            source=model_config.model_name,
        )
        return replace(config, vision=vision)
