"""The server's process: the socket, uvicorn, signals, and an end that lets answers finish. Knows no routes."""

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.hosting import RequestExecutor

from .app import Server
from .errors import HttpError

_logger = logging.getLogger(__name__)

# Bytes of a request's line and headers, and the seconds in which they must have arrived.
_HEADER_BYTES = 65_536
_HEADER_SECONDS = 20.0
# Seconds for which an idle connection is kept, and for which the last bytes may take at the end.
_KEEP_ALIVE = 65
_LAST_BYTES = 5


class ServeError(Phi3Error):
    """A server that cannot be started as asked."""


@dataclass(frozen=True)
class Process:
    """Where the server listens, and how it ends.

    Attributes:
        host: an address of this machine.
        port: 0 for any that is free.
        drain: seconds in which running answers may finish when the process is told to end.
        preload: whether models are loaded before the first request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    preload: bool = False


class _Protocol(H11Protocol):
    """Closes a connection whose request's headers do not arrive: uvicorn's own clock starts behind the first answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        super().connection_lost(exc)


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `serve`: uvicorn would stop listening at once, and end with the signal's status."""
        yield


def listen(process: Process) -> socket.socket:
    """The socket that the server listens at.

    Raises:
        ServeError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in process.host else socket.AF_INET
        return socket.create_server((process.host, process.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ServeError(f"the server cannot listen at {process.host}:{process.port}: {error}") from error


def is_public(host: str) -> bool:
    """Whether other machines can reach the address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


async def serve(server: Server, process: Process, listening: socket.socket) -> None:
    """Serves until the process is told to end (SIGINT or SIGTERM).

    Then it is no longer ready, running answers finish or are cut after `drain` seconds, and it ends; at once, if it is
    told a second time.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(RequestExecutor())
    config = uvicorn.Config(
        server.app,
        http=_Protocol,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_BYTES,
    )
    uvicorn_server = _Uvicorn(config)
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        _logger.info("ending: running answers have %g seconds; a second signal ends at once", process.drain)
        await server.models.close(process.drain)
        uvicorn_server.should_exit = True

    def told() -> None:
        server.draining = True
        if ending:
            uvicorn_server.should_exit = uvicorn_server.force_exit = True
        else:
            ending.append(loop.create_task(end()))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    try:
        try:
            await server.models.start(process.preload)
        except HttpError:
            if server.draining:  # told to end while models were loaded
                return
            raise
        await uvicorn_server.serve(sockets=[listening])
    finally:
        await server.models.close(0.0)
