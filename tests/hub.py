"""A Hugging Face hub on this machine, which gives folders as repositories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

from unispec.checkpoints import repository

__all__ = ["Hub", "Refusal", "running_hub"]

FILE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)")
INFO = re.compile(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?")


class Refusal(NamedTuple):
    """How the hub answers for a repository that it does not give."""

    status: int
    code: str
    message: str


NOT_FOUND = Refusal(401, "RepoNotFound", "Invalid username or password.")
"""What the hub says of names that it does not have, to those who are not logged in."""


class Hub:
    """The server and what it has.

    Attributes:
        repositories: Folders and refusals by name.
        asked: What was asked for so far, "METHOD path".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path | Refusal] = {}
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def commit(self, name: str) -> str:
        """The repository's commit, another one as soon as a file changes."""
        found = hashlib.sha1(name.encode())
        folder = self.repositories.get(name)
        for path in sorted(folder.iterdir()) if isinstance(folder, Path) else ():
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded, in order."""
        found = (re.fullmatch("GET " + FILE.pattern, line) for line in self.asked)
        return [match[2] for match in found if match]

    def go_down(self) -> None:
        """Answers nothing from now on."""
        self.server.shutdown()
        self.server.server_close()
        repository._outage.cache_clear()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                if match := FILE.fullmatch(self.path):
                    self.give_file(*match.groups())
                elif match := INFO.fullmatch(self.path):
                    self.give_info(match[1])
                else:
                    self.refuse(Refusal(404, "", "Not found"))

            do_GET = do_HEAD

            def give_file(self, name: str, file: str) -> None:
                found = hub.repositories.get(name, NOT_FOUND)
                if isinstance(found, Refusal):
                    self.refuse(found)
                elif (path := found / file).is_file():
                    content = path.read_bytes()
                    self.give(content, name, etag=hashlib.sha1(content).hexdigest())
                else:
                    self.refuse(Refusal(404, "EntryNotFound", "Entry not found"), name)

            def give_info(self, name: str) -> None:
                found = hub.repositories.get(name, NOT_FOUND)
                if isinstance(found, Refusal):
                    return self.refuse(found)
                files = [{"rfilename": path.name} for path in sorted(found.iterdir())]
                info = {"id": name, "sha": hub.commit(name), "siblings": files}
                self.give(json.dumps(info).encode(), name)

            def give(self, content: bytes, name: str = "", etag: str = "") -> None:
                self.send_response(200)
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                self.finish_headers(name, len(content))
                if self.command == "GET":
                    self.wfile.write(content)

            def refuse(self, refusal: Refusal, name: str = "") -> None:
                self.send_response(refusal.status)
                self.send_header("X-Error-Code", refusal.code)
                self.send_header("X-Error-Message", refusal.message)
                self.finish_headers(name, 0)

            def finish_headers(self, name: str, size: int) -> None:
                if name:
                    self.send_header("X-Repo-Commit", hub.commit(name))
                self.send_header("Content-Length", str(size))
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Nothing on stderr."""

        return Handler


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub in place of huggingface.co, and an empty cache."""
    hub = Hub()
    # The hub's library reads its environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository._outage.cache_clear()
    yield hub
    hub.go_down()
