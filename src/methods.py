"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

from unispec.errors import InputError

__all__ = [
    "AUTO",
    "DRAFTLESS",
    "DRAFT_METHODS",
    "FACTS",
    "LARGEST_DRAFT_TOKENS",
    "METHODS",
    "DraftCheckpoint",
    "Method",
    "MethodFacts",
    "check_num_speculative_tokens",
    "generations",
    "largest_when",
    "method_of_architecture",
]

Method = Literal["dflash", "eagle", "eagle3", "mtp", "ngram"]
"""How tokens are proposed; asked for, `"eagle"` means EAGLE of any generation. `"ngram"` has no
draft: it proposes what followed the same tokens before."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Every `Method`."""


class DraftCheckpoint(NamedTuple):
    """What is said of the checkpoints of a method's drafts."""

    kind: str
    """What tensors and config.json show it to be, by its name in `checkpoints.draft_kinds`."""
    architecture: str
    """The class in `architectures` that MAX takes for such a draft."""
    model_type: str
    """Of its layers, where a checkpoint of the `speculators` library does not say."""


class MethodFacts(NamedTuple):
    """What is known of a method without MAX."""

    default_draft_tokens: int | None
    """K where one is needed and none is asked for; None: the checkpoint's block decides, or steps
    always choose."""
    largest_draft_tokens: int
    """The largest K that a graph is built for."""
    chosen_draft_tokens: int | None
    """The largest K where each step chooses its own; None: the checkpoint's block decides."""
    draft: DraftCheckpoint | None
    """None: the draft is part of its target's checkpoint, or there is none."""
    max_method: Literal["dflash", "eagle", "mtp"] | None
    """MAX's name for it, which generations of a method may share; None: MAX has no such method."""


FACTS: Final[Mapping[Method, MethodFacts]] = {
    "dflash": MethodFacts(
        None, 31, None, DraftCheckpoint("DFLASH", "DFlashDraftModel", "qwen3"), "dflash"
    ),
    "eagle": MethodFacts(3, 8, 8, DraftCheckpoint("EAGLE", "LlamaForCausalLM", "llama"), "eagle"),
    "eagle3": MethodFacts(
        3, 8, 8, DraftCheckpoint("EAGLE3", "LlamaForCausalLMEagle3", "llama"), "eagle"
    ),
    "mtp": MethodFacts(1, 8, 8, None, "mtp"),
    "ngram": MethodFacts(None, 31, 16, None, None),
}
"""The facts of each method."""

DRAFT_METHODS: Final[tuple[Method, ...]] = tuple(name for name in METHODS if FACTS[name].draft)
"""Those with a checkpoint for the draft; the other drafts are part of their target's."""

DRAFTLESS: Final[tuple[Method, ...]] = ("ngram",)
"""Those that run in the graph of the target alone."""

AUTO: Final = "auto"
"""In place of a K: each step chooses its own, by what steps cost and what came true."""

LARGEST_DRAFT_TOKENS: Final = {name: FACTS[name].largest_draft_tokens for name in METHODS}
"""The largest K that a graph is built for."""


def generations(method: Method) -> tuple[Method, ...]:
    """What a draft may be that this method is asked for: itself, or a later generation of it."""
    return tuple(name for name in METHODS if method in (name, FACTS[name].max_method))


def method_of_architecture(max_method: Method, declared: Collection[str]) -> Method:
    """Which of the methods that MAX calls by one name a draft's class is of.

    Args:
        max_method: MAX's name.
        declared: `architectures` of the draft, after `read_draft_config`.
    """
    for name, facts in FACTS.items():
        if facts.max_method == max_method and facts.draft and facts.draft.architecture in declared:
            return name
    return max_method


def largest_when(method: Method | None, count: int | str | None) -> int | None:
    """K of the graph and of the room in the caches; None: the checkpoint's block decides.

    Args:
        count: K as it is asked for, or `AUTO`; None: the method's default.
    """
    if method is None:
        return 0
    facts = FACTS[method]
    if count == AUTO:
        return facts.chosen_draft_tokens
    return facts.default_draft_tokens if count is None else int(count)


def check_num_speculative_tokens(
    method: Method | None,
    count: Any,
    *,
    loaded: int | None = None,
    asked: str = "num_speculative_tokens is",
) -> None:
    """Refuses a K that a graph cannot propose; `AUTO` is one that each step chooses.

    Args:
        method: of the draft; None: there is none.
        count: K, as it is asked for.
        loaded: the largest K of a graph that is loaded already; None: the method's.
        asked: how an error begins, before K.

    Raises:
        InputError: it is neither an integer nor `AUTO`, out of range, or there is no draft.
    """
    if type(count) is not int and count != AUTO:
        raise InputError(f"{asked} {count!r}; give an integer, or {AUTO!r}")
    if method is None:
        raise InputError(
            f"{asked} {count}, but there is no speculative method; give one, or leave it out"
        )
    if count == AUTO:
        return
    largest = LARGEST_DRAFT_TOKENS[method] if loaded is None else loaded
    if not 1 <= count <= largest:
        reason = f" with {method}" if loaded is None else ", what the engine's graph is for"
        raise InputError(f"{asked} {count}; choose 1 to {largest}{reason}")
