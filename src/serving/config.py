"""What `unispec serve` is told beside the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from unispec.errors import InputError

__all__ = ["ServeConfig", "name_of"]

_KEY: Final = re.compile(r"[!-~]+")


def name_of(model: str) -> str:
    """A model's name without the folders of this machine before it."""
    return Path(model).name if Path(model).exists() else model


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
    """What clients call the model; None: what `name_of` makes of it."""
    max_queue_size: int | None = None
    """Most answers that wait for their first token; more get 429. None: any number."""
    api_key: str | None = None
    """What clients send as bearer token; None: nothing is asked."""
    ssl_certfile: Path | None = None
    """Certificate in PEM, for HTTPS."""
    ssl_keyfile: Path | None = None
    """Its private key in PEM."""
    page: bool = True
    """Whether there is a page to try the model at `/`."""

    def __post_init__(self) -> None:
        """Raises `InputError` for half a certificate, a key that cannot be sent, or one port."""
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InputError("HTTPS needs --ssl-certfile and --ssl-keyfile; give both or neither")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise InputError(
                "the API key is empty, or has spaces or characters beyond ASCII, which HTTP headers"
                " cannot hold; give another, or none at all"
            )
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise InputError("--served-model-name is empty; give a name, or leave it out")
        if self.port == self.metrics_port != 0:
            raise InputError(
                f"--port and --metrics-port are both {self.port}; give two different ones"
            )
