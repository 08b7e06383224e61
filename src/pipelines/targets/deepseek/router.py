"""Which experts a token goes through (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, Weight, ops
from max.nn import Module

from .config import DeepseekV3Config

__all__ = ["Router"]

_NEVER = float("-inf")
_TINY = 1e-20


class Router(Module):
    """Scores all experts and chooses some, from the best groups only.

    A bias that training balances the load with takes part in the choice, not in the weights.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        device, experts = config.devices[0], config.n_routed_experts
        # float32 whatever the stack's dtype: a rounded score can choose another expert.
        self.weight = Weight("weight", DType.float32, [experts, config.hidden_size], device)
        self.e_score_correction_bias = Weight(
            "e_score_correction_bias", DType.float32, [experts], device
        )

    def __call__(self, x: TensorValue) -> tuple[TensorValue, TensorValue]:
        """Chooses k experts for each token.

        Returns:
            int64 `[T, k]`, the experts, and float32 `[T, k]`, their weights.
        """
        config = self.config
        scores = ops.sigmoid(x.cast(DType.float32) @ TensorValue(self.weight).T)  # [T, E]
        ranking = self._of_best_groups(scores + self.e_score_correction_bias)
        _, chosen = ops.top_k(ranking, config.num_experts_per_tok, axis=-1)  # [T, k]
        chosen = chosen.cast(DType.int64)
        weights = ops.gather_nd(scores, ops.unsqueeze(chosen, -1), batch_dims=1)  # [T, k]
        if config.norm_topk_prob:
            weights = weights / (ops.sum(weights, axis=-1) + _TINY)
        return chosen, weights * config.routed_scaling_factor

    def _of_best_groups(self, ranking: TensorValue) -> TensorValue:
        """`[T, E]` with -inf outside of the chosen groups."""
        groups, wanted = self.config.n_group, self.config.topk_group
        if wanted == groups:
            return ranking
        tokens, experts = ranking.shape
        grouped = ranking.reshape([tokens, groups, int(experts) // groups])
        best_two, _ = ops.top_k(grouped, 2, axis=-1)  # [T, groups, 2]
        _, chosen = ops.top_k(ops.sum(best_two, axis=-1).reshape([tokens, groups]), wanted, axis=-1)
        ids = ops.range(0, groups, 1, out_dim=groups, dtype=DType.int64, device=ranking.device)
        hits = ops.unsqueeze(chosen.cast(DType.int64), -1) == ids  # [T, wanted, groups]
        hit = ops.max(hits.cast(DType.float32), axis=1).reshape([tokens, groups, 1])
        never = ops.constant(_NEVER, DType.float32, device=ranking.device)
        return ops.where(hit > 0, grouped, never).reshape([tokens, experts])
