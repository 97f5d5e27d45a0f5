"""A finished request as an MLflow trace with one span, under an id that was given out before. Knows no queue."""

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.entities import SpanType
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

from .records import Record

# MLflow's limit for the values of a trace's metadata, in characters.
_METADATA = 250
# Where MLflow says that a trace could not be written.
_EXPORTER = logging.getLogger("mlflow.tracing.export.mlflow_v3")


class TracesError(Phi3Error):
    """Traces that cannot be written, as things are set or as the tracking server says."""


class Spans:
    """Writes traces, one after the other, in the thread that asks for it.

    They go where MLflow's own go: to this process's tracking URI, or where OTEL_EXPORTER_OTLP_ENDPOINT says, in
    OpenTelemetry's terms where MLFLOW_ENABLE_OTEL_GENAI_SEMCONV is set. To have a say in the id, the span is made by a
    tracer of the provider that MLflow has for such bridges.

    Raises:
        TracesError: MLflow's tracing is off, samples by itself, or cannot be had as it is set.
    """

    def __init__(self) -> None:
        ratio = MLFLOW_TRACE_SAMPLING_RATIO.get()
        if ratio not in (None, 1.0):
            problem = f"{MLFLOW_TRACE_SAMPLING_RATIO.name} is {ratio:g}, and would drop traces whose ids were given out"
            raise TracesError(f"{problem}; unset it, and set the rate here")
        self._ids = _ChosenIds()
        self._tracer = _tracer()
        self._tracer.id_generator = self._ids
        self._uri = mlflow.get_tracking_uri()
        self._stored = not should_use_otlp_exporter() or MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT.get()
        self._experiments: dict[str, str | None] = {}  # of logged models, by their id
        self._failures = _Failures()
        _EXPORTER.addFilter(self._failures)

    def write(self, record: Record, answers: Sequence[Answer]) -> None:
        """Writes the trace of a request that has ended.

        Args:
            record: has a trace id.
            answers: what was answered.

        Raises:
            Exception: the trace was not written.
        """
        assert record.trace_id is not None
        attributes = attributes_of(record, answers)
        metadata = {"phi3_mlflow.request_id": record.id}
        if record.model_id is not None:
            metadata[TraceMetadataKey.MODEL_ID] = record.model_id
        if self._stored:
            self.knock()
            attributes[SpanAttributeKey.EXPERIMENT_ID] = self._experiment(record.model_id)
        session = attributes[SpanAttributeKey.SESSION_ID] = (record.session or "")[:_METADATA] or None
        user = attributes[SpanAttributeKey.USER_ID] = (record.user or "")[:_METADATA] or None
        began = int(record.began * 1e9)
        kind = SpanType.LLM if record.task == "llm/v1/completions" else SpanType.CHAT_MODEL
        self._ids.next = int(record.trace_id.removeprefix("tr-"), 16)
        self._failures.begin()
        with mlflow.tracing.context(metadata=metadata, session_id=session, user=user):
            span = self._tracer.start_span(
                record.route,
                context=Context(),
                attributes={key: _json(value) for key, value in attributes.items() if value is not None},
                start_time=began,
            )
            span.set_attribute(SpanAttributeKey.SPAN_TYPE, _json(kind))  # MLflow has set its own at the start
            span.set_status(_status(record))
            span.end(began + max(0, int((record.ended - record.came) * 1e9)))  # here the exporter writes
        if self._failures.said is not None:
            raise TracesError(self._failures.said)

    def knock(self) -> None:
        """Returns where the tracking server is there, and fails at once where it is gone.

        MLflow would try again for minutes; and where a server does not answer when it is first asked for its version,
        MLflow takes it for an old one as long as the process lives.
        """
        if self._uri.startswith(("http://", "https://")):
            http_request(get_default_host_creds(self._uri), "/health", "GET", max_retries=0, timeout=3)

    def close(self) -> None:
        """Gives MLflow's log back what it says."""
        _EXPORTER.removeFilter(self._failures)

    def _experiment(self, model_id: str | None) -> str | None:
        """The experiment of a logged model; None where there is no such model here, for the active one."""
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


def _tracer() -> Tracer:
    """A tracer of MLflow's provider that exports in the thread which ends the span."""
    before = MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get_raw()
    MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.set(False)  # read when the provider is made
    try:
        mlflow.tracing.reset()
        tracer = mlflow.tracing.get_bridged_tracer_provider().get_tracer("phi3_mlflow")
    except (ImportError, MlflowException) as error:
        raise TracesError(f"MLflow cannot trace as it is set: {error}") from None
    finally:
        if before is None:
            MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.unset()
        else:
            MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.set(before)
    if not isinstance(tracer, Tracer):
        raise TracesError("MLflow's tracing is off; unset OTEL_SDK_DISABLED, or do without traces")
    return tracer


def attributes_of(record: Record, answers: Sequence[Answer]) -> dict[str, Any]:
    """What MLflow keeps of a request in its span, by MLflow's names; None for what there is not."""
    sampled = sum(choice.tokens for answer in answers for choice in answer.choices)
    read = sum(answer.prompt_tokens for answer in answers)
    usage = {
        "input_tokens": read,
        "output_tokens": sampled,
        "total_tokens": read + sampled,
        "cache_read_input_tokens": sum(answer.cached_tokens for answer in answers),
    }
    return {
        SpanAttributeKey.MESSAGE_FORMAT: "openai",
        SpanAttributeKey.MODEL: record.model,
        SpanAttributeKey.MODEL_PROVIDER: "phi3_mlflow",
        SpanAttributeKey.INPUTS: record.body,
        SpanAttributeKey.OUTPUTS: _outputs(record, answers),
        SpanAttributeKey.CHAT_USAGE: usage if answers else None,
        # Without it MLflow looks for the price of a model of that name, in the network.
        SpanAttributeKey.LLM_COST: dict.fromkeys(("input_cost", "output_cost", "total_cost"), 0.0),
        "http.response.status_code": record.status,
        "phi3_mlflow.first_byte_seconds": record.first_byte - record.came if record.first_byte else None,
    }


def _outputs(record: Record, answers: Sequence[Answer]) -> dict[str, Any] | None:
    """The response; of several prompts one with the choices of all, as the OpenAI reference has it."""
    error = {"error": record.error} if record.error else {}
    if not answers:
        return error or None
    task: Task = "llm/v1/completions" if record.task == "llm/v1/completions" else "llm/v1/chat"
    first, *others = (completion(answer, task, record.model or "") for answer in answers)
    for other in others:
        start = len(first["choices"])
        first["choices"] += [{**each, "index": start + each["index"]} for each in other["choices"]]
        first["usage"] = {key: count + other["usage"][key] for key, count in first["usage"].items()}
    return first | error


def _status(record: Record) -> Status:
    """A client that left is no fault of the answer's."""
    if record.status == 499 or (record.status < 400 and not record.error):
        return Status(StatusCode.OK)
    return Status(StatusCode.ERROR, record.error or f"HTTP status {record.status}")


def _json(value: Any) -> str:
    """As MLflow writes attributes; half a surrogate pair, which no store takes and MLflow reads, as a question mark."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
