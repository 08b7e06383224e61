"""How a target and a draft work together, as a configuration states it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParamInterface, KVCacheParams, MultiKVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import ArchConfigWithKVCache
from max.pipelines.speculative import SpeculativeConfig

from unispec.errors import InputError
from unispec.methods import Method, check_num_speculative_tokens
from unispec.pipelines.speculative.deferred import FeatureType
from unispec.pipelines.speculative.step import StepInputs
from unispec.sampling.acceptance import AcceptanceRule, Matching, Rejection, Relaxed, Synthetic

if TYPE_CHECKING:
    from .method import DraftWeights
    from .target import ExtraTypes, TargetFamily

__all__ = ["UnifiedConfig", "both_caches"]


def both_caches(target: KVCacheParams, draft: KVCacheParams) -> KVCacheParamInterface:
    """A tree of caches with the children `target` and `draft`."""
    return MultiKVCacheParams.from_params({"target": target, "draft": draft})


@dataclass(kw_only=True)
class UnifiedConfig(ArchConfigWithKVCache):
    """The target's stack, and how drafts are proposed and accepted.

    A draft method's own configuration derives from it.
    """

    family: ClassVar[TargetFamily]
    """The target."""
    draft_method: ClassVar[Method]
    """The draft method."""

    target: Any
    """The target's stack."""
    speculative_config: SpeculativeConfig
    """The method, K, and which acceptance rule decides."""

    @property
    def devices(self) -> list[DeviceRef]:
        """The target's devices, which the draft shares."""
        return list(self.target.devices)

    @property
    @abstractmethod
    def draft_kv_params(self) -> KVCacheParams:
        """Parameters of the draft's cache."""

    @property
    def tapped_layers(self) -> Sequence[int]:
        """Target layers whose outputs the draft reads; none: it reads what the head reads."""
        return ()

    @property
    def features(self) -> FeatureType | None:
        """What the draft reads of a position; None: the draft reads in each step."""
        width = self.target.hidden_size * max(len(self.tapped_layers), 1)
        return FeatureType(width, self.target.dtype)

    def check_num_speculative_tokens(self) -> None:
        """Refuses a K that the method's graph is not built for.

        Raises:
            InputError: K is not set, or out of range.
        """
        check_num_speculative_tokens(
            self.draft_method, self.speculative_config.num_speculative_tokens
        )

    def get_kv_params(self) -> KVCacheParamInterface:
        """Parameters of both caches, as a tree with the children `target` and `draft`."""
        return both_caches(self.target.kv_params, self.draft_kv_params)

    def get_max_seq_len(self) -> int:
        """Longest sequence of a request in tokens, the target's."""
        return int(self.target.max_seq_len)

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: MAXModelConfig) -> int:
        """Longest sequence that the target's positions and `max_length` allow, in tokens.

        Raises:
            ValueError: `max_length` is beyond the target's `max_position_embeddings`.
        """
        longest: int = cls.family.config.calculate_max_seq_len(huggingface_config, model_config)
        return longest

    @classmethod
    def read_target(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None,
        max_seq_len: int | None,
    ) -> tuple[Any, SpeculativeConfig]:
        """The target's stack and the speculative configuration.

        Args:
            max_seq_len: longest sequence in tokens; None: what the target allows.

        Raises:
            InputError: no speculative configuration, or a target that is not supported.
        """
        speculative = pipeline_config.speculative
        if speculative is None:
            raise InputError(
                "there is no speculative configuration; give --speculative-method"
                f" {cls.draft_method}"
            )
        target = cls.family.config.initialize(
            pipeline_config, model_config, max_seq_len=max_seq_len
        )
        return target, speculative

    def with_draft(self, weights: DraftWeights) -> UnifiedConfig:
        """The configuration, after what only the draft's tensors tell."""
        return self

    def input_order(self, order: Sequence[str]) -> Sequence[str]:
        """Names of the graph's inputs, given those of the target's inputs class."""
        return order

    def extra_types(self) -> ExtraTypes:
        """Types of the inputs that only some graphs have, by name."""
        return self.family.extra_types(self.target)

    def rule(self, step: StepInputs) -> AcceptanceRule:
        """The configured acceptance rule; the lossy ones only where they are requested by name.

        `synthetic_acceptance_rate` comes first, then `use_relaxed_acceptance_for_thinking`, then
        `draft_proposal`.
        """
        config = self.speculative_config
        if config.synthetic_acceptance_rate is not None:
            return Synthetic(config.synthetic_acceptance_rate)
        if config.use_relaxed_acceptance_for_thinking:
            return Relaxed(config.relaxed_topk, config.relaxed_delta)
        return Rejection() if config.draft_proposal == "sampled" else Matching()
