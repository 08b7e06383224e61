"""Prompts of mixed length, as token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

__all__ = ["random_prompt", "real_prompts"]

QUESTIONS = 9
"""The first paragraphs of the file are for the chat template, the rest is plain text."""

LONG = (128, 129, 257, 600)
"""A page, one token more, two pages and one, and more than a prefill chunk of 512."""


def real_prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """24 prompts for SmolLM2: 9 chats, 9 plain texts, 2 of one token and 4 of ``LONG``."""
    text = (Path(__file__).parent / "data" / "prompts.txt").read_text(encoding="utf-8")
    paragraphs = text.strip().split("\n\n")
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in paragraphs[:QUESTIONS]
    ]
    plain = [tokenizer.encode(text) for text in paragraphs[QUESTIONS:]]
    story = [token for shift in range(3) for ids in plain[shift:] + plain[:shift] for token in ids]
    long = [story[start : start + length] for start, length in enumerate(LONG)]
    return [*chats, *plain, plain[0][:1], chats[0][:1], *long]


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Random tokens other than the three special ones of a tiny tokenizer."""
    ids = np.random.default_rng([seed, length]).integers(3, vocab_size, length)
    return [int(token) for token in ids]
