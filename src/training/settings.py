"""What a training is asked for: defaults and allowed values of every setting.

Needs no torch, so a command line can show them and refuse wrong values at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, NamedTuple, get_args

from unispec.checkpoints.tapped_layers import default_layer_ids
from unispec.errors import InputError
from unispec.methods import Method

__all__ = [
    "DEFAULT_LAYERS",
    "LARGEST",
    "LIMITS",
    "SECONDS",
    "SWITCH",
    "Choices",
    "CollectSettings",
    "Device",
    "DraftShape",
    "Dtype",
    "FitSettings",
    "Limits",
    "check",
    "shortened",
]

Device = Literal["cpu", "cuda"]
"""Where torch computes."""

Dtype = Literal["float32", "bfloat16"]
"""Number format of the target, and of the fit's matrix products."""

DEFAULT_LAYERS: Final[dict[str, int]] = {"eagle": 1, "eagle3": 1, "dflash": 3}
"""Decoder layers of a draft, by method."""

LIMITS: Final = "limits"
"""Key of a field's `Limits` or `Choices` in its metadata."""

LARGEST: Final = 10**12
"""The largest number of a setting that has no smaller limit; arithmetic with it cannot overflow."""

_MOST_TAPS: Final = 3

_LONGEST: Final = 100
"""Characters of a value in a message."""


class Limits(NamedTuple):
    """Which numbers a setting may have."""

    low: float
    """The least one."""
    high: float = LARGEST
    """The largest one."""
    above_low: bool = False
    """Whether `low` itself is excluded."""
    is_integer: bool = True
    """Whether it must be an integer."""

    def allows(self, value: object) -> bool:
        """Whether a value is a number within them; NaN, the infinities and bools are not."""
        if not isinstance(value, int if self.is_integer else int | float):
            return False
        is_low_enough = self.low < value if self.above_low else self.low <= value
        return not isinstance(value, bool) and is_low_enough and value <= self.high

    def __str__(self) -> str:
        kind = "an integer" if self.is_integer else "a number"
        low = f"{'more than' if self.above_low else 'at least'} {self.low:,}"
        return f"{kind}, {low} and at most {self.high:,}"


class Choices(NamedTuple):
    """Which few values a setting may have."""

    values: tuple[object, ...]
    """All of them."""

    def allows(self, value: object) -> bool:
        """Whether a value is one of them; 1 is not True."""
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))


SECONDS: Final = Limits(0, above_low=True, is_integer=False)
"""How long something may take."""

SWITCH: Final = Choices((True, False))
"""Whether something is done."""

_DTYPES: Final = Choices(get_args(Dtype))

_LAYER: Final = Limits(0)


def shortened(value: object) -> str:
    """The `repr` of a value that is refused, not too long for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of many thousand digits
        return "too long a number"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check(name: str, value: object, limits: Limits | Choices) -> None:
    """Refuses a value that a setting may not have.

    Args:
        name: what the message calls it.

    Raises:
        InputError: it is of another type, or not one of those that are allowed.
    """
    if not limits.allows(value):
        raise InputError(f"{name} is {shortened(value)}: choose {limits}")


def _integer(default: int | None, low: int, high: int = LARGEST) -> Any:
    return _limited(Limits(low, high), default)


def _limited(limits: Limits | Choices, default: Any) -> Any:
    return field(default=default, metadata={LIMITS: limits})


def _seed() -> Any:
    # torch's generator on a CPU takes no notice of more bits.
    return _integer(0, 0, 2**32 - 1)


class _Limited:
    """A settings dataclass that refuses values of other types and beyond their limits."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            limits, value = one.metadata.get(LIMITS), getattr(self, one.name)
            may_be_none = str(one.type).endswith("| None")
            if limits is not None and not (value is None and may_be_none):
                check(one.name, value, limits)


@dataclass(frozen=True, kw_only=True)
class CollectSettings(_Limited):
    """What is collected.

    Raises:
        InputError: a value is of another type or beyond its limits, there is neither `tokens` nor
            `seconds`, or own prompts are asked for without chat template.
    """

    layers: tuple[int, ...] = ()
    """Target layers, ascending, whose outputs are the features; one more than the last layer, or
    none at all, takes the final norm's."""
    tokens: int | None = _integer(400_000, 1)
    """Stop after this many tokens of answers; None: `seconds` alone ends it."""
    seconds: float | None = _limited(SECONDS, None)
    """Stop after this time; None: `tokens` alone ends it."""
    max_new_tokens: int = _integer(200, 8)
    """Length of the longest answer."""
    chat_template: bool = _limited(SWITCH, True)
    """Whether prompts are posed as a user's messages."""
    own_prompts: bool | None = _limited(SWITCH, None)
    """Whether the target writes up to half of the prompts itself. None: if no prompts are given
    and its chat template has what it needs."""
    seed: int = _seed()
    """For sampling answers and prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, tuple | list) or not all(map(_LAYER.allows, self.layers)):
            raise InputError(
                f"layers is {shortened(self.layers)}: choose a tuple, of which each is {_LAYER}"
            )
        if self.tokens is None and self.seconds is None:
            raise InputError("collecting has no end: give tokens or seconds")
        if self.own_prompts and not self.chat_template:
            raise InputError(
                "own prompts need the chat template, for it begins a message: leave own_prompts"
                " out, or set chat_template"
            )

    def check(self, config: Any) -> None:
        """Refuses what does not fit the target.

        Args:
            config: the target's configuration.

        Raises:
            InputError: a layer that the target does not have.
        """
        for number, layer in enumerate(self.layers):
            check(f"layers[{number}]", layer, Limits(0, config.num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class DraftShape(_Limited):
    """Which draft is trained, and of what shape.

    Raises:
        InputError: a value is of another type or beyond its limits, or `method` has no draft that
            can be trained.
    """

    method: Method = field(metadata={LIMITS: Choices(tuple(DEFAULT_LAYERS))})
    """`"eagle"` (the first generation), `"eagle3"` or `"dflash"`."""
    layers: int | None = _integer(None, 1)
    """Decoder layers; None: as `DEFAULT_LAYERS` says. EAGLE-3 has one."""
    vocab_size: int | None = _integer(None, 1)
    """How many tokens it proposes, the most frequent ones; None: all."""
    block_size: int = _integer(6, 2, 16)
    """Slots of a DFlash block, one more than it proposes tokens."""
    mask_token_id: int | None = _integer(None, 0)
    """The token in a DFlash block's empty slots; None: the one that the target writes least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "eagle3" and self.num_layers != 1:
            raise InputError(f"layers is {self.layers}: an EAGLE-3 draft has 1; leave it out")

    @property
    def num_layers(self) -> int:
        """Decoder layers, the method's default where none are asked for."""
        return self.layers or DEFAULT_LAYERS[self.method]

    def check(self, config: Any) -> None:
        """Refuses what does not fit the target.

        Args:
            config: the target's configuration.

        Raises:
            InputError: more tokens to propose than the target has, or a mask token that is none of
                the target's.
        """
        if self.vocab_size is not None and self.vocab_size > config.vocab_size:
            raise InputError(
                f"vocab_size {self.vocab_size} is beyond the target's {config.vocab_size} tokens:"
                " choose less"
            )
        if self.mask_token_id is not None:
            check("mask_token_id", self.mask_token_id, Limits(0, config.vocab_size - 1))

    def tapped_layers(self, config: Any) -> tuple[int, ...]:
        """What a fit needs of the target: layers, the number of them for the final norm.

        None for EAGLE, which reads the final norm. For EAGLE-3 those that a draft reads which does
        not say, and the final norm, of which its loss makes the target's distributions. For DFlash
        up to three layers, spread from the second to the third from the end.

        Args:
            config: the target's configuration.
        """
        count = config.num_hidden_layers
        if self.method == "eagle":
            return ()
        if self.method == "eagle3":
            return (*default_layer_ids(count), count)
        first = 1 if count > 3 else 0
        last = max(count - 3, first)
        steps = _MOST_TAPS - 1
        return tuple(sorted({round(first + (last - first) * i / steps) for i in range(steps + 1)}))


@dataclass(frozen=True, kw_only=True)
class FitSettings(_Limited):
    """How a draft is fitted.

    Raises:
        InputError: a value is of another type or beyond its limits.
    """

    epochs: int = _integer(10, 1)
    """How often every sequence is seen; the end, if there is no `seconds`."""
    seconds: float | None = _limited(SECONDS, None)
    """Stop after this time instead."""
    batch_size: int = _integer(4, 1)
    """Sequences of a step."""
    learning_rate: float = _limited(Limits(0, above_low=True, is_integer=False), 1e-3)
    """AdamW's, at its highest."""
    dtype: Dtype | None = field(default=None, metadata={LIMITS: _DTYPES})
    """Of matrix products, while parameters are float32; None: bfloat16 on a GPU, float32 on a
    CPU."""
    seed: int = _seed()
    """For the draft's first weights, the order of sequences and what the draft draws."""

    def dtype_on(self, device: str) -> Dtype:
        """The number format on a device, `"cpu"` or `"cuda"`."""
        return self.dtype or ("bfloat16" if device == "cuda" else "float32")
