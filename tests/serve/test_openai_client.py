"""OpenAI's own Python client, unmodified, against models of both builders.

Run: pytest tests/serve/test_openai_client.py
"""

import asyncio

import httpx
import openai
import pytest
from process import ENDLESS, MADRID, PATIENCE, SPAIN, post, until
from pydantic import BaseModel

BUILDERS = ["onnx", "transformers"]
HELLO = [{"role": "user", "content": "Hello there"}]


class City(BaseModel):
    city: str
    large: bool


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(params=BUILDERS)
def model(request):
    return request.param


def test_a_chat_is_answered(client, model):
    answer = client.chat.completions.create(model=model, messages=SPAIN)

    assert answer.choices[0].message.content == MADRID
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == model
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer._request_id


def test_a_chat_in_a_stream_has_the_role_first_and_the_reason_last(client, model):
    chunks = list(client.chat.completions.create(model=model, messages=SPAIN, stream=True))

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == MADRID
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_of_a_stream_comes_in_a_chunk_of_its_own(client, model):
    whole = client.chat.completions.create(model=model, messages=SPAIN)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=model, messages=SPAIN, stream=True, stream_options=options))

    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_gives_the_same_as_the_whole_answer(client, model):
    with client.chat.completions.stream(model=model, messages=SPAIN) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert "".join(deltas) == final.choices[0].message.content == MADRID


def test_closing_a_stream_early_frees_its_slot(server, client, model):
    before = server.generated()
    stream = client.chat.completions.create(
        model=model, messages=SPAIN, stream=True, max_tokens=4000, extra_body=ENDLESS
    )
    next(stream)
    next(stream)
    stream.close()

    until(lambda: server.running() == 0)
    assert server.generated() - before < 4000


def test_several_choices_are_numbered_whole_and_in_a_stream(client, model):
    options = {"model": model, "messages": HELLO, "n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    whole = client.chat.completions.create(**options)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""

    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize("stop", ["Madrid", ["nothing", "Madrid"]])
def test_a_stop_sequence_ends_the_answer_and_is_not_in_it(client, model, stop):
    answer = client.chat.completions.create(model=model, messages=SPAIN, stop=stop)
    chunks = client.chat.completions.create(model=model, messages=SPAIN, stop=stop, stream=True)

    assert answer.choices[0].message.content == "The capital of Spain is "
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The capital of Spain is "


def test_a_seed_repeats_an_answer_and_another_one_changes_it(client, model):
    def ask(seed):
        options = {"temperature": 2.0, "max_tokens": 30, "seed": seed, "extra_body": ENDLESS}
        return client.chat.completions.create(model=model, messages=HELLO, **options).choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_max_tokens_under_either_name_ends_with_length(client, model):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=model, messages=SPAIN, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_log_probabilities_have_the_chat_shape(client, model):
    options = {"model": model, "messages": SPAIN, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**options).choices[0]
    content = choice.logprobs.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]

    assert "".join(token.token for token in content) == choice.message.content == MADRID
    assert b"".join(bytes(token.bytes) for token in content) == MADRID.encode()
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)
    assert [token.token for token in streamed] == [token.token for token in content]


def test_parse_gives_the_object_that_the_schema_describes(client, model):
    answer = client.chat.completions.parse(model=model, messages=SPAIN, response_format=City, max_tokens=200)

    assert isinstance(answer.choices[0].message.parsed, City)


def test_json_object_and_plain_schemas_give_json(client, model):
    schema = {"name": "n", "schema": {"type": "integer", "minimum": 3, "maximum": 5}}
    answer = client.chat.completions.create(
        model=model, messages=HELLO, response_format={"type": "json_schema", "json_schema": schema}
    )

    assert answer.choices[0].message.content in ("3", "4", "5")


def test_roles_parts_and_an_earlier_answer_are_taken_as_clients_send_them(client, model):
    first = client.chat.completions.create(model=model, messages=SPAIN).choices[0].message
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of Spain?"}]},
            first,
            {"role": "user", "content": "What is the capital of Spain?"},
        ],
        user="someone",
        metadata={"a": "b"},
        service_tier="auto",
        store=False,
    )

    assert answer.choices[0].message.content


def test_own_options_go_in_extra_body(client, model):
    def first(**more):
        answer = client.chat.completions.create(model=model, messages=SPAIN, max_tokens=30, **more)
        return answer.choices[0].message.content

    assert first(temperature=2.0, extra_body={"top_k": 1}) == MADRID
    assert first(temperature=2.0, extra_body={"min_p": 1.0}) == MADRID


def test_a_completion_is_answered_whole_and_in_a_stream(client, model):
    options = {"model": model, "prompt": "The capital of Spain", "max_tokens": 8}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))

    assert whole.object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_several_prompts_have_choices_in_their_order(client, model):
    alone = [client.completions.create(model=model, prompt=each, max_tokens=5) for each in ("Hello", "The sum of")]
    together = client.completions.create(model=model, prompt=["Hello", "The sum of"], max_tokens=5)

    assert [choice.index for choice in together.choices] == [0, 1]
    assert [choice.text for choice in together.choices] == [each.choices[0].text for each in alone]
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)


def test_echo_with_log_probabilities_covers_the_prompt(client, model):
    prompt = "The capital of Spain is Madrid."
    answer = client.completions.create(model=model, prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    likely = answer.choices[0].logprobs

    assert answer.choices[0].text.startswith(prompt)
    assert likely.tokens[0] == "<s>"
    assert "".join(likely.tokens[1:]).removesuffix("<|end|>") == answer.choices[0].text
    assert likely.text_offset == sorted(likely.text_offset)
    # Evaluation harnesses leave the last one out, and take the rest for the prompt's.
    assert len(likely.tokens) == len(likely.text_offset) == answer.usage.prompt_tokens + 1
    assert (likely.token_logprobs[0], likely.top_logprobs[0]) == (None, None)
    assert all(likely.top_logprobs[1:])
    assert all(value <= 0 for value in likely.token_logprobs[1:])
    # Worse than chance over a vocabulary would be wrong: this is what the model was trained on.
    assert sum(likely.token_logprobs[-4:-1]) > -30


def test_what_an_evaluation_harness_asks_finds_the_likeliest_of_three_continuations(server, client, model):
    """As lm-evaluation-harness does it, with the server's tokenizer: scripts/harness.py runs the harness itself."""

    def encode(text):
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return post(server, "/tokenize", body).json()["tokens"]

    info = httpx.get(f"{server.address}/tokenizer_info", params={"model": model}, timeout=PATIENCE).json()
    question, cities = "What is the capital of France?", ("Madrid", "Paris", "Rome")
    whole = [encode(f"{question} The capital of France is {city}.") for city in cities]
    answer = client.completions.create(model=model, prompt=whole, echo=True, logprobs=1, max_tokens=1, temperature=0)
    length = len(encode(question))
    scores = [sum(choice.logprobs.token_logprobs[length:-1]) for choice in answer.choices]
    greedy = [
        all(
            own == max(top.values())
            for own, top in zip(likely.token_logprobs[length:-1], likely.top_logprobs[length:-1], strict=True)
        )
        for likely in (choice.logprobs for choice in answer.choices)
    ]

    assert len(encode(info["bos_token"])) == len(encode(info["eos_token"])) == 1
    assert len(encode(f"{info['bos_token']} ")) > 1  # within a text it is text
    assert "assistant" in info["chat_template"]
    assert scores.index(max(scores)) == 1
    assert not greedy[0]


def test_a_response_is_answered_whole_and_as_typed_events(client, model):
    options = {"model": model, "input": SPAIN[0]["content"], "instructions": "Answer."}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))

    assert whole.status == "completed"
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text


def test_a_response_is_held_to_a_schema_and_cut_where_it_is_said(client, model):
    parsed = client.responses.parse(model=model, input="Name a city.", text_format=City, max_output_tokens=200)
    cut = client.responses.create(model=model, input=SPAIN[0]["content"], max_output_tokens=2)

    assert isinstance(parsed.output_parsed, City)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_the_models_are_listed_and_looked_up(client):
    assert [each.id for each in client.models.list()] == BUILDERS
    assert client.models.retrieve("onnx").id == "onnx"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def refused(call, kind, param=None, code=None):
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.body["param"] == param
    assert code is None or caught.value.body["code"] == code
    return str(caught.value)


def test_errors_become_the_clients_exceptions_with_the_field_at_fault(client, model):
    create = client.chat.completions.create
    told = refused(lambda: create(model=model, messages=SPAIN, temperature=3), openai.BadRequestError, "temperature")
    assert "must be a number from 0 to 2" in told
    refused(lambda: create(model=model, messages=[]), openai.BadRequestError, "messages")
    refused(lambda: create(model="gpt-4", messages=SPAIN), openai.NotFoundError, "model", "model_not_found")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    refused(lambda: create(model=model, messages=SPAIN, tools=tools), openai.BadRequestError, "tools")
    refused(lambda: create(model=model, messages=SPAIN, extra_body={"mood": 1}), openai.BadRequestError, "mood")
    long = [{"role": "user", "content": "hello " * 5000}]
    told = refused(lambda: create(model=model, messages=long), openai.BadRequestError, "messages")
    assert "context holds 4096" in told
    respond = client.responses.create
    refused(lambda: respond(model=model, input="a", store=True), openai.BadRequestError, "store")
    earlier = "previous_response_id"
    refused(lambda: respond(model=model, input="a", **{earlier: "r"}), openai.BadRequestError, earlier)
    refused(lambda: respond(model=model, input="a", max_output_tokens=0), openai.BadRequestError, "max_output_tokens")
    refused(lambda: respond(model=model, input=""), openai.BadRequestError, "input")


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 3}, {"messages": []}, {"messages": [{"role": "user", "content": "hello " * 5000}]}, {"n": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_bad_request_for_a_stream_is_an_error_before_the_first_byte(client, model, wrong):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{"model": model, "messages": SPAIN, "stream": True, **wrong})


def test_the_asynchronous_client_has_many_streams_at_once(server, model):
    async def ask(client):
        stream = await client.chat.completions.create(model=model, messages=SPAIN, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=PATIENCE) as client:
            return await asyncio.gather(*(ask(client) for _ in range(12)))

    assert asyncio.run(main()) == [MADRID] * 12


def test_tokens_of_a_chat_are_counted_as_the_answer_counts_them(server, client, model):
    answer = client.chat.completions.create(model=model, messages=SPAIN)
    body = {"model": model, "messages": SPAIN}
    found = httpx.post(f"{server.address}/tokenize", json=body, timeout=PATIENCE).json()

    assert found["count"] == len(found["tokens"]) == answer.usage.prompt_tokens
    assert found["max_model_len"] == 4096
