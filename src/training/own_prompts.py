"""Prompts that the target writes itself.

A model that was tuned to chat has read users' messages; given the beginning of one, it writes one
(Magpie, arXiv 2406.08464). They are of far more kinds than any list.
"""

from __future__ import annotations

from unispec.errors import InputError

from .answering import answer
from .target import TorchTarget

__all__ = ["write_prompts"]

TEMPERATURE = 0.8
"""Above it, small models write words that do not exist."""

LONGEST = 64
"""Tokens; a longer message is left out."""

_MARK = "\x02the message\x03"


def write_prompts(target: TorchTarget, count: int, seed: int) -> list[str]:
    """Users' messages, at most `count`; those that do not end, are empty or repeat are left out.

    Args:
        target: writes them.
        count: how many it begins.
        seed: of the sampling.

    Raises:
        InputError: the target has no chat template, one that changes a message, or computes NaN.
    """
    before, after = _around_a_message(target)
    end, *_ = after
    written = answer(
        target.model,
        [before] * count,
        [TEMPERATURE] * count,
        LONGEST,
        sorted({end, *target.eos}),
        seed,
        lambda *_: None,
    )
    ended = [ids[:-1] for ids in written if ids[-1] in (end, *target.eos)]
    texts = [target.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in ended]
    return list(dict.fromkeys(filter(None, texts)))


def _around_a_message(target: TorchTarget) -> tuple[list[int], list[int]]:
    """Tokens that the chat template puts before and behind a user's message."""
    tokenizer = target.tokenizer
    if not tokenizer.chat_template:
        raise InputError(
            f"{target.name}: its tokenizer has no chat template, so it cannot write prompts: use"
            " --no-own-prompts"
        )
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    # A template is a program that the checkpoint brings along: it can raise anything.
    except Exception as error:
        raise InputError(
            f"the chat template refuses a message ({error}); use --no-own-prompts"
        ) from error
    parts = text.split(_MARK)
    encoded = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    if len(encoded) != 2 or not all(encoded):
        raise InputError(
            f"{target.name}: its chat template does not put a message between marks of its own, so"
            " it cannot write prompts: use --no-own-prompts"
        )
    return encoded[0], encoded[1]
