"""Bodies of OpenAI's routes: what is accepted and what it comes to, what is refused, and the shapes of answers.

Run: pytest tests/serve/test_bodies.py
"""

import json

import pytest
from fakes import TOKENS, FakeDecoder, spell
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve import openai, responses, tokenize
from phi3_mlflow.serve.keys import Keys
from phi3_mlflow.serve.wire import JsonResponse, encode

HELLO = [{"role": "user", "content": "hello"}]
MINE = Options(temperature=0.5)


@pytest.fixture
def service():
    made = Service(TOKENS, FakeDecoder(lambda prompt: spell("hello world")))
    yield made
    made.close()


def chat(**more):
    return openai.parse_chat({"messages": HELLO, **more}, MINE)


def completion(**more):
    return openai.parse_completion({"prompt": "hello", **more}, MINE)


def respond(**more):
    return responses.parse({"input": "hello", **more}, MINE)


@pytest.mark.parametrize("parse", [chat, completion, respond])
def test_what_means_nothing_changes_nothing(parse):
    plain = parse()
    for fields in (
        {
            "user": "a",
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "safety_identifier": "s",
            "prompt_cache_key": "k",
        },
        {"store": False},
        {"store": None, "temperature": None, "stream": None, "stream_options": None},
    ):
        assert parse(**fields) == plain
    assert plain.requests[0].options.temperature == 0.5


def test_options_stand_at_the_top_level():
    options = chat(logit_bias={"5": 1}, min_p=0.1, top_k=3, seed=4, stop="a", n=2).requests[0].options

    assert (options.logit_bias, options.min_p, options.top_k, options.seed) == ({5: 1}, 0.1, 3, 4)
    assert (options.stop, options.n) == (("a",), 2)


@pytest.mark.parametrize("names", [["max_tokens"], ["max_completion_tokens"], ["max_tokens", "max_completion_tokens"]])
def test_max_tokens_has_two_names(names):
    assert chat(**dict.fromkeys(names, 7)).requests[0].options.max_tokens == 7


def test_a_conversation_as_clients_send_it_back_is_taken():
    wanted = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
            {"role": "user", "content": "d"},
        ],
        tools=[],
        tool_choice="none",
    )

    assert [message["role"] for message in wanted.requests[0].prompt] == ["system", "user", "assistant", "user"]
    assert wanted.requests[0].prompt[1]["content"] == "a\nb"


def test_prompts_come_as_text_ids_or_several_of_them():
    assert [each.prompt for each in completion(prompt=[1, 2]).requests] == [[1, 2]]
    assert [each.prompt for each in completion(prompt=["a", "b"]).requests] == ["a", "b"]
    assert [each.prompt for each in completion(prompt=[[1], [2, 3]]).requests] == [[1], [2, 3]]
    assert completion(best_of=2, n=2).requests[0].options.n == 2
    assert completion(logprobs=3).requests[0].options.top_logprobs == 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a"),
        ({"custom_inputs": {}}, "custom_inputs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_what_a_chat_cannot_honour_is_named(fields, named):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)

    assert caught.value.field == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "text"}}, "response_format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"truncation": "some"}, "truncation"),
        ({"text": 1}, "text"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": ["text"]}}}, "text.format"),
        ({"text": {"format": {"type": {}}}}, "text.format"),
        ({"text": {"format": []}}, "text.format"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"instructions": 1}, "instructions"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"mood": 1}, "mood"),
    ],
)
def test_what_a_response_cannot_honour_is_named(fields, named):
    with pytest.raises(InvalidRequest) as caught:
        respond(**fields)

    assert caught.value.field == named


def test_a_response_that_is_not_to_be_obfuscated_is_not():
    options = {"include_obfuscation": False}

    assert respond(stream=True, stream_options=options) == respond(stream=True)
    assert chat(stream=True, stream_options=options) == chat(stream=True)


@pytest.mark.parametrize(
    ("body", "field", "named"),
    [
        ({"input": "a"}, "messages[0].content", "input"),
        ({"instructions": "a", "input": "b"}, "messages[0].content", "instructions"),
        ({"instructions": "a", "input": [{}, {}]}, "messages[2].content", "input[1].content"),
        ({"input": "a"}, "response_format.json_schema.schema#/a", "text.format.schema#/a"),
    ],
)
def test_errors_of_a_response_have_the_names_that_its_sender_knows(body, field, named):
    assert responses.renamed(InvalidRequest(field, "is wrong"), body).field == named


def whole(service, wanted):
    runs = [service.run(service.prepare(each)) for each in wanted.requests]
    pieces = [list(run) for run in runs]
    return runs, pieces


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0}, {"logprobs": True, "top_logprobs": 2}])
def test_chats_have_openais_shape_whole_and_in_chunks(service, more):
    wanted = chat(stream=True, stream_options={"include_usage": True}, **more)
    runs, (pieces,) = whole(service, wanted)
    shape = openai.Shape(wanted, [run.answer for run in runs], "phi3", [None] * len(runs))
    chunks = [chunk for piece in pieces for chunk in shape.chunks(0, piece)] + shape.last()

    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    answer = openai.Shape(chat(**more), [run.answer for run in runs], "phi3", [None] * len(runs)).whole()
    ChatCompletion.model_validate(answer, strict=True)
    assert answer["choices"][0]["message"]["content"] == "hello world"
    for likely in [answer["choices"][0]["logprobs"], *(c["choices"][0]["logprobs"] for c in chunks[:2])]:
        assert (likely is None) is ("logprobs" not in more)
        assert likely is None or set(likely) == {"content", "refusal"}


def test_choices_are_encoded_one_by_one_and_the_body_is_the_same():
    choice = {"index": 0, "text": "\ud800 é", "logprobs": {"tokens": ["a"] * 3}}
    for count in range(4):
        content = {"id": "cmpl-1", "choices": [choice] * count, "usage": {"prompt_tokens": 1}}
        assert json.loads(JsonResponse(content).body) == json.loads(encode(content))
    assert JsonResponse([1]).body == b"[1]"


def test_completions_have_openais_shape_and_repeat_the_prompt_where_asked(service):
    wanted = completion(prompt=["hello", "world"], echo=True, logprobs=1)
    runs, _ = whole(service, wanted)
    prompts = [openai.echoed(each, TOKENS) for each in wanted.requests]
    answer = openai.Shape(wanted, [run.answer for run in runs], "phi3", prompts).whole()

    for choice in answer["choices"]:
        # OpenAI's own answers have nulls for a token that nothing comes before, and its client's type does not.
        likely = choice["logprobs"]
        assert (likely["token_logprobs"][0], likely["top_logprobs"][0]) == (None, None)
        likely["token_logprobs"][0], likely["top_logprobs"][0] = 0.0, {}
    Completion.model_validate(answer, strict=True)
    assert [choice["text"] for choice in answer["choices"]] == ["hello hello world", "world hello world"]


def test_a_stream_that_repeats_the_prompt_has_the_log_probabilities_of_the_whole_answer(service):
    wanted = completion(echo=True, logprobs=1, n=2, stream=True)
    runs, (pieces,) = whole(service, wanted)
    prompts = [openai.echoed(each, TOKENS) for each in wanted.requests]
    answer = openai.Shape(wanted, [run.answer for run in runs], "phi3", prompts).whole()
    shape = openai.Shape(wanted, [run.answer for run in runs], "phi3", prompts)
    streamed = [choice for piece in pieces for chunk in shape.chunks(0, piece) for choice in chunk["choices"]]

    for choice in answer["choices"]:
        assert choice["logprobs"]["tokens"][-1] == "<|end|>"
        for name, values in choice["logprobs"].items():
            own = [each["logprobs"] for each in streamed if each["index"] == choice["index"] and each["logprobs"]]
            assert [value for likely in own for value in likely[name]] == values


def test_responses_have_openais_shape(service):
    wanted = respond(instructions="yes", metadata={"a": "b"})
    (run,), (pieces,) = whole(service, wanted)
    shape = responses.Shape({"instructions": "yes"}, wanted.requests[0].options, run.answer, "phi3")
    events = [*shape.begin(), *(event for piece in pieces for event in shape.pieces(piece))]

    assert Response.model_validate(shape.whole()).output_text == "hello world"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == shape.whole()
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)


@pytest.mark.parametrize(
    ("code", "told"),
    [("rate_limit_exceeded", "rate_limit_exceeded"), ("internal_error", "server_error"), ("timeout", "server_error")],
)
def test_a_response_that_fails_has_one_of_openais_codes(service, code, told):
    wanted = respond()
    (run,), _ = whole(service, wanted)
    failed = responses.Shape({}, wanted.requests[0].options, run.answer, "phi3").failed("it failed", code)

    assert TypeAdapter(ResponseStreamEvent).validate_python(failed).response.error.code == told


def test_text_and_its_tokens_go_to_and_fro(service):
    found = tokenize.tokenize({"prompt": "hello world", "return_token_strs": True}, service)
    plain = tokenize.tokenize({"prompt": "hello world", "add_special_tokens": False}, service)

    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["tokens"][1:] == plain["tokens"]
    assert tokenize.detokenize({"tokens": plain["tokens"]}, service) == {"prompt": "hello world"}
    for plain in ({}, {"add_special_tokens": False, "add_generation_prompt": True}):
        assert tokenize.tokenize({"messages": HELLO, **plain}, service)["tokens"] == TOKENS.encode_chat(HELLO)


@pytest.mark.parametrize(
    ("function", "body", "named"),
    [
        (tokenize.tokenize, {}, "prompt"),
        (tokenize.tokenize, {"prompt": "a", "b": 1}, "b"),
        (tokenize.tokenize, {"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        (tokenize.tokenize, {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        (tokenize.tokenize, {"messages": [{"role": "user", "content": "a" * 200_001}]}, "messages"),
        (tokenize.tokenize, {"messages": HELLO * 20_000}, "messages"),
        (tokenize.detokenize, {}, "tokens"),
        (tokenize.detokenize, {"tokens": [1], "a": 1}, "a"),
        (tokenize.detokenize, {"tokens": [True]}, "tokens[0]"),
        (tokenize.detokenize, {"tokens": [-1]}, "tokens[0]"),
        (tokenize.detokenize, {"tokens": [10**9]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_tokenized_is_named(service, function, body, named):
    with pytest.raises(InvalidRequest) as caught:
        function(body, service)

    assert caught.value.field == named


def test_a_key_is_known_by_its_name_whatever_the_case_of_its_scheme():
    keys = Keys({"alice": "one-long-key", "bob": "two-long-key"})

    assert keys.name_of("Bearer one-long-key") == "alice"
    assert keys.name_of("bearer   two-long-key ") == "bob"
    for wrong in (None, "", "one-long-key", "Basic one-long-key", "Bearer", "Bearer one-long-ke", "Bearer \ud800"):
        assert keys.name_of(wrong) is None
    assert not Keys({})
