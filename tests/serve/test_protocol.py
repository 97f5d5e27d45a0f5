"""What uvicorn's protocol leaves open: readers that take nothing, what comes behind a request, bytes that are none.

Run: pytest tests/serve/test_protocol.py
"""

import threading
import time

import pytest
from process import PATIENCE, raw, until
from test_connections import BODY, CHAT, LETTERS, received, running, service

from phi3_mlflow.serve import server as server_module


def test_a_reader_that_takes_nothing_of_a_whole_answer_loses_its_connection(monkeypatch):
    monkeypatch.setattr(server_module, "_TAKE_SECONDS", 1)
    many = service(lambda prompt: LETTERS * 150, context_length=5000)
    wide = BODY | {"logprobs": True, "top_logprobs": 20, "max_tokens": 3900}
    with running(many) as server, server.connect(receive_buffer=4096) as slow:
        slow.sendall(raw("POST", CHAT, wide))
        until(lambda: server.records)
        assert server.records[0].status == 200
        until(lambda: not server.connections, 30)


@pytest.mark.parametrize("behind", [b"\r\n", raw("GET", "/health")], ids=["an empty line", "a request"])
def test_a_client_that_sent_more_behind_its_request_is_seen_to_leave(behind):
    gate = threading.Event()
    with running(service(on_call=lambda name, slot, ids: gate.wait(PATIENCE))) as server:
        with server.connect() as connection:
            connection.sendall(raw("POST", CHAT, BODY))
            until(lambda: server.models.loaded()[0].service.statistics().running == 1)
            connection.sendall(behind)
            time.sleep(0.2)  # for the server to read it
        try:
            until(lambda: server.models.leases == 0, 20)
        finally:
            gate.set()
        assert [record.status for record in server.records] == [499]


def test_an_empty_line_behind_the_last_request_spoils_nothing():
    gate = threading.Event()
    waiting = service(on_call=lambda name, slot, ids: gate.wait(PATIENCE))
    with running(waiting) as server, server.connect() as connection:
        connection.sendall(raw("POST", CHAT, BODY, headers=["Connection: close"]))
        until(lambda: server.models.loaded()[0].service.statistics().running == 1)
        connection.sendall(b"\r\n")
        time.sleep(0.2)  # for the server to read it
        gate.set()

        assert received(connection).startswith(b"HTTP/1.1 200")


NO_CHUNK = raw("POST", "/nowhere", headers=["Transfer-Encoding: chunked"])  # answered before its body


def test_what_is_no_request_is_not_told_to_the_log_at_length(caplog):
    with running(service()) as server, server.connect() as connection:
        connection.sendall(NO_CHUNK)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"no chunk\r\n")
        received(connection)
        until(lambda: not server.connections)

    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_asks_for_another_protocol_is_answered_without_a_word(caplog):
    with running(service()) as server:
        answer = server.post(BODY, headers={"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c"})

    assert answer.json()["choices"][0]["message"]["content"] == "abcdefghi"
    assert not caplog.records
