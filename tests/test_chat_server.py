"""`phi3-mlflow chat --url` with servers that are unlike ours.

Run: pytest tests/test_chat_server.py
"""

import json
from contextlib import contextmanager

import pytest
from scripted_server import running
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from phi3_mlflow.chat.conversation import Conversation
from phi3_mlflow.chat.models import ChatError
from phi3_mlflow.chat.server import Server


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def piece(text, reason=None):
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}])


class Odd:
    """A server with one model whose answer is the bytes that it is given."""

    def __init__(self, answer=b"", kind="text/event-stream", models=None, path="/v1"):
        self.address = ""
        self.bodies = []

        async def listed(request):
            return Response(models, 200 if models else 404, media_type="application/json")

        async def chat(request):
            self.bodies.append((str(request.url.query), await request.json()))
            return Response(answer, media_type=kind)

        self.app = Starlette(
            routes=[
                Route(f"{path}/models", listed),
                Route(f"{path}/chat/completions", chat, methods=["POST"]),
            ]
        )


@contextmanager
def talking_to(odd, path="", name="phi3"):
    with running(odd):
        server = Server(odd.address + path, name)
        try:
            yield Conversation(server)
        finally:
            server.close()


WHOLE = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (json.dumps(WHOLE).encode(), "application/json"),
        (piece("Hi.", "stop"), "text/event-stream"),
        (piece("Hi") + piece(".") + b"data: [DONE]\n\n", "text/plain"),
        (b": comment\r\n\r\nevent: x\r\n" + piece("Hi.").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n\r\n", None),
        (piece("Hi.", "stop") + b"data: [DONE]", "text/event-stream; charset=utf-8"),
    ],
    ids=["whole", "without an end", "as text", "with carriage returns", "without a last line"],
)
def test_what_servers_make_of_a_stream_is_an_answer(answer, kind):
    with talking_to(Odd(answer, kind or "text/event-stream")) as conversation:
        assert "".join(conversation.ask("Hello")) == "Hi."


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        (b"", "text/event-stream", "the server broke the answer off"),
        (piece("Hi."), "text/event-stream", "the server broke the answer off"),
        (b"<html>\n", "text/html", "is no JSON: b'<html>"),
        (b"data: {\n\n", "text/event-stream", "is no JSON"),
        (b"data: []\n\n", "text/event-stream", "is no object"),
        (b"data: \xff\n\n", "text/event-stream", "is no JSON"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "text/event-stream", "is no JSON"),
        (b"data: " + b"x" * 5_000_000, "text/event-stream", "a line of more than 4194304 bytes"),
        (event(error="overloaded"), "text/event-stream", "the server failed: overloaded"),
        (event(error={"message": "a\nb\x1b"}), "text/event-stream", r"the server failed: a b\\x1b"),
        (event(choices="none"), "text/event-stream", "has not the shape of a chat completion"),
    ],
    ids=["empty", "cut", "html", "half", "list", "bytes", "deep", "long", "error", "lines", "shape"],
)
def test_what_is_no_answer_is_an_error(answer, kind, problem):
    with talking_to(Odd(answer, kind)) as conversation:
        with pytest.raises(ChatError, match=problem):
            list(conversation.ask("Hello"))
        assert conversation.messages == []


def test_the_whole_object_of_an_answer():
    with talking_to(Odd(json.dumps(WHOLE).encode(), "application/json")) as conversation:
        assert conversation.ask_whole("Hello") == WHOLE


def test_options_come_as_they_are_set_and_ours_alone_are_not_sent_to_others():
    odd = Odd(piece("Hi.", "stop"))
    with talking_to(odd) as conversation:
        conversation.set("stop", ["a"])
        conversation.set("logit_bias", {"5": 1})
        list(conversation.ask("Hello"))

    assert odd.bodies == [
        (
            "",
            {
                "model": "phi3", "messages": [{"role": "user", "content": "Hello"}], "stop": ["a"],
                "logit_bias": {"5": 1.0}, "stream": True, "stream_options": {"include_usage": True},
            },
        )
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["/deployments/phi", "/deployments/phi/", "/deployments/phi/chat/completions"])
def test_an_address_with_a_path_and_a_query_is_taken_as_it_is(given):
    odd = Odd(piece("Hi.", "stop"), path="/deployments/phi")
    with talking_to(odd, f"{given}?api-version=1") as conversation:
        assert "".join(conversation.ask("Hello")) == "Hi."

    assert odd.bodies[0][0] == "api-version=1"


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (b'{"data": [{"id": "a"}, {"id": "b\\ud83d"}, {"id": "c"}, {"id": 1}, 2]}', "with --model; it has a, c"),
        (b'{"data": 1}', "with --model; it lists none"),
        (b"[]", "is no object"),
        (None, r"the server refuses \(404\)"),
    ],
    ids=["two", "none", "a list", "no list"],
)
def test_where_the_server_does_not_tell_its_only_model_it_has_to_be_named(models, problem):
    with running(Odd(models=models)) as odd, pytest.raises(ChatError, match=problem):
        Server(odd.address)


def test_a_proxy_that_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "gopher://127.0.0.1:1")

    with pytest.raises(ChatError, match="what the environment says of proxies"):
        Server("https://example.invalid", "phi3")


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "a b"])
def test_a_key_that_cannot_be_one_is_an_error_that_does_not_show_it(monkeypatch, key):
    monkeypatch.setenv("PHI3_MLFLOW_API_KEY", key)

    with pytest.raises(ChatError, match="has characters that no key has") as error:
        Server("http://127.0.0.1:1", "phi3")
    assert key not in str(error.value)
