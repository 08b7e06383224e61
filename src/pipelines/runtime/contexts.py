"""From a prompt and its sampling parameters to what MAX's classes know of a request."""

from __future__ import annotations

from collections.abc import Set

from max.pipelines.context import EOSTracker, SamplingParams, TextContext

from unispec.errors import InputError

from .prompts import Prompt

__all__ = ["make_context"]


def make_context(
    prompt: Prompt,
    params: SamplingParams,
    *,
    name: str,
    max_length: int,
    vocab_size: int,
    eos_token_ids: Set[int],
    has_grammar: bool,
) -> TextContext:
    """A request that fits: its longest length and what ends its answer are settled here.

    Args:
        params: checked by `check_sampling`.
        name: what errors call the prompt.
        max_length: longest sequence, prompt and output, in tokens.
        vocab_size: V, the width of the logits.
        eos_token_ids: end an answer, unless `params` ignore them.
        has_grammar: what ignores EOS under a grammar goes on until nothing else is allowed.

    Raises:
        InputError: the prompt leaves no room for an answer, or for `min_new_tokens`.
    """
    length = len(prompt.tokens)
    if length >= max_length:
        raise InputError(
            f"{name} has {length} tokens, max_length is {max_length} and an answer needs"
            " at least one more: shorten the prompt or raise max_length"
        )
    room = min(params.max_new_tokens or max_length, max_length - length)
    if params.min_new_tokens > room:
        raise InputError(
            f"min_new_tokens is {params.min_new_tokens}, but {name} has room for {room} new"
            " tokens: lower it, or raise max_new_tokens or max_length"
        )
    ends = set(params.stop_token_ids or ())
    if has_grammar or not params.ignore_eos:
        ends |= eos_token_ids
    return prompt.context(
        max_length=length + room,
        eos_tracker=EOSTracker(eos_token_ids=ends),
        sampling_params=params,
        vocab_size=vocab_size,
    )
