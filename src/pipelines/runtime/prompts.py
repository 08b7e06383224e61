"""A prompt on its way to a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.pipelines.context import TextContext, TokenBuffer

__all__ = ["Prompt"]


@dataclass(frozen=True)
class Prompt:
    """The tokens that a model reads."""

    tokens: Sequence[int]
    """What the cache will hold of the prompt."""

    def context(self, **fields: Any) -> TextContext:
        """The request."""
        return TextContext(tokens=TokenBuffer(np.array(self.tokens, np.int64)), **fields)
