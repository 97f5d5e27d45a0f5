"""/invocations: MLflow's scoring app unchanged, and a stream where the body has `stream: true`.

Knows MLflow's app as an ASGI app, and its errors' shape.
"""

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from phi3_mlflow.runtime import chat, hosting
from phi3_mlflow.runtime.answers import Answer, Piece
from phi3_mlflow.runtime.errors import Unavailable
from phi3_mlflow.runtime.model import clean
from phi3_mlflow.runtime.service import Service

from .errors import HttpError
from .records import Record
from .streams import event

_logger = logging.getLogger(__name__)

_OPEN = ("messages", "prompt")  # bodies that MLflow hands on as they are


def json_object(content_type: str | None, content: bytes) -> dict[str, Any] | None:
    """The body as an object; None where it is none, which is for MLflow to say."""
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        return None
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def is_stream(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for a stream; everything else is MLflow's to answer."""
    return body.get("stream") is True and any(name in body for name in _OPEN)


async def forward(app: ASGIApp, request: HttpRequest, content: bytes, record: Record) -> Response:
    """What MLflow's app answers. Its threads are told when this is cancelled, so that they end their work.

    Args:
        app: MLflow's, over one model.
        request: as it came.
        content: its body.
        record: is given what was begun for it.
    """
    body: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if body:
            return body.pop()
        await asyncio.Event().wait()  # who waits for the client to leave is the caller
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    with hosting.hosted() as hosted:
        record.runs = hosted.runs
        try:
            await app(request.scope, receive, send)
        except asyncio.CancelledError:
            hosted.leave()
            raise
        except Exception as error:
            if not (sent and sent[-1]["type"] == "http.response.body" and not sent[-1].get("more_body")):
                raise
            # Starlette has answered with a bare 500, and tells the server's log besides.
            _logger.error("MLflow's app failed", exc_info=error)
    response = Response(b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["status"])
    response.raw_headers = sent[0]["headers"]
    return response


def refused(error: Exception) -> Response:
    """An error before the stream, as MLflow's app would tell it."""
    cleaned = clean(Unavailable(str(error)) if isinstance(error, HttpError) else error)
    return Response(cleaned.serialize_as_json(), cleaned.get_http_status_code(), media_type="application/json")


def failed(error: HttpError) -> bytes:
    """An error in the middle of a stream."""
    return event({"error": {"message": str(error), "code": error.code}})


class Shape:
    """The chunks of one stream, as `predict_stream` gives them.

    Args:
        service: of the model.
        answer: in the making.
    """

    def __init__(self, service: Service, answer: Answer):
        self._task, self._name = service.task, service.name
        self._answer = answer
        self._opened: set[int] = set()

    def chunks(self, piece: Piece) -> Iterator[Any]:
        """The chunks of a piece; text alone for the flat task."""
        yield from chat.chunks(self._answer, self._task, self._name, piece, self._opened)
