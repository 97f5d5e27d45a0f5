"""/invocations of `serve` beside that of `mlflow models serve`: the table of the contract gets the same answers.

Run: pytest tests/serve/test_invocations.py
"""

import asyncio
import io
import json

import httpx
import mlflow
import pytest
from process import SPAIN, serving
from prometheus_client.parser import text_string_to_metric_families
from scoring import JSON, post
from test_contract import ANSWERED, REFUSED, with_options

from phi3_mlflow.serve.access import AccessLog
from phi3_mlflow.serve.app import Limits, Server
from phi3_mlflow.serve.keys import Keys
from phi3_mlflow.serve.metrics import Metrics
from phi3_mlflow.serve.models import Models, Spec
from phi3_mlflow.serve.traces import Traces

# What MLflow decides before a model sees it.
DECIDED = {
    "text": ("hello", "text/plain"),
    "CSV": ("messages\nhello\n", "text/csv"),
    "no content type": ("{}", None),
    "broken JSON": ("{", JSON),
    "a list": ("[1]", JSON),
    "a wrong type": ({"messages": "hello"}, JSON),
    "stop as a string": (with_options(stop="a"), JSON),
    "an integer of 5000 digits": (
        '{"messages": [{"role": "user", "content": "a"}], "seed": 1' + "0" * 5000 + "}",
        JSON,
    ),
    "unknown fields": (with_options(unknown=1), JSON),
    "nothing it knows": ({"a": 1}, JSON),
}  # fmt: skip
# Ids and times differ from one answer to the next, and so does what the context kept from the one before.
VARYING = ("id", "created", "cached_tokens")


def comparable(value):
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def outcome(address, body, content_type=JSON):
    status, text = post(address, body, content_type)
    try:
        return status, comparable(json.loads(text))
    except ValueError:
        return status, text


@pytest.fixture(scope="module")
def both(servers, onnx_model):
    """The addresses of `mlflow models serve` and of `serve` over the same model."""
    with serving(f"--name=phi3={onnx_model}", "--preload", "--access-log=none", "--max-body=16777216") as running:
        yield servers["onnx"], running.address


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "stream"])
def test_a_bad_request_gets_the_same_words(both, name):
    mlflow, ours = (outcome(address, REFUSED[name][0]) for address in both)

    assert ours == mlflow
    assert ours[0] == 400


# A time that is over at once may leave more or less of an answer.
@pytest.mark.parametrize("name", [name for name in ANSWERED if name != "a tiny max_time"])
def test_a_good_request_gets_the_same_answer(both, name):
    mlflow, ours = (outcome(address, ANSWERED[name]) for address in both)

    assert ours == mlflow
    assert ours[0] == 200


@pytest.mark.parametrize("name", DECIDED)
def test_what_mlflow_decides_is_left_to_it(both, name):
    mlflow, ours = (outcome(address, *DECIDED[name]) for address in both)

    assert ours[0] == mlflow[0]
    if ours[0] != 400:  # its own 400 has a traceback, with the lines of whoever called it
        assert ours == mlflow


@pytest.mark.parametrize("path", ["/ping", "/health", "/version"])
def test_the_other_routes_say_the_same(both, path):
    mlflow, ours = (httpx.get(address + path, timeout=60) for address in both)

    assert (ours.status_code, ours.text) == (mlflow.status_code, mlflow.text)


def test_whole_answers_are_counted_logged_and_traced_as_those_of_other_routes_and_their_model_is_chosen(
    onnx_model, monkeypatch
):
    # MLflow's scoring app notes in the environment that it serves.
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "false")
    lines = io.StringIO()
    log, metrics, traces = AccessLog(lines), Metrics(), Traces(1.0)
    rows = {"dataframe_split": {"columns": ["messages"], "data": [[SPAIN], [SPAIN]]}}

    async def run():
        models = Models([Spec("a", str(onnx_model)), Spec("b", str(onnx_model))])
        server = Server(models, keys=Keys({}), limits=Limits(), observers=[traces, log, metrics])
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = [
                await client.post("/invocations", json={"messages": SPAIN}),
                await client.post("/invocations?model=b", json=rows),
                await client.post("/invocations", json={"messages": SPAIN, "model": "b"}),
                await client.post("/invocations?model=a", json={"messages": []}),
                await client.post("/invocations?model=c", json={"messages": SPAIN}),
            ]
        text = metrics.render(models.loaded()).decode()
        await models.close(10)
        return answers, text

    answers, text = asyncio.run(run())
    log.close()
    traces.close(60)

    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 404]
    logged = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line.get("model") for line in logged] == ["a", "b", "b", "a", None]
    bodies = [answer.json() for answer in answers[:3]]
    usages = [[each["usage"] for each in (body["predictions"] if isinstance(body, dict) else body)] for body in bodies]
    assert [len(usage) for usage in usages] == [1, 2, 1]
    for line, usage, answer in zip(logged, usages, answers, strict=False):
        prompt, completion = (sum(each[name] for each in usage) for name in ("prompt_tokens", "completion_tokens"))
        assert (line["prompt_tokens"], line["completion_tokens"]) == (prompt, completion)
        assert line["finish_reasons"] == ["stop"] * len(usage)
        assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
        trace = mlflow.get_trace(answer.headers["x-mlflow-trace-id"])
        assert (trace.info.token_usage["input_tokens"], trace.info.token_usage["output_tokens"]) == (prompt, completion)
    assert not any("prompt_tokens" in line for line in logged[3:])
    samples = {
        (sample.name, sample.labels.get("model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:request_generation_tokens_")
    }
    for name, served in (("a", usages[0]), ("b", usages[1] + usages[2])):
        answered = [usage["completion_tokens"] for usage in served]
        assert samples["vllm:request_generation_tokens_sum", name] == sum(answered)
        assert samples["vllm:request_generation_tokens_count", name] == len(answered)
