"""Run with: python -m pytest tests/test_chat.py"""

import json
import math

import openai.types.chat
import pytest

from phi3_mlflow.runtime.answers import Answer, Choice, Piece, TokenLogprob
from phi3_mlflow.runtime.chat import chunks, completion, parse_chat, parse_completion, parse_flat
from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.options import Options

USER = {"role": "user", "content": "Hello"}
BIG = "x" * 3_000_000


def refused(parse, body, **values):
    with pytest.raises(InvalidRequest) as caught:
        parse(body, Options(), **values)
    assert str(caught.value).startswith(f"`{caught.value.field}")
    assert len(str(caught.value)) < 700
    return caught.value


BAD_CHATS = {
    "no messages": ({}, "messages", "at least one message"),
    "null messages": ({"messages": None}, "messages", "is None"),
    "empty messages": ({"messages": []}, "messages", "is []; it must be a list of at least one message"),
    "messages as text": ({"messages": "Hello"}, "messages", "is 'Hello'"),
    "messages as an object": ({"messages": USER}, "messages", "must be a list"),
    "a message as text": ({"messages": ["Hello"]}, "messages[0]", "an object with `role` and `content`"),
    "a null message": ({"messages": [USER, None]}, "messages[1]", "is None"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role", "one of system, user, assistant"),
    "an unknown role": ({"messages": [{**USER, "role": "bot"}]}, "messages[0].role", "is 'bot'"),
    "a role in capitals": ({"messages": [{**USER, "role": "User"}]}, "messages[0].role", "is 'User'"),
    "the tool role": ({"messages": [USER, {**USER, "role": "tool"}]}, "messages[1].role", "is 'tool'"),
    "a role that is a list": ({"messages": [{**USER, "role": ["user"]}]}, "messages[0].role", "is ['user']"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "is None"),
    "null content": ({"messages": [{**USER, "content": None}]}, "messages[0].content", "is None"),
    "empty content": ({"messages": [USER, {**USER, "content": ""}]}, "messages[1].content", "at least one character"),
    "a number as content": ({"messages": [{**USER, "content": 5}]}, "messages[0].content", "is 5"),
    "parts as content": (
        {"messages": [{**USER, "content": [{"type": "text", "text": BIG}]}]}, "messages[0].content", "is [{'type'",
    ),
    "NUL": ({"messages": [{**USER, "content": "a\x00"}]}, "messages[0].content", "U+0000 at position 1"),
    "an escape character": ({"messages": [{**USER, "content": "\x1b[0m"}]}, "messages[0].content", "U+001B"),
    "delete": ({"messages": [{**USER, "content": "\x7f"}]}, "messages[0].content", "U+007F"),
    "half a surrogate": ({"messages": [{**USER, "content": "ab\ud800"}]}, "messages[0].content", "U+D800 at"),
    "a control character behind megabytes": (
        {"messages": [{**USER, "content": BIG + "\x00"}]}, "messages[0].content", "at position 3000000",
    ),
    "a name": ({"messages": [{**USER, "name": "Bob"}]}, "messages[0].name", "no place for it"),
    "a refusal": ({"messages": [{**USER, "refusal": "no"}]}, "messages[0].refusal", "no place for it"),
    "tool calls": ({"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls", "no place for it"),
    "a tool call's id": ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0].tool_call_id", "no place for it"),
    "an unknown message field": ({"messages": [{**USER, "mood": 1}]}, "messages[0].mood", "is not known"),
    "a message field of megabytes": ({"messages": [{**USER, BIG: 1}]}, f"messages[0].{'x' * 188}", "is not known"),
    "a message field that is no text": ({"messages": [{**USER, 5: 1}]}, "messages[0].5", "is not known"),
    "tools": ({"messages": [USER], "tools": []}, "tools", "leave it out"),
    "a stream of a call that cannot": ({"messages": [USER], "stream": True}, "stream", "use predict_stream"),
    "stream as text": ({"messages": [USER], "stream": "false"}, "stream", "is 'false'; it must be true or false"),
    "stream as a number": ({"messages": [USER], "stream": 0}, "stream", "is 0"),
    "custom_inputs as text": ({"messages": [USER], "custom_inputs": "a"}, "custom_inputs", "must be an object"),
    "an unknown custom input": ({"messages": [USER], "custom_inputs": {"seed": 1}}, "custom_inputs.seed", "not known"),
    "a custom input of megabytes": (
        {"messages": [USER], "custom_inputs": {BIG: 1}}, f"custom_inputs.{'x' * 186}", "not known",
    ),
    "a bad custom input": ({"messages": [USER], "custom_inputs": {"logit_bias": 5}}, "logit_bias", "is 5"),
    "logit_bias twice": (
        {"messages": [USER], "logit_bias": {}, "custom_inputs": {"logit_bias": {}}}, "logit_bias", "twice",
    ),
    "an unknown field": ({"messages": [USER], "temprature": 1}, "temprature", "is not a field of this request"),
    "an unknown field of megabytes": ({"messages": [USER], BIG: 1}, "x" * 200, "is not a field"),
    "an unknown field with a line break": ({"messages": [USER], "a\nb": 1}, "a\\nb", "is not a field"),
    "a field that is no text": ({"messages": [USER], 5: 1}, "5", "is not a field"),
    "a prompt": ({"messages": [USER], "prompt": "a"}, "prompt", "is not a field"),
    "a temperature that is no number": ({"messages": [USER], "temperature": math.nan}, "temperature", "is nan"),
    "an infinite max_time": ({"messages": [USER], "max_time": math.inf}, "max_time", "is inf"),
    "too many choices": ({"messages": [USER], "n": 17}, "n", "from 1 to 16"),
    "too many stop sequences": ({"messages": [USER], "stop": ["a"] * 17}, "stop", "at most 16"),
    "an option of megabytes": ({"messages": [USER], "top_p": BIG}, "top_p", "is 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_request_is_refused_by_the_field_the_value_and_what_is_allowed(case):
    body, field, text = BAD_CHATS[case]
    error = refused(parse_chat, body)
    assert error.field == field
    assert text in str(error)


def test_a_good_chat_request_is_taken_as_it_is():
    messages = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "\ta\r\n"}, USER]
    body = {"messages": messages, "temperature": 1, "stop": ["a"], "n": None, "stream": False, "tools": None}
    request = parse_chat({**body, "custom_inputs": {"logit_bias": {"5": 1}}}, Options(n=2))
    assert request.prompt == tuple(messages)
    assert request.options == Options(n=2, temperature=1.0, stop=("a",), logit_bias={5: 1.0})
    unset = dict.fromkeys(("name", "refusal", "tool_calls", "tool_call_id"))
    assert parse_chat({"messages": [{**USER, **unset}]}, Options()).prompt == (USER,)
    assert parse_chat({"messages": (USER,), "stream": True}, Options(), stream=True).prompt == (USER,)
    assert parse_chat({"messages": [USER], "custom_inputs": {"logit_bias": None}}, Options()).options == Options()


def test_megabytes_of_text_are_no_error_of_their_own():
    assert parse_chat({"messages": [{**USER, "content": BIG}]}, Options()).prompt[0]["content"] == BIG


def test_a_completion_request_has_a_prompt_with_or_without_template():
    body = {"prompt": "Once", "max_tokens": 5}
    raw = parse_completion(body, Options(), template=False)
    assert (raw.prompt, raw.options, raw.field) == ("Once", Options(max_tokens=5), "prompt")
    assert parse_completion({"prompt": [1, 2]}, Options(), template=False).prompt == [1, 2]
    with pytest.raises(InvalidRequest, match="`prompt` is"):
        parse_completion({"prompt": [1, 2]}, Options(), template=True)
    chat = parse_completion(body, Options(), template=True)
    assert (chat.prompt, chat.field) == (({"role": "user", "content": "Once"},), "prompt")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a\x00"}, "prompt"),
        ({"prompt": "a", "messages": [USER]}, "messages"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
    ],
)
def test_a_bad_completion_request_is_refused(body, field, template):
    assert refused(parse_completion, body, template=template).field == field


def test_a_flat_request_is_a_prompt_or_messages_as_text():
    request = parse_flat({"prompt": "Hello", "seed": 5, "messages": None}, Options(), template=True)
    assert (request.prompt, request.options.seed) == ((USER,), 5)
    assert parse_flat({"prompt": "Hello"}, Options(), template=False).prompt == "Hello"
    for template in (True, False):
        request = parse_flat({"messages": json.dumps([USER])}, Options(), template=template)
        assert (request.prompt, request.field) == ((USER,), "messages")


def test_flat_options_that_are_no_single_values_are_text_or_json_text():
    def options(**values):
        return parse_flat({"prompt": "a", **values}, Options(), template=True).options

    assert options(stop="END").stop == ("END",)
    assert options(stop='["a", "[b"]').stop == ("a", "[b")
    assert options(stop=["a"]).stop == ("a",)
    assert options(response_format='{"type": "json_object"}').response_format == {"type": "json_object"}
    assert options(logit_bias='{"5": 1}').logit_bias == {5: 1.0}


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({}, "prompt", "is None"),
        ({"prompt": "a", "messages": "[]"}, "prompt", "together with `messages`"),
        ({"messages": "Hello"}, "messages", "is not valid JSON"),
        ({"messages": '"Hello"'}, "messages", "must be a list"),
        ({"messages": "[]"}, "messages", "at least one message"),
        ({"messages": "null"}, "prompt", "is None"),
        ({"messages": '[{"role": "user", "content": "\\u0000"}]'}, "messages[0].content", "U+0000"),
        ({"messages": "[" * 100_000}, "messages", "is not valid JSON"),
        ({"messages": f"[{'9' * 5000}]"}, "messages", "is not valid JSON"),
        ({"prompt": "a", "stop": "[END]"}, "stop", """as a list: '["[END]"]'"""),
        ({"prompt": "a", "response_format": "json"}, "response_format", "is not valid JSON"),
        ({"prompt": "a", "response_format": "[1]"}, "response_format", "must be an object"),
        ({"prompt": "a", "logit_bias": "5"}, "logit_bias", "is 5"),
        ({"prompt": "a", "n": 2}, "n", "is 2; it must be 1"),
        ({"prompt": "a", "stream": True}, "stream", "whole answers"),
    ],
    ids=range(15),
)
def test_a_bad_flat_request_is_refused(body, field, text):
    error = refused(parse_flat, body, template=True)
    assert error.field == field
    assert text in str(error)


ANSWER = Answer(7, [Choice("Madrid", "eos", 3), Choice("Mad", "max_tokens", 2)], id="abc", created=1700000000)


def test_a_chat_completion_has_openais_shape_and_sums_the_choices():
    assert completion(ANSWER, "llm/v1/chat", "phi3") == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "phi3",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Madrid"}, "finish_reason": "stop"},
            {"index": 1, "message": {"role": "assistant", "content": "Mad"}, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        "custom_outputs": {"stop_reason": ["eos", "max_tokens"]},
    }


def test_a_text_completion_has_openais_shape():
    body = completion(ANSWER, "llm/v1/completions", "phi3")
    assert (body["id"], body["object"]) == ("cmpl-abc", "text_completion")
    assert body["choices"][0] == {"index": 0, "text": "Madrid", "finish_reason": "stop"}


def test_dropped_messages_are_reported():
    dropped = Answer(7, ANSWER.choices, dropped=2)
    assert completion(dropped, "llm/v1/chat", "phi3")["custom_outputs"]["dropped_messages"] == 2


def test_answers_have_ids_of_their_own():
    ids = {completion(Answer(1, []), "llm/v1/chat", "phi3")["id"] for _ in range(100)}
    assert len(ids) == 100


def test_chunks_open_with_the_role_and_the_last_one_carries_the_usage():
    (first,) = chunks(ANSWER, "llm/v1/chat", "phi3", Piece(0, "Mad", None, None), opened := {1})
    head = {"id": "chatcmpl-abc", "object": "chat.completion.chunk", "created": 1700000000, "model": "phi3"}
    assert first == {
        **head,
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Mad"}, "finish_reason": None}],
    }
    (second,) = chunks(ANSWER, "llm/v1/chat", "phi3", Piece(1, "rid", None, None), opened)
    assert second["choices"] == [{"index": 1, "delta": {"content": "rid"}, "finish_reason": None}]
    (ends,) = chunks(ANSWER, "llm/v1/chat", "phi3", Piece(0, "", "eos", None), opened)
    assert ends == {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    (whole,) = chunks(ANSWER, "llm/v1/chat", "phi3", Piece(1, "", "max_tokens", None, last=True), opened)
    assert whole == {
        **head,
        "choices": [{"index": 1, "delta": {}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        "custom_outputs": {"stop_reason": ["eos", "max_tokens"]},
    }


def test_chunks_of_a_text_completion_carry_text():
    (body,) = chunks(ANSWER, "llm/v1/completions", "phi3", Piece(0, "Mad", None, None), opened := set())
    assert (body["object"], body["choices"]) == (
        "text_completion",
        [{"index": 0, "text": "Mad", "finish_reason": None}],
    )
    (body,) = chunks(ANSWER, "llm/v1/completions", "phi3", Piece(0, "", "eos", None, last=True), opened)
    assert body["choices"] == [{"index": 0, "text": "", "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 12


TOLD = [
    TokenLogprob(0, " é".encode(), -0.25, ((" é".encode(), -0.25), (b"<|end|>", -2.0))),
    TokenLogprob(1, b"\xf0\x9f", -0.5, ((b"\xe2", -0.1), (b"\xf0\x9f", -0.5))),
]


def test_log_probabilities_of_a_chat_have_openais_shape():
    choices = completion(Answer(7, [Choice("é", "eos", 2, TOLD)]), "llm/v1/chat", "phi3")["choices"]
    first, second = choices[0]["logprobs"]["content"]
    assert first == {
        "token": " é",
        "logprob": -0.25,
        "bytes": [32, 195, 169],
        "top_logprobs": [
            {"token": " é", "logprob": -0.25, "bytes": [32, 195, 169]},
            {"token": "<|end|>", "logprob": -2.0, "bytes": list(b"<|end|>")},
        ],
    }
    assert (second["token"], second["bytes"]) == ("bytes:\\xf0\\x9f", [240, 159])
    (piece,) = chunks(ANSWER, "llm/v1/chat", "phi3", Piece(0, "é", None, TOLD), set())
    assert piece["choices"][0]["logprobs"] == choices[0]["logprobs"]
    read = openai.types.chat.ChatCompletionChunk.model_validate(piece).choices[0].logprobs
    assert [(token.token, token.logprob) for token in read.content] == [(" é", -0.25), ("bytes:\\xf0\\x9f", -0.5)]


def test_log_probabilities_of_a_text_completion_have_openais_shape():
    body = completion(Answer(7, [Choice("é", "eos", 2, TOLD)]), "llm/v1/completions", "phi3")
    assert body["choices"][0]["logprobs"] == {
        "tokens": [" é", "bytes:\\xf0\\x9f"],
        "token_logprobs": [-0.25, -0.5],
        "top_logprobs": [{" é": -0.25, "<|end|>": -2.0}, {"bytes:\\xe2": -0.1, "bytes:\\xf0\\x9f": -0.5}],
        "text_offset": [0, 1],
    }
    assert openai.types.Completion.model_validate(body).choices[0].logprobs.text_offset == [0, 1]


def test_the_first_token_of_a_prompt_has_null_for_its_log_probability_and_for_the_likeliest_tokens():
    told = [TokenLogprob(0, b"<s>", None), TokenLogprob(0, b"a", -0.3, ((b"a", -0.3),))]
    body = completion(Answer(2, [Choice("a", "eos", 2, told)]), "llm/v1/completions", "phi3")
    likely = body["choices"][0]["logprobs"]
    assert (likely["token_logprobs"], likely["top_logprobs"]) == ([None, -0.3], [None, {"a": -0.3}])


def test_of_two_tokens_with_one_text_the_likelier_one_is_told():
    told = [TokenLogprob(0, b"a", -0.3, ((b"a", -0.3), (b"b", -1.0), (b"a", -1.3)))]
    body = completion(Answer(7, [Choice("a", "eos", 2, told)]), "llm/v1/completions", "phi3")
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.3, "b": -1.0}]


def test_log_probabilities_are_asked_for_as_in_openais_two_tasks():
    options = parse_chat({"messages": [USER], "logprobs": True, "top_logprobs": 3}, Options()).options
    assert (options.logprobs, options.top_logprobs) == (True, 3)
    options = parse_completion({"prompt": "Hello", "logprobs": 3}, Options(), template=True).options
    assert (options.logprobs, options.top_logprobs) == (True, 3)
    options = parse_completion({"prompt": "Hello", "logprobs": 0}, Options(), template=True).options
    assert (options.logprobs, options.top_logprobs) == (True, 0)
    for parse, body, field, text in [
        (parse_chat, {"messages": [USER], "top_logprobs": 3}, "top_logprobs", "`logprobs` is not true"),
        (parse_chat, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        (parse_chat, {"messages": [USER], "logprobs": 3}, "logprobs", "true or false"),
        (parse_completion, {"prompt": "Hello", "logprobs": True}, "logprobs", "from 0 to 20"),
        (parse_completion, {"prompt": "Hello", "top_logprobs": 3}, "top_logprobs", "is for chats"),
        (parse_flat, {"prompt": "Hello", "logprobs": 3}, "logprobs", "one string"),
        (parse_flat, {"prompt": "Hello", "top_logprobs": 3}, "top_logprobs", "one string"),
        (parse_flat, {"prompt": "Hello", "show_engine": True}, "show_engine", "one string"),
    ]:
        error = refused(parse, body, **({} if parse is parse_chat else {"template": True}))
        assert (error.field, text in str(error)) == (field, True)


def test_completions_are_what_mlflows_output_schemas_ask_for():
    import pandas as pd
    from mlflow.models.utils import _enforce_schema
    from mlflow.types.llm import CHAT_MODEL_OUTPUT_SCHEMA, COMPLETIONS_MODEL_OUTPUT_SCHEMA

    for task, schema, more in [
        ("llm/v1/chat", CHAT_MODEL_OUTPUT_SCHEMA, set()),
        ("llm/v1/completions", COMPLETIONS_MODEL_OUTPUT_SCHEMA, {"custom_outputs"}),
    ]:
        body = completion(ANSWER, task, "phi3")
        enforced = _enforce_schema(pd.DataFrame([body]), schema)
        assert set(body) - set(enforced) == more
        assert enforced["choices"][0] == body["choices"]


def test_chunks_are_what_mlflow_and_openai_read():
    from mlflow.types.llm import ChatCompletionChunk

    for body in (
        *chunks(ANSWER, "llm/v1/chat", "phi3", Piece(0, "Mad", None, None), set()),
        *chunks(ANSWER, "llm/v1/chat", "phi3", Piece(1, "", "eos", None, last=True), {1}),
    ):
        read = ChatCompletionChunk.from_dict(body)
        assert read.choices[0].finish_reason == body["choices"][0]["finish_reason"]
        assert read.to_dict()["choices"][0]["index"] == body["choices"][0]["index"]
