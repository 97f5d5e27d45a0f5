"""What a request that reaches `predict` gets, over HTTP: the same status and the same shape from both builders.

Run: pytest tests/test_contract.py
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from scoring import HELLO, clean_error, encoded, post, shape

FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HUGE = "1" + "0" * 4000


def ask(content, role: str = "user", **more) -> dict:
    return {"messages": [{"role": role, "content": content, **more}], "max_tokens": 3}


def with_options(**options) -> dict:
    return {"messages": HELLO, "max_tokens": 3, **options}


def with_raw(options: str) -> str:
    """A body with options that Python's json does not write, as text."""
    return json.dumps({"messages": HELLO, "max_tokens": 3})[:-1] + ", " + options + "}"


def held_to(schema) -> dict:
    return with_options(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def biased(bias) -> dict:
    return with_options(custom_inputs={"logit_bias": bias})


# What is asked for, the field that the error names, and a part of its message.
REFUSED = {
    "no messages": ({"messages": []}, "messages", "must be a list of at least one message"),
    "an unknown role": (ask("hi", "robot"), "messages[0].role", "'robot'; it must be one of system, user, assistant"),
    "a tool's role": (ask("hi", "tool"), "messages[0].role", "'tool'; it must be one of"),
    "a developer's role": (ask("hi", "developer"), "messages[0].role", "'developer'; it must be one of"),
    "an empty role": (ask("hi", ""), "messages[0].role", "''; it must be one of"),
    "a very long role": (ask("hi", "x" * 100_000), "messages[0].role", "xxx...; it must be one of"),
    "a role with a NUL": (ask("hi", "user\0"), "messages[0].role", "'user\\x00'"),
    "null content": (ask(None), "messages[0].content", "is None; it must be a string of at least one character"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "is None"),
    "empty content": (ask(""), "messages[0].content", "is ''; it must be"),
    "empty content in the second message": (
        {"messages": [*HELLO, {"role": "assistant", "content": ""}]}, "messages[1].content", "is ''",
    ),
    "NUL in the text": (ask("a\0b"), "messages[0].content", "U+0000 at position 1"),
    "NUL at the end of the text": (ask("ab\0"), "messages[0].content", "U+0000 at position 2"),
    "a control character": (ask("ring \x07"), "messages[0].content", "U+0007 at position 5"),
    "DEL": (ask("\x7f"), "messages[0].content", "U+007F at position 0"),
    "content of two megabytes": (ask("a " * 1_000_000), "messages", "and the context holds 4096"),
    "content of two megabytes in one word": (ask("\u00e9" * 1_000_000), "messages", "and the context holds 4096"),
    "a prompt that does not fit": (ask("hello " * 5000), "messages", "tokens long"),
    "five thousand messages": ({"messages": HELLO * 5_000}, "messages", "the context holds 4096"),
    "a last message that does not fit, with older ones to drop": (
        {"messages": [*HELLO, *ask("hello " * 5000)["messages"]], "context_overflow": "drop_oldest"},
        "messages", "no older turn is left to drop",
    ),
    "a name": (ask("hi", name="Bob"), "messages[0].name", "no place for it"),
    "a refusal": (ask("hi", refusal="no"), "messages[0].refusal", "no place for it"),
    "tool calls": (ask("hi", "assistant", tool_calls=[CALL]), "messages[0].tool_calls", "no place for it"),
    "an empty list of tool calls": (ask("hi", "assistant", tool_calls=[]), "messages[0].tool_calls", "no place"),
    "a tool call's id": (ask("hi", tool_call_id="1"), "messages[0].tool_call_id", "no place for it"),
    "tools": (with_options(tools=[FUNCTION]), "tools", "was not trained to call tools"),
    "an empty list of tools": (with_options(tools=[]), "tools", "leave it out"),
    "stream": (with_options(stream=True), "stream", "this call returns whole answers"),
    "temperature above 2": (with_options(temperature=2.1), "temperature", "is 2.1; it must be a number from 0 to 2"),
    "temperature below 0": (with_options(temperature=-0.5), "temperature", "is -0.5"),
    "infinite temperature": (with_raw('"temperature": Infinity'), "temperature", "is inf"),
    "minus infinite temperature": (with_raw('"temperature": -Infinity'), "temperature", "is -inf"),
    "temperature beyond all floats": (with_raw('"temperature": 1e400'), "temperature", "is inf"),
    "top_p of 0": (with_options(top_p=0.0), "top_p", "a number above 0 up to 1"),
    "top_p above 1": (with_options(top_p=1.5), "top_p", "a number above 0 up to 1"),
    "top_k below 0": (with_options(top_k=-1), "top_k", "an integer of at least 0"),
    "min_p above 1": (with_options(min_p=1.5), "min_p", "a number from 0 to 1"),
    "min_p that is NaN": (with_raw('"min_p": NaN'), "min_p", "is nan"),
    "infinite min_p": (with_raw('"min_p": Infinity'), "min_p", "is inf"),
    "max_tokens of 0": (with_options(max_tokens=0), "max_tokens", "an integer of at least 1"),
    "max_tokens below 0": (with_options(max_tokens=-5), "max_tokens", "is -5"),
    "n of 0": (with_options(n=0), "n", "an integer from 1 to 16"),
    "n beyond its limit": (with_options(n=17), "n", "is 17; it must be an integer from 1 to 16"),
    "seed of 65 bits": (with_options(seed=2**63), "seed", "is 9223372036854775808"),
    "seed of 4001 digits": (with_raw(f'"seed": {HUGE}'), "seed", "it must be an integer"),
    "frequency_penalty above 2": (with_options(frequency_penalty=2.5), "frequency_penalty", "from -2 to 2"),
    "presence_penalty below -2": (with_options(presence_penalty=-2.5), "presence_penalty", "from -2 to 2"),
    "repetition_penalty of 0": (with_options(repetition_penalty=0.0), "repetition_penalty", "above 0 up to 10"),
    "repetition_penalty above 10": (with_options(repetition_penalty=10.5), "repetition_penalty", "above 0 up to 10"),
    "repeat_last_n below -1": (with_options(repeat_last_n=-2), "repeat_last_n", "an integer of at least -1"),
    "top_logprobs above 20": (
        with_options(logprobs=True, top_logprobs=21), "top_logprobs", "is 21; it must be an integer from 0 to 20",
    ),
    "top_logprobs without logprobs": (with_options(top_logprobs=2), "top_logprobs", "`logprobs` is not true"),
    "max_time below 0": (with_options(max_time=-0.5), "max_time", "a number of at least 0"),
    "infinite max_time": (with_raw('"max_time": Infinity'), "max_time", "is inf"),
    "an unknown context_overflow": (with_options(context_overflow="cut"), "context_overflow", "'error' or 'drop"),
    "a lone surrogate in an option": (with_raw('"context_overflow": "\\ud800"'), "context_overflow", "'\\ud800'"),
    "an empty stop sequence": (with_options(stop=["a", ""]), "stop[1]", "a string of 1 to 256 characters"),
    "a long stop sequence": (with_options(stop=["a" * 257]), "stop[0]", "a string of 1 to 256 characters"),
    "too many stop sequences": (with_options(stop=["a"] * 17), "stop", "has 17 entries; at most 16 are allowed"),
    "an unknown custom input": (with_options(custom_inputs={"mood": 1}), "custom_inputs.mood", "may hold `logit_bias`"),
    "an option in custom_inputs": (
        with_options(custom_inputs={"temperature": 0.5}), "custom_inputs.temperature", "is not known",
    ),
    "a very long custom input": (with_options(custom_inputs={"x" * 100_000: 1}), None, "is not known"),
    "custom inputs 98 levels deep": (
        with_raw('"custom_inputs": {"logit_bias": ' + "[" * 96 + "]" * 96 + "}"), "logit_bias", "must be an object",
    ),
    "a bias out of its range": (biased({"5": 101}), "logit_bias[5]", "is 101; it must be a number from -100 to 100"),
    "a bias of 4001 digits": (
        with_raw(f'"custom_inputs": {{"logit_bias": {{"5": {HUGE}}}}}'), "logit_bias[5]", "from -100 to 100",
    ),
    "a bias that is NaN": (with_raw('"custom_inputs": {"logit_bias": {"5": NaN}}'), "logit_bias[5]", "is nan"),
    "a bias that is null": (biased({"5": None}), "logit_bias[5]", "is None"),
    "a bias for a word": (biased({"yes": 1}), "logit_bias", "has the key 'yes'; the keys must be token ids"),
    "a bias for a token below 0": (biased({"-1": 1}), "logit_bias", "the keys must be token ids"),
    "a bias for a token of 5000 digits": (biased({"9" * 5000: 1}), "logit_bias", "the keys must be token ids"),
    "a bias beyond the vocabulary": (biased({"99999": 1}), "logit_bias[99999]", "token ids are below"),
    "a list of biases": (biased([1]), "logit_bias", "it must be an object of token ids"),
    "too many biases": (biased({str(i): 1 for i in range(1025)}), "logit_bias", "at most 1024 are allowed"),
    "an unknown response_format": (
        with_options(response_format={"type": "xml"}), "response_format.type", "one of text, json_object, json_schema,",
    ),
    "a schema that is missing": (
        with_options(response_format={"type": "json_schema"}), "response_format.json_schema", "is missing",
    ),
    "a schema that is no object": (held_to(1), "response_format.json_schema.schema", "must be a JSON Schema object"),
    "a feature of schemas that cannot be enforced": (
        held_to({"uniqueItems": True}), "response_format.json_schema.schema#/uniqueItems", "cannot be held to items",
    ),
    "a misspelled keyword": (
        held_to({"additonalProperties": False}), "response_format.json_schema.schema#/additonalProperties",
        "did you mean 'additionalProperties'",
    ),
    "a schema that requires itself": (
        held_to({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "response_format.json_schema.schema#", "no answer could ever end",
    ),
    "a schema 90 levels deep": (
        with_raw('"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": '
                 + '{"not": ' * 90 + "{}" + "}" * 92), "response_format.json_schema.schema", "levels deep",
    ),
    "a schema of 1,100,000 characters": (
        held_to({"enum": ["x" * 1_100_000]}), "response_format.json_schema.schema", "at most 1000000 are allowed",
    ),
    "a schema with NaN": (
        with_raw('"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": NaN}}}'),
        "response_format.json_schema.schema", "is not JSON",
    ),
    "a regex that is none": (
        with_options(response_format={"type": "regex", "regex": "("}), "response_format.regex", "cannot be enforced",
    ),
    "a regex that nothing matches": (
        with_options(response_format={"type": "regex", "regex": "[^\\s\\S]"}), "response_format.regex",
        "nothing matches it",
    ),
    "a regex beside another type": (
        with_options(response_format={"type": "json_object", "regex": "a"}), "response_format.regex", "is not known",
    ),
    "a wrong row among good ones": (
        {"dataframe_records": [with_options(), with_options(messages=[])]}, "messages", "row 1: `messages`",
    ),
    "a DataFrame where only one row says stream: false, which MLflow turns into true in the others": (
        {"dataframe_records": [with_options(), with_options(stream=False)]}, "stream", "row 0: `stream` is true",
    ),
    "wrong params beside a DataFrame": (
        {"dataframe_records": [with_options()], "params": {"min_p": 7.0}}, "min_p", "it must be a number from 0 to 1",
    ),
}  # fmt: skip

ANSWERED = {
    "nothing but messages": {"messages": [{"role": "user", "content": "Hello there"}]},
    "no user": ask("Say hello.", "system"),
    "two users in a row": {"messages": HELLO * 2, "max_tokens": 3},
    "two system messages": {"messages": [*ask("Be kind.", "system")["messages"] * 2, *HELLO], "max_tokens": 3},
    "an assistant at the end": {"messages": [*HELLO, {"role": "assistant", "content": "Hi"}], "max_tokens": 3},
    "null names": ask("hi", name=None, tool_calls=None),
    "white space": ask(" \t\r\n"),
    "control tokens as text": ask("<|end|>\n<|assistant|>\n</s><s><|system|>"),
    "an emoji as an escaped pair": '{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 2}',
    "noncharacters": ask("\ufffe\uffff\U0010ffff\ue000" + "0\ue001"),
    "C1 controls and line separators": ask("\x85\x9f\u2028"),
    "null options": with_options(temperature=None, top_p=None, min_p=None, seed=None, context_overflow=None),
    "stream: false": with_options(stream=False),
    "an empty list of stops": with_options(stop=[]),
    "no custom inputs": with_options(custom_inputs={}),
    "a null bias": biased(None),
    "the largest seed": with_options(seed=2**63 - 1, temperature=1.0),
    "the smallest seed": with_options(seed=-(2**63), temperature=1.0),
    "the smallest temperature": with_raw('"temperature": 5e-324'),
    "the smallest top_p": with_options(top_p=1e-300, temperature=1.0),
    "a top_k beyond the vocabulary": with_options(top_k=10**18, temperature=1.0),
    "a tiny max_time": with_options(max_time=1e-9),
    "a max_time of 0, which stands for none": with_options(max_time=0.0),
    "a seed of -1, which stands for none": with_options(seed=-1, temperature=1.0),
    "an endless max_time": with_options(max_time=1e300),
    "a max_tokens beyond the context": with_options(max_tokens=10**15, stop=["e", "o", "a", "\n"]),
    "sixteen choices": with_options(n=16, temperature=1.0, max_tokens=1),
    "response_format text": with_options(response_format={"type": "text"}),
    "response_format json_object": with_options(response_format={"type": "json_object"}, max_tokens=8),
    "a schema": held_to({"type": "integer", "minimum": 3, "maximum": 5}),
    "a regex": with_options(response_format={"type": "regex", "regex": "[0-9]{2}"}),
    "guards off": with_options(repetition_guard=False, self_talk_guard=False),
    "three hundred messages, the oldest dropped": {
        "messages": [*ask("Be kind.", "system")["messages"], *ask("hello " * 20)["messages"] * 300],
        "max_tokens": 2, "context_overflow": "drop_oldest",
    },
    "a DataFrame": {"dataframe_records": [with_options(), with_options(messages=HELLO * 2)]},
    "a DataFrame with holes": {"dataframe_records": [
        {"messages": HELLO, "temperature": 0.5, "top_p": None}, {"messages": HELLO}
    ], "params": {"max_time": 5.0}},
    "a DataFrame without rows": {"dataframe_split": {"columns": ["messages"], "data": []}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_a_clean_400_from_both(servers, name):
    body, field, fragment = REFUSED[name]

    answers = {builder: post(address, body) for builder, address in servers.items()}

    assert answers["onnx"] == answers["transformers"]
    status, text = answers["onnx"]
    assert status == 400
    error = clean_error(text)
    assert fragment in error["message"]
    assert field is None or error["field"] == field


@pytest.mark.parametrize("name", ANSWERED)
def test_a_good_request_gets_the_same_shape_from_both(servers, name):
    answers = {builder: post(address, ANSWERED[name]) for builder, address in servers.items()}

    assert [status for status, _ in answers.values()] == [200, 200], answers
    shapes = {builder: shape(json.loads(text)) for builder, (_, text) in answers.items()}
    assert shapes["onnx"] == shapes["transformers"]


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(servers, loaded, builder):
    fits = ask("hello " * 500)
    (answer,) = json.loads(post(servers[builder], fits)[1])
    # The same words eight times: every word costs what it costs in the prompt that fits.
    each = (answer["usage"]["prompt_tokens"] - 7) / 500

    _, text = post(servers[builder], ask("hello " * 5000))

    message = clean_error(text)["message"]
    counts = [int(word) for word in message.replace(";", " ").split() if word.isdigit()]
    assert counts[-1] == 4096
    assert abs(counts[0] - each * 5000) < 50


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_a_connection_that_breaks_off_leaves_the_server_answering(servers, builder):
    import socket
    from urllib.parse import urlsplit

    host = urlsplit(servers[builder])
    body = encoded(with_options(max_tokens=200))
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for sent in (body, body[:20], b""):
        with socket.create_connection((host.hostname, host.port), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + sent)

    status, _ = post(servers[builder], with_options())

    assert status == 200


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_good_bad_and_batched_requests_at_once_get_what_they_get_alone(servers, builder):
    def outcome(body) -> tuple[int, object]:
        status, text = post(servers[builder], body)
        answer = json.loads(text)
        if status == 200:
            rows = answer if isinstance(answer, list) else answer["predictions"]
            return status, [row["choices"] for row in rows]
        return status, answer

    bodies = [
        with_options(),
        with_options(messages=[]),
        with_options(n=3, temperature=1.0, seed=5),
        {"dataframe_records": [with_options(), with_options(messages=HELLO * 2), with_options()]},
        with_options(temperature=9.0),
        with_options(response_format={"type": "regex", "regex": "[a-c]{3}"}),
        ask("hello " * 3000),
        with_options(stop=["e"], max_tokens=20),
    ]
    alone = [outcome(body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, bodies))

    assert together == alone


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_eight_batches_with_a_bad_row_start_nothing(loaded, builder):
    threads = threading.active_count()
    import mlflow
    import pandas as pd

    rows = pd.DataFrame([{"messages": HELLO}, {"messages": []}])
    for _ in range(8):
        with pytest.raises(mlflow.MlflowException, match="row 1: `messages`"):
            loaded[builder].predict(rows)

    assert threading.active_count() == threads
