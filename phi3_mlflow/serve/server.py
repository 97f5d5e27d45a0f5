"""The server's process: the socket, uvicorn, signals, and an end that lets answers finish. Knows no routes."""

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.hosting import RequestExecutor
from phi3_mlflow.runtime.surrogates import half

from .app import Server

_logger = logging.getLogger(__name__)

# Bytes of a request's line and headers, and the seconds in which they must have arrived.
_HEADER_BYTES = 65_536
_HEADER_SECONDS = 20.0
# Seconds for which an idle connection is kept, in which a client must take something of what was sent to it, and for
# which the last bytes may take at the end.
_KEEP_ALIVE = 65
_TAKE_SECONDS = 60
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
        trusted_proxies: see `http_server`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    preload: bool = False
    trusted_proxies: Sequence[str] = ()


class _Protocol(H11Protocol):
    """What uvicorn leaves open: requests that begin and do not arrive, and what comes behind one that is answered."""

    _arriving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # the last request has come; some clients send an empty line behind it
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _HEADER_BYTES:
            self.flow.resume_reading()  # else nobody would see that the client leaves
        self._watch()

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except h11.LocalProtocolError:  # what came is no request, and an answer was begun: no 400 can be told
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._arriving is not None:
            self._arriving.cancel()

    def _unsupported_upgrade_warning(self) -> None:
        """Clients may ask for HTTP/2 or WebSockets, and go on without."""

    def _watch(self) -> None:
        """Runs the clock while headers arrive, and while a body arrives that was answered before its end."""
        headers = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if headers or (self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE):
            if self._arriving is None:
                self._arriving = self.loop.call_later(_HEADER_SECONDS, self.transport.close)
        elif self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `serve`: uvicorn would stop listening at once, and end with the signal's status."""
        yield


def listen(process: Process) -> socket.socket:
    """The socket that the server listens at.

    Raises:
        ServeError: the address is none or not this machine's, or the port is in use.
    """
    if not process.host or half(process.host) is not None:  # no name would be every address of this machine
        raise ServeError(f"the host {process.host!r} is no address: give one of this machine's, such as 127.0.0.1")
    try:
        family = socket.AF_INET6 if ":" in process.host else socket.AF_INET
        listening = socket.create_server((process.host, process.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            other = process.port + 1 if process.port < 65535 else 8000
            problem = f"port {process.port} of {process.host} is in use: choose another one, such as --port {other}"
            raise ServeError(f"{problem}, or --port 0 for any that is free") from error
        raise ServeError(f"the server cannot listen at {process.host}:{process.port}: {error}") from error
    # Connections inherit it. asyncio sets it for sockets whose protocol is named alone; without it a client that
    # acknowledges late (40 ms) gets what follows the headers as late.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; without it a client that takes nothing could hold on for ever
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _TAKE_SECONDS)
    return listening


def is_public(host: str) -> bool:
    """Whether other machines can reach the address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def http_server(app: ASGIApp, trusted_proxies: Sequence[str] = ()) -> uvicorn.Server:
    """uvicorn over an app, with this module's limits. It takes no signals: set `should_exit` to end it.

    Args:
        app: the app.
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-For is taken for the client's address.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_BYTES,
    )
    return _Uvicorn(config)


async def serve(server: Server, process: Process, listening: socket.socket) -> None:
    """Serves until the process is told to end (SIGINT or SIGTERM).

    Then it is no longer ready, running answers finish or are cut after `drain` seconds, and it ends; at once, if it is
    told a second time.

    Raises:
        HttpError: a model that was to be loaded at the start cannot be.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(RequestExecutor())
    uvicorn_server = http_server(server.app, process.trusted_proxies)
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

    async def start() -> None:
        try:
            await server.models.start(process.preload)
        except BaseException:
            if not ending:
                uvicorn_server.should_exit = True
            raise
        server.starting = False

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    # Whoever watches over the process is answered while models are loaded.
    server.starting = True
    starting = loop.create_task(start())
    try:
        await uvicorn_server.serve(sockets=[listening])
        if starting.done() and not ending:
            await starting
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await server.models.close(0.0)
