"""What `unispec serve` is told beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unispec.errors import InputError

__all__ = ["ServeConfig"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens, and what it admits."""

    host: str = "127.0.0.1"
    """The address it listens at; others than this machine reach `0.0.0.0`."""
    port: int = 8000
    """Of the interface; 0: any that is free."""
    metrics_port: int = 8001
    """Of MAX's own metrics, which `/metrics` of `port` has too; 0: any that is free."""
    served_model_name: str | None = None
    """What clients call the model; None: the name that it was given by."""
    max_queue_size: int | None = None
    """Most requests that wait for their first token; more get 429. None: any number."""
    api_key: str | None = None
    """What clients send as bearer token; None: nothing is asked."""
    ssl_certfile: Path | None = None
    """Certificate in PEM, for HTTPS."""
    ssl_keyfile: Path | None = None
    """Its private key in PEM."""
    page: bool = True
    """Whether there is a page to try the model at `/`."""

    def __post_init__(self) -> None:
        """Raises `InputError` for half a certificate or an empty key."""
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InputError("HTTPS needs --ssl-certfile and --ssl-keyfile; give both or neither")
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is empty; give at least one character, or none at all")
        if self.api_key is not None and not self.api_key.isascii():
            raise InputError("the API key has characters beyond ASCII; HTTP headers cannot hold it")
