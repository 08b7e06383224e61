"""`unispec serve` as a replica starts it: it ends with the replica, and keeps to its processors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from unispec.cli import main
from unispec.serving.children import end_with_parent

__all__ = ["command"]


def command(parent: int, processors: Sequence[int], arguments: Sequence[str]) -> list[str]:
    """A command line of this module.

    Args:
        parent: the process that it ends with.
        processors: where it runs; none: wherever the parent may.
        arguments: of `unispec serve`.
    """
    listed = ",".join(map(str, processors))
    return [sys.executable, "-m", __name__, str(parent), listed, "serve", *arguments]


def _run() -> None:
    _, parent, listed, *arguments = sys.argv
    end_with_parent(int(parent))
    if listed:
        os.sched_setaffinity(0, map(int, listed.split(",")))
    sys.argv = ["unispec", *arguments]
    main()


if __name__ == "__main__":
    _run()
