"""From a run's pieces to a client: server-sent events, and a client that goes away. Knows no body's shape.

Pieces come from the scheduler's thread into the event loop; no thread waits for them. What waits for a slow reader is
one answer's pieces at most, and a reader that takes nothing for too long loses the connection.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from phi3_mlflow.runtime.answers import Piece
from phi3_mlflow.runtime.runs import Event, Run

from .errors import HttpError, http_error
from .wire import encode

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Proxies such as nginx pass each event on at once.
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# Seconds after its deadline for which a request goes on waiting for the decoder to come back.
_GRACE = 30.0


class ClientLeft(Exception):
    """The client closed the connection before it had its answer."""


class Pieces:
    """The pieces of several runs, as they come.

    Args:
        deadline: of the runs, on time.monotonic()'s clock.
    """

    def __init__(self, deadline: float):
        self.runs: list[Run] = []
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(self) -> Callable[[Event], object]:
        """What the next run is to be given as its callback."""
        return partial(self._put, len(self.runs))

    def _begun(self, place: int) -> bool:
        return any(choice.tokens for choice in self.runs[place].answer.choices)

    def _put(self, place: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    def cancel(self) -> None:
        """Ends what is still going on."""
        for run in self.runs:
            run.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece with the place of its run.

        Raises:
            HttpError: the time was over before an answer was begun: an empty one would pass for an answer.
            Exception: what else ended one of the runs; the others are cancelled.
        """
        left = len(self.runs)
        try:
            while left:
                patience = max(0.0, self._deadline - time.monotonic()) + _GRACE
                try:
                    async with asyncio.timeout(patience):  # wait_for may lose a cancellation that comes with an event
                        place, event = await self._events.get()
                except TimeoutError:
                    message = "the model has not come back in time; the server's log may say why"
                    raise HttpError(503, message, kind="server_error", code="timeout", retry_after=30) from None
                if isinstance(event, Exception):
                    raise event.with_traceback(None)
                if event.reason == "max_time" and not self._begun(place) and time.monotonic() >= self._deadline:
                    message = "the time was over before the answer was begun; try again later"
                    raise HttpError(503, message, kind="server_error", code="timeout", retry_after=30)
                left -= event.last
                yield place, event
        finally:
            self.cancel()


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    text = data.encode() if isinstance(data, str) else encode(data)
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text + b"\n\n"


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """The work's result, for as long as the client is there.

    Args:
        receive: of a request whose body was read.
        work: is cancelled when the client leaves.

    Raises:
        ClientLeft: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response whose body is sent as it comes.

    Args:
        events: the body; its errors are told in the stream, since the status has been sent.
        failed: how an error is told.
        stack: closed when the stream has ended, however.
        write_timeout: seconds in which a client must take what was sent.
        headers: further ones.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        failed: Callable[[HttpError], bytes],
        stack: AsyncExitStack,
        *,
        write_timeout: float,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(headers={**HEADERS, **(headers or {})}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._failed = failed
        self._stack = stack
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it.

        Raises:
            ClientLeft: the client went away, or takes nothing any more.
        """
        async with self._stack:
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await self._write(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for line in self._events:
                await self._write(send, {"type": "http.response.body", "body": line, "more_body": True})
        except (ClientLeft, asyncio.CancelledError):
            raise
        except Exception as error:
            told = http_error(error)
            if told.status == 500:
                _logger.error("a stream failed", exc_info=error)
            await self._write(send, {"type": "http.response.body", "body": self._failed(told), "more_body": True})
        await self._write(send, {"type": "http.response.body", "body": b""})

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await send(message)
        except TimeoutError:
            _logger.info("a client took nothing for %g seconds and is given up", self._write_timeout)
            raise ClientLeft from None
