"""What MAX's own commands get where they would drive a unified graph."""

from __future__ import annotations

from typing import Any

from unispec.errors import InputError

__all__ = ["UnservedPipeline"]


class UnservedPipeline:
    """Stands where MAX would put its own pipeline, which gives a step other inputs than ours takes.

    Raises:
        InputError: always, before weights are read.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise InputError(
            "MAX's own pipelines do not drive unispec's unified graphs; run `unispec generate` with"
            " the same options, or leave out --custom-architectures"
        )
