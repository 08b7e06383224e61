"""Metrics of several servers as one."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["merge"]


def merge(texts: Mapping[str, str]) -> str:
    """Prometheus' text of all replicas; each sample has its replica as a label.

    Args:
        texts: what each replica exports, by its name.
    """
    heads: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in filter(None, text.splitlines()):
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                heads.setdefault(family, {})[line] = None
            elif not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, replica))
    return "".join(
        f"{line}\n" for family in samples for line in (*heads.get(family, ()), *samples[family])
    )


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        comma = "" if rest.startswith("}") else ","
        return f'{name}{{replica="{replica}"{comma}{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
