"""Connections and answers that go wrong, by the server's own HTTP protocol in this process, with short times.

Run: pytest tests/serve/test_connections.py
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx
import pytest
from fakes import TOKENS, FakeDecoder, spell
from process import PATIENCE, events, raw, until

from phi3_mlflow.runtime.answers import Piece
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve import server as server_module
from phi3_mlflow.serve.app import Limits, Server
from phi3_mlflow.serve.keys import Keys
from phi3_mlflow.serve.served import Spec
from phi3_mlflow.serve.server import Process, http_server, listen
from phi3_mlflow.serve.streams import Pieces

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "one"}], "repetition_guard": False}
LETTERS = spell("abcdefghijklmnopqrstuvwxyz")[1:]


@dataclass
class Loaded:
    service: Service
    name: str = "phi3"
    uri: str = "models:/phi3/1"
    model_id: str | None = None
    version: str | None = None


class OneModel:
    """In the place of `Models`, which loads real ones: a service that is there."""

    def __init__(self, service):
        self._loaded = Loaded(service)
        self.leases = 0

    def find(self, name):
        return Spec("phi3", "models:/phi3/1")

    def list(self):
        return [{"id": "phi3"}]

    def loaded(self):
        return [self._loaded]

    def failed(self):
        return {} if self._loaded.service.statistics().alive else {"phi3": "has ended"}

    @asynccontextmanager
    async def lease(self, name):
        self.leases += 1
        try:
            yield self._loaded
        finally:
            self.leases -= 1


@dataclass
class Running:
    address: tuple[str, int]
    models: OneModel
    records: list
    connections: set

    def begun(self, record):
        pass

    def ended(self, record):
        self.records.append(record)

    def connect(self, receive_buffer=None):
        connection = socket.socket()
        connection.settimeout(PATIENCE)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(self.address)
        return connection

    def post(self, body, path=CHAT, **more):
        return httpx.post(f"http://{self.address[0]}:{self.address[1]}{path}", json=body, timeout=PATIENCE, **more)


@contextmanager
def running(service, trusted_proxies=(), **limits):
    """A server over one service, for the length of a block."""
    with listen(Process(port=0)) as listening:
        models = OneModel(service)
        state = Running(listening.getsockname(), models, [], set())
        server = Server(models, keys=Keys({}), limits=Limits(**limits), observers=[state])
        uvicorn = http_server(server.app, trusted_proxies)
        state.connections = uvicorn.server_state.connections
        thread = threading.Thread(target=lambda: asyncio.run(uvicorn.serve(sockets=[listening])), daemon=True)
        thread.start()
        until(lambda: uvicorn.started)
        try:
            yield state
        finally:
            uvicorn.should_exit = True
            thread.join(PATIENCE)
            service.close()
            assert not thread.is_alive()


def service(script=lambda prompt: LETTERS[:9], **values):
    return Service(TOKENS, FakeDecoder(script, **values))


def received(connection):
    """All that comes until the server closes."""
    try:
        return b"".join(iter(lambda: connection.recv(65536), b""))
    except ConnectionError:
        return b""


def drips(connection):
    """Sends byte after byte; the seconds until the server has had enough."""
    start = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - start < 20:
            connection.sendall(b"x")
            time.sleep(0.1)
    return time.monotonic() - start


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(server_module, "_HEADER_SECONDS", 0.5)


@pytest.mark.parametrize("begin", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_headers_that_do_not_arrive_end_the_connection(hurried, begin):
    with running(service()) as server, server.connect() as connection:
        connection.sendall(begin)

        assert received(connection) == b""


def test_headers_of_a_second_request_that_drip_end_the_connection_too(hurried):
    with running(service()) as server, server.connect() as connection:
        connection.sendall(raw("GET", "/health"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")

        assert drips(connection) < 10


def test_a_connection_that_rests_between_requests_is_kept(hurried):
    with running(service()) as server, httpx.Client(timeout=PATIENCE) as client:
        for _ in range(2):
            answer = client.get(f"http://{server.address[0]}:{server.address[1]}/health")
            time.sleep(1.0)
        assert answer.status_code == 200
        assert len({record.client for record in server.records}) == 1


def test_an_answer_that_takes_long_is_not_taken_for_headers_that_do_not_arrive(hurried):
    def slowly(name, slot, ids):
        time.sleep(0.2)

    with running(service(on_call=slowly)) as server:
        assert server.post(BODY).json()["choices"][0]["message"]["content"] == "abcdefghi"


def test_a_body_that_does_not_arrive_is_a_408(hurried):
    with running(service(), body_seconds=0.3) as server, server.connect() as connection:
        connection.sendall(raw("POST", CHAT, BODY)[:-10])
        answer = received(connection)

        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in answer


def test_a_refused_body_that_drips_on_ends_the_connection(hurried):
    with running(service(), body=1000) as server, server.connect() as connection:
        connection.sendall(raw("POST", CHAT, BODY).replace(b"Content-Length: ", b"Content-Length: 99999"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")

        assert drips(connection) < 10


def test_a_reader_that_takes_nothing_is_given_up_and_holds_up_nobody():
    """A long answer with many alternatives for each token, so that it does not fit into the buffers on the way."""
    many = service(lambda prompt: LETTERS * 150, slots=2, context_length=5000)
    wide = BODY | {"logprobs": True, "top_logprobs": 20, "stream": True, "max_tokens": 3900}
    with running(many, write_seconds=1.0) as server, server.connect(receive_buffer=4096) as slow:
        slow.sendall(raw("POST", CHAT, wide))
        until(lambda: server.models.leases == 1)
        other = server.post(BODY | {"max_tokens": 5})
        assert other.json()["choices"][0]["message"]["content"] == "abcde"
        until(lambda: server.models.leases == 0)

        left = [record for record in server.records if record.status in (200, 499) and record.error]
        assert [record.error for record in left] == ["the client left"]
        assert server.models.loaded()[0].service.statistics().running == 0


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_that_comes_with_a_piece_is_not_lost(turns):
    """Whatever the event loop's turn at which it comes after the piece."""

    async def take(pieces):
        async for _ in pieces:
            pass

    async def main(pieces, put):
        task = asyncio.create_task(take(pieces))
        await asyncio.sleep(0.01)
        put(Piece(0, "a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.cancelled()

    async def of_the_server():
        pieces = Pieces(time.monotonic() + 60)
        put = pieces.deliver()
        pieces.runs.append(quiet.start(BODY, deliver=lambda event: None))
        await main(pieces, put)

    async def of_the_seam():
        run = quiet.start(BODY)
        await main(run, lambda piece: run._sink(piece))

    gate = threading.Event()
    quiet = service(on_call=lambda name, slot, ids: gate.wait(PATIENCE))
    try:
        asyncio.run(of_the_server())
        asyncio.run(of_the_seam())
    finally:
        gate.set()
        quiet.close()


def test_the_model_of_a_stream_of_invocations_is_no_option():
    with running(service()) as server:
        text = server.post(BODY | {"stream": True, "model": "phi3"}, "/invocations").text

        assert "".join(line["choices"][0]["delta"].get("content", "") for line in events(text)) == "abcdefghi"


def test_a_client_that_leaves_within_its_body_is_no_error(caplog):
    with running(service()) as server:
        with server.connect() as connection:
            connection.sendall(raw("POST", CHAT, BODY)[:-10])
        until(lambda: server.records)

        assert [(record.status, record.error) for record in server.records] == [(499, "the client left")]
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_error_in_the_middle_of_a_stream_is_one_line_and_the_end():
    calls = []

    def failing(name, slot, ids):
        calls.append(name)
        if calls.count("decode") == 4:
            raise RuntimeError("the secret of the decoder")

    with running(service(on_call=failing)) as server:
        text = server.post(BODY | {"stream": True}).text
        lines = events(text)

        assert lines[0]["choices"][0]["delta"]["content"] == "a"
        assert set(lines[-1]) == {"error"}
        assert [line for line in lines if "error" in line] == lines[-1:]
        assert "[DONE]" not in text
        assert "secret" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status_and_no_internals(stream):
    def failing(name, slot, ids):
        raise RuntimeError("the secret of the decoder")

    with running(service(on_call=failing)) as server:
        answer = server.post(BODY | {"stream": stream})

        assert answer.status_code in (500, 503)
        assert set(answer.json()) == {"error"}
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text


def test_a_scheduler_that_has_died_shows_in_health():
    def dying(name, slot, ids):
        if name == "prefill":
            raise SystemExit

    with running(service(on_call=dying)) as server:
        assert server.post(BODY).status_code in (500, 503)
        health = httpx.get(f"http://{server.address[0]}:{server.address[1]}/health", timeout=PATIENCE)

        assert health.status_code == 503


def test_a_full_queue_is_a_429_that_says_when_to_come_back():
    gate = threading.Event()

    def waiting(name, slot, ids):
        gate.wait(PATIENCE)

    full = Service(TOKENS, FakeDecoder(lambda prompt: LETTERS[:3], on_call=waiting), queue_limit=1)
    with running(full) as server:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(server.post(BODY))) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: full.statistics().running + full.statistics().waiting == number + 1)
        refused = server.post(BODY | {"stream": True})
        ready = httpx.get(f"http://{server.address[0]}:{server.address[1]}/ready", timeout=PATIENCE)
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)

        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert ready.status_code == 503
        assert [json.loads(answer.text)["choices"][0]["message"]["content"] for answer in answers] == ["abc"] * 2


def test_an_answer_ends_with_what_it_has_when_its_time_is_over():
    def slowly(name, slot, ids):
        time.sleep(0.2)

    with running(service(on_call=slowly), seconds=1.0) as server:
        choice = server.post(BODY).json()["choices"][0]

        assert choice["finish_reason"] == "length"
        assert choice["stop_reason"] == "max_time"
        assert "abcdefghi".startswith(choice["message"]["content"])


def test_what_follows_the_headers_does_not_wait_for_a_client_to_acknowledge_them():
    with listen(Process(port=0)) as listening, socket.create_connection(listening.getsockname()) as client:
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getpeername() == client.getsockname()


@pytest.mark.parametrize(("trusted", "client"), [((), "127.0.0.1"), (("127.0.0.1",), "203.0.113.9")])
def test_what_a_client_says_of_its_address_is_taken_from_trusted_proxies_alone(trusted, client):
    with running(service(), trusted_proxies=trusted) as server:
        server.post(BODY, headers={"x-forwarded-for": "203.0.113.9"})
        until(lambda: server.records)

        assert server.records[0].client == client


def test_nothing_leads_to_where_a_host_header_says():
    with running(service()) as server:
        answer = server.post(BODY, CHAT + "/", headers={"host": "evil.example"})

        assert answer.status_code == 404
        assert "location" not in answer.headers


class Reading(Service):
    """Reads no request before `go` is set."""

    def __init__(self):
        super().__init__(TOKENS, FakeDecoder(lambda prompt: LETTERS[:9]))
        self.go = threading.Event()
        self.read = []

    def prepare(self, request):
        self.read.append(request.prompt)
        assert self.go.wait(PATIENCE)
        return super().prepare(request)


def test_requests_that_take_long_to_be_read_hold_up_nobody_else_and_those_whose_client_left_are_not_read():
    reading = Reading()
    with running(reading) as server:
        body = BODY | {"messages": [{"role": "user", "content": "two"}]}
        connections = [server.connect() for _ in range(5)]
        for connection in connections[:4]:
            connection.sendall(raw("POST", CHAT, BODY))
        until(lambda: len(reading.read) == 4)
        connections[4].sendall(raw("POST", CHAT, body))
        until(lambda: server.models.leases == 5)
        health = httpx.get(f"http://{server.address[0]}:{server.address[1]}/health", timeout=PATIENCE)
        connections[4].close()
        until(lambda: server.models.leases == 4)
        reading.go.set()
        answers = [connection.recv(65536) for connection in connections[:4]]

        assert health.status_code == 200
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        assert len(reading.read) == 4
        for connection in connections:
            connection.close()
