"""/invocations of `serve` beside that of `mlflow models serve`: the table of the contract gets the same answers.

Run: pytest tests/serve/test_invocations.py
"""

import json

import httpx
import pytest
from process import serving
from scoring import JSON, post
from test_contract import ANSWERED, REFUSED, with_options

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
