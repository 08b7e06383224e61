"""Servers that a benchmark starts."""

from __future__ import annotations

import subprocess
import time

import click
import httpx

__all__ = ["wait_until_ready"]

START_SECONDS = 900


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Returns when a server answers at its URL.

    Raises:
        click.ClickException: it has ended, or takes longer than a compile does.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise click.ClickException(f"the server at {url} did not start")
