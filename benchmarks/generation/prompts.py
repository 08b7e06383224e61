"""The prompts: chat messages of the kinds that the draft was trained on, and of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["Prompt", "encode", "load_prompts", "load_tokenizer"]


@dataclass(frozen=True)
class Prompt:
    """One user message."""

    kind: str
    """`"seen"`: worded like the draft's training prompts, about something else; or `"unseen"`."""
    text: str
    token_ids: list[int]
    """The message in the model's chat template."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The target's own tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    return tokenizer


def load_prompts(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Reads a file with a prompt a line: its kind, a tab, its text."""
    lines = [line.split("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Prompt(kind, text, encode(tokenizer, text)) for kind, text in lines]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one user message, up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)
