"""A server with OpenAI's shapes that answers what it was told to, and notes what it was asked.

Knows no model: for tests of what stands at the other end of the wire.
"""

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route


@dataclass(frozen=True)
class Scripted:
    """One answer: its pieces, and how it goes wrong if it does."""

    pieces: Sequence[str] = ("Hello.",)
    delay: float = 0.0  # seconds before each piece
    status: int = 200  # of a refusal before the first byte
    error: str = ""  # the refusal's message; with status 200 it comes after the pieces
    silent: float = 0.0  # seconds after the pieces in which nothing comes
    cut: bool = False  # the connection ends after the pieces, without a word
    finish_reason: str = "stop"
    trace: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    newline: str = "\n"


def envelope(message: str, status: int) -> dict[str, Any]:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class ScriptedServer:
    """The scripted answers, one for each request in turn, and what came in.

    Args:
        routes: more routes, for example those of the chat page.
        models: names that /v1/models lists.
        key: which every request to the API must carry, or None.
    """

    def __init__(self, routes: Sequence[BaseRoute] = (), models: Sequence[str] = ("phi3",), key: str | None = None):
        self.models = list(models)
        self.key = key
        self.answers: deque[Scripted] = deque()
        self.requests: list[dict[str, Any]] = []  # bodies of chat requests
        self.keys: list[str | None] = []  # their Authorization headers
        self.feedback: list[dict[str, Any]] = []
        self.feedback_status = 200
        self.closed = threading.Event()  # a client left before its answer ended
        self.address = ""
        self.app = Starlette(
            routes=[
                *routes,
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/feedback", self._feedback, methods=["POST"]),
            ]
        )

    def will_say(self, *pieces: str, **how: Any) -> None:
        self.answers.append(Scripted(pieces, **how))

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse(envelope("Send a valid key as `Authorization: Bearer KEY`.", 401), 401)

    async def _models(self, request: Request) -> Response:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.models]
        return self._refused(request) or JSONResponse({"object": "list", "data": listed})

    async def _feedback(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        if self.feedback_status != 200:
            return JSONResponse(envelope("The tracking server is away.", 503), self.feedback_status)
        self.feedback.append(await request.json())
        return JSONResponse({})

    async def _chat(self, request: Request) -> Response:
        self.keys.append(request.headers.get("Authorization"))
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.requests.append(body)
        script = self.answers.popleft()
        if script.status != 200:
            return JSONResponse(envelope(script.error, script.status), script.status, script.headers)
        headers = {"x-mlflow-trace-id": script.trace} if script.trace else {}
        return StreamingResponse(
            self._stream(script, body), media_type="text/event-stream", headers={**headers, **script.headers}
        )

    async def _stream(self, script: Scripted, body: dict[str, Any]) -> AsyncIterator[str]:
        def event(**fields: Any) -> str:
            chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
            return f"data: {json.dumps(chunk | fields, ensure_ascii=False)}{script.newline * 2}"

        def choice(delta: dict[str, str], reason: str | None = None) -> str:
            return event(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])

        try:
            yield choice({"role": "assistant", "content": ""})
            for piece in script.pieces:
                await asyncio.sleep(script.delay)
                yield choice({"content": piece})
            await asyncio.sleep(script.silent)
            if script.cut:
                return
            if script.error:
                yield f"data: {json.dumps(envelope(script.error, 500))}{script.newline * 2}"
                return
            yield choice({}, script.finish_reason)
            tokens = len(script.pieces) + 1
            usage = {"prompt_tokens": 14, "completion_tokens": tokens, "total_tokens": 14 + tokens}
            yield event(choices=[], usage=usage | {"prompt_tokens_details": {"cached_tokens": 8}})
            yield f"data: [DONE]{script.newline * 2}"
        except asyncio.CancelledError:
            self.closed.set()
            raise


@contextmanager
def running(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """The server on a free port of the loopback, in a thread, for as long as the block lasts."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=1)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(timeout=10)
        listener.close()
