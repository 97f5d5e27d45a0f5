"""What is known of one request to the server, for those who count, log and trace it. Knows no HTTP framework."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from phi3_mlflow.runtime.runs import Run
from phi3_mlflow.runtime.service import Service


@dataclass
class Record:
    """One request, from its first byte to its last.

    Attributes:
        method: of HTTP.
        route: the path as the server knows it, such as `/v1/chat/completions`.
        id: of the request, sent back as `x-request-id`.
        client: the peer's address.
        key: the name of the API key; None where no key was asked for.
        session, user: what the headers `x-session-id` and `x-user-id` say, for traces.
        model: the served model's name; None while it is not known, or where there is none.
        service: what answers; None while it is not known, or where nothing is asked of a model.
        model_id: of its LoggedModel; None where it has none.
        task: of the body: `llm/v1/chat` or `llm/v1/completions`.
        stream: whether the answer is streamed.
        body: the request's fields, for traces alone.
        runs: what was started for it; their answers and times are read when it has ended.
        status: of HTTP; 0 until it is known, 499 where the client left before.
        error: what the client was told, in one line.
        trace_id: of MLflow's trace; None where it is not traced.
        began: Unix time in seconds.
        came, first_byte, ended: on time.monotonic()'s clock; 0 for what has not happened.
    """

    method: str
    route: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    client: str | None = None
    key: str | None = None
    session: str | None = None
    user: str | None = None
    model: str | None = None
    service: Service | None = None
    model_id: str | None = None
    task: str | None = None
    stream: bool = False
    body: Mapping[str, Any] | None = None
    runs: list[Run] = field(default_factory=list)
    status: int = 0
    error: str | None = None
    trace_id: str | None = None
    began: float = field(default_factory=time.time)
    came: float = field(default_factory=time.monotonic)
    first_byte: float = 0.0
    ended: float = 0.0


class Observer(Protocol):
    """Who is told of requests. Called in the event loop: returns within a millisecond, and raises nothing."""

    def begun(self, record: Record) -> None:
        """A request whose model is known is about to be started; may set `trace_id`."""

    def ended(self, record: Record) -> None:
        """A request has ended, however."""
