"""One `unispec serve` in processes of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from unispec.serving.listening import bind, url_of

from .launch import command
from .messages import ServerLost

__all__ = ["Server"]

logger = logging.getLogger("ray.serve")

_HOST: Final = "127.0.0.1"
_STOP_S: Final = 40
"""A server gives its answers 30 seconds; before it is stopped it has none."""


class Server:
    """A server that answers once this is made, until `stop`.

    Args:
        arguments: of `unispec serve`.
        processors: where it runs; none: anywhere.

    Attributes:
        url: where it answers, without a slash at its end.

    Raises:
        ServerLost: it has ended before it answered; says its last line.
    """

    def __init__(self, arguments: Sequence[str], processors: Sequence[int]) -> None:
        with bind(_HOST, 0, "--port") as reserved:
            port = reserved.getsockname()[1]
        self.url = url_of("http", _HOST, port)
        own = [f"--host={_HOST}", f"--port={port}", "--metrics-port=0"]
        self._process = subprocess.Popen(
            command(os.getpid(), processors, [*arguments, *own]),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._lines: deque[str] = deque(maxlen=1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while not self.answers():
            if not self.runs():
                self._reader.join()
                raise ServerLost(f"unispec serve has ended: {' '.join(self._lines)}")
            time.sleep(0.1)

    def _read(self) -> None:
        """Writes what it says to the replica's log."""
        for line in self._process.stderr or ():
            if line.strip():
                self._lines.append(line.strip())
                logger.info("%s", line.rstrip())

    def answers(self) -> bool:
        """Whether it takes requests."""
        try:
            with build_opener(ProxyHandler({})).open(f"{self.url}/health", timeout=5):
                return True
        except (HTTPError, OSError, HTTPException):
            return False

    def runs(self) -> bool:
        """Whether its process is there."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Waits until it ends; returns its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
