"""Seeds of what is drawn in a training."""

from __future__ import annotations

import hashlib

__all__ = ["seed_of"]


def seed_of(*key: object) -> int:
    """A seed for one purpose: its draws have nothing to do with those of another key.

    Args:
        key: what names the purpose; its `repr` must be the same from run to run.

    Returns:
        32 bits, for torch's generator on a CPU takes no notice of more.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")
