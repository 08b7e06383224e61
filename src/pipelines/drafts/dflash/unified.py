"""What the configurations of all targets with a DFlash draft share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.methods import LARGEST_DRAFT_TOKENS, Method
from unispec.pipelines.drafts.config import DraftStackConfig, UnifiedDraftConfig
from unispec.pipelines.layers.rope import RopeType
from unispec.pipelines.targets.llama.stack_config import StackConfig
from unispec.pipelines.unified.method import trained_width

from .config import DflashDraftHFConfig, layer_causality, layer_windows
from .gathered import is_gathered, wide_head

__all__ = ["DflashStackConfig", "UnifiedDflashConfig"]


@dataclass(kw_only=True)
class DflashStackConfig(DraftStackConfig):
    """A DFlash draft's stack, whose rope may be scaled as YaRN does."""

    ROPE_TYPES: ClassVar[Sequence[RopeType]] = (*DraftStackConfig.ROPE_TYPES, "yarn")


@dataclass(kw_only=True)
class UnifiedDflashConfig(UnifiedDraftConfig):
    """Target and draft stacks and how they work together."""

    draft_method: ClassVar[Method] = "dflash"
    draft_stack: ClassVar[type[StackConfig]] = DflashStackConfig

    target_layer_ids: list[int] = field(default_factory=list)
    """Target layers, from 0, whose outputs the draft reads, in this order."""
    mask_token_id: int = 0
    """What stands in the slots of a block that are to be filled."""
    block_size: int = 0
    """Slots of a block, K + 1; 0 where the checkpoint does not say."""
    windows: list[int | None] = field(default_factory=list)
    """Window of each draft layer in tokens, None where it sees the whole context; empty: none
    of them has one."""
    causal: list[bool] = field(default_factory=list)
    """Whether each draft layer hides from a slot those after it; empty: none of them does."""

    def resolve_block_size(self, *, default: int | None = None) -> int:
        """Slots of a block: the checkpoint's, else the default, else K + 1.

        Args:
            default: for a checkpoint that does not say.

        Raises:
            InputError: neither the checkpoint nor the caller nor the configuration says.
        """
        if self.block_size:
            return self.block_size
        requested = self.speculative_config.num_speculative_tokens
        if default is None and requested is None:
            raise InputError(
                "the draft's config.json has no block_size; give --num-speculative-tokens, one"
                " less than the block size it was trained with"
            )
        return default if default is not None else (requested or 0) + 1

    def validate_dflash_fields(self) -> None:
        """Checks the fields that only a DFlash draft has, and that the draft fits the target.

        Raises:
            InputError: no tapped layers or some outside the target, a mask token outside the
                vocabulary, a block that is too small or too large, another hidden size, a
                window missing, or one that is too small.
        """
        self.check_hidden_size()
        self.check_taps()
        if not 0 <= self.mask_token_id < self.target.vocab_size:
            raise InputError(
                f"mask_token_id {self.mask_token_id} is outside the target's vocabulary of"
                f" {self.target.vocab_size}; use a draft that was trained for this target"
            )
        size = self.resolve_block_size()
        largest = LARGEST_DRAFT_TOKENS[self.draft_method] + 1
        if not 2 <= size <= largest:
            raise InputError(f"block_size is {size}; choose 2 to {largest}")
        if self.windows and len(self.windows) != self.draft.num_hidden_layers:
            raise InputError(
                f"{len(self.windows)} windows are given for {self.draft.num_hidden_layers} draft"
                " layers; give one for each"
            )
        for window, causal in zip(self.windows, self.causal, strict=False):
            if window is not None and not causal and window < size:
                raise InputError(
                    f"sliding_window {window} is below the block_size {size}, which is supported"
                    " in causal layers only; use a draft with a larger window"
                )

    @property
    def draft_kv_params(self) -> KVCacheParams:
        """Parameters of the draft's cache; where windows are gathered, of one wide head."""
        params = self.draft.kv_params
        return wide_head(params) if is_gathered(self.windows, self.draft.devices[0]) else params

    @property
    def tapped_layers(self) -> Sequence[int]:
        """Target layers whose outputs the draft reads."""
        return self.target_layer_ids

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads both stacks; K is the checkpoint's `block_size` less one.

        Another K that the user set is replaced, with a warning: the draft fills a block of
        the size that it was trained with.

        Args:
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len`
                of the target says.

        Raises:
            InputError: no draft or speculative configuration, a DFlash field missing, or what
                `validate_dflash_fields` refuses.
        """
        target, draft, speculative = cls.read_stacks(pipeline_config, model_config, max_seq_len)
        draft_model = pipeline_config.draft_model
        assert draft_model is not None
        hf, source = draft_model.huggingface_config, draft_model.model_name
        fields = DflashDraftHFConfig.from_huggingface(hf, source=source)
        if fields.num_target_layers not in (None, target.num_hidden_layers):
            raise InputError(
                f"{source} was trained for a target of {fields.num_target_layers} layers, this one"
                f" has {target.num_hidden_layers}; use a draft that was trained for this target"
            )
        config = cls(
            target=target,
            draft=draft,
            speculative_config=speculative,
            target_layer_ids=fields.target_layer_ids,
            mask_token_id=fields.mask_token_id,
            block_size=fields.block_size or 0,
            windows=layer_windows(hf, source=source),
            causal=layer_causality(hf, source=source),
        )
        config.validate_dflash_fields()
        return config._with_block(config.resolve_block_size())

    def _with_block(self, block_size: int) -> Self:
        """Makes K and the room for drafts in both caches follow the block."""
        width = trained_width(block_size - 1, self.speculative_config.num_speculative_tokens)

        def roomy(stack: Any) -> Any:
            return replace(stack, kv_params=replace(stack.kv_params, num_draft_tokens=width))

        return replace(
            self,
            target=roomy(self.target),
            draft=roomy(self.draft),
            speculative_config=self.speculative_config.model_copy(
                update={"num_speculative_tokens": width}
            ),
            block_size=block_size,
        )
