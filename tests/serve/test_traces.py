"""Run with: python -m pytest tests/serve/test_traces.py"""

import asyncio
import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from statistics import mean

import mlflow
import pytest
from fakes import TOKENS, FakeDecoder, spell
from mlflow.entities import SpanStatusCode, SpanType
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve.errors import HttpError
from phi3_mlflow.serve.records import Record
from phi3_mlflow.serve.spans import TracesError
from phi3_mlflow.serve.traces import Traces

PATIENCE = 300  # seconds; only what is broken takes as long


@pytest.fixture
def traces():
    """Makes what traces, and closes it after the test."""
    made = []

    def make(rate=1.0):
        made.append(Traces(rate))
        return made[-1]

    yield make
    for each in made:
        each.close(0)
    mlflow.tracing.reset()


@pytest.fixture
def service():
    service = Service(TOKENS, FakeDecoder(lambda prompt: spell("madrid yes")), renew_after=None)
    yield service
    service.close()


@pytest.fixture(scope="module")
def model_id(tracking):
    """A logged model in an experiment of its own."""
    mlflow.create_experiment("traced", artifact_location=tracking.replace("sqlite", "file").rpartition("/")[0])
    return mlflow.create_external_model("phi3", experiment_id=experiment()).model_id


@pytest.fixture
def offline(monkeypatch):
    """Fails where anything but this machine is looked for."""
    look_up = socket.getaddrinfo

    def guarded(host, *args, **values):
        if host not in ("127.0.0.1", "localhost", None):
            asked.append(host)
            raise OSError(f"{host} is out of bounds")
        return look_up(host, *args, **values)

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    yield
    assert asked == []


def experiment():
    return mlflow.get_experiment_by_name("traced").experiment_id


def request(traces, service=None, model_id=None, *, body=None, **values):
    """A request from its beginning to its end; its record."""
    record = Record("POST", "/v1/chat/completions", model="phi3", model_id=model_id, task="llm/v1/chat", **values)
    record.body = body or {"messages": [{"role": "user", "content": "hello é"}], "max_tokens": 9}
    traces.begun(record)
    if service is not None:
        record.runs = [service.start(record.body, task=record.task)]
        record.runs[0].wait()
    record.status = record.status or 200
    record.ended = time.monotonic()
    traces.ended(record)
    return record


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refused(coroutine):
    with pytest.raises(HttpError) as caught:
        asyncio.run(coroutine)
    return caught.value.status, str(caught.value)


def test_a_traced_request_shows_at_its_logged_model_with_all_that_mlflow_knows_of_a_chat(
    traces, service, model_id, offline
):
    written = traces()
    record = request(written, service, model_id, session="session 7", user="ada")
    written.close(PATIENCE)
    assert (written.queue.done, written.queue.lost) == (1, 0)
    (found,) = mlflow.search_traces(locations=[experiment()], model_id=model_id, return_type="list")
    assert found.info.trace_id == record.trace_id
    answer = record.runs[0].answer
    usage = {
        "input_tokens": answer.prompt_tokens,
        "output_tokens": 3,
        "total_tokens": answer.prompt_tokens + 3,
        "cache_read_input_tokens": 0,
    }
    assert found.info.token_usage == usage
    assert found.info.state == "OK"
    assert found.info.request_time == pytest.approx(record.began * 1000, abs=2)
    assert found.info.execution_duration == pytest.approx((record.ended - record.came) * 1000, abs=2)
    metadata = found.info.trace_metadata
    assert metadata["mlflow.modelId"] == model_id
    assert metadata["mlflow.trace.session"] == "session 7"
    assert metadata["mlflow.trace.user"] == "ada"
    assert metadata["phi3_mlflow.request_id"] == record.id
    (span,) = found.data.spans
    assert (span.span_type, span.parent_id, span.name) == (SpanType.CHAT_MODEL, None, "/v1/chat/completions")
    assert span.inputs == record.body
    assert span.outputs["choices"][0]["message"] == {"role": "assistant", "content": "madrid yes"}
    assert span.attributes["mlflow.chat.tokenUsage"] == usage
    assert span.attributes["mlflow.llm.model"] == span.model_name == "phi3"
    assert (found.info.request_preview, found.info.response_preview) == ("hello é", "madrid yes")


def test_a_completion_is_a_span_of_its_own_kind_and_several_prompts_are_one_answer(traces, service):
    written = traces()
    record = Record("POST", "/v1/completions", model="phi3", task="llm/v1/completions", status=200)
    record.body = {"prompt": ["one", "two"]}
    written.begun(record)
    record.runs = [service.start({"prompt": text}, task=record.task) for text in record.body["prompt"]]
    for run in record.runs:
        run.wait()
    record.ended = time.monotonic()
    written.ended(record)
    written.close(PATIENCE)
    (span,) = mlflow.get_trace(record.trace_id).data.spans
    assert span.span_type == SpanType.LLM
    assert [(choice["index"], choice["text"]) for choice in span.outputs["choices"]] == [
        (0, "madrid yes"),
        (1, "madrid yes"),
    ]
    assert span.outputs["usage"]["completion_tokens"] == span.attributes["mlflow.chat.tokenUsage"]["output_tokens"] == 6


def test_an_error_is_an_error_in_the_trace_too_and_a_client_that_left_is_none(traces):
    written = traces()
    failed = request(written, status=500, error="the model failed while it answered")
    left = request(written, status=499, error="the client left")
    written.close(PATIENCE)
    trace = mlflow.get_trace(failed.trace_id)
    assert trace.info.state == "ERROR"
    assert trace.data.spans[0].status.status_code == SpanStatusCode.ERROR
    assert trace.data.spans[0].status.description == "the model failed while it answered"
    assert trace.data.spans[0].attributes["http.response.status_code"] == 500
    assert mlflow.get_trace(left.trace_id).info.state == "OK"


def test_whatever_a_client_sends_its_trace_is_written(traces):
    written = traces()
    strange = request(
        written,
        body={"messages": [{"role": "user", "content": "\ud800 \x00 é"}]},
        session="s" * 9999,
        user="\u2028" * 999,
    )
    large = request(written, body={"prompt": "a" * (2 << 20)})
    written.close(PATIENCE)
    assert (written.queue.done, written.queue.lost) == (2, 0)
    trace = mlflow.get_trace(strange.trace_id)
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s" * 250
    assert trace.data.spans[0].inputs["messages"][0]["content"].endswith(" é")
    assert mlflow.get_trace(large.trace_id).data.spans[0].inputs == {"omitted": "more than 1 MiB"}


def test_a_rate_traces_that_part_of_requests(traces):
    none, some = traces(0), traces(0.25)
    records = [Record("POST", "/v1/chat/completions") for _ in range(4000)]
    for record in records:
        none.begun(record)
    assert not any(record.trace_id for record in records)
    for record in records:
        some.begun(record)
    assert 800 < sum(record.trace_id is not None for record in records) < 1200
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(TracesError, match="must be from 0 to 1"):
            traces(rate)


def test_a_trace_costs_its_request_less_than_a_millisecond(traces, service):
    written = traces()
    took = []
    for _ in range(300):
        record = Record("POST", "/v1/chat/completions", model="phi3", task="llm/v1/chat", status=200)
        record.body = {"messages": [{"role": "user", "content": "hello " * 5}] * 20}
        record.runs = [service.start({"messages": [{"role": "user", "content": "one"}]})]
        record.runs[0].wait()
        began = time.thread_time()
        written.begun(record)
        written.ended(record)
        took.append(time.thread_time() - began)
    assert mean(sorted(took)[:270]) < 0.001


def test_settings_that_would_lose_traces_are_refused(traces, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.5")
    with pytest.raises(TracesError, match=r"MLFLOW_TRACE_SAMPLING_RATIO is 0\.5, .* unset it"):
        traces()
    monkeypatch.delenv("MLFLOW_TRACE_SAMPLING_RATIO")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(TracesError, match="tracing is off"):
        traces()
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke")
    with pytest.raises(TracesError, match=r"cannot trace as it is set: .*'smoke'"):
        traces()


def test_with_the_semantic_conventions_spans_are_opentelemetrys(traces, service, monkeypatch):
    exporter = InMemorySpanExporter()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV", "true")
    monkeypatch.setattr("mlflow.tracing.provider.get_otlp_exporter", lambda: exporter)
    written = traces()
    record = request(written, service, "m-of-another-server", session="s7", user="ada")
    written.close(PATIENCE)
    mlflow.tracing.get_bridged_tracer_provider().force_flush()
    (span,) = exporter.get_finished_spans()
    assert f"tr-{span.context.trace_id:032x}" == record.trace_id
    assert (span.name, span.kind) == ("chat phi3", SpanKind.CLIENT)
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.request.model"] == "phi3"
    assert span.attributes["gen_ai.provider.name"] == "phi3_mlflow"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["gen_ai.request.max_tokens"] == 9
    assert json.loads(span.attributes["gen_ai.input.messages"])[0]["parts"][0]["content"] == "hello é"
    assert "madrid yes" in span.attributes["gen_ai.output.messages"]
    assert not [name for name in span.attributes if name.startswith("mlflow.")]


def test_feedback_becomes_mlflows_on_the_trace_also_where_that_waits_to_be_written(traces, service):
    written = traces()
    records = [request(written, service) for _ in range(3)]

    async def both():
        await written.feedback(records[2].trace_id, True, seconds=PATIENCE)
        await written.feedback(records[0].trace_id, False, seconds=PATIENCE)

    asyncio.run(both())
    for record, value in ((records[2], True), (records[0], False)):
        (thumb,) = mlflow.get_trace(record.trace_id).info.assessments
        assert (thumb.name, thumb.value, thumb.source.source_type) == ("user_feedback", value, "HUMAN")


def test_feedback_that_cannot_be_taken_is_refused_in_words(traces, service, monkeypatch):
    written = traces()
    record = request(written, service)
    own = record.trace_id
    with mlflow.start_span("somebody else's") as span:
        pass
    assert refused(written.feedback(span.trace_id, True))[0] == 404
    assert "this server has no trace 'tr-0'" in refused(written.feedback("tr-0", True))[1]
    open_record = Record("POST", "/v1/chat/completions")
    written.begun(open_record)
    assert refused(written.feedback(open_record.trace_id, True))[0] == 409
    until(lambda: written.queue.done == 1)
    mlflow.MlflowClient().delete_traces(mlflow.get_trace(own).info.experiment_id, trace_ids=[own])
    assert refused(written.feedback(own, True, seconds=PATIENCE)) == (404, f"the tracking server has no trace {own}")
    written.close(PATIENCE)
    assert refused(written.feedback(own, True))[0] == 503


def test_what_is_remembered_of_traces_is_bounded(traces, monkeypatch):
    monkeypatch.setattr("phi3_mlflow.serve.traces._REMEMBERED", 10)
    written = traces()
    records = [Record("POST", "/v1/chat/completions") for _ in range(50)]
    for record in records:
        written.begun(record)
    assert list(written._known) == [record.trace_id for record in records[-10:]]


class Stuck(http.server.BaseHTTPRequestHandler):
    """A tracking server that is there, and does not answer."""

    go = threading.Event()

    def do_GET(self):
        self.go.wait(PATIENCE)

    def log_message(self, *args):
        pass


def test_a_tracking_server_that_does_not_answer_holds_up_nobody_and_what_finds_no_room_is_dropped(
    traces, tracking, monkeypatch, caplog
):
    monkeypatch.setattr("phi3_mlflow.serve.traces._TRACES", 5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stuck) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
        try:
            written = traces()
            began = time.monotonic()
            records = [request(written) for _ in range(50)]
            assert time.monotonic() - began < PATIENCE / 4
            assert written.queue.lost >= 44
            kept = next(record.trace_id for record in records if written._known.get(record.trace_id))
            status, message = refused(written.feedback(kept, True, seconds=0.2))
            assert status == 503
            assert "too much waits" in message or "gave no answer for 0.2 seconds" in message
            assert refused(written.feedback(records[-1].trace_id, True))[0] == 404
            written.close(0.1)
            assert written.queue.lost >= 49
            assert written.queue.waiting == 0
        finally:
            Stuck.go.set()
            mlflow.set_tracking_uri(tracking)
            server.shutdown()
    assert len([line for line in caplog.records if "traces" in line.getMessage()]) <= 3


@contextlib.contextmanager
def mlflow_server(folder, port):
    """A real `mlflow server` for as long as the block lasts."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_tracking_server_may_be_killed_and_started_again(traces, service, tracking, tmp_path, caplog):
    shutil.copy(tracking.removeprefix("sqlite:///"), tmp_path / "mlflow.db")  # making one anew takes long
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
    try:
        written = traces()
        early = request(written, service, "m-1")  # nobody is there yet
        until(lambda: written.queue.lost == 1)
        with mlflow_server(tmp_path, port):
            model_id = mlflow.create_external_model("phi3", experiment_id="0").model_id
            first = request(written, service, model_id)
            asyncio.run(written.feedback(first.trace_id, True, seconds=PATIENCE))
            found = mlflow.search_traces(locations=["0"], model_id=model_id, return_type="list")
            assert [trace.info.trace_id for trace in found] == [first.trace_id]
            assert found[0].data.spans[0].outputs["choices"][0]["message"]["content"] == "madrid yes"
            assert found[0].info.assessments[0].value is True
        lost = [request(written, service, model_id) for _ in range(20)]
        until(lambda: written.queue.lost == 21)
        status, message = refused(written.feedback(first.trace_id, False, seconds=PATIENCE))
        assert (status, "the server's log says why" in message) == (503, True)
        with mlflow_server(tmp_path, port):
            last = request(written, service, model_id)
            asyncio.run(written.feedback(last.trace_id, False, seconds=PATIENCE))
            found = mlflow.search_traces(locations=["0"], model_id=model_id, return_type="list")
            assert {trace.info.trace_id for trace in found} == {first.trace_id, last.trace_id}
        for record in (early, *lost):
            assert refused(written.feedback(record.trace_id, True))[0] == 404
        said = [line.getMessage() for line in caplog.records if line.getMessage().startswith("traces:")]
        assert len(said) == 2  # once for each time that it was gone
    finally:
        mlflow.set_tracking_uri(tracking)
