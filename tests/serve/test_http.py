"""What the server makes of everything that may come over a connection, good and odd.

Run: pytest tests/serve/test_http.py
"""

import json
import socket

import httpx
import pytest
from process import ENDLESS, MADRID, PATIENCE, SPAIN, chat, endless, events, post, raw, said, until

CHAT = "/v1/chat/completions"
SECRET = "the word is xylophone"
ASKING = {"messages": [{"role": "user", "content": SECRET}]}
HUGE = "1" + "0" * 5000


def with_raw(fields: str) -> bytes:
    return (json.dumps(ASKING)[:-1] + ", " + fields + "}").encode()


# Path, body, status, and a part of the message.
REFUSED = {
    "broken JSON": (CHAT, b'{"messages": [', 400, "is not valid JSON"),
    "no body": (CHAT, b"", 400, "is not valid JSON"),
    "a list": (CHAT, b"[1]", 400, "must be a JSON object"),
    "bytes that are no text": (CHAT, b"\xff\xfe\x00", 400, "is not valid JSON"),
    "NaN": (CHAT, with_raw('"temperature": NaN'), 400, "NaN is not a number of JSON"),
    "a number beyond all floats": (CHAT, with_raw('"temperature": 1e999'), 400, "beyond all floating-point"),
    "a number of 5000 digits": (CHAT, with_raw(f'"seed": {HUGE}'), 400, "is not valid JSON"),
    "100,000 levels": (CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "nested too deeply"),
    "a lone surrogate as a field": (CHAT, with_raw('"\\ud800": 1'), 400, "is not a field of this request"),
    "a lone surrogate as a model": (CHAT, with_raw('"model": "\\ud800"'), 404, "is not served here"),
    "a lone surrogate in the text": (
        CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "U+D800 at position 0",
    ),
    "a lone surrogate in a stop sequence": (CHAT, with_raw('"stop": ["a", "b\\ud800"]'), 400, "`stop[1]` has the lone"),
    "a path that ends in a slash": ("/v1/models/../completions/", {"prompt": "a"}, 404, "there is nothing at"),
    "a model that is a number": (CHAT, with_raw('"model": 1'), 400, "it must be a string"),
    "a model's path": (CHAT, with_raw('"model": "/etc/passwd"'), 404, "is not served here"),
    "a field of 100,000 characters": (CHAT, with_raw(f'"{"x" * 100_000}": 1'), 400, "is not a field of this request"),
    "an unknown option": (CHAT, with_raw('"best": 1'), 400, "is not a field of this request"),
    "stream_options without a stream": (CHAT, with_raw('"stream_options": {}'), 400, "`stream` is not true"),
    "a stream that is a word": (CHAT, with_raw('"stream": "yes"'), 400, "must be true or false"),
    "custom inputs": (CHAT, with_raw('"custom_inputs": {}'), 400, "at the top level"),
    "a picture": (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, 400,
        "this model reads text",
    ),
    "a suffix": ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "does not fill in text"),
    "best_of": ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "choices are not ranked"),
    "a prompt's id beyond the vocabulary": ("/v1/completions", {"prompt": [9**9]}, 400, "token ids are below"),
    "65 prompts": ("/v1/completions", {"prompt": ["a"] * 65}, 400, "at most 64"),
    "a second prompt that is empty": ("/v1/completions", {"prompt": ["a", ""]}, 400, "`prompt[1]`"),
    "a stored response": ("/v1/responses", {"input": "a", "store": True}, 400, "nothing is stored"),
    "a second message of a response that is empty": (
        "/v1/responses", {"input": [*SPAIN, {"role": "user", "content": ""}]}, 400, "`input[1].content`",
    ),
    "a token that is a word": ("/detokenize", {"tokens": ["a"]}, 400, "`tokens[0]`"),
    "text to tokenize that is none": ("/tokenize", {"prompt": 1}, 400, "it must be a string"),
    "nothing at the path": ("/v1/embeddings", {"input": "a"}, 404, "there is nothing at '/v1/embeddings'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_a_clean_error_with_a_reason(server, name):
    path, body, status, reason = REFUSED[name]

    answer = post(server, path, body)

    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text
    assert "xylophone" not in answer.text
    assert len(answer.text) < 1500


def is_object(body) -> bool:
    """Whether it is an object with room for one more field."""
    return isinstance(body, bytes) and body.startswith(b'{"messages": [{') and body.endswith(b"}")


OBJECTS = [name for name in REFUSED if is_object(REFUSED[name][1]) and "stream" not in name]


@pytest.mark.parametrize("name", OBJECTS)
def test_the_same_as_a_stream_is_the_same_error(server, name):
    _, body, status, _ = REFUSED[name]

    answer = post(server, CHAT, body[:-1] + b', "stream": true}')

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"


def test_other_content_types_are_told_and_none_is_taken_for_json(server):
    text = httpx.post(server.address + CHAT, content=b"{}", headers={"content-type": "text/plain"}, timeout=PATIENCE)
    none = httpx.post(server.address + CHAT, content=json.dumps(chat()).encode(), timeout=PATIENCE)

    assert text.status_code == 415
    assert "must be application/json" in text.json()["error"]["message"]
    # A page of another site can post without a type, and without asking first.
    assert none.status_code == 415
    assert "the content type is missing" in none.json()["error"]["message"]


def test_a_page_under_another_name_gets_nothing(server):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        answer = httpx.get(f"{server.address}/v1/models", headers={"host": host}, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_host")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
        answer = httpx.get(f"{server.address}/v1/models", headers={"host": host}, timeout=PATIENCE)
        assert answer.status_code == 200


def test_a_text_to_be_tokenized_is_checked_and_bounded(server):
    for prompt, problem in (("\ud800", "U+D800"), ("a" * 200_001, "at most 200000"), ("", "at least one character")):
        content, kind = json.dumps({"prompt": prompt}), {"content-type": "application/json"}
        answer = httpx.post(f"{server.address}/tokenize", content=content, headers=kind, timeout=PATIENCE)
        assert answer.status_code == 400
        assert problem in answer.json()["error"]["message"]


def test_methods_that_are_not_taken_are_a_405(server):
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        answer = httpx.request(method, server.address + CHAT, timeout=PATIENCE)
        assert answer.status_code == 405
        assert answer.json()["error"]["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "POST"


def test_health_is_answered_to_head_and_under_both_names(server):
    for path in ("/health", "/ping", "/ready", "/version"):
        assert httpx.get(server.address + path, timeout=PATIENCE).status_code == 200
        head = httpx.head(server.address + path, timeout=PATIENCE)
        assert head.status_code == 200
        assert head.content == b""


def test_every_answer_has_a_request_id_and_no_server_header(server):
    good, bad = post(server, CHAT, chat()), post(server, CHAT, b"{")

    assert good.headers["x-request-id"] != bad.headers["x-request-id"]
    assert "server" not in good.headers


def test_the_headers_of_a_stream_keep_proxies_from_buffering(server):
    answer = post(server, CHAT, chat(stream=True))

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert said(answer.text) == MADRID


def test_the_usage_is_null_in_every_chunk_but_its_own_where_it_was_asked_for(server):
    asked = events(post(server, CHAT, chat(stream=True, stream_options={"include_usage": True})).text)
    plain = events(post(server, CHAT, chat(stream=True, stream_options={})).text)

    assert [chunk["usage"] is None for chunk in asked] == [True] * (len(asked) - 1) + [False]
    assert not any("usage" in chunk for chunk in plain)


def test_http_1_0_is_answered_and_closed(server):
    with server.connect() as connection:
        connection.sendall(raw("POST", CHAT, chat(stream=True), version="1.0"))
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    assert text.startswith("HTTP/1.1 200")
    assert said(text) == MADRID


def test_requests_that_follow_each_other_without_waiting_are_answered_in_their_order(server):
    with server.connect() as connection, connection.makefile("rb") as answer:
        connection.sendall(
            raw("POST", CHAT, chat()) + raw("GET", "/v1/models") + raw("GET", "/health", headers=["Connection: close"])
        )
        text = answer.read().decode()

    assert text.index("chat.completion") < text.index('"object":"list"')
    assert text.count("HTTP/1.1 200") == 3


def test_a_body_in_chunks_is_taken(server):
    content = json.dumps(chat()).encode()

    parts = iter([content[:9], content[9:]])
    headers = {"content-type": "application/json"}
    answer = httpx.post(server.address + CHAT, content=parts, headers=headers, timeout=PATIENCE)

    assert answer.json()["choices"][0]["message"]["content"] == MADRID


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # how TLS begins
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"\x00" * 1000,
    ],
    ids=["nonsense", "TLS", "header", "length", "smuggled", "zeros"],
)
def test_bytes_that_are_no_request_end_the_connection_and_nothing_else(server, sent):
    with server.connect() as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError:
            received = b""

    assert b"HTTP/1.1 2" not in received
    assert b"Traceback" not in received
    assert post(server, CHAT, chat()).status_code == 200


def test_a_body_above_the_limit_is_a_413_declared_or_in_chunks(server):
    declared = raw("POST", CHAT, b"x", headers=[]).replace(b"Content-Length: 1", b"Content-Length: 99999999")
    with server.connect() as connection:
        connection.sendall(declared)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    piece = b"x" * 2**20

    answer = httpx.post(server.address + CHAT, content=iter([piece] * 5), timeout=PATIENCE)

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


# Clients that leave.


LEAVING = {
    "a stream": (CHAT, endless(stream=True)),
    "a whole answer": (CHAT, endless()),
    "a completion": ("/v1/completions", {"prompt": "The", "max_tokens": 4000, **ENDLESS}),
    "a response": (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 4000, **ENDLESS},
    ),
    "MLflow's route": ("/invocations", None),
    "MLflow's route, as a stream": ("/invocations", None),
}


def leaving_body(name):
    path, body = LEAVING[name]
    if body is None:
        body = endless()
        body["custom_inputs"] = {"logit_bias": body.pop("logit_bias")}
        body |= {"stream": True} if "stream" in name else {}
    return path, body


@pytest.mark.parametrize("name", LEAVING)
def test_a_client_that_leaves_frees_its_slot_at_once(server, name):
    path, body = leaving_body(name)
    until(lambda: server.running() == 0)
    before = server.generated()
    connection = server.connect()
    connection.sendall(raw("POST", path, body))
    until(lambda: server.running() == 1)
    connection.close()
    until(lambda: server.running() == 0)

    assert server.generated() - before < 4000  # it was not computed to its end
    assert server.waiting() == 0


def test_clients_that_leave_the_queue_are_forgotten_and_the_others_answered(server):
    until(lambda: server.running() == 0)
    busy = [server.connect() for _ in range(4)]
    for connection in busy:
        connection.sendall(raw("POST", CHAT, endless(stream=True)))
    until(lambda: server.running() == 4)
    waiting = [server.connect() for _ in range(3)]
    for connection in waiting:
        connection.sendall(raw("POST", CHAT, endless()))
    until(lambda: server.waiting() == 3)
    for connection in waiting:
        connection.close()
    until(lambda: server.waiting() == 0)
    for connection in busy:
        connection.close()

    assert post(server, CHAT, chat()).json()["choices"][0]["message"]["content"] == MADRID
    until(lambda: server.running() == 0)


# MLflow's own route.


def test_a_stream_of_invocations_says_what_the_whole_answer_says(server):
    whole = post(server, "/invocations", {"messages": SPAIN}).json()
    stream = post(server, "/invocations", {"messages": SPAIN, "stream": True})

    assert stream.headers["content-type"].startswith("text/event-stream")
    assert said(stream.text) == whole[0]["choices"][0]["message"]["content"] == MADRID
    assert stream.text.endswith("data: [DONE]\n\n")


def test_a_bad_stream_of_invocations_is_mlflows_400(server):
    answer = post(server, "/invocations", {"messages": [], "stream": True})

    assert answer.status_code == 400
    assert answer.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    assert answer.json()["field"] == "messages"
