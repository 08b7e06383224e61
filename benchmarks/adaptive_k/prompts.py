"""Prompts of five kinds, as long as they are asked to be."""

from __future__ import annotations

import difflib
import heapq
import inspect
import json
import random
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "prompts_of"]

_HERE: Final = Path(__file__).parent.parent
_BOOK: Final = (_HERE / "data" / "alice.txt").read_text()
_MANUAL: Final = "\n".join(topics.values())
_SUMMARY_CHARACTERS: Final = 6000
_FUNCTIONS: Final = (
    textwrap.dedent,
    shlex.join,
    heapq.merge,
    heapq.nlargest,
    shlex.split,
    difflib.unified_diff,
    difflib.get_close_matches,
    textwrap.indent,
)
_NAMES: Final = ("Alice Moreau", "Bob Lindqvist", "Carla Rossi", "David Okafor", "Emma Schulz")
_CITIES: Final = ("Lyon", "Uppsala", "Bologna", "Lagos", "Bremen", "Porto", "Krakow")


def _chat(number: int) -> str:
    lines = (_HERE / "unseen_prompts.txt").read_text().splitlines()
    return lines[number % len(lines)].split("\t")[-1]


def _summary(number: int) -> str:
    text = _from_book(number * 2000, _SUMMARY_CHARACTERS)
    return f"{text}\n\nSummarise the text above; quote its most important sentences."


def _code_edit(number: int) -> str:
    code = inspect.getsource(_FUNCTIONS[number % len(_FUNCTIONS)])
    return (
        f"```python\n{code}```\n\nAdd a line `# reviewed` at the top of this code and change"
        " nothing else. Print the whole code."
    )


def _translation(number: int) -> str:
    return f"Translate into French:\n\n{_from_book(number * 2000, 500)}"


def _from_book(start: int, characters: int) -> str:
    """A passage; behind the end of the book it goes on at the beginning."""
    start %= len(_BOOK)
    return (_BOOK + _BOOK)[start : start + characters]


def _extraction(number: int) -> str:
    draw = random.Random(number)
    people = [
        f"{name} is {draw.randint(20, 70)} years old, lives in {draw.choice(_CITIES)} and earns"
        f" {draw.randint(20, 90) * 1000} euros."
        for name in draw.sample(_NAMES, 4)
    ]
    example = json.dumps({"name": "...", "age": 0, "city": "...", "salary": 0})
    return f"{' '.join(people)}\n\nExtract all people as a JSON list of objects like {example}."


KINDS: Final[dict[str, Callable[[int], str]]] = {
    "chat": _chat,
    "summary": _summary,
    "code edit": _code_edit,
    "translation": _translation,
    "JSON": _extraction,
}
"""What a user wants, to a prompt of its own for each number."""


def prompts_of(
    kind: str, count: int, context: int, tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """Token ids of so many prompts, each of at least `context` tokens.

    One that is shorter has a part of Python's manual before it, which has nothing to do with it.
    """
    found = []
    for number in range(count):
        task = KINDS[kind](number)
        ids = _encoded(task, tokenizer)
        if len(ids) < context:
            start = number * 30_000
            manual = tokenizer.encode(_MANUAL[start : start + 8 * context])
            # Some tokens more, for text is not always cut into the same ones again.
            before = tokenizer.decode(manual[: context - len(ids) + context // 32])
            ids = _encoded(f"{before}\n\n{task}", tokenizer)
        if len(ids) < context:
            raise AssertionError(f"a prompt has {len(ids)} tokens, not {context}")
        found.append(ids)
    return found


def _encoded(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return [int(token) for token in ids]
