"""Bodies of requests: read, and as JSON objects. Knows nothing of what they mean."""

import asyncio
import json
import math
from typing import Any

from starlette.requests import ClientDisconnect, Request

from phi3_mlflow.runtime.errors import shorten

from .errors import HttpError
from .streams import ClientLeft


async def content(request: Request, seconds: float) -> bytes:
    """A request's body, all of it.

    Raises:
        ClientLeft: before its end.
        HttpError: it has not arrived in so many seconds.
    """
    try:
        async with asyncio.timeout(seconds):
            return await request.body()
    except ClientDisconnect:
        raise ClientLeft from None
    except TimeoutError:
        raise HttpError(408, f"the body has not arrived within {seconds:g} seconds", code="request_timeout") from None


def json_object(content_type: str | None, content: bytes) -> dict[str, Any]:
    """A body as an object.

    Raises:
        HttpError: it is none.
    """
    # Also where it is missing: a page of another site may post without a type, and without asking first.
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        given = f"is {shorten(kind)}" if kind else "is missing"
        raise HttpError(415, f"the content type {given}; it must be application/json")
    try:
        body = json.loads(content, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 120)
        raise HttpError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shorten(text)} is beyond all floating-point numbers")
    return number
