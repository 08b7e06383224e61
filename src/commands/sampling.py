"""How the next token is chosen and when an answer ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from unispec.commands.options import SamplingInteger, SamplingRange, option_group

if TYPE_CHECKING:
    from max.pipelines.context import SamplingParams

__all__ = ["SamplingOptions", "sampling_options"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling as the user gives it; None stands for the checkpoint's default, then MAX's."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool

    def __post_init__(self) -> None:
        """Raises `click.UsageError` for an empty stop text."""
        if "" in self.stop:
            raise click.UsageError("--stop is empty; give at least one character")

    def params(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Returns the parameters of one request; each call draws a seed unless one is given.

        Args:
            generation_config: the checkpoint's, see `sampling_params`.

        Raises:
            InputError: a value of the checkpoint is of the wrong type, or out of range.
        """
        from unispec.engine.sampling_defaults import sampling_params

        return sampling_params(
            generation_config,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=list(self.stop),
            ignore_eos=self.ignore_eos,
        )


sampling_options = option_group(
    "sampling",
    SamplingOptions,
    click.option(
        "--max-new-tokens",
        type=SamplingInteger("max_new_tokens"),
        default=100,
        show_default=True,
        help="Most tokens of an answer.",
    ),
    click.option(
        "--temperature",
        type=SamplingRange("temperature"),
        help="Flattens (above 1) or sharpens (below 1) the distribution; 0 takes the most likely "
        "token.  [default: the checkpoint's, else 1]",
    ),
    click.option(
        "--top-k",
        type=SamplingInteger("top_k"),
        help="Sample from the k most likely tokens; -1 or 0 from all.  "
        "[default: the checkpoint's, else -1]",
    ),
    click.option(
        "--top-p",
        type=SamplingRange("top_p"),
        help="Sample from the most likely tokens that hold this probability together.  "
        "[default: the checkpoint's, else 1]",
    ),
    click.option(
        "--min-p",
        type=SamplingRange("min_p"),
        help="Sample from tokens at least this likely in proportion to the most likely one.  "
        "[default: 0]",
    ),
    click.option(
        "--presence-penalty",
        type=SamplingRange("presence_penalty"),
        help="Taken from the logit of a token once it was generated.  [default: 0]",
    ),
    click.option(
        "--frequency-penalty",
        type=SamplingRange("frequency_penalty"),
        help="Taken from the logit of a token each time it was generated.  [default: 0]",
    ),
    click.option(
        "--repetition-penalty",
        type=SamplingRange("repetition_penalty"),
        help="Above 1, makes tokens that occurred less likely.  "
        "[default: the checkpoint's, else 1]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        help="Seed of every request; an answer then repeats in any batch.  [default: random]",
    ),
    click.option(
        "--stop",
        multiple=True,
        help="End the answer before this text. Can be given several times.",
    ),
    click.option(
        "--ignore-eos",
        is_flag=True,
        help="Go on after the end-of-sequence token; under a grammar, for as long as it allows.",
    ),
)
"""Adds the options of `SamplingOptions` to a command."""
