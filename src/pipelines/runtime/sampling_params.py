"""Sampling parameters held against what this engine does and what its graph can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from math import inf
from numbers import Integral, Real
from reprlib import repr as shown
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from max.pipelines.context import SamplingParams

from unispec.errors import InputError

__all__ = ["HANDLED_FIELDS", "check_sampling", "in_float32", "is_integer"]

_SMALLEST_TEMPERATURE: Final = 1e-37
"""Smaller ones may be zero to a processor: float32 loses digits below 1.2e-38."""
_LARGEST_PENALTY: Final = 1e6
"""A repetition penalty, or its inverse: logits times it stay far below what float32 holds."""
_LARGEST_TOP_K: Final = 2**63 - 1


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def in_float32(name: str, value: Any) -> float:
    """A number as the graph will see it; infinite beyond its range.

    Args:
        name: what to call it in errors.
        value: what the user gave.

    Raises:
        InputError: it is no number.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; give a number")
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except OverflowError:  # an integer beyond float64
        return inf


def check_sampling(params: Any) -> None:
    """Refuses what would be ignored, or would not survive the way into the graph.

    Args:
        params: of one request.

    Raises:
        InputError: no `SamplingParams`; a field of the wrong type or out of range; or a field
            that this engine does not do, with another value than its default.
    """
    if not isinstance(params, SamplingParams):
        raise InputError(f"sampling is {shown(params)}; give a SamplingParams")
    for field in fields(params):
        value = getattr(params, field.name)
        check = HANDLED_FIELDS.get(field.name)
        if check is not None:
            check(field.name, value)
        elif value != _default(field):
            raise InputError(
                f"{field.name} of the SamplingParams is {shown(value)}, which this engine does"
                " not do; leave it out"
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _number(low: float, high: float, or_zero: str = "") -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        # Zero after the cast is the same as zero, but where the range begins above it.
        in_range = np.isfinite(in_float32(name, value)) and low <= value <= high
        if not (in_range or (or_zero and value == 0)):
            raise InputError(f"{name} is {shown(value)}; choose {or_zero}{low:g} to {high:g}")

    return check


def _integer(low: float, high: float = inf) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not is_integer(value):
            raise InputError(f"{name} is {shown(value)}; give an integer")
        if value < low:
            raise InputError(f"{name} is {value}; choose at least {low:.0f}")
        if value > high:
            raise InputError(f"{name} is {value}; choose at most {high}")

    return check


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _truth(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {shown(value)}; give True or False")


def _texts(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise InputError(f"{name} is the text {shown(value)}; give a list: [{shown(value)}]")
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{name} is {shown(value)}; give a list of texts")
    if "" in value:
        raise InputError(f"{name} has an empty text; give at least one character")


def _integers(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(map(is_integer, value)):
        raise InputError(f"{name} is {shown(value)}; give a list of integers")


HANDLED_FIELDS: Final[Mapping[str, Callable[[str, Any], None]]] = MappingProxyType(
    {
        "temperature": _number(
            _SMALLEST_TEMPERATURE, 2, or_zero="0, which takes the most probable token, or "
        ),
        "top_k": _integer(-1, _LARGEST_TOP_K),
        "top_p": _number(0, 1),
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(1 / _LARGEST_PENALTY, _LARGEST_PENALTY),
        "max_new_tokens": _optional(_integer(1)),
        "min_new_tokens": _integer(0),
        "ignore_eos": _truth,
        "stop": _optional(_texts),
        "stop_token_ids": _optional(_integers),
        "seed": _integer(-inf),
    }
)
"""What this engine does of MAX's `SamplingParams`, and how each field is checked."""
