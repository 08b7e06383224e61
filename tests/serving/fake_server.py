"""A server with the endpoints that the page uses and answers that a test chooses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["FakeServer", "serving"]

PAGE = Path(__file__).resolve().parents[2] / "src" / "serving" / "page.html"
STATUS: dict[str, Any] = {
    "state": "ready",
    "phase": "ready",
    "model": "smollm2",
    "target": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "draft": "smollm2-135m-eagle3",
    "speculative_method": "eagle3",
    "num_speculative_tokens": 1,
    "max_length": 2048,
    "max_batch_size": 8,
    "version": "0.1.0",
}


class FakeServer:
    """What the server answers, for a test to set, and what the page sent to it."""

    def __init__(self) -> None:
        self.url = ""
        self.status = dict(STATUS)
        self.pieces = ["An ", "answer", "."]
        """The texts that an answer streams."""
        self.usage: dict[str, Any] = {
            "prompt_tokens": 9,
            "completion_tokens": 128,
            "total_tokens": 137,
            "completion_tokens_details": {
                "accepted_prediction_tokens": 30,
                "rejected_prediction_tokens": 90,
            },
        }
        self.finish_reason = "stop"
        self.refusal: tuple[int, str] | None = None
        """A status and a sentence, instead of an answer."""
        self.error_within: str | None = None
        """A sentence that ends an answer after its pieces."""
        self.key: str | None = None
        self.pause = 0.0
        """Seconds between two pieces."""
        self.go_on = threading.Event()
        """An answer ends only once this is set."""
        self.go_on.set()
        self.disconnected = threading.Event()
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", lambda _: FileResponse(PAGE)),
                Route("/status", lambda _: JSONResponse(self.status)),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def complete(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _refusal(401, "This server needs an API key.")
        self.bodies.append(await request.json())
        if self.refusal:
            return _refusal(*self.refusal)
        return StreamingResponse(self.stream(), media_type="text/event-stream")

    async def stream(self) -> AsyncIterator[str]:
        complete = False
        try:
            yield ": a comment, which means nothing\n\n"
            for piece in self.pieces:
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
                await asyncio.sleep(self.pause)
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            if self.error_within:
                yield _event({"error": {"message": self.error_within}})
            else:
                last = {"index": 0, "delta": {}, "finish_reason": self.finish_reason}
                yield _event({"choices": [last]})
                yield _event({"choices": [], "usage": self.usage})
                yield "data: [DONE]\n\n"
            complete = True
        finally:
            if not complete:
                self.disconnected.set()


def _refusal(status: int, sentence: str) -> Response:
    return JSONResponse({"error": {"message": sentence}}, status)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A fake server on a free port of this machine."""
    fake = FakeServer()
    config = uvicorn.Config(
        fake.app(), port=0, log_level="warning", timeout_graceful_shutdown=1, lifespan="off"
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    fake.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield fake
    finally:
        fake.go_on.set()
        server.should_exit = True
        thread.join()
        socket.close()
