"""The prompts of a training: those that are given, or many kinds of tasks on many subjects."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final

from unispec.errors import InputError

from .settings import shortened

__all__ = ["built_in_prompts", "check_prompts"]

_PARTS: Final = Path(__file__).resolve().parent.parent / "data" / "prompts.json"
_NUMBERS: Final = 40
"""Pairs of numbers for each arithmetic problem."""


def built_in_prompts() -> list[str]:
    """Tasks on subjects, on short texts, with numbers and with programs, and plain questions.

    About 9,000 prompts, all different, in an order that mixes the kinds and never changes.
    """
    parts = json.loads(_PARTS.read_text(encoding="utf-8"))
    chance = random.Random(0)
    prompts = list(parts["questions"])
    for task, subject in product(parts["tasks"], parts["subjects"]):
        manner = chance.choice(["", *parts["manners"]])
        prompts.append(f"{task.format(subject)} {manner}".rstrip())
    for task, text in product(parts["text_tasks"], parts["texts"]):
        prompts.append(task.replace("{}", text))
    for problem in parts["problems"]:
        pairs = {(chance.randint(10, 59), chance.randint(2, 60)) for _ in range(_NUMBERS)}
        prompts += [problem.format(*pair) for pair in sorted(pairs)]
    for words in product(parts["program_tasks"], parts["languages"], parts["programs"]):
        task, language, program = words
        prompts.append(task.format(language, program))
    chance.shuffle(prompts)
    return prompts


def check_prompts(prompts: Sequence[str] | None) -> None:
    """Refuses what is no list of texts.

    Args:
        prompts: texts; None stands for the built-in ones.

    Raises:
        InputError: it is no sequence, a single text, too short, or one is empty, no text or holds
            surrogates.
    """
    if prompts is None:
        return
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts is {shortened(prompts)}: give a list of texts")
    for number, text in enumerate(prompts):
        if not isinstance(text, str) or not text:
            raise InputError(
                f"prompts[{number}] is {shortened(text)}: give a text of at least one character"
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(
                f"prompts[{number}] is {shortened(text)}, which UTF-8 cannot write: give a text"
                " without surrogates"
            )
    if (count := len(set(prompts))) < 2:
        raise InputError(
            f"{count} prompts were given; one is held out, so give at least two that differ"
        )
