"""Prompts for those who have none: many kinds of tasks on many subjects."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Final

__all__ = ["built_in_prompts"]

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
