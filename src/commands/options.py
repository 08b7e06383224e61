"""How options are declared: groups that arrive as one dataclass, and checked value types."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from unispec.commands.standard_input import STANDARD_INPUT, read_standard_input
from unispec.sampling.ranges import RANGES
from unispec.training.settings import LARGEST, LIMITS

__all__ = [
    "FiniteRange",
    "SamplingInteger",
    "SamplingRange",
    "TextFile",
    "option_group",
    "setting",
]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def option_group(argument: str, group: type[Any], *options: Decorator) -> Decorator:
    """Adds options to a command, which receives them as one dataclass.

    Args:
        argument: name of the command's parameter.
        group: dataclass whose fields are named as the options' parameters. What it raises
            when it is made (`click.UsageError` for options that contradict each other)
            ends the command.
        options: what `click.option` returns, in the order of `--help`.

    Returns:
        The decorator of the command's function.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def packed(**values: Any) -> None:
            members = {field.name: values.pop(field.name) for field in fields(group)}
            command(**values, **{argument: group(**members)})

        decorated: Callable[..., None] = packed
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def setting(option: str, group: type[Any], name: str, *, help: str) -> Decorator:
    """An option whose default and limits are those of a settings dataclass.

    Args:
        option: with its dashes.
        group: the dataclass.
        name: its field, which has `Limits`.
        help: the text of `--help`.

    Returns:
        What `click.option` returns.
    """
    (field,) = (field for field in fields(group) if field.name == name)
    limits, default = field.metadata[LIMITS], field.default
    kind = click.IntRange if limits.is_integer else FiniteRange
    return click.option(
        option,
        type=kind(
            limits.low,
            None if limits.high == LARGEST else limits.high,
            min_open=limits.above_low,
        ),
        default=default,
        show_default=default is not None,
        help=help,
    )


class FiniteRange(click.FloatRange):
    """A number in a range; NaN and the infinities, which pass comparisons, are refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the number; fails if it is not finite or not in the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


class SamplingRange(FiniteRange):
    """A number that a sampling parameter may have.

    Args:
        name: the parameter's, in `RANGES`.
    """

    def __init__(self, name: str) -> None:
        self._range = RANGES[name]
        super().__init__(0 if self._range.or_zero else self._range.low, self._range.high)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the number; fails if it is not finite or not in the range."""
        number = super().convert(value, param, ctx)
        if not self._range.holds(number):
            self.fail(f"{number} is too small; choose {self._range}.", param, ctx)
        return number


class SamplingInteger(click.IntRange):
    """An integer that a sampling parameter may be.

    Args:
        name: the parameter's, in `RANGES`.
    """

    def __init__(self, name: str) -> None:
        low, high = RANGES[name][:2]
        super().__init__(int(low), int(high) if math.isfinite(high) else None)


class TextFile(click.ParamType[Any], ABC):
    """A UTF-8 text file that is read when the command line is parsed; `-` is standard input.

    Subclasses turn the text into the option's value.
    """

    name = "file"
    """What `--help` calls the value."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns what `parse` makes of the file; fails if the file cannot be read."""
        name = STANDARD_INPUT if value == "-" else f"'{Path(value)}'"
        try:
            if value == "-":
                text = read_standard_input()
            else:
                text = Path(value).read_text(encoding="utf-8-sig")
            return self.parse(text)
        except OSError as error:
            self.fail(f"cannot read {name}: {error.strerror}.", param, ctx)
        except UnicodeDecodeError as error:
            self.fail(f"{name} is not UTF-8 text (byte {error.start}).", param, ctx)
        except ValueError as error:
            self.fail(f"{name} {error}.", param, ctx)

    @abstractmethod
    def parse(self, text: str) -> Any:
        """Makes the option's value.

        Raises:
            ValueError: the text cannot be used; the message continues "'file' ...".
        """
