"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

from unispec.errors import InputError

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "DRAFT_METHODS",
    "FACTS",
    "LARGEST_DRAFT_TOKENS",
    "METHODS",
    "DraftCheckpoint",
    "Method",
    "MethodFacts",
    "check_num_speculative_tokens",
    "generations",
    "method_of_architecture",
]

Method = Literal["dflash", "eagle", "eagle3", "mtp"]
"""How a draft proposes tokens; asked for, `"eagle"` means EAGLE of any generation."""

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
    """K where none is asked for; None: the checkpoint's block decides."""
    largest_draft_tokens: int
    """The largest K that a graph is built for."""
    draft: DraftCheckpoint | None
    """None: the draft is part of its target's checkpoint."""
    max_method: Literal["dflash", "eagle", "mtp"]
    """MAX's name for it, which generations of a method may share."""


FACTS: Final[Mapping[Method, MethodFacts]] = {
    "dflash": MethodFacts(
        None, 31, DraftCheckpoint("DFLASH", "DFlashDraftModel", "qwen3"), "dflash"
    ),
    "eagle": MethodFacts(3, 8, DraftCheckpoint("EAGLE", "LlamaForCausalLM", "llama"), "eagle"),
    "eagle3": MethodFacts(
        3, 8, DraftCheckpoint("EAGLE3", "LlamaForCausalLMEagle3", "llama"), "eagle"
    ),
    "mtp": MethodFacts(1, 8, None, "mtp"),
}
"""The facts of each method."""

DRAFT_METHODS: Final[tuple[Method, ...]] = tuple(name for name in METHODS if FACTS[name].draft)
"""Those with a checkpoint for the draft; the other drafts are part of their target's."""

DEFAULT_DRAFT_TOKENS: Final = {name: FACTS[name].default_draft_tokens for name in METHODS}
"""K where none is asked for; None: the checkpoint's block decides."""

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


def check_num_speculative_tokens(
    method: Method | None, count: Any, *, loaded: int | None = None
) -> None:
    """Refuses a K that a graph cannot propose.

    Args:
        method: of the draft; None: there is none.
        count: K, as it is asked for.
        loaded: the largest K of a graph that is loaded already; None: the method's.

    Raises:
        InputError: it is no integer, out of range, or there is no draft.
    """
    if type(count) is not int:
        raise InputError(f"num_speculative_tokens is {count!r}; give an integer")
    if method is None:
        raise InputError(
            f"num_speculative_tokens is {count}, but there is no speculative method; give one,"
            " or leave it out"
        )
    largest = LARGEST_DRAFT_TOKENS[method] if loaded is None else loaded
    if not 1 <= count <= largest:
        reason = f" with {method}" if loaded is None else ", what the engine's graph is for"
        raise InputError(f"num_speculative_tokens is {count}; choose 1 to {largest}{reason}")
