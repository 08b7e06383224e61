"""What a draft method is to the composer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from max.nn import Module

from unispec.checkpoints import Weight
from unispec.methods import Method
from unispec.pipelines.speculative.step import StepOutputs

from .checkpoint import Checkpoint
from .config import UnifiedConfig

__all__ = ["DraftMethod", "DraftWeights", "trained_width"]

_LOGGER: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class DraftWeights:
    """A draft's weights under our names."""

    state: Mapping[str, Weight]
    """Without embedding and head where they are the target's."""
    num_proposed: int | None = None
    """N, tokens that the draft can propose; None: all of the target's."""
    own_head: bool = False
    """Whether the head is the draft's own, not rows of the target's."""


@dataclass(frozen=True, kw_only=True)
class DraftMethod:
    """A way to propose tokens: how its checkpoint is read, and what computes it."""

    config: type[UnifiedConfig]
    """Reads from MAX's `PipelineConfig` how target and draft work together; its `draft_method` is
    the method's name."""
    state: Callable[[Checkpoint, Any, Mapping[str, Weight]], DraftWeights]
    """The draft's weights, checked; given the checkpoint that has them, the configuration and the
    target's weights."""
    build: Callable[[Any, Any], Module]
    """The draft, given the configuration and the target's stack; its `at(step)` is the draft in
    one step."""
    step: Callable[..., StepOutputs]
    """`(target, draft, rule, step)` to the outputs of one step."""
    reads_next_token: bool
    """Whether the draft's cache entry of a position depends on the token after it."""
    checkpoint_width: Callable[[Any], int | None] = lambda draft: None
    """K of a draft that was trained for one K alone, given its Hugging Face config."""
    later: tuple[DraftMethod, ...] = ()
    """Later generations, which MAX calls by the same name; the draft's checkpoint tells."""
    prepare: Callable[..., None] = lambda draft, requested, *, source: None
    """Brings the draft's Hugging Face config into the form that MAX reads, given K if the
    user set it."""

    @property
    def name(self) -> Method:
        """Its facts, such as the largest K, are in `unispec.methods` under this name."""
        return self.config.draft_method


def trained_width(width: int, requested: int | None) -> int:
    """K of a draft that was trained for one; another that the user set gets a warning."""
    if requested not in (None, width):
        _LOGGER.warning(
            "num_speculative_tokens %d is replaced by %d: the draft fills blocks of %d tokens",
            requested,
            width,
            width + 1,
        )
    return width
