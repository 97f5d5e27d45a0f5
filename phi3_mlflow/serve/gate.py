"""What every request passes: its record, the key, the limits, and errors told as OpenAI tells them.

Knows ASGI, and nothing of the routes but which of them are open.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi3_mlflow.runtime.errors import shorten

from .errors import HttpError, http_error
from .keys import Keys
from .records import Observer, Record
from .streams import ClientLeft

_logger = logging.getLogger(__name__)

# What a header may add to traces and logs, in characters.
_HEADER = 200


class _Server(Protocol):
    draining: bool
    current: int


class _Limits(Protocol):
    @property
    def body(self) -> int: ...
    @property
    def concurrent(self) -> int | None: ...


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        keys: one of them is asked for, where there are any.
        limits: of bodies, and of requests at once.
        observers: are told of every request.
        open_paths: need no key, and no room.
        server: says whether requests are still taken, and is told how many are under way.
        hosts: names by which the server may be called, so that no page on the web gets at it under a name of its own
            (DNS rebinding); None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        limits: _Limits,
        observers: Sequence[Observer],
        open_paths: Collection[str],
        server: _Server,
        hosts: Collection[str] | None = None,
    ):
        self._app = app
        self._keys = keys
        self._limits = limits
        self._observers = observers
        self._open = tuple(open_paths)
        self._server = server
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(
            scope["method"][:20],
            scope["path"][:_HEADER],
            client=(scope.get("client") or [None])[0],
            session=_short(headers.get("x-session-id")),
            user=_short(headers.get("x-user-id")),
        )
        scope.setdefault("state", {})["record"] = record

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status, record.first_byte = message["status"], time.monotonic()
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        counts = scope["method"] == "POST"
        self._server.current += counts
        try:
            self._check(scope, headers, record)
            await self._app(scope, self._limited(receive), watched)
        except ClientLeft:
            record.status, record.error = 499, "the client left"
        except asyncio.CancelledError:
            if not self._server.draining:
                raise
            record.error = "the server has ended"  # uvicorn would log a traceback
            if not record.status:
                await _ending().response()(scope, receive, watched)
        except Exception as error:
            told = http_error(error)
            if told.status == 500:
                _logger.error("a request to %s failed", record.route, exc_info=error)
            record.error = str(told)
            if not record.status:
                await told.response()(scope, receive, watched)
        finally:
            self._server.current -= counts
            record.status = record.status or 499  # cancelled
            record.ended = time.monotonic()
            for observer in self._observers:
                observer.ended(record)

    def _check(self, scope: Scope, headers: Headers, record: Record) -> None:
        host = _hostname(headers.get("host", "localhost"))  # no browser leaves it out
        if self._hosts is not None and host not in self._hosts:
            problem = f"the server is not called {shorten(host)} here: it answers to {', '.join(sorted(self._hosts))}"
            raise HttpError(403, f"{problem}, or to any name where it has API keys", code="forbidden_host")
        if scope["path"] in self._open or (scope["path"] == "/" and "/" in self._open):
            return
        if self._keys:
            record.key = self._keys.name_of(headers.get("authorization"))
            if record.key is None:
                given = "is not known" if "authorization" in headers else "is missing"
                problem = f"the API key {given}: send it as `Authorization: Bearer KEY`"
                raise HttpError(401, problem, code="invalid_api_key")
        if scope["method"] != "POST":
            return
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limits.body:
            raise self._too_large()
        if self._server.draining:
            raise _ending()
        most = self._limits.concurrent
        if most is not None and self._server.current > most:
            problem = f"{most} requests are under way, as many as may be; try again in a second"
            raise HttpError(429, problem, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1)

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limits.body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body is larger than {self._limits.body} bytes; send less", code="body_too_large")


def _ending() -> HttpError:
    return HttpError(503, "the server is ending", kind="server_error", code="unavailable", retry_after=5)


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0].lower()


def _short(value: str | None) -> str | None:
    return value[:_HEADER] if value else None
