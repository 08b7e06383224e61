"""The router as a gate of MAX's layer of experts, for GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, ShardingStrategy, TensorValue, Weight, ops
from max.nn.kernels import moe_router_group_limited
from max.nn.moe import MoEGate

from .config import DeepseekV3Config

__all__ = ["GroupLimitedGate"]


class GroupLimitedGate(MoEGate):
    """What `Router` does, in one kernel; its weights have the same names.

    Args:
        devices: where it runs; its weights are on the first.
        **sizes: as `MoEGate` takes them.

    Attributes:
        config: the stack.
        weight: float32 `[E, H]`.
        e_score_correction_bias: float32 `[E]`.
    """

    def __init__(
        self, config: DeepseekV3Config, *, devices: Sequence[DeviceRef], **sizes: Any
    ) -> None:
        # As a shard the base makes no weights of its own.
        super().__init__(devices=list(devices), **{**sizes, "is_sharding": True})
        self.config = config
        experts = config.n_routed_experts
        # float32 whatever the stack's dtype: a rounded score can choose another expert.
        self.weight = Weight("weight", DType.float32, [experts, config.hidden_size], devices[0])
        self.e_score_correction_bias = Weight(
            "e_score_correction_bias", DType.float32, [experts], devices[0]
        )

    def __call__(self, hidden_state: TensorValue) -> tuple[TensorValue, TensorValue]:
        """Chooses k experts for each token.

        Returns:
            int32 `[T, k]`, the experts, and float32 `[T, k]`, their weights.
        """
        config = self.config
        logits = hidden_state.cast(DType.float32) @ TensorValue(self.weight).T  # [T, E]
        return moe_router_group_limited(
            ops.sigmoid(logits),
            TensorValue(self.e_score_correction_bias),
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )

    @property
    def sharding_strategy(self) -> ShardingStrategy | None:
        """That of its weights: every device has them whole."""
        return self.weight.sharding_strategy

    @sharding_strategy.setter
    def sharding_strategy(self, strategy: ShardingStrategy) -> None:
        """Sets that of its weights."""
        self.weight.sharding_strategy = strategy
        self.e_score_correction_bias.sharding_strategy = strategy

    def shard(self, devices: Iterable[DeviceRef]) -> list[GroupLimitedGate]:
        """The gate on each device."""
        devices = list(devices)
        weights = self.weight.shard(devices)
        biases = self.e_score_correction_bias.shard(devices)
        gates = []
        for device, weight, bias in zip(devices, weights, biases, strict=True):
            gate = GroupLimitedGate(
                self.config,
                devices=[device],
                hidden_dim=self.hidden_dim,
                num_experts=self.num_experts,
                num_experts_per_token=self.num_experts_per_token,
                dtype=self.dtype,
            )
            gate.weight, gate.e_score_correction_bias = weight, bias
            gates.append(gate)
        return gates
