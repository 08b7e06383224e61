"""Which prompts to answer, and how they become tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unispec.chat import encode_message
from unispec.commands.options import TextFile, option_group
from unispec.commands.standard_input import STANDARD_INPUT, is_piped, read_standard_input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptOptions", "prompt_options"]


class PromptFile(TextFile):
    """A file with one prompt a line; blank lines are allowed at its end only."""

    def parse(self, text: str) -> tuple[str, ...]:
        """Splits a text into prompts, so that the n-th result answers the n-th line."""
        lines = text.rstrip("\n").split("\n")
        if lines == [""]:
            raise ValueError("holds no prompt; write one a line")
        if "" in lines:
            raise ValueError(
                f"has no prompt in line {lines.index('') + 1}; write one or remove the line"
            )
        return tuple(lines)


def _piped_prompt() -> str:
    """What is piped into the command, as one prompt without its last line's end."""
    try:
        text = read_standard_input().removesuffix("\n") if is_piped() else ""
    except OSError as error:
        raise click.UsageError(f"cannot read {STANDARD_INPUT}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{STANDARD_INPUT} is not UTF-8 text (byte {error.start})"
        ) from error
    if not text:
        raise click.UsageError(
            "no prompt; give --prompt TEXT or --prompt-file FILE, or pipe a prompt into the command"
        )
    return text


def _read_as_utf8(argument: str) -> str:
    """An argument whose bytes the locale's encoding does not have; Python keeps them."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as error:
        raise click.UsageError("--prompt is not valid UTF-8; give it in --prompt-file") from error


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Where the prompts come from."""

    prompt: str | None
    """If neither this nor `prompt_file` is given, what is piped into the command."""
    prompt_file: tuple[str, ...] | None
    image: tuple[Path, ...]
    chat_template: bool

    def __post_init__(self) -> None:
        """Raises `click.UsageError` for no source of prompts, two, or images of a whole file."""
        if self.prompt is None and self.prompt_file is None:
            object.__setattr__(self, "prompt", _piped_prompt())
        if self.prompt is not None and self.prompt_file is not None:
            raise click.UsageError("--prompt and --prompt-file exclude each other; give one")
        if self.image and self.prompt is None:
            raise click.UsageError(
                f"--image {self.image[0]} belongs to one prompt; give --prompt, not --prompt-file"
            )
        if self.prompt == "":
            raise click.UsageError("--prompt is empty; give at least one character")
        if self.prompt is not None and any("\ud800" <= char <= "\udfff" for char in self.prompt):
            object.__setattr__(self, "prompt", _read_as_utf8(self.prompt))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, at least one, none of them empty."""
        if self.prompt is not None:
            return (self.prompt,)
        return self.prompt_file or ()

    def check_images(self) -> None:
        """Reads the heads of the images' files.

        Raises:
            InputError: one is no image that models read, or is too large.
        """
        if not self.image:
            return
        from unispec.images import check_image

        for file in self.image:
            check_image(file)

    def encode(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Encodes one prompt.

        Args:
            tokenizer: the target's tokenizer. If it has a chat template, the prompt becomes
                one user message, its images before its text, and the answer is opened, unless
                `chat_template` is false; then, or without a template, the tokenizer adds its
                own special tokens, and placeholders of images are the text's own.

        Returns:
            Token ids.

        Raises:
            InputError: the chat template refuses a conversation of one user message.
        """
        if not (self.chat_template and tokenizer.chat_template):
            return list(tokenizer.encode(text))
        if not self.image:  # templates of models that read text only know no parts
            return encode_message(tokenizer, text)
        parts: list[Any] = [{"type": "image"} for _ in self.image]
        return encode_message(tokenizer, [*parts, {"type": "text", "text": text}])


prompt_options = option_group(
    "prompts",
    PromptOptions,
    click.option("--prompt", help="The prompt.  [default: what is piped into the command]"),
    click.option(
        "--prompt-file",
        type=PromptFile(),
        help="A batch of prompts, one a line; - reads standard input.",
    ),
    click.option(
        "--image",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
        help="An image that the prompt is about, for models that see. Can be given several times; "
        "the images come before the prompt's text, in order.",
    ),
    click.option(
        "--chat-template/--no-chat-template",
        default=True,
        help="Whether to pose each prompt as a user's message, where the tokenizer has a chat "
        "template.  [default: chat-template]",
    ),
)
"""Adds the options of `PromptOptions` to a command."""
