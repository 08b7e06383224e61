"""Prompts that the target writes itself.

A model that was tuned to chat has read users' messages; given the beginning of one, it writes one
(Magpie, arXiv 2406.08464). They are of far more kinds than any list.
"""

from __future__ import annotations

from dataclasses import dataclass

from unispec.errors import InputError

from .target import TorchTarget

__all__ = ["MessageDelimiters", "message_delimiters", "write_prompts"]

TEMPERATURE = 0.8
"""Above it, small models write words that do not exist."""

LONGEST = 64
"""Tokens of a message at most; a longer one is left out."""

_CONTENT = "\x02the message\x03"


@dataclass(frozen=True)
class MessageDelimiters:
    """What a chat template puts around a user's message."""

    before: list[int]
    """Token ids; what is written behind them is a message."""
    after: str
    """The text behind a message."""
    ends: frozenset[int]
    """Tokens that end a message; empty if `after` begins with no token of its own."""


def message_delimiters(target: TorchTarget) -> MessageDelimiters:
    """Reads the target's chat template.

    Raises:
        InputError: there is none, it refuses a message or changes it, or lacks a text before or
            behind it.
    """
    tokenizer = target.tokenizer
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
        )
    # A template is a program that the checkpoint brings along: it can raise anything.
    except Exception as error:
        raise InputError(
            f"{target.name} cannot write prompts, its chat template refuses a message ({error}):"
            " use own_prompts=False (--no-own-prompts)"
        ) from error
    before, _, after = text.partition(_CONTENT)
    # A blank belongs to the word behind it.
    before, after = before.rstrip(" "), after.strip()
    if not (before and after):
        raise InputError(
            f"{target.name} cannot write prompts, its chat template has no delimiter before and"
            " behind a message: use own_prompts=False (--no-own-prompts)"
        )
    end, *_ = tokenizer.encode(after, add_special_tokens=False)
    ends = {end} & set(tokenizer.get_added_vocab().values())
    return MessageDelimiters(
        tokenizer.encode(before, add_special_tokens=False), after, frozenset(ends)
    )


def write_prompts(
    target: TorchTarget, delimiters: MessageDelimiters, count: int, seed: int
) -> list[str]:
    """Users' messages, at most `count`; those that do not end, are empty or repeat are left out.

    Args:
        count: how many messages it begins.

    Raises:
        InputError: the target computes NaN.
    """
    tokenizer, ends = target.tokenizer, delimiters.ends | set(target.eos)
    written = target.write(
        [delimiters.before] * count, [TEMPERATURE] * count, LONGEST, sorted(ends), seed
    )
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    texts = []
    for ids in written:
        has_ended = ids[-1] in ends
        ids = ids[:-1] if has_ended else ids
        text, delimiter, _ = tokenizer.decode(ids).partition(delimiters.after)
        if (has_ended or delimiter) and not control & set(ids):
            texts.append(text.strip())
    return list(dict.fromkeys(filter(None, texts)))
