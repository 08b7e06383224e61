"""A request as it crosses from the API process to the model worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from max.pipelines.context import TextContext
from typing_extensions import Self

__all__ = ["ServedContext"]


@dataclass(kw_only=True)
class ServedContext(TextContext):
    """MAX's request, with what it lacks.

    `json_schema` is a schema's text and `grammar` a regex as in `Grammar(kind="regex")`; either
    constrains the whole answer. msgspec sends all fields by their annotations.
    """

    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""

    @classmethod
    def of(
        cls,
        context: TextContext,
        *,
        logit_bias: Mapping[int, float] | None = None,
        **changes: Any,
    ) -> Self:
        """The same request as a context of this class; buffers are shared, not copied.

        Args:
            logit_bias: see the field.
            changes: values of other fields that replace those of `context`.
        """
        copied = {each.name: getattr(context, each.name) for each in fields(TextContext)}
        return cls(**{**copied, **changes}, logit_bias=dict(logit_bias or {}))
