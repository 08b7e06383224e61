"""What the configurations of all methods with a draft checkpoint share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from max.pipelines.speculative import SpeculativeConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.layers.fields import positive_integer
from unispec.pipelines.targets.llama.stack_config import StackConfig
from unispec.pipelines.unified.config import UnifiedConfig

if TYPE_CHECKING:
    from unispec.pipelines.unified.method import DraftWeights

__all__ = ["DraftStackConfig", "UnifiedDraftConfig"]


@dataclass(kw_only=True)
class DraftStackConfig(StackConfig):
    """The stack of a draft, whose head is the target's, its scale too."""

    CONSTANTS: ClassVar[Collection[str]] = ("logits_scaling",)


@dataclass(kw_only=True)
class UnifiedDraftConfig(UnifiedConfig):
    """Target and draft stacks and how they work together."""

    draft_stack: ClassVar[type[StackConfig]] = DraftStackConfig
    """Reads the draft's stack."""

    draft: StackConfig
    """The draft's stack, on the target's device and in its dtype."""

    @property
    def draft_kv_params(self) -> KVCacheParams:
        """Parameters of the draft's cache."""
        return self.draft.kv_params

    def check_hidden_size(self) -> None:
        """Refuses a draft that cannot read the target's embedding.

        Raises:
            InputError: the hidden sizes differ.
        """
        if self.draft.hidden_size != self.target.hidden_size:
            raise InputError(
                f"the draft's hidden_size {self.draft.hidden_size} is not the target's"
                f" {self.target.hidden_size}; use a draft that was trained for this target"
            )

    def check_taps(self) -> None:
        """Refuses a draft that is said to read layers, and reads none or some outside the target.

        Raises:
            InputError: no tapped layer, or one that the target does not have.
        """
        layers = self.target.num_hidden_layers
        if not self.tapped_layers:
            raise InputError("target_layer_ids is empty; name the target layers the draft reads")
        for layer in self.tapped_layers:
            if not 0 <= layer < layers:
                raise InputError(
                    f"target_layer_ids has {layer}, but the target has layers 0 to {layers - 1};"
                    " use a draft that was trained for this target"
                )

    def with_draft(self, weights: DraftWeights) -> Self:
        """The configuration with as many tokens to propose as the draft's tensors say."""
        proposed = weights.num_proposed or self.target.vocab_size
        return replace(self, draft=replace(self.draft, vocab_size=proposed))

    @classmethod
    def read_stacks(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None,
        max_seq_len: int | None,
    ) -> tuple[Any, StackConfig, SpeculativeConfig]:
        """The target's stack, the draft's, and the speculative configuration.

        The draft's vocabulary is `draft_vocab_size` if it states one, else the tokens that both
        have.

        Args:
            max_seq_len: longest sequence in tokens; None: what the target allows.

        Raises:
            InputError: no draft or speculative configuration, a wrong configuration of
                either model.
        """
        draft_model = pipeline_config.draft_model
        if draft_model is None or pipeline_config.speculative is None:
            raise InputError("this architecture needs a draft model; give --draft-model-path")
        target, speculative = cls.read_target(pipeline_config, model_config, max_seq_len)
        if len(target.devices) != 1:
            raise InputError(
                f"{len(target.devices)} devices were given; a target with a draft model runs on one"
            )
        draft = cls.draft_stack.initialize(
            pipeline_config, draft_model, max_seq_len=target.max_seq_len
        )
        return target, _for_target(draft, draft_model, target), speculative


def _for_target(draft: StackConfig, draft_model: MAXModelConfig, target: Any) -> StackConfig:
    """The draft's stack on the target's device, in its dtype, of its vocabulary and head."""
    reduced = getattr(draft_model.huggingface_config, "draft_vocab_size", None)
    if reduced is not None:
        positive_integer("draft_vocab_size", reduced, draft_model.model_name)
    # The draft lives on the target's device and in its dtype, whatever its own says.
    kv_params = replace(
        draft.kv_params, devices=target.kv_params.devices, dtype=target.kv_params.dtype
    )
    return replace(
        draft,
        vocab_size=reduced or min(draft.vocab_size, target.vocab_size),
        devices=target.devices,
        dtype=target.dtype,
        kv_params=kv_params,
        # The head is the target's.
        logits_scaling=target.logits_scaling,
    )
