"""Which requests belong to one replica: those of a session, and those that begin alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

__all__ = ["Affinity", "affinity_of"]

_BLOCK: Final = 256
"""Characters; a replica's cache shares whole pages of tokens, of which this is about half a one."""
_MAX_BLOCKS: Final = 128
_BYTES: Final = 8


@dataclass(frozen=True)
class Affinity:
    """What tells whether two requests belong together."""

    session: bytes | None = None
    """Of the session, where the client names one."""
    blocks: tuple[bytes, ...] = ()
    """Of the beginning of the prompt: of its first 256 characters, 512, and so on."""

    @property
    def keys(self) -> tuple[bytes, ...]:
        """From what most requests share to what fewest do."""
        return self.blocks if self.session is None else (*self.blocks, self.session)

    @property
    def home(self) -> bytes | None:
        """What decides where nothing is known of the keys: the same in every router."""
        return self.session or (self.blocks[0] if self.blocks else None)


def affinity_of(headers: Mapping[str, str], body: bytes) -> Affinity:
    """Reads of a request what its replica is chosen by; of any other body, nothing.

    The session is the header `x-session-id`, or else `prompt_cache_key` of the body.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        asked = {}
    session = headers.get("x-session-id") or asked.get("prompt_cache_key") or None
    return Affinity(
        None if session is None else _digest(f"session {session}"),
        _blocks(asked.get("cache_salt"), asked.get("messages") or asked.get("prompt")),
    )


def _blocks(salt: Any, prompt: Any) -> tuple[bytes, ...]:
    if not prompt:
        return ()
    # Prompts with different salts share no pages.
    text, hashed = json.dumps(prompt), blake2b(repr(salt).encode(), digest_size=_BYTES)
    found = []
    # What is left over after the last whole block goes on in the next turn of a conversation.
    for start in range(0, max(len(text) - _BLOCK + 1, 1), _BLOCK)[:_MAX_BLOCKS]:
        hashed.update(text[start : start + _BLOCK].encode())
        found.append(hashed.digest())
    return tuple(found)


def _digest(text: str) -> bytes:
    return blake2b(text.encode(errors="replace"), digest_size=_BYTES).digest()
