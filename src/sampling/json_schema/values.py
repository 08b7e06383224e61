"""Numbers and strings of a schema that the engine would not keep to the digit or the letter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NoReturn

from typing_extensions import Self

from unispec.checkpoints.json_object import MAX_DEPTH, is_deeper_than

__all__ = ["UNWRITABLE", "check_values", "parse_schema"]

UNWRITABLE: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Control characters that JSON can only write by their number, which is never allowed: a key could
otherwise hide behind such a writing of its letters."""
_LARGEST: Final = 2**53
"""Integers beyond it are not all floats, and floats are what the engine keeps."""
_NUMBERS: Final = (
    *("const", "enum", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
)


def parse_schema(text: str) -> dict[str, Any]:
    """Reads a schema; numbers that floats do not hold keep their digits for a message.

    Raises:
        ValueError: it is no JSON object, or nested too deep.
    """
    try:
        schema = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_no_number)
        deep = isinstance(schema, dict) and is_deeper_than(schema, MAX_DEPTH)
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")
    return schema


class _Rounded(float):
    """A number that floats do not hold to the digit; 0 where they do not hold it at all."""

    text: str

    def __new__(cls, text: str) -> Self:
        value = float(text)
        rounded = super().__new__(cls, value if math.isfinite(value) else 0)
        rounded.text = text
        return rounded


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 40 else _Rounded(text)


def _float(text: str) -> float:
    try:
        exact = Decimal(text) == Decimal(repr(float(text)))
    except InvalidOperation:  # an exponent of twenty digits
        exact = False
    return float(text) if exact else _Rounded(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def check_values(node: dict[str, Any]) -> None:
    """Refuses numbers that the engine rounds, and strings that it cannot write.

    Raises:
        ValueError: there is one; the text names it.
    """
    for keyword in _NUMBERS:
        for value in _scalars(node.get(keyword)):
            if isinstance(value, str) and keyword in ("const", "enum"):
                if bad := UNWRITABLE.search(value):
                    raise ValueError(
                        f"its {keyword} has the control character U+{ord(bad[0]):04X}, which"
                        " cannot be enforced"
                    )
            elif isinstance(value, _Rounded):
                raise ValueError(
                    f"its {keyword} {value.text[:60]} cannot be enforced to the last digit"
                )
            elif isinstance(value, int | float):
                # The next integer is not a float any more.
                limit = _LARGEST - keyword.startswith("exclusive")
                if abs(value) > limit:
                    raise ValueError(
                        f"its {keyword} {value} is beyond 2^53, where numbers cannot be enforced"
                    )


def _scalars(value: Any) -> Iterator[Any]:
    open_ = [value]
    while open_:
        value = open_.pop()
        if isinstance(value, list):
            open_ += value
        elif isinstance(value, dict):
            open_ += (*value, *value.values())
        else:
            yield value
