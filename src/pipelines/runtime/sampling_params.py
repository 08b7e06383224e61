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
from unispec.sampling.ranges import LOGPROBS, RANGES, Range

__all__ = ["HANDLED_FIELDS", "check_logprobs", "check_sampling", "in_float32", "is_integer"]


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def in_float32(name: str, value: Any) -> float:
    """A number as the graph will see it; infinite beyond its range.

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


def check_logprobs(value: Any) -> None:
    """Refuses a number of log probabilities that the graph has no room for.

    Raises:
        InputError: neither None nor an integer of `LOGPROBS`.
    """
    if value is not None and not (is_integer(value) and LOGPROBS.holds(value)):
        raise InputError(f"logprobs is {shown(value)}; give an integer, {LOGPROBS}, or None")


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _number(name: str, value: Any) -> None:
    # Zero after the cast is the same as zero, but where the range begins above it.
    if not (np.isfinite(in_float32(name, value)) and RANGES[name].holds(value)):
        raise InputError(f"{name} is {shown(value)}; choose {RANGES[name]}")


def _integer(name: str, value: Any) -> None:
    if not is_integer(value):
        raise InputError(f"{name} is {shown(value)}; give an integer")
    allowed = RANGES.get(name, Range(-inf))
    if value < allowed.low:
        raise InputError(f"{name} is {value}; choose at least {allowed.low}")
    if value > allowed.high:
        raise InputError(f"{name} is {value}; choose at most {allowed.high}")


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
        **{name: _integer if one.is_integer else _number for name, one in RANGES.items()},
        "max_new_tokens": _optional(_integer),
        "ignore_eos": _truth,
        "stop": _optional(_texts),
        "stop_token_ids": _optional(_integers),
        "seed": _integer,
    }
)
"""What this engine does of MAX's `SamplingParams`, and how each field is checked."""
