"""Log probabilities of one step, as MAX's contexts and its server take them."""

from __future__ import annotations

from collections.abc import Sequence

from max.pipelines.context import LogProbabilities

from .outputs import StepModelOutputs

__all__ = ["StepLogprobs"]


class StepLogprobs:
    """What a step's outputs say of each emitted token, copied to the host.

    Args:
        outputs: of a step that some row asked for log probabilities.
    """

    def __init__(self, outputs: StepModelOutputs) -> None:
        self._tokens = outputs.token_logprobs.to_numpy()  # [B, K + 1]
        self._top_tokens = outputs.top_tokens.to_numpy()  # [B, K + 1, 20]
        self._top = outputs.top_logprobs.to_numpy()  # [B, K + 1, 20]

    def of(self, row: int, tokens: Sequence[int], num_logprobs: int) -> list[LogProbabilities]:
        """Those of the tokens that a row emits.

        MAX's server shows what is among the most probable ones: these are there in their order,
        and the token itself behind them where it is none of them.

        Args:
            row: its index in the step.
            tokens: the accepted drafts and the next token.
            num_logprobs: 1 and how many of the most probable tokens the row asks for.
        """
        found = []
        for position, token in enumerate(tokens):
            at = row, position, slice(num_logprobs - 1)
            own = float(self._tokens[row, position])
            top = dict(zip(self._top_tokens[at].tolist(), self._top[at].tolist(), strict=True))
            top.setdefault(token, own)
            found.append(
                LogProbabilities(
                    token_log_probabilities=[own],
                    top_log_probabilities=[top],
                    sampled_token_ids=[token],
                )
            )
        return found
