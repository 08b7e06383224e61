"""Requests as callers give them, read into the engine's own types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from reprlib import repr as shown
from typing import Any

import numpy as np

from unispec.errors import InputError
from unispec.pipelines.runtime.sampling_params import in_float32, is_integer
from unispec.sampling.grammar import Grammar

from .requests import Request

__all__ = ["read_request", "read_requests"]


def read_requests(requests: Any) -> list[Request]:
    """The requests of one call.

    Raises:
        InputError: it is no sequence of requests, or one of them cannot be used.
    """
    if isinstance(requests, Request):
        raise InputError("a single Request was given; give a list: [request]")
    if isinstance(requests, str) or not isinstance(requests, Iterable):
        raise InputError(f"requests is {shown(requests)}; give a list of Requests")
    return [read_request(request, f"prompt {at}") for at, request in enumerate(requests, start=1)]


def read_request(request: Any, name: str) -> Request:
    """One request, its fields checked and its numbers those of Python.

    Raises:
        InputError: it is no `Request`, or a field is of another type or out of range; `sampling`
            and `logprobs` are not looked at.
    """
    if not isinstance(request, Request):
        raise InputError(f"{name} is {shown(request)}; give a Request")
    tokens = _token_ids(request.token_ids, name)
    try:
        if not isinstance(request.grammar, Grammar | None):
            raise InputError(f"grammar is {shown(request.grammar)}; give a Grammar")
        _check_images(request.images)
        bias = _logit_bias(request.logit_bias)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return replace(request, token_ids=tokens, logit_bias=bias)


def _token_ids(value: Any, name: str) -> list[int]:
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
            raise InputError(
                f"{name} is a NumPy array of {value.dtype} and shape {list(value.shape)}; give"
                " one of integers with one dimension, and a Request for each prompt"
            )
        return [int(token) for token in value]
    kind = type(value).__name__
    if isinstance(value, str):
        raise InputError(
            f"{name} is the text {shown(value)}; encode it with the engine's tokenizer"
        )
    if isinstance(value, Mapping):
        raise InputError(
            f"{name} is of type {kind}; give token ids: apply_chat_template with return_dict=False"
            ' returns them, and a tokenizer\'s result has them as ["input_ids"]'
        )
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        convert = "call .tolist() and " if hasattr(value, "tolist") else ""
        raise InputError(f"{name} is of type {kind}; {convert}give a list of integers")
    others = {type(token) for token in value if type(token) is not int}
    for token in value if others else ():
        if not is_integer(token):
            several = isinstance(token, Sequence) and not isinstance(token, str)
            fix = "give a Request for each prompt" if several else "give a list of integers"
            raise InputError(f"{name} has {shown(token)} among its token ids; {fix}")
    return [int(token) for token in value]


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping) or not all(map(is_integer, value)):
        raise InputError(f"logit_bias is {shown(value)}; give a dict of token ids and numbers")
    for token, bias in value.items():
        if not np.isfinite(in_float32(f"the logit_bias of token {token}", bias)):
            raise InputError(
                f"the logit_bias of token {token} is {shown(bias)}; give a finite number of"
                " float32, -100 all but bans a token"
            )
    return {int(token): float(bias) for token, bias in value.items()}


def _check_images(value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, PurePath)):
        raise InputError(f"images is {shown(value)}; give a list, [image] for a single one")
