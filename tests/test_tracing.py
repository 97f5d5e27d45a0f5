"""What a model answers is a span of the trace that is active where it is asked, and of none where none is.

Run with: python -m pytest tests/test_tracing.py
"""

import mlflow
import pytest
from mlflow.entities import SpanType, Trace

from phi3_mlflow.builders import onnx

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


@pytest.fixture(scope="module")
def model():
    """A model that has a page in the tracking store."""
    return mlflow.pyfunc.load_model(onnx.log_model(name="traced").model_uri)


def traces(name: str) -> list[Trace]:
    """The traces whose first span has a name."""
    mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(return_type="list")
    return [trace for trace in found if trace.data.spans and trace.data.spans[0].name == name]


def spans_of(name: str):
    """The caller's span and the model's, which has to lie below it."""
    [trace] = traces(name)
    outer, inner = trace.data.spans
    assert inner.parent_id == outer.span_id
    assert (inner.name, inner.span_type) == ("phi3_mlflow", SpanType.CHAT_MODEL)
    return trace, inner


def test_predict_is_a_span_with_what_was_asked_and_answered_and_the_tokens_of_all_rows(model):
    rows = [QUESTION, {"messages": [{"role": "user", "content": "What is the capital of France?"}]}]
    with mlflow.start_span("table"):
        answers = model.predict(rows)
    trace, span = spans_of("table")
    prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    completion = sum(answer["usage"]["completion_tokens"] for answer in answers)
    cached = sum(answer["custom_outputs"].get("cached_tokens", 0) for answer in answers)
    usage = {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion}
    assert span.attributes["mlflow.chat.tokenUsage"] == usage | {"cache_read_input_tokens": cached}
    assert trace.info.token_usage == usage | {"cache_read_input_tokens": cached}
    assert span.attributes["mlflow.llm.model"] == answers[0]["model"]
    assert [row["messages"] for row in span.inputs["rows"]] == [row["messages"] for row in rows]
    assert [answer["choices"][0]["message"]["content"] for answer in span.outputs] == [
        "The capital of Spain is Madrid.",
        "The capital of France is Paris.",
    ]


def test_predict_stream_is_a_span_from_its_first_piece_to_its_last(model):
    with mlflow.start_span("stream"):
        *_, last = model.predict_stream(QUESTION)
    _, span = spans_of("stream")
    assert span.outputs == ["The capital of Spain is Madrid."]
    usage = span.attributes["mlflow.chat.tokenUsage"]
    assert usage["input_tokens"] == last["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == last["usage"]["completion_tokens"]


def test_a_stream_that_is_left_early_counts_what_was_computed(model):
    with mlflow.start_span("left"):
        stream = model.predict_stream(QUESTION)
        next(stream)
        stream.close()
    _, span = spans_of("left")
    usage = span.attributes["mlflow.chat.tokenUsage"]
    assert usage["input_tokens"] > 0
    assert usage["output_tokens"] > 0


def test_the_models_page_shows_the_traces_in_which_it_was_asked(model):
    with mlflow.start_span("page"):
        model.predict(QUESTION)
    mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(model_id=model.model_id, return_type="list")
    assert "page" in [trace.data.spans[0].name for trace in found]
    assert all(trace.info.trace_metadata["mlflow.modelId"] == model.model_id for trace in found)


def test_a_request_that_is_refused_is_a_span_with_the_error_and_no_tokens(model):
    with mlflow.start_span("refused"), pytest.raises(mlflow.MlflowException, match=r"`min_p` is 3\.0"):
        model.predict(QUESTION, params={"min_p": 3.0})
    _, span = spans_of("refused")
    assert span.status.status_code == "ERROR"
    assert "`min_p` is 3.0" in span.status.description
    assert span.attributes["mlflow.chat.tokenUsage"]["total_tokens"] == 0


def test_without_an_active_trace_there_is_none(model):
    mlflow.flush_trace_async_logging()
    before = len(mlflow.search_traces(return_type="list"))
    model.predict(QUESTION)
    list(model.predict_stream(QUESTION))
    mlflow.flush_trace_async_logging()
    assert len(mlflow.search_traces(return_type="list")) == before


def test_a_model_without_a_page_is_a_span_all_the_same(loaded):
    with mlflow.start_span("saved"):
        loaded["onnx"].predict(QUESTION)
    trace, span = spans_of("saved")
    assert span.attributes["mlflow.chat.tokenUsage"]["output_tokens"] == 8
    assert "mlflow.modelId" not in trace.info.trace_metadata
