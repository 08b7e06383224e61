"""Configuration of a target that drafts with a layer of its own checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.methods import Method
from unispec.pipelines.speculative.deferred import FeatureType
from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.unified.config import UnifiedConfig
from unispec.pipelines.unified.target import ExtraTypes
from unispec.sampling.acceptance import AcceptanceRule
from unispec.sampling.late_masks import AfterMasks, late_mask_types, with_late_masks

__all__ = ["UnifiedMtpConfig"]


@dataclass(kw_only=True)
class UnifiedMtpConfig(UnifiedConfig):
    """The target's stack, and how its MTP layer drafts.

    Raises:
        InputError: K outside 1 to 8, or late masks on a CPU.
    """

    draft_method: ClassVar[Method] = "mtp"

    target: DeepseekV3Config
    """The target's stack; the MTP layer has the same widths."""
    late_masks: bool = False
    """Whether the graph takes `pinned_bitmask`, `wait_payload` and `device_bitmask_scratch` in
    place of `token_bitmask`; on GPUs only."""

    def __post_init__(self) -> None:
        self.check_num_speculative_tokens()
        if self.late_masks and not self.devices[0].is_gpu():
            raise InputError("late_masks is set, but a CPU does not wait for masks: unset it")

    @property
    def draft_kv_params(self) -> KVCacheParams:
        """Parameters of the draft's cache, of one layer."""
        return self.target.one_layer().kv_params

    @property
    def features(self) -> FeatureType | None:
        """As in `UnifiedConfig`; None on GPUs.

        Their latent attention reads how wide a step is from what the host says of the merged
        tokens, and replicas know where those start, but not where deferred ones do.
        """
        return None if self.target.on_gpus else super().features

    def input_order(self, order: Sequence[str]) -> Sequence[str]:
        """Late masks stand in place of `token_bitmask`."""
        return with_late_masks(order) if self.late_masks else order

    def extra_types(self) -> ExtraTypes:
        """The target's, and late masks where there are any."""
        types = dict(super().extra_types())
        if self.late_masks:
            types |= late_mask_types(self.devices[0], self.target.vocab_size)
        return types

    def rule(self, step: StepInputs) -> AcceptanceRule:
        """The configured acceptance rule, which waits for late masks."""
        rule = super().rule(step)
        return AfterMasks(rule, step.extra) if self.late_masks else rule

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads the target's stack.

        Args:
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len` says.

        Raises:
            InputError: no speculative configuration, K outside 1 to 8, no MTP layer, or a
                stack that is not supported.
        """
        model_config = model_config or pipeline_config.model
        target, speculative = cls.read_target(pipeline_config, model_config, max_seq_len)
        if target.num_nextn_predict_layers == 0:
            raise InputError(
                f"{model_config.model_name} has no multi-token prediction layer"
                f" {target.num_hidden_layers} (its num_nextn_predict_layers is 0); use a"
                " checkpoint that has it, or another method"
            )
        return cls(target=target, speculative_config=speculative)
