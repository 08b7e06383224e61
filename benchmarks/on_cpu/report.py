"""What is kept of a run: everything, for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .contenders import CONTENDERS
from .measurement import Cell, Measured
from .summary import Summary

__all__ = ["format_report"]


def format_report(
    measured: Measured, summaries: Mapping[Cell, Mapping[str, Summary]], weight_bytes: int
) -> dict[str, Any]:
    """All of one number format."""
    return {
        "weight_bytes": weight_bytes,
        "cells": [
            {
                **cell._asdict(),
                "contenders": {
                    name: {
                        "label": CONTENDERS[name].label,
                        "summary": asdict(summary),
                        "answers": [asdict(answer) for answer in measured.answers[cell][name]],
                    }
                    for name, summary in found.items()
                },
            }
            for cell, found in summaries.items()
        ],
        "prefill_s": measured.prefill_s,
        "about": measured.about,
        "missing": measured.missing,
    }
