"""Configuration of a DeepSeek-V3 target that drafts with its own MTP layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.lib import MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import ArchConfigWithKVCache
from max.pipelines.speculative import SpeculativeConfig
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.drafts.config import both_caches
from unispec.pipelines.speculative.step import MAX_DRAFT_TOKENS
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config

__all__ = ["UnifiedMTPDeepseekV3Config"]


@dataclass(kw_only=True)
class UnifiedMTPDeepseekV3Config(ArchConfigWithKVCache):
    """The target's stack, and how its MTP layer drafts.

    Raises:
        InputError: K outside 1 to 8, or late masks on a CPU.
    """

    target: DeepseekV3Config
    """The target's stack; the MTP layer has the same widths."""
    speculative_config: SpeculativeConfig
    """The method, K, and which acceptance rule decides."""
    late_masks: bool = False
    """Whether the graph takes `pinned_bitmask`, `wait_payload` and `device_bitmask_scratch` in
    place of `token_bitmask`; on GPUs only."""

    def __post_init__(self) -> None:
        width = self.speculative_config.num_speculative_tokens
        if width is None or not 1 <= width <= MAX_DRAFT_TOKENS:
            raise InputError(f"num_speculative_tokens is {width}; choose 1 to {MAX_DRAFT_TOKENS}")
        if self.late_masks and not self.devices[0].is_gpu():
            raise InputError("late_masks is set, but a CPU does not wait for masks: unset it")

    @property
    def devices(self) -> list[DeviceRef]:
        """Where target and draft run."""
        return self.target.devices

    def get_kv_params(self) -> KVCacheParamInterface:
        """Parameters of both caches, as a tree with the children `target` and `draft`."""
        return both_caches(self.target.kv_params, self.target.one_layer().kv_params)

    def get_max_seq_len(self) -> int:
        """Longest sequence of a request in tokens."""
        return self.target.max_seq_len

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: MAXModelConfig) -> int:
        """Longest sequence that the target's positions and `max_length` allow.

        Args:
            huggingface_config: the target's.
            model_config: the target's, for `max_length`.

        Returns:
            Tokens of prompt and output.
        """
        return DeepseekV3Config.calculate_max_seq_len(huggingface_config, model_config)

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
            pipeline_config: target and speculative configuration.
            model_config: the target's, by default that of `pipeline_config`.
            max_seq_len: longest sequence in tokens, by default what `calculate_max_seq_len` says.

        Raises:
            InputError: no speculative configuration, K outside 1 to 8, no MTP layer, or a
                stack that is not supported.
        """
        model_config = model_config or pipeline_config.model
        speculative = pipeline_config.speculative
        if speculative is None:
            raise InputError("there is no speculative configuration; give --speculative-method mtp")
        target = DeepseekV3Config.initialize(pipeline_config, model_config, max_seq_len=max_seq_len)
        if target.num_nextn_predict_layers == 0:
            raise InputError(
                f"{model_config.model_name} has no multi-token prediction layer"
                f" {target.num_hidden_layers} (its num_nextn_predict_layers is 0); use a"
                " checkpoint that has it, or another method"
            )
        return cls(target=target, speculative_config=speculative)
