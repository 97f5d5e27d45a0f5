"""Generated requests against MLflow's scoring app: nothing but 200s and 400s, and every error of ours is clean.

The bodies stay within what JSON readers take: application/json, nesting below 100, integers below 4,300 digits.

Run: pytest tests/test_fuzz.py
"""

import json
import random
from collections import Counter

import pytest
from scoring import HELLO, App, clean_error, post, serving_apart

BODIES = 2000
SERVED = 150
CANARY = "canary-7f3a"
REASONS = {
    "eos": "stop",
    "stop_sequence": "stop",
    "repetition": "stop",
    "self_talk": "stop",
    "max_tokens": "length",
    "context": "length",
    "max_time": "length",
}
# The beginnings of what MLflow refuses by itself; a failure inside `predict` would read otherwise.
MLFLOW_REFUSES = (
    "Failed to enforce schema",
    "Invalid parameters found",
    "Parameters must be a dictionary",
    "Data is not compatible with model signature",
    "The input must be a JSON dictionary with exactly one of the input fields",
    "is not a valid dataframe representation",
)
TEXTS = [
    "", " ", "hi", "What is 2 + 2?", "a\0b", "\x07", "\ud800", "\ufffe", "\u00e9t\u00e9 \u6771\u4eac \U0001f600",
    "<|end|>", "<|user|>\n</s>", "\ue0000\ue001", "User: hi", "1e400", "NaN", "[]", "{}", "\u2028\x85",
    "hello " * 50, "ab" * 2000,
    "x" * 100_000, "{{ messages }}", "{% raise %}", "../../etc/passwd", "'; --", "\\ud800", "null",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 16, 17, 0.5, -0.0, 1e-320, 1e-9, 1.5, 2.0, 1e300, -1e300, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    -(2**63), 2**64, 10**400, 10**4200, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
FIELDS = [
    "temperature", "max_tokens", "stop", "n", "stream", "top_p", "top_k", "frequency_penalty", "presence_penalty",
    "tools", "custom_inputs", "seed", "min_p", "repetition_penalty", "repeat_last_n", "max_time", "context_overflow",
    "repetition_guard", "self_talk_guard", "show_engine", "response_format", "logit_bias", "logprobs", "top_logprobs",
    "user", "params", "prompt",
]  # fmt: skip
GOOD = {
    "temperature": [0.0, 0.7, 2.0, 1],
    "stop": [[], ["e"], ["the", "\n"], ["a"] * 16],
    "n": [1, 2],
    "stream": [False],
    "top_p": [1.0, 0.5, 1e-9],
    "top_k": [0, 1, 40, 10**9],
    "frequency_penalty": [0.0, -2.0, 2.0],
    "presence_penalty": [0.5, 1],
    "seed": [0, -5, 2**63 - 1],
    "min_p": [0.0, 0.5, 1.0],
    "repetition_penalty": [1.0, 0.01, 10.0],
    "repeat_last_n": [-1, 0, 64],
    "max_time": [0.001, 5.0, 1e300],
    "logprobs": [True, False],
    "context_overflow": ["error", "drop_oldest"],
    "repetition_guard": [True, False],
    "self_talk_guard": [True, False],
    "show_engine": [True, False],
    "custom_inputs": [{}, {"logit_bias": {}}, {"logit_bias": {"100": 100, "7": -3.5}}],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "regex", "regex": "[a-c]{2,4}"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
    ],
}
KEYWORDS = ["type", "properties", "items", "enum", "const", "pattern", "minimum", "$ref", "not", "required", CANARY]


def anything(source: random.Random, depth: int = 0):
    """Any JSON value."""
    kind = source.randrange(10 if depth < 4 else 7)
    if kind < 2:
        return source.choice(TEXTS)
    if kind < 4:
        return source.choice(NUMBERS)
    if kind < 7:
        return source.choice([None, True, False, CANARY * source.choice([1, 100])])
    if kind < 8:
        return nested(source, source.randrange(1, 90 - depth)) if source.random() < 0.3 else []
    if kind < 9:
        return [anything(source, depth + 1) for _ in range(source.randrange(4))]
    keys = ["role", "content", "type", "logit_bias", "schema", "name", *KEYWORDS, *TEXTS[:8]]
    return {source.choice(keys): anything(source, depth + 1) for _ in range(source.randrange(4))}


def nested(source: random.Random, depth: int):
    value: object = 1
    for _ in range(depth):
        value = [value] if source.random() < 0.5 else {"a": value}
    return value


def schema(source: random.Random, depth: int = 0):
    if depth > 3 or source.random() < 0.2:
        return source.choice([True, {}, {"type": "string"}, {"enum": ["a", 1, None]}, anything(source)])
    keyword = source.choice(KEYWORDS)
    inner = schema(source, depth + 1)
    return {keyword: source.choice([inner, [inner], {"a": inner}, source.choice(TEXTS), source.choice(NUMBERS)])}


def messages(source: random.Random):
    if source.random() < 0.08:
        return anything(source)
    made = []
    for _ in range(source.choice([1, 1, 1, 2, 3, 40])):
        message = {"role": source.choice(["user", "user", "system", "assistant"]), "content": source.choice(TEXTS[1:4])}
        if source.random() < 0.12:
            field = source.choice(["role", "content", "name", "tool_calls", "tool_call_id", "refusal", CANARY])
            message[field] = anything(source)
        if source.random() < 0.1:
            message["content"] = source.choice(TEXTS)
        made.append(message)
    return made


def generated(source: random.Random):
    """One request's body."""
    body = {"messages": messages(source) if source.random() < 0.5 else HELLO, "max_tokens": source.randint(1, 2)}
    for field in source.sample(FIELDS, source.choice([0, 1, 1, 2, 3])):
        good = field in GOOD and source.random() < 0.6
        body[field] = source.choice(GOOD[field]) if good else anything(source)
    if source.random() < 0.1:
        made = schema(source)
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": made}}
    if source.random() < 0.1:
        bias = {source.choice(["5", "-1", "1e3", "99999999", CANARY, "9" * 5000]): source.choice(NUMBERS)}
        body["custom_inputs"] = {"logit_bias": bias}
    if source.random() < 0.06:
        row = {"dataframe_records": [body, {"messages": HELLO, "max_tokens": 1}][: source.randint(1, 2)]}
        body = {**row, "params": anything(source)} if source.random() < 0.3 else row
    if source.random() < 0.03:
        body = anything(source)
    return body


def encoded(source: random.Random, body) -> bytes:
    text = json.dumps(body, ensure_ascii=source.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def check(status: int, text: str, sent: bytes) -> str:
    """The kind of a good answer: `answered`, `ours` or `mlflow`."""
    assert status in (200, 400), (status, text[:300], sent[:600])
    answer = json.loads(text)
    if status == 200:
        for completion in answer if isinstance(answer, list) else answer["predictions"]:
            usage, reasons = completion["usage"], completion["custom_outputs"]["stop_reason"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert [REASONS[reason] for reason in reasons] == [c["finish_reason"] for c in completion["choices"]]
            assert all(choice["message"]["role"] == "assistant" for choice in completion["choices"])
        return "answered"
    if "field" in answer:
        error = clean_error(text)
        assert error["message"].count(CANARY) < 20, sent[:600]
        return "ours"
    assert any(beginning in answer["message"] for beginning in MLFLOW_REFUSES), (text[-1500:], sent[:600])
    return "mlflow"


@pytest.fixture
def app(loaded):
    import torch

    # So small a model is slower on several threads, much slower where something else runs beside it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with serving_apart():
        yield {builder: App(model) for builder, model in loaded.items()}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_generated_requests_get_an_answer_or_a_clean_error(app, builder):
    source = random.Random(20_260_101)
    kinds: Counter[str] = Counter()
    for _ in range(BODIES):
        sent = encoded(source, generated(source))
        kinds[check(*app[builder].post(sent), sent)] += 1

    # The generator has to reach all three.
    assert min(kinds["answered"], kinds["ours"], kinds["mlflow"]) > BODIES // 20, kinds


def test_both_servers_give_generated_requests_the_same_status(servers):
    source = random.Random(11)
    for _ in range(SERVED):
        sent = encoded(source, generated(source))
        answers = {builder: post(address, sent) for builder, address in servers.items()}

        kinds = {check(status, text, sent) for status, text in answers.values()}
        assert len(kinds) == 1, (answers, sent[:600])
        if kinds == {"ours"}:
            assert answers["onnx"] == answers["transformers"], sent[:600]
