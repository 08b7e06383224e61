"""A mixture of experts out of graph operations, for devices without grouped products.

max 26.7 has the kernels of `max.nn.moe` for GPUs only. As in vLLM's `moe_align_block_size`, the
tokens of every expert fill tiles of equal size, and one product runs over each tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, Weight, ops
from max.nn import Module

from unispec.pipelines.layers.linear import GatedMLP

from .config import DeepseekV3Config
from .router import Router

__all__ = ["TiledExperts"]

_TILE: Final = 8
"""Tokens of a tile: a decode step seldom has more for one expert, and a product over so few
takes as long as reading the expert."""


@dataclass(frozen=True)
class _Tiles:
    """Which token stands where. S slots in tiles; only the first `count` tiles have tokens."""

    count: TensorValue
    """int64 scalar on the CPU."""
    ends: TensorValue
    """int64 `[E]`: the tile after each expert's last one."""
    tokens: TensorValue
    """int64 `[S]`: which token; any at slots that are not filled."""
    weights: TensorValue
    """float32 `[S]`: of the token's expert; 0 at slots that are not filled."""


class TiledExperts(Module):
    """Experts of which only those are read that some token goes through.

    Args:
        config: the stack; E is its `n_routed_experts`, I its `moe_intermediate_size`.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        device, dtype = config.devices[0], config.dtype
        hidden, self.inner = config.hidden_size, config.moe_intermediate_size
        self.num_experts = config.n_routed_experts
        self.gate = Router(config)
        self.gate_up_proj = Weight(
            "experts.gate_up_proj", dtype, [self.num_experts, 2 * self.inner, hidden], device
        )
        self.down_proj = Weight(
            "experts.down_proj", dtype, [self.num_experts, hidden, self.inner], device
        )
        shared = self.inner * config.n_shared_experts
        self.shared_experts = GatedMLP(hidden, shared, dtype, device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """`[T, H]` to `[T, H]`."""
        chosen, weights = self.gate(x)  # [T, k] each
        tiles = _fill_tiles(chosen, weights, self.num_experts)
        within = ops.range(0, _TILE, 1, out_dim=_TILE, dtype=DType.int64, device=x.device)

        def unfinished(tile: TensorValue, count: TensorValue, *state: TensorValue) -> TensorValue:
            return tile < count

        def one_tile(
            tile: TensorValue,
            count: TensorValue,
            output: TensorValue,
            gate_up_proj: TensorValue,
            down_proj: TensorValue,
        ) -> list[TensorValue]:
            expert = ops.sum((tiles.ends <= tile).cast(DType.int64), axis=0).reshape([1])
            slots = tile * _TILE + within
            tokens = ops.gather(tiles.tokens, slots, axis=0)  # [tile]
            gate_up = ops.gather(x, tokens, axis=0) @ _one(gate_up_proj, expert).T
            gate, up = ops.split(gate_up, [self.inner, self.inner], axis=-1)  # [tile, I] each
            result = (ops.silu(gate) * up) @ _one(down_proj, expert).T  # [tile, H]
            weight = ops.gather(tiles.weights, slots, axis=0).cast(x.dtype)
            result = result * ops.unsqueeze(weight, 1)
            output = ops.scatter_nd_add(output, result, ops.unsqueeze(tokens, 1))
            return [tile + 1, count, ops.rebind(output, x.shape), gate_up_proj, down_proj]

        zero = ops.constant(0, DType.int64, device=DeviceRef.CPU())
        # The weights are part of the state: in max 26.7 a loop within a loop sees no others.
        projections = [TensorValue(self.gate_up_proj), TensorValue(self.down_proj)]
        state = [zero, tiles.count, x * 0, *projections]
        return ops.while_loop(state, unfinished, one_tile)[2] + self.shared_experts(x)


def _one(stacked: TensorValue, expert: TensorValue) -> TensorValue:
    """`[N, M]` of one expert, int64 `[1]`, out of `[E, N, M]`."""
    return ops.gather(stacked, expert, axis=0).reshape(stacked.shape[1:])


def _fill_tiles(chosen: TensorValue, weights: TensorValue, num_experts: int) -> _Tiles:
    """Gives every pair of token and expert a slot in its expert's tiles.

    Args:
        chosen: int64 `[T, k]`, the experts of each token.
        weights: float32 `[T, k]`.
    """
    device, int64 = chosen.device, DType.int64
    tokens, per_token = chosen.shape
    pairs = tokens * per_token  # P
    flat = chosen.reshape([pairs, 1])
    experts = ops.range(0, num_experts, 1, out_dim=num_experts, dtype=int64, device=device)
    is_here = (flat == experts).cast(int64)  # [P, E]
    so_far = ops.cumsum(is_here, axis=0)  # [P, E]
    used = ops.sum(is_here, axis=0).reshape([num_experts])
    ends = ops.cumsum((used + (_TILE - 1)) // _TILE, axis=0)  # [E]
    starts = ends - (used + (_TILE - 1)) // _TILE
    slot = ops.sum(is_here * (so_far - 1 + starts * _TILE), axis=1)  # [P, 1]

    ids = ops.range(0, Dim(pairs), 1, out_dim=pairs, dtype=int64, device=device) // per_token
    slots = pairs + num_experts * (_TILE - 1)  # S: no expert leaves a whole tile unfilled
    no_token = ops.broadcast_to(ops.constant(0, int64, device=device), [slots])
    no_weight = ops.broadcast_to(ops.constant(0.0, DType.float32, device=device), [slots])
    slot = slot.reshape([pairs, 1])
    return _Tiles(
        count=ops.max(ends, axis=0).reshape([]).to(DeviceRef.CPU()),
        ends=ends,
        tokens=ops.scatter_nd(no_token, ids, slot),
        weights=ops.scatter_nd(no_weight, weights.reshape([pairs]), slot),
    )
