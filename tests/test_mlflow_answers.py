"""What MLflow answers by itself, before or instead of `predict`: pinned, so that an upgrade shows what changes.

Run: pytest tests/test_mlflow_answers.py
"""

import http.client
import json
from urllib.parse import urlsplit

import pytest
from scoring import HELLO, JSON, post

BODY = json.dumps({"messages": HELLO, "max_tokens": 2})
SCHEMA = "Failed to enforce schema"
PARAMS = "Invalid parameters found"
NOT_COMPATIBLE = "Data is not compatible with model signature"
NOT_JSON = "Ensure that input is a valid JSON formatted string"
UNSUPPORTED = "only supports the following content types"


def body(**options) -> dict:
    return {"messages": HELLO, "max_tokens": 2, **options}


def raw(options: str) -> str:
    return f"{BODY[:-1]}, {options}}}"


def message(**fields) -> dict:
    return {"messages": [fields]}


def rows(*more: dict) -> dict:
    return {"dataframe_records": [{"messages": HELLO, **options} for options in more]}


# What is sent, and the status and a part of the answer. The kinds of body:
# not one that MLflow hands on
NOT_HANDED_ON = {
    "text/plain": (BODY, "text/plain", 415, UNSUPPORTED),
    "a media type in capitals": (BODY, "Application/JSON", 415, UNSUPPORTED),
    "another charset": (BODY, "application/json; charset=latin-1", 415, "only supports UTF-8"),
    "another parameter of the media type": (BODY, "application/json; boundary=1", 415, "Unrecognized content type"),
    "no content type": (BODY, None, 500, "Internal Server Error"),
    "CSV for a chat": ("messages\nhello", "text/csv", 400, "stack_trace"),
    "CSV that is no UTF-8": (b"\xff\xfe", "text/csv", 400, "valid UTF-8 encoded string"),
    "Parquet that is none": (b"PAR1", "application/vnd.apache.parquet", 400, "stack_trace"),
    "no body": (b"", JSON, 400, NOT_JSON),
    "bytes that are no UTF-8": (b"\xff\xfe{}", JSON, 400, NOT_JSON),
    "half a body": (BODY[:30], JSON, 400, NOT_JSON),
    "text behind the body": (BODY + "x", JSON, 400, NOT_JSON),
    "a list": ("[]", JSON, 400, "Received a list"),
    "null": ("null", JSON, 400, "Received unexpected input type"),
    "an empty object": ("{}", JSON, 400, "exactly one of the input fields"),
    "JSON 3000 levels deep": (raw('"custom_inputs": ' + "[" * 3000 + "]" * 3000), JSON, 500, "Internal Server Error"),
    "an integer of 5000 digits": (raw('"seed": ' + "1" * 5000), JSON, 500, "Internal Server Error"),
    "a prompt for a chat": ({"prompt": "hello"}, JSON, 400, SCHEMA),
    "messages that are text": ({"messages": "hello"}, JSON, 400, SCHEMA),
    "messages that are one message": ({"messages": HELLO[0]}, JSON, 400, SCHEMA),
    "messages: null": ({"messages": None}, JSON, 400, SCHEMA),
    "content that is a list": (message(role="user", content=[{"type": "text", "text": "hi"}]), JSON, 400, SCHEMA),
    "content that is a number": (message(role="user", content=1), JSON, 400, SCHEMA),
    "a lone surrogate in the content": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}', JSON, 400, SCHEMA,
    ),
    "a message without a role": (message(content="hi"), JSON, 400, SCHEMA),
    "a role that is null": (message(role=None, content="hi"), JSON, 400, SCHEMA),
    "an unknown field of a message": (message(role="user", content="hi", mood="good"), JSON, 400, SCHEMA),
    "a tool without parameters": (
        body(tools=[{"type": "function", "function": {"name": "f"}}]), JSON, 400, SCHEMA,
    ),
    "temperature as text": (body(temperature="1"), JSON, 400, SCHEMA),
    "temperature: true": (body(temperature=True), JSON, 400, SCHEMA),
    "temperature: 2, an integer other than 0 and 1": (body(temperature=2), JSON, 400, SCHEMA),
    "frequency_penalty: -1": (body(frequency_penalty=-1), JSON, 400, SCHEMA),
    "max_tokens: 3.0": (body(max_tokens=3.0), JSON, 400, SCHEMA),
    "max_tokens: null": (body(max_tokens=None), JSON, 400, SCHEMA),
    "max_tokens of 65 bits": (body(max_tokens=2**64), JSON, 400, SCHEMA),
    "n: null": (body(n=None), JSON, 400, SCHEMA),
    "stop as text": (body(stop="x"), JSON, 400, SCHEMA),
    "stop that holds a number": (body(stop=[1]), JSON, 400, SCHEMA),
    "custom_inputs that are a list": (body(custom_inputs=[1]), JSON, 400, SCHEMA),
    "min_p as text": (body(min_p="0.5"), JSON, 400, PARAMS),
    "seed: 1.0": (body(seed=1.0), JSON, 400, PARAMS),
    "seed: true": (body(seed=True), JSON, 400, PARAMS),
    "a guard: 0": (body(repetition_guard=0), JSON, 400, PARAMS),
    "response_format as text": (body(response_format="json_object"), JSON, 400, PARAMS),
    "response_format: null": (body(response_format=None), JSON, 400, PARAMS),
    "response_format without a type": (body(response_format={}), JSON, 400, PARAMS),
    "an unknown key of response_format": (body(response_format={"type": "text", "strict": True}), JSON, 400, PARAMS),
    "a DataFrame without columns": ({"dataframe_records": []}, JSON, 400, SCHEMA),
    "a DataFrame where max_tokens is missing in a row": (rows({"max_tokens": 2}, {}), JSON, 400, NOT_COMPATIBLE),
    "a DataFrame where stop is missing in a row": (rows({"stop": ["a"]}, {}), JSON, 400, NOT_COMPATIBLE),
    "a DataFrame where custom_inputs are missing in a row": (
        rows({"custom_inputs": {"a": 1}}, {}), JSON, 400, NOT_COMPATIBLE,
    ),
    "chats as instances": ({"instances": [{"messages": HELLO}]}, JSON, 400, SCHEMA),
    "params that are a list": ({**rows({}), "params": [1]}, JSON, 400, "Parameters must be a dictionary"),
}  # fmt: skip

# Changed or dropped on the way, without a word: the plain request's answer comes.
HANDED_ON_CHANGED = {
    "an unknown field is dropped": body(mood="good", best_of=3),
    "params beside messages are dropped": body(params={"min_p": 7}),
    "a prompt beside messages is dropped": body(prompt="Goodbye"),
    "NaN in a column is taken as not given": raw('"temperature": NaN'),
    "of a field that comes twice the last one counts": '{"messages": [], ' + BODY[1:],
    "null in a list of stops becomes the text None": body(stop=[None]),
    "UTF-16 is read": BODY.encode("utf-16"),
    "a byte order mark is skipped": b"\xef\xbb\xbf" + BODY.encode(),
}


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
@pytest.mark.parametrize("name", NOT_HANDED_ON)
def test_mlflow_answers_without_the_model(servers, builder, name):
    sent, content_type, status, fragment = NOT_HANDED_ON[name]

    answer = post(servers[builder], sent, content_type)

    assert answer[0] == status
    assert fragment in answer[1]
    assert '"field"' not in answer[1]


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
@pytest.mark.parametrize("name", HANDED_ON_CHANGED)
def test_mlflow_changes_a_request_without_a_word(servers, builder, name):
    status, text = post(servers[builder], HANDED_ON_CHANGED[name])
    plain_status, plain = post(servers[builder], BODY)

    assert (status, plain_status) == (200, 200)
    assert json.loads(text)[0]["choices"] == json.loads(plain)[0]["choices"]


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_mlflow_strips_a_nul_from_the_end_of_a_stop_sequence(servers, builder):
    long = body(max_tokens=30)
    answers = [post(servers[builder], {**long, "stop": [stop]}) for stop in ("e\0", "e")]

    assert [status for status, _ in answers] == [200, 200]
    choices = [json.loads(text)[0]["choices"] for _, text in answers]
    assert choices[0] == choices[1]


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_mlflow_repeats_the_body_in_its_own_errors(servers, builder):
    status, text = post(servers[builder], message(role="user", content="a secret", mood="good"))

    assert status == 400
    assert text.count("a secret") == 2


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ping", 200),
        ("GET", "/health", 200),
        ("GET", "/version", 200),
        ("GET", "/invocations", 405),
        ("POST", "/ping", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/", 404),
    ],
)
def test_the_routes_are_mlflows(servers, builder, method, path, status):
    host = urlsplit(servers[builder])
    connection = http.client.HTTPConnection(host.hostname, host.port, timeout=30)
    connection.request(method, path)

    assert connection.getresponse().status == status
    connection.close()
