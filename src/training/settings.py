"""What a training is asked for: defaults and limits of every number.

Needs no torch, so a command line can show them and refuse wrong values at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf, isfinite
from typing import Any, Final, Literal, NamedTuple, get_args

from unispec.errors import InputError
from unispec.methods import Method

__all__ = [
    "DEFAULT_LAYERS",
    "LIMITS",
    "CollectSettings",
    "Device",
    "DraftShape",
    "Dtype",
    "FitSettings",
    "Limits",
]

Device = Literal["cpu", "cuda"]
"""Where torch computes."""

Dtype = Literal["float32", "bfloat16"]
"""Number format of the target, and of the fit's matrix products."""

DEFAULT_LAYERS: Final[dict[str, int]] = {"eagle": 1, "dflash": 3}
"""Decoder layers of a draft, by method."""

LIMITS: Final = "limits"
"""Key of a field's `Limits` in its metadata."""

_MOST_TAPS: Final = 3


class Limits(NamedTuple):
    """Which numbers a setting may have."""

    low: float
    """The least one."""
    high: float = inf
    """The largest one."""
    above_low: bool = False
    """Whether `low` itself is excluded."""

    def allows(self, value: float) -> bool:
        """Whether a number is within them; NaN and the infinities are not."""
        is_low_enough = self.low < value if self.above_low else self.low <= value
        return isfinite(value) and is_low_enough and value <= self.high

    def __str__(self) -> str:
        low = f"{'more than' if self.above_low else 'at least'} {self.low:,}"
        return low if self.high == inf else f"{low} and at most {self.high:,}"


def _limited(default: Any, low: float, high: float = inf, *, above_low: bool = False) -> Any:
    return field(default=default, metadata={LIMITS: Limits(low, high, above_low)})


def _seed() -> Any:
    # torch's generator on a CPU takes no notice of more bits.
    return _limited(0, 0, 2**32 - 1)


class _Limited:
    """A settings dataclass that refuses numbers beyond the limits of their fields."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            limits, value = one.metadata.get(LIMITS), getattr(self, one.name)
            if limits is not None and value is not None and not limits.allows(value):
                raise InputError(f"{one.name} is {value}: choose {limits}")


@dataclass(frozen=True, kw_only=True)
class CollectSettings(_Limited):
    """What is collected.

    Raises:
        InputError: a number is beyond its limits, there is neither `tokens` nor `seconds`, or own
            prompts are asked for without chat template.
    """

    layers: tuple[int, ...] = ()
    """Target layers whose outputs are the features; none takes the final norm's."""
    tokens: int | None = _limited(400_000, 1)
    """Stop after this many tokens of answers; None: `seconds` alone ends it."""
    seconds: float | None = _limited(None, 0, above_low=True)
    """Stop after this time; None: `tokens` alone ends it."""
    max_new_tokens: int = _limited(200, 8)
    """Length of the longest answer."""
    chat_template: bool = True
    """Whether prompts are posed as a user's messages."""
    own_prompts: bool | None = None
    """Whether the target writes up to half of the prompts itself. None: if no prompts are given
    and its chat template has what it needs."""
    seed: int = _seed()
    """For sampling answers and prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is None and self.seconds is None:
            raise InputError("collecting has no end: give tokens or seconds")
        if self.own_prompts and not self.chat_template:
            raise InputError(
                "own prompts need the chat template, for it begins a message: use --no-own-prompts"
            )


@dataclass(frozen=True, kw_only=True)
class DraftShape(_Limited):
    """Which draft is trained, and of what shape.

    Raises:
        InputError: a number is beyond its limits, or `method` has no draft that can be trained.
    """

    method: Method
    """`"eagle"` or `"dflash"`."""
    layers: int | None = _limited(None, 1)
    """Decoder layers; None: as `DEFAULT_LAYERS` says."""
    vocab_size: int | None = _limited(None, 1)
    """How many tokens it proposes, the most frequent ones; None: all."""
    block_size: int = _limited(6, 2, 16)
    """Slots of a DFlash block, one more than it proposes tokens."""
    mask_token_id: int | None = None
    """The token in a DFlash block's empty slots; None: the one that the target writes least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in DEFAULT_LAYERS:
            raise InputError(
                f"a draft for {self.method!r} cannot be trained: choose"
                f" {' or '.join(DEFAULT_LAYERS)}"
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers, the method's default where none are asked for."""
        return self.layers or DEFAULT_LAYERS[self.method]

    def check(self, config: Any) -> None:
        """Refuses what does not fit the target.

        Args:
            config: the target's configuration.

        Raises:
            InputError: more tokens to propose than the target has.
        """
        if self.vocab_size is not None and self.vocab_size > config.vocab_size:
            raise InputError(
                f"--draft-vocab-size {self.vocab_size} is beyond the target's"
                f" {config.vocab_size} tokens: choose less"
            )

    def tapped_layers(self, config: Any) -> tuple[int, ...]:
        """The target's layers that the draft reads; none for EAGLE, which reads the final norm.

        For DFlash up to three, spread from the second to the third from the end.

        Args:
            config: the target's configuration.
        """
        if self.method == "eagle":
            return ()
        count = config.num_hidden_layers
        first = 1 if count > 3 else 0
        last = max(count - 3, first)
        steps = _MOST_TAPS - 1
        return tuple(sorted({round(first + (last - first) * i / steps) for i in range(steps + 1)}))


@dataclass(frozen=True, kw_only=True)
class FitSettings(_Limited):
    """How a draft is fitted.

    Raises:
        InputError: a number is beyond its limits, or the number format is unknown.
    """

    epochs: int = _limited(10, 1)
    """How often every sequence is seen; the end, if there is no `seconds`."""
    seconds: float | None = _limited(None, 0, above_low=True)
    """Stop after this time instead."""
    batch_size: int = _limited(4, 1)
    """Sequences of a step."""
    learning_rate: float = _limited(1e-3, 0, above_low=True)
    """AdamW's, at its highest."""
    dtype: Dtype | None = None
    """Of matrix products, while parameters are float32; None: bfloat16 on a GPU, float32 on a
    CPU."""
    seed: int = _seed()
    """For the draft's first weights, the order of sequences and what the draft draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise InputError(
                f"dtype {self.dtype!r} is unknown: choose {' or '.join(get_args(Dtype))}"
            )

    def dtype_on(self, device: str) -> Dtype:
        """The number format on a device, `"cpu"` or `"cuda"`."""
        return self.dtype or ("bfloat16" if device == "cuda" else "float32")
