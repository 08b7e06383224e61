"""What the configurations of all targets with a draft checkpoint share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParamInterface, KVCacheParams, MultiKVCacheParams
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import ArchConfigWithKVCache
from max.pipelines.speculative import SpeculativeConfig

from unispec.errors import InputError
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.targets.llama.stack_config import StackConfig

__all__ = ["UnifiedDraftConfig", "both_caches"]


def both_caches(target: KVCacheParams, draft: KVCacheParams) -> KVCacheParamInterface:
    """A tree of caches with the children `target` and `draft`.

    Args:
        target: the target's cache.
        draft: the draft's cache.
    """
    return MultiKVCacheParams.from_params({"target": target, "draft": draft})


@dataclass(kw_only=True)
class UnifiedDraftConfig(ArchConfigWithKVCache):
    """Target and draft stacks and how they work together."""

    target_stack: ClassVar[type[Any]] = StackConfig
    """Reads the target's stack."""
    draft_stack: ClassVar[type[Llama3Config]] = StackConfig
    """Reads the draft's stack."""

    target: Any
    """The target's stack."""
    draft: Llama3Config
    """The draft's stack, on the target's device and in its dtype."""
    speculative_config: SpeculativeConfig
    """The method, K, and which acceptance rule decides."""

    @property
    def devices(self) -> list[DeviceRef]:
        """The target's device, which the draft shares."""
        return list(self.target.devices)

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

    def get_kv_params(self) -> KVCacheParamInterface:
        """Parameters of both caches, as a tree with the children `target` and `draft`."""
        return both_caches(self.target.kv_params, self.draft.kv_params)

    def get_max_seq_len(self) -> int:
        """Longest sequence of a request in tokens, the target's."""
        return int(self.target.max_seq_len)

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: MAXModelConfig) -> int:
        """Longest sequence that the target's positions and `max_length` allow.

        Args:
            huggingface_config: the target's.
            model_config: the target's, for `max_length`.

        Returns:
            Tokens of prompt and output.

        Raises:
            ValueError: `max_length` is beyond the target's `max_position_embeddings`.
        """
        longest: int = cls.target_stack.calculate_max_seq_len(huggingface_config, model_config)
        return longest

    @classmethod
    def read_stacks(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None,
        max_seq_len: int | None,
    ) -> tuple[Any, Llama3Config, SpeculativeConfig]:
        """The target's stack, the draft's, and the speculative configuration.

        The draft's vocabulary is `draft_vocab_size` if it states one, else the tokens that both
        have.

        Args:
            pipeline_config: target, draft and speculative configuration.
            model_config: the target's; None: that of `pipeline_config`.
            max_seq_len: longest sequence in tokens; None: what the target allows.

        Raises:
            InputError: no draft or speculative configuration, a wrong configuration of
                either model.
        """
        draft_model, speculative = pipeline_config.draft_model, pipeline_config.speculative
        if draft_model is None or speculative is None:
            raise InputError("this architecture needs a draft model; give --draft-model-path")
        target = cls.target_stack.initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        draft = cls.draft_stack.initialize(
            pipeline_config, draft_model, max_seq_len=target.max_seq_len
        )
        return target, _for_target(draft, draft_model, target), speculative


def _for_target(draft: Llama3Config, draft_model: MAXModelConfig, target: Any) -> Llama3Config:
    """The draft's stack on the target's device, in its dtype and of its vocabulary."""
    reduced = getattr(draft_model.huggingface_config, "draft_vocab_size", None)
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
    )
