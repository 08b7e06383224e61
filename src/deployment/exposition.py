"""Metrics of several servers as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["merge"]


@dataclass
class _Family:
    """Lines of one metric."""

    heads: dict[str, None] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(texts: Mapping[str, str]) -> str:
    """Prometheus' text of all replicas; each sample has its replica as a label.

    Args:
        texts: what each replica exports, by its name.
    """
    families: dict[str, _Family] = {}
    for replica, text in texts.items():
        name = ""
        for line in filter(None, text.splitlines()):
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                families.setdefault(name, _Family()).heads[line] = None
            elif not line.startswith("#"):
                families.setdefault(name, _Family()).samples.append(_labelled(line, replica))
    return "".join(
        f"{line}\n" for family in families.values() for line in (*family.heads, *family.samples)
    )


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        comma = "" if rest.startswith("}") else ","
        return f'{name}{{replica="{replica}"{comma}{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
