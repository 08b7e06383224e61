"""A user's message as tokens, up to where the answer begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unispec.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_message"]


def encode_message(tokenizer: PreTrainedTokenizerBase, content: str | list[Any]) -> list[int]:
    """Poses a user's message through the tokenizer's chat template and opens the answer.

    Args:
        tokenizer: one that has a chat template.
        content: the message's text, or its parts.

    Returns:
        Token ids.

    Raises:
        InputError: the chat template refuses a conversation of one user message.
    """
    message: dict[str, Any] = {"role": "user", "content": content}
    try:
        token_ids = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=False
        )
    # A template is a program that the checkpoint brings along: it can raise anything.
    except Exception as error:
        raise InputError(
            f"the chat template refuses the prompt ({error}); use --no-chat-template"
        ) from error
    return list(token_ids)
