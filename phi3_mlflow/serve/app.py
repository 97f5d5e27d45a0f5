"""The ASGI app: routes of OpenAI's API and of MLflow's scoring server over the same loaded models.

Knows HTTP and what the seam of the runtime offers; who counts, logs and traces is told by records.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.service import Prepared, Service

from . import bodies, invocations, openai, responses, status, tokenize
from .errors import HttpError, not_allowed, not_found
from .gate import Gate
from .keys import Keys
from .models import Loaded, Models
from .records import Observer, Record
from .streams import ClientLeft, EventStream, Pieces, event, while_connected
from .wire import JsonResponse

_logger = logging.getLogger(__name__)

DONE = event("[DONE]")
# Threads that read requests and write answers. Python's lock lets one of them go on at a time, mostly.
_WORKERS = 4
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body: bytes.
        body_seconds: until the body has arrived.
        seconds: until the answer ends with what it has.
        write_seconds: in which a client must take what was sent.
        concurrent: requests to models at once, those that wait included; None for any number.
    """

    body: int = 4 * 2**20
    body_seconds: float = 30.0
    seconds: float = 600.0
    write_seconds: float = 60.0
    concurrent: int | None = None


class _Shape(Protocol):
    """How answers become a response."""

    def whole(self) -> dict[str, Any]: ...


class Server:
    """What the routes share.

    Args:
        models: those that are served.
        keys: API keys; none asked for where it is empty.
        limits: of a request.
        observers: are told of every request.
        metrics: the text of /metrics.
        feedback: takes a trace's id and what somebody thinks of the answer.
        page: further routes, open to everybody.
        origins: of pages that may call from a browser.
        hosts: names by which the server may be called; None for any.
    """

    def __init__(
        self,
        models: Models,
        *,
        keys: Keys,
        limits: Limits,
        observers: Sequence[Observer] = (),
        metrics: Callable[[Sequence[Loaded]], bytes] | None = None,
        feedback: Callable[[str, bool], Awaitable[None]] | None = None,
        page: Sequence[BaseRoute] = (),
        origins: Sequence[str] = (),
        hosts: Collection[str] | None = None,
    ):
        self.models = models
        self.limits = limits
        self.starting = False  # whether models are still loaded that were to be before the first request
        self.draining = False
        self.current = 0  # requests that were posted and have no answer yet
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="phi3-read")
        self._metrics = metrics
        self._feedback = feedback
        routes: list[BaseRoute] = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/models", self._list, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info, methods=["GET"]),
            Route("/invocations", self._invocations, methods=["POST"]),
            Route("/ping", self._health, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/version", self._version, methods=["GET"]),
            Route("/metrics", self._metrics_text, methods=["GET"]),
            Route("/feedback", self._take_feedback, methods=["POST"]),
            *page,
        ]
        open_paths = {"/ping", "/health", "/ready", "/version", *(route.path for route in page)}  # type: ignore[attr-defined]
        middleware = [
            Middleware(
                Gate, keys=keys, limits=limits, observers=observers, open_paths=open_paths, server=self, hosts=hosts
            )
        ]
        if origins:
            cors = Middleware(
                CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "x-mlflow-trace-id", "retry-after"],
            )  # fmt: skip
            middleware.insert(0, cors)
        # Everything else goes through to the gate.
        self.app = Starlette(
            routes=routes, middleware=middleware, exception_handlers={404: not_found, 405: not_allowed}
        )
        # Where a redirect leads to would be what the Host header says.
        self.app.router.redirect_slashes = False
        self._observers = observers

    async def _chat(self, request: HttpRequest) -> Response:
        def parse(body: Mapping[str, Any], service: Service) -> openai.Wanted:
            return openai.parse_chat(body, service.defaults, tools=service.calls_tools)

        return await self._answer(request, parse)

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(
            request, lambda body, service: openai.parse_completion(body, service.defaults, tools=service.calls_tools)
        )

    async def _answer(self, request: HttpRequest, parse: Callable[[Any, Service], openai.Wanted]) -> Response:
        """A completion of either kind, whole or as a stream."""
        body = await self._body(request)
        async with AsyncExitStack() as stack:
            loaded, record = await self._lease(stack, request, body)
            service = loaded.service

            def read() -> tuple[openai.Wanted, list[Prepared], list[str | None]]:
                wanted = parse(body, service)
                prepared = [service.prepare(each) for each in wanted.requests]
                return wanted, prepared, [openai.echoed(each, service.tokens) for each in wanted.requests]

            wanted, prepared, echoed = await self._work(request, read)
            record.task, record.stream = wanted.kind, wanted.stream
            pieces = self._run(service, prepared, record)
            stack.callback(pieces.cancel)
            shape = openai.Shape(wanted, [run.answer for run in pieces.runs], loaded.name, echoed)
            if not wanted.stream:
                return await self._whole(request, pieces, shape, record)

            async def events(first: tuple[int, Any], rest: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[bytes]:
                for chunk in shape.chunks(*first):
                    yield event(chunk)
                async for place, piece in rest:
                    for chunk in shape.chunks(place, piece):
                        yield event(chunk)
                for chunk in shape.last():
                    yield event(chunk)
                yield DONE

            return await self._stream(request, stack, pieces, events, lambda error: event(error.body), record)

    async def _responses(self, request: HttpRequest) -> Response:
        body = await self._body(request)
        async with AsyncExitStack() as stack:
            loaded, record = await self._lease(stack, request, body)
            service = loaded.service

            def read() -> tuple[openai.Wanted, list[Prepared]]:
                wanted = responses.parse(body, service.defaults)
                return wanted, [service.prepare(each) for each in wanted.requests]

            try:
                wanted, prepared = await self._work(request, read)
            except InvalidRequest as error:
                raise responses.renamed(error, body) from None
            record.task, record.stream = wanted.kind, wanted.stream
            pieces = self._run(service, prepared, record)
            stack.callback(pieces.cancel)
            shape = responses.Shape(body, wanted.requests[0].options, pieces.runs[0].answer, loaded.name)
            if not wanted.stream:
                return await self._whole(request, pieces, shape, record)

            async def events(first: tuple[int, Any], rest: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[bytes]:
                for each in shape.begin():
                    yield event(each, each["type"])
                for each in shape.pieces(first[1]):
                    yield event(each, each["type"])
                async for _, piece in rest:
                    for each in shape.pieces(piece):
                        yield event(each, each["type"])

            def failed(error: HttpError) -> bytes:
                told = shape.failed(str(error), error.code)
                return event(told, told["type"])

            return await self._stream(request, stack, pieces, events, failed, record)

    async def _invocations(self, request: HttpRequest) -> Response:
        """MLflow's own route, by MLflow's own app; or as a stream, where the body asks for one."""
        content = await bodies.content(request, self.limits.body_seconds)
        async with AsyncExitStack() as stack:
            body = invocations.json_object(request.headers.get("content-type"), content) or {}
            named = "model" in body
            if (name := request.query_params.get("model")) is not None:
                body["model"] = name
            loaded, record = await self._lease(stack, request, body)
            service = loaded.service
            record.stream, record.task = invocations.is_stream(body), service.task
            if not record.stream:
                for observer in self._observers:
                    observer.begun(record)
                if named:  # which is no input of the model's
                    content = json.dumps(body).encode()
                answering = invocations.forward(loaded.scoring, request, content, record)
                response = await while_connected(request.receive, answering)
                response.headers.update(_headers(record))
                return response
            try:
                prepared = await self._work(request, lambda: service.prepare(service.parse(body)))
                pieces = self._run(service, [prepared], record)
            except ClientLeft:
                raise
            except Exception as error:
                return invocations.refused(error)
            stack.callback(pieces.cancel)
            shape = invocations.Shape(service, pieces.runs[0].answer)

            async def events(first: tuple[int, Any], rest: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[bytes]:
                for chunk in shape.chunks(first[1]):
                    yield event(chunk)
                async for _, piece in rest:
                    for chunk in shape.chunks(piece):
                        yield event(chunk)
                yield DONE

            return await self._stream(request, stack, pieces, events, invocations.failed, record, invocations.refused)

    async def _work(self, request: HttpRequest, work: Callable[[], Result]) -> Result:
        """Has a request read or an answer written by one of a few threads; others go on meanwhile.

        Long texts take time to be read, schemas to be compiled, and thousands of log probabilities to be written. What
        waits for a thread when its client leaves is not begun.
        """
        loop = asyncio.get_running_loop()
        return await while_connected(request.receive, loop.run_in_executor(self._workers, work))

    def _run(self, service: Service, prepared: Sequence[Prepared], record: Record) -> Pieces:
        deadline = time.monotonic() + self.limits.seconds
        pieces = Pieces(deadline)
        for observer in self._observers:
            observer.begun(record)
        try:
            for each in prepared:
                pieces.runs.append(service.run(each, deliver=pieces.deliver(), deadline=deadline))
        except BaseException:
            pieces.cancel()
            raise
        finally:
            record.runs = pieces.runs
        return pieces

    async def _whole(self, request: HttpRequest, pieces: Pieces, shape: _Shape, record: Record) -> Response:
        async def take() -> None:
            async for _ in pieces:
                pass

        await while_connected(request.receive, take())
        return await self._work(request, lambda: JsonResponse(shape.whole(), headers=_headers(record)))

    async def _stream(
        self,
        request: HttpRequest,
        stack: AsyncExitStack,
        pieces: Pieces,
        events: Callable[[tuple[int, Any], AsyncIterator[tuple[int, Any]]], AsyncIterator[bytes]],
        failed: Callable[[HttpError], bytes],
        record: Record,
        refused: Callable[[Exception], Response] | None = None,
    ) -> Response:
        """The stream, once there is a first piece: what fails before it is an error with a status."""
        arriving = aiter(pieces)
        try:
            first = await while_connected(request.receive, anext(arriving))
        except ClientLeft:
            raise
        except Exception as error:
            if refused is None:
                raise
            return refused(error)

        def told(error: HttpError) -> bytes:
            record.error = str(error)  # the status cannot say it any more
            return failed(error)

        return EventStream(
            events(first, arriving),
            told,
            stack.pop_all(),
            write_timeout=self.limits.write_seconds,
            headers=_headers(record),
        )

    async def _lease(self, stack: AsyncExitStack, request: HttpRequest, body: dict[str, Any]) -> tuple[Loaded, Record]:
        """The model that a body names, until the stack is closed. The name goes from the body."""
        record: Record = request.state.record
        name = body.pop("model", None)
        if name is not None and not isinstance(name, str):
            raise InvalidRequest("model", f"is {shorten(name)}; it must be a string")
        record.model, record.body = self.models.find(name).name, body
        loaded = await while_connected(request.receive, stack.enter_async_context(self.models.lease(name)))
        record.model, record.model_id, record.service = loaded.name, loaded.model_id, loaded.service
        return loaded, record

    async def _body(self, request: HttpRequest) -> dict[str, Any]:
        """The request's body as an object."""
        content = await bodies.content(request, self.limits.body_seconds)
        return bodies.json_object(request.headers.get("content-type"), content)

    async def _list(self, request: HttpRequest) -> Response:
        return JsonResponse({"object": "list", "data": self.models.list()})

    async def _model(self, request: HttpRequest) -> Response:
        name = self.models.find(request.path_params["name"]).name
        return JsonResponse(next(entry for entry in self.models.list() if entry["id"] == name))

    async def _tokenize(self, request: HttpRequest) -> Response:
        return await self._tokens(request, tokenize.tokenize)

    async def _detokenize(self, request: HttpRequest) -> Response:
        return await self._tokens(request, tokenize.detokenize)

    async def _tokenizer_info(self, request: HttpRequest) -> Response:
        async with AsyncExitStack() as stack:
            loaded, _ = await self._lease(stack, request, dict(request.query_params))
            return JsonResponse(tokenize.info(loaded.service))

    async def _tokens(
        self, request: HttpRequest, function: Callable[[Mapping[str, Any], Service], dict[str, Any]]
    ) -> Response:
        body = await self._body(request)
        async with AsyncExitStack() as stack:
            loaded, _ = await self._lease(stack, request, body)
            return await self._work(request, lambda: JsonResponse(function(body, loaded.service)))

    async def _health(self, request: HttpRequest) -> Response:
        return status.health(self.models)

    async def _ready(self, request: HttpRequest) -> Response:
        return status.ready(self.models, starting=self.starting, draining=self.draining)

    async def _version(self, request: HttpRequest) -> Response:
        import mlflow.version

        return PlainTextResponse(mlflow.version.VERSION, media_type="application/json")

    async def _metrics_text(self, request: HttpRequest) -> Response:
        content = b"" if self._metrics is None else self._metrics(self.models.loaded())
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _take_feedback(self, request: HttpRequest) -> Response:
        body = await self._body(request)
        trace, value = body.get("trace_id"), body.get("value")
        if not isinstance(trace, str) or not isinstance(value, bool) or set(body) - {"trace_id", "value"}:
            raise HttpError(400, "the body must be an object with `trace_id`, a string, and `value`, true or false")
        if self._feedback is None:
            raise HttpError(404, "answers are not traced here: the server needs --trace", code="not_found")
        await self._feedback(trace, value)
        return JsonResponse({"ok": True})


def _headers(record: Record) -> dict[str, str]:
    return {} if record.trace_id is None else {"x-mlflow-trace-id": record.trace_id}
