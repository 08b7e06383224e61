"""Medians, spreads and ratios of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from generation.summary import Spread

from .answer import Answer
from .contenders import CONTENDERS, LLAMA_CPP
from .measurement import Cell

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One contender over all rounds of one cell."""

    step_s: Spread
    tokens_per_second: Spread
    """Of all answers of the batch together."""
    acceptance_length: float
    ratio: Spread | None
    """Tokens per second over those of llama.cpp alone in the same round."""
    gb_per_second: float
    """The target's weights over the median step."""
    same: tuple[int, int] | None
    """How many answers are token by token those of `compared_with`, and of how many."""
    compared_with: str | None


def summarise(
    cell: Cell, answers: Mapping[str, Sequence[Answer]], weight_bytes: int
) -> dict[str, Summary]:
    """Sums up all contenders of one cell."""
    return {name: _summary(name, cell, answers, weight_bytes) for name in answers}


def _summary(
    name: str, cell: Cell, answers: Mapping[str, Sequence[Answer]], weight_bytes: int
) -> Summary:
    own, base = answers[name], answers.get(LLAMA_CPP)
    steps = Spread.of([_step_s(answer, cell.rows) for answer in own])
    other = _reference(name)
    others = answers.get(other) if other is not None else None
    return Summary(
        step_s=steps,
        tokens_per_second=Spread.of([_speed(answer) for answer in own]),
        acceptance_length=_mean_length(own),
        ratio=Spread.of(
            [_speed(a) / _speed(b) for a, b in zip(own, base, strict=False)],
        )
        if base
        else None,
        gb_per_second=weight_bytes / steps.median / 1e9,
        same=None if others is None else _same(own, others),
        compared_with=None if others is None else other,
    )


def _reference(name: str) -> str | None:
    """Speculation is compared with the same system's target alone, that with llama.cpp's."""
    contender = CONTENDERS[name]
    if contender.method is None:
        return None if name == LLAMA_CPP else LLAMA_CPP
    return next(
        other.name
        for other in CONTENDERS.values()
        if other.system == contender.system and other.method is None
    )


def _speed(answer: Answer) -> float:
    return answer.decode_tokens / answer.decode_s


def _step_s(answer: Answer, rows: int) -> float:
    """The mean: a step brings as many tokens to each answer as its acceptance length says."""
    return rows * answer.acceptance_length / _speed(answer)


def _mean_length(answers: Sequence[Answer]) -> float:
    """Every step with the same weight."""
    tokens = sum(answer.decode_tokens for answer in answers)
    return tokens / sum(answer.decode_tokens / answer.acceptance_length for answer in answers)


def _same(own: Sequence[Answer], others: Sequence[Answer]) -> tuple[int, int]:
    pairs = [
        (ids, other_ids)
        for answer, other in zip(own, others, strict=False)
        for ids, other_ids in zip(answer.token_ids, other.token_ids, strict=True)
    ]
    return sum(ids == other_ids for ids, other_ids in pairs), len(pairs)
