"""MLflow traces: one for each sampled request, with one span, at the logged model that answered; and feedback on them.

All that is said to a tracking server is said by one thread. Requests never wait for it.
"""

import asyncio
import json
import logging
import math
import os
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlflow
from mlflow.entities import AssessmentSource, AssessmentSourceType, SpanType
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ASYNC_TRACE_LOGGING,
    MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT,
    MLFLOW_TRACE_SAMPLING_RATIO,
)
from mlflow.exceptions import MlflowException
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey
from mlflow.tracing.utils.otlp import should_use_otlp_exporter
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from opentelemetry.context import Context
from opentelemetry.sdk.trace import RandomIdGenerator, Tracer
from opentelemetry.trace import Status, StatusCode

from phi3_mlflow.runtime.answers import Answer
from phi3_mlflow.runtime.chat import Task, completion
from phi3_mlflow.runtime.errors import Phi3Error

from .background import Background, weigh
from .errors import HttpError
from .records import Record

_logger = logging.getLogger(__name__)

# What may wait for a slow tracking server, in traces and in bytes; and how much of it one request.
_TRACES, _ROOM, _REQUEST = 1000, 64 << 20, 1 << 20
# So many of the last traces take feedback.
_REMEMBERED = 10_000
# MLflow's limit for the values of a trace's metadata, in characters.
_METADATA = 250
# Where MLflow says that a trace could not be written; it raises nothing.
_EXPORT_LOG = "mlflow.tracing.export.mlflow_v3"


class TracesError(Phi3Error):
    """Traces that cannot be written as things are set."""


@dataclass(frozen=True)
class _Ended:
    """What is kept of a request until its trace is written."""

    record: Record  # without what was started for it
    answers: Sequence[Answer]


class Traces:
    """Traces a part of the requests.

    A trace's id is known when its request begins, so that the answer's header can name it. The trace is written after
    the request's end, in a thread; where the tracking server is slow or gone it is dropped and counted.

    Spans go through MLflow's own exporters: to the tracking URI of this process, or where OTEL_EXPORTER_OTLP_ENDPOINT
    says, in OpenTelemetry's terms where MLFLOW_ENABLE_OTEL_GENAI_SEMCONV is set.

    Args:
        rate: the part of requests that are traced, from 0 to 1.

    Attributes:
        queue: what waits, is done and is lost; feedback counts too.

    Raises:
        TracesError: MLflow's tracing is off, or samples by itself.
        MlflowException: the tracking URI means nothing.
    """

    def __init__(self, rate: float):
        if not 0 <= rate <= 1:
            raise TracesError(f"the rate of traces is {rate:g}; it must be from 0 to 1")
        if MLFLOW_TRACE_SAMPLING_RATIO.get() not in (None, 1.0):
            problem = (
                f"{MLFLOW_TRACE_SAMPLING_RATIO.name} is {MLFLOW_TRACE_SAMPLING_RATIO.get()}, and would drop traces"
            )
            raise TracesError(f"{problem} whose ids were given out; unset it, and set the rate of traces here")
        self._rate = rate
        self._ids = _ChosenIds()
        self._tracer = _tracer(self._ids)
        self._uri = mlflow.get_tracking_uri()
        self._elsewhere = should_use_otlp_exporter() and not MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT.get()
        self._experiments: dict[str, str | None] = {}  # of logged models, by their id
        # Traces that were begun here, and whether they have ended; the oldest are forgotten.
        self._known: OrderedDict[str, bool] = OrderedDict()
        self._unwritten: set[str] = set()
        self._failures = _Failures()
        logging.getLogger(_EXPORT_LOG).addFilter(self._failures)
        self.queue: Background[Callable[[], None]] = Background(
            "traces", lambda work: work(), items=_TRACES, room=_ROOM
        )

    def begun(self, record: Record) -> None:
        """Decides whether the request is traced, and gives it a trace id if it is."""
        if random.random() >= self._rate:
            return
        record.trace_id = f"tr-{os.urandom(16).hex()}"
        self._known[record.trace_id] = False
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def ended(self, record: Record) -> None:
        """Queues the trace of a request that has one."""
        trace_id = record.trace_id
        if trace_id is None:
            return
        weight = weigh(record.body, _REQUEST)
        body = record.body if weight <= _REQUEST else {"omitted": f"more than {_REQUEST >> 20} MiB"}
        answers = [_without_logprobs(run.answer) for run in record.runs]
        weight = min(weight, _REQUEST) + sum(len(choice.text) for answer in answers for choice in answer.choices)
        ended = _Ended(replace(record, body=body, runs=[], service=None), answers)
        self._unwritten.add(trace_id)
        if self.queue.put(partial(self._write, ended), weight):
            self._known[trace_id] = True
        else:
            self._forget(trace_id)

    async def feedback(
        self,
        trace_id: str,
        value: bool | float | str,
        *,
        name: str = "user_feedback",
        comment: str | None = None,
        user: str | None = None,
        seconds: float = 10.0,
    ) -> None:
        """Writes what somebody thinks of an answer to its trace.

        Args:
            trace_id: of a request that this server has answered.
            value: true or false for thumbs, or a number, or a text.
            name: what is judged.
            comment: why.
            user: who says so.
            seconds: how long it may take.

        Raises:
            HttpError: 400 for a value that means nothing, 404 for a trace that this server did not make or did not
                keep, 409 for one that has not ended, 503 where the tracking server did not take it in time.
        """
        _check_feedback(value, name, comment)
        ended = self._known.get(trace_id)
        if ended is None:
            problem = f"there is no trace {trace_id[:60]!r} of this server's; it may be too old, or was dropped"
            raise HttpError(404, problem, param="trace_id", code="trace_not_found")
        if not ended:
            raise HttpError(409, f"the answer of {trace_id} has not ended; try again then", param="trace_id")
        source = AssessmentSource(AssessmentSourceType.HUMAN, (user or "anonymous")[:_METADATA])
        work = partial(mlflow.log_feedback, trace_id=trace_id, name=name, value=value, rationale=comment, source=source)
        future: Future[None] = Future()
        # Behind its trace where that waits, or else before all traces that do.
        if not self.queue.put(partial(_settle, future, work), first=trace_id not in self._unwritten):
            raise _not_taken("too much waits for it already")
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            raise _not_taken(f"it gave no answer for {seconds:g} seconds") from None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                problem = f"the tracking server has no trace {trace_id}"
                raise HttpError(404, problem, param="trace_id", code="trace_not_found") from None
            _logger.warning("feedback was not taken: %s", _one_line(error))
            raise _not_taken("the server's log says why") from None

    def close(self, seconds: float = 5.0) -> None:
        """Writes what waits, for at most so long; the rest is dropped."""
        self.queue.close(seconds)
        logging.getLogger(_EXPORT_LOG).removeFilter(self._failures)

    def _write(self, ended: _Ended) -> None:
        """Makes the span, which MLflow's exporter writes before `end` returns.

        Raises:
            Exception: the trace was not written.
        """
        record, trace_id = ended.record, ended.record.trace_id
        assert trace_id is not None
        try:
            attributes = _attributes(record, ended.answers)
            if not self._elsewhere:
                self._knock()
                experiment = self._experiment(record.model_id)
                if experiment is not None:
                    attributes[SpanAttributeKey.EXPERIMENT_ID] = experiment
            metadata = {"phi3_mlflow.request_id": record.id}
            if record.model_id:
                metadata[TraceMetadataKey.MODEL_ID] = record.model_id
            session, user = ((each and each[:_METADATA]) or None for each in (record.session, record.user))
            for key, value in ((SpanAttributeKey.SESSION_ID, session), (SpanAttributeKey.USER_ID, user)):
                if value is not None:
                    attributes[key] = value
            self._ids.next = int(trace_id.removeprefix("tr-"), 16)
            self._failures.begin()
            began = int(record.began * 1e9)
            with mlflow.tracing.context(metadata=metadata, session_id=session, user=user):
                span = self._tracer.start_span(
                    record.route,
                    context=Context(),
                    attributes={key: _json(value) for key, value in attributes.items()},
                    start_time=began,
                )
                kind = SpanType.LLM if record.task == "llm/v1/completions" else SpanType.CHAT_MODEL
                span.set_attribute(SpanAttributeKey.SPAN_TYPE, _json(kind))  # MLflow sets its own at the start
                span.set_status(_status(record))
                span.end(began + max(0, int((record.ended - record.came) * 1e9)))
            if self._failures.said:
                raise TracesError(self._failures.said)
        except BaseException:
            self._forget(trace_id)
            raise
        self._unwritten.discard(trace_id)

    def _forget(self, trace_id: str) -> None:
        self._known.pop(trace_id, None)
        self._unwritten.discard(trace_id)

    def _knock(self) -> None:
        """Fails at once where the tracking server is gone.

        MLflow would try again for minutes; and where a server does not answer when it is first asked for its version,
        MLflow takes it for an old one as long as the process lives.
        """
        if self._uri.startswith(("http://", "https://")):
            http_request(get_default_host_creds(self._uri), "/health", "GET", max_retries=0, timeout=3)

    def _experiment(self, model_id: str | None) -> str | None:
        """The experiment of a logged model; None where there is none here, for the active one."""
        if model_id is None:
            return None
        if model_id not in self._experiments:
            try:
                self._experiments[model_id] = mlflow.get_logged_model(model_id).experiment_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._experiments[model_id] = None
        return self._experiments[model_id]


class _ChosenIds(RandomIdGenerator):
    """Gives the next trace the id that was promised. Used by one thread."""

    next = 0

    def generate_trace_id(self) -> int:
        """The promised id, once."""
        chosen, self.next = self.next, 0
        return chosen or super().generate_trace_id()


class _Failures(logging.Filter):
    """Keeps what MLflow's exporter says in one thread from the log: it says so for each trace, and raises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.said: str | None = None
        self._thread = 0

    def begin(self) -> None:
        """What is said from now on in this thread is kept."""
        self.said, self._thread = None, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the log gets it."""
        if record.thread != self._thread or record.levelno < logging.WARNING:
            return True
        self.said = self.said or record.getMessage()
        return False


def _tracer(ids: _ChosenIds) -> Tracer:
    """A tracer of MLflow's provider that exports in the thread which ends the span.

    Raises:
        TracesError: MLflow's tracing is off.
    """
    before = MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get_raw()
    MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.set(False)  # read when the provider is made
    try:
        mlflow.tracing.reset()
        tracer = mlflow.tracing.get_bridged_tracer_provider().get_tracer("phi3_mlflow")
    finally:
        if before is None:
            MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.unset()
        else:
            MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.set(before)
    if not isinstance(tracer, Tracer):
        raise TracesError("MLflow's tracing is off; unset OTEL_SDK_DISABLED, or do without traces")
    tracer.id_generator = ids
    return tracer


def _attributes(record: Record, answers: Sequence[Answer]) -> dict[str, Any]:
    """The span's, as MLflow names them."""
    sampled = sum(choice.tokens for answer in answers for choice in answer.choices)
    read = sum(answer.prompt_tokens for answer in answers)
    values: dict[str, Any] = {
        SpanAttributeKey.MESSAGE_FORMAT: "openai",
        SpanAttributeKey.MODEL: record.model,
        SpanAttributeKey.MODEL_PROVIDER: "phi3_mlflow",
        SpanAttributeKey.INPUTS: record.body,
        SpanAttributeKey.OUTPUTS: _outputs(record, answers),
        "http.response.status_code": record.status,
    }
    if answers:
        # Without it MLflow looks the model's price up by its name, in the network.
        values[SpanAttributeKey.LLM_COST] = dict.fromkeys(("input_cost", "output_cost", "total_cost"), 0.0)
        values[SpanAttributeKey.CHAT_USAGE] = {
            "input_tokens": read,
            "output_tokens": sampled,
            "total_tokens": read + sampled,
            "cache_read_input_tokens": sum(answer.cached_tokens for answer in answers),
        }
    if record.first_byte:
        values["phi3_mlflow.first_byte_seconds"] = round(record.first_byte - record.came, 6)
    return {key: value for key, value in values.items() if value is not None}


def _outputs(record: Record, answers: Sequence[Answer]) -> dict[str, Any] | None:
    """The response; of several prompts one with the choices of all, as the OpenAI reference has it."""
    if not answers:
        return {"error": record.error} if record.error else None
    task: Task = "llm/v1/completions" if record.task == "llm/v1/completions" else "llm/v1/chat"
    first, *others = (completion(answer, task, record.model or "") for answer in answers)
    for other in others:
        start = len(first["choices"])
        first["choices"] += [{**each, "index": start + each["index"]} for each in other["choices"]]
        first["usage"] = {key: count + other["usage"][key] for key, count in first["usage"].items()}
    return first | ({"error": record.error} if record.error else {})


def _status(record: Record) -> Status:
    """A client that left is no fault of the answer's."""
    if record.status == 499 or (record.status < 400 and not record.error):
        return Status(StatusCode.OK)
    return Status(StatusCode.ERROR, record.error or f"HTTP status {record.status}")


def _without_logprobs(answer: Answer) -> Answer:
    choices = [replace(choice, logprobs=None) for choice in answer.choices]
    return replace(answer, choices=choices, prompt_logprobs=None)


def _json(value: Any) -> str:
    """As MLflow writes attributes; half a surrogate pair, which no store takes, as its escape."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()


def _check_feedback(value: Any, name: Any, comment: Any) -> None:
    if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
        raise HttpError(400, "`value` must be true, false, a number or a text", param="value", code="invalid_value")
    if isinstance(value, str) and len(value) > 1000:
        raise HttpError(400, f"`value` has {len(value)} characters; 1000 are allowed", param="value")
    if not isinstance(name, str) or not 0 < len(name) <= _METADATA or not name.isprintable():
        problem = f"`name` must be a text of 1 to {_METADATA} printable characters"
        raise HttpError(400, problem, param="name", code="invalid_value")
    if comment is not None and (not isinstance(comment, str) or len(comment) > 10_000):
        raise HttpError(400, "`comment` must be a text of at most 10000 characters", param="comment")


def _not_taken(why: str) -> HttpError:
    problem = f"the tracking server did not take the feedback: {why}"
    return HttpError(503, problem, kind="server_error", code="unavailable", retry_after=5)


def _settle(future: "Future[None]", work: Callable[[], object]) -> None:
    """Does the work and tells whoever still waits for it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
