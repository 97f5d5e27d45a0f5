"""Requests to MLflow's scoring server, over HTTP or to its app in this process."""

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

JSON = "application/json"
HELLO = [{"role": "user", "content": "Hello there"}]


def encoded(body: Any) -> bytes:
    """A body as bytes: text and bytes as they are, anything else as JSON."""
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def post(address: str, body: Any, content_type: str | None = JSON, *, path: str = "/invocations") -> tuple[int, str]:
    """Status and text of the answer of the server at `address`."""
    host = urlsplit(address)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=120)
    try:
        headers = {} if content_type is None else {"Content-Type": content_type}
        connection.request("POST", path, encoded(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


class App:
    """MLflow's scoring app around a loaded model, in this process."""

    def __init__(self, model: Any):
        from mlflow.pyfunc import scoring_server
        from starlette.testclient import TestClient

        self._client = TestClient(scoring_server.init(model), raise_server_exceptions=False)

    def post(self, body: Any, content_type: str = JSON) -> tuple[int, str]:
        """Status and text of the answer."""
        answer = self._client.post("/invocations", content=encoded(body), headers={"Content-Type": content_type})
        return answer.status_code, answer.text


@contextmanager
def serving_apart() -> Iterator[None]:
    """Takes back, at the end of the block, that MLflow's app marks the whole process as a server."""
    name = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def shape(value: Any) -> Any:
    """The keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


def clean_error(text: str) -> dict[str, str]:
    """The error in an answer's text, which has to be one of ours: short, with its field, and without a traceback."""
    error = json.loads(text)
    assert set(error) == {"error_code", "message", "field"}, text[:500]
    assert error["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "Traceback" not in text
    assert len(text) < 1500
    return error
