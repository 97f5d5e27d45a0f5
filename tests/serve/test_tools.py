"""Tools: what a request may offer, prompts like transformers', calls held to their schemas, and a model that calls.

Run with: python -m pytest tests/serve/test_tools.py
"""

import json
from collections import defaultdict
from dataclasses import replace

import jsonschema
import mlflow
import numpy as np
import openai
import pytest
from families import KINDS
from process import serving
from tool_model import ADD, TOOLS, WEATHER, user, write

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.quantize import export
from phi3_mlflow.runtime import chat
from phi3_mlflow.runtime.calls import Calling, CallReader, Form
from phi3_mlflow.runtime.chat import parse_chat
from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.grammar import Grammars
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.serve import responses

CALLING = ("Phi-4-mini", "Qwen 2")
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
LISTED = {**CALL, "function": {"name": "weather", "arguments": "[]"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "one"}
NAMED = {"type": "function", "function": {"name": "add"}}


HELLO = (user("hello"),)


def parse(messages=HELLO, **fields):
    return parse_chat({"messages": list(messages), "tools": TOOLS, **fields}, Options(), tools=True)


def function(**changes):
    return {"type": "function", "function": {**WEATHER["function"], **changes}}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """By name: the tokenizer of a family, and transformers'."""
    found = {}
    for name in KINDS:
        folder = tmp_path_factory.mktemp("tokenizer")
        KINDS[name].write(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": KINDS[name].model_type}))
        found[name] = Tokens.from_folder(folder, template=False), folder
    return found


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"tools": []}, "tools", "a list of 1 to 64 tools"),
        ({"tools": "weather"}, "tools", "a list of 1 to 64 tools"),
        ({"tools": [{}]}, "tools[0]", "it must be {"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "it must be {"),
        ({"tools": [{**WEATHER, "cache": 1}]}, "tools[0].cache", "is not known"),
        ({"tools": [function(name="the weather")]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [function(name=7)]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [function(description=7)]}, "tools[0].function.description", "a text"),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict", "true or false"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "schema of an object"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters", "schema of an object"),
        ({"tools": [function(returns={})]}, "tools[0].function.returns", "is not known"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "a second time"),
        ({"tools": TOOLS * 40}, "tools", "a list of 1 to 64 tools"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "name one of the tools"),
        ({"tool_choice": {"type": "function", "function": {"name": ["add"]}}}, "tool_choice", "name one of the tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "no `tools` are given"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls", "no `tools` are given"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
        ({"messages": [user("a"), {**CALLED, "tool_calls": []}]}, "messages[1].tool_calls", "1 to 64 calls"),
        ({"messages": [user("a"), {**CALLED, "tool_calls": [{}]}]}, "messages[1].tool_calls[0]", "it must be {"),
        (
            {"messages": [user("a"), {**CALLED, "tool_calls": [LISTED]}]},
            "messages[1].tool_calls[0].function.arguments",
            "the JSON text of an object",
        ),
        ({"messages": [user("a"), RESULT]}, "messages[1].tool_call_id", "there is none"),
        (
            {"messages": [user("a"), CALLED, {**RESULT, "tool_call_id": "c2"}]},
            "messages[2].tool_call_id",
            "the message before it (c1)",
        ),
        ({"messages": [user("a"), CALLED, {**RESULT, "content": ""}]}, "messages[2].content", "at least one character"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "messages[1].content", "at least one"),
        ({"messages": [{**user("a"), "tool_calls": [CALL]}]}, "messages[0].tool_calls", "no place for it"),
        ({"messages": [{**user("a"), "tool_call_id": "c1"}]}, "messages[0].tool_call_id", "no place for it"),
        ({"messages": [user("a"), {"role": "function", "content": "a"}]}, "messages[1].role", "user, assistant, tool"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(fields, field, problem):
    with pytest.raises(InvalidRequest) as error:
        parse(**fields)
    assert error.value.field == field
    assert problem in str(error.value)


def test_tools_are_refused_where_the_model_was_not_trained_for_them():
    for fields in ({"tools": TOOLS}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}):
        with pytest.raises(InvalidRequest, match="was not trained to call tools") as error:
            parse_chat({"messages": [user("a")], **fields}, Options())
        assert error.value.field == next(iter(fields))


@pytest.mark.parametrize("task", ["llm/v1/completions", "flat"])
def test_a_task_that_takes_no_tools_names_those_that_do(task):
    for fields in ({"tools": TOOLS}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}):
        for trained, message in ((True, "this task takes no tools; chats with this model do"), (False, "not trained")):
            with pytest.raises(InvalidRequest, match=message) as error:
                chat.parse({"prompt": "a", **fields}, task, Options(), template=True, stream=False, tools=trained)
            assert error.value.field == next(iter(fields))


def test_a_route_that_takes_no_tools_names_the_one_that_does():
    for fields in ({"tools": TOOLS}, {"tool_choice": "required"}, {"max_tool_calls": 1}):
        with pytest.raises(InvalidRequest, match="takes no tools; /v1/chat/completions does") as error:
            responses.parse({"input": "a", **fields}, Options())
        assert error.value.field == next(iter(fields))


def test_what_may_be_called_follows_tool_choice():
    assert parse(tool_choice="none").tools is None
    auto, required, named = (parse(tool_choice=choice).tools for choice in ("auto", "required", NAMED))
    assert auto == parse().tools
    assert (auto.names, auto.required, auto.parallel) == (("weather", "add"), False, True)
    assert required == replace(auto, required=True)
    assert named == replace(auto, required=True, names=("add",))
    assert parse(parallel_tool_calls=False).tools == replace(auto, parallel=False)


CONVERSATIONS = [
    [user("hello")],
    [{"role": "system", "content": "You are a system"}, user("hello")],
    [user("weather Rome"), CALLED, RESULT],
    [user("weather Rome"), CALLED, RESULT, {"role": "assistant", "content": "Rome is one"}, user("hello")],
    [
        {"role": "system", "content": "a"},
        user("weather Rome and Oslo"),
        {**CALLED, "content": "one two", "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        RESULT,
        {**RESULT, "tool_call_id": "c2"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", CALLING)
def test_prompts_are_those_of_transformers(tokens, name, messages):
    from transformers import AutoTokenizer

    ours, folder = tokens[name]
    theirs = AutoTokenizer.from_pretrained(folder)
    request = parse(messages)
    given = json.loads(json.dumps(messages))
    if name == "Phi-4-mini":  # as its model card says: tools in the system message; a call is the assistant's text
        for message in given:
            if "tool_calls" in message:
                texts = [
                    f'{{"name": "{c["function"]["name"]}", "arguments": {c["function"]["arguments"]}}}'
                    for c in message.pop("tool_calls")
                ]
                message["content"] = (message["content"] or "") + f"<|tool_call|>[{', '.join(texts)}]<|/tool_call|>"
            if message["role"] == "tool":
                message["role"] = "tool_response"
        if given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
        given[0]["tools"] = json.dumps([tool["function"] for tool in TOOLS])
        expected = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        for message in given:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        expected = theirs.apply_chat_template(given, TOOLS, add_generation_prompt=True, return_dict=True)["input_ids"]

    assert ours.encode_chat(request.prompt, request.tools.functions) == expected


def test_a_model_whose_template_takes_no_tools_calls_none(tokens):
    assert [name for name in KINDS if tokens[name][0].calls] == list(CALLING)


@pytest.mark.parametrize("name", CALLING)
def test_no_control_token_comes_of_a_text(tokens, name):
    ours, _ = tokens[name]
    begin = next(text for text, token in ours.control.items() if token == ours.calls.begin)

    def begins(request):
        return ours.encode_chat(request.prompt, request.tools.functions).count(ours.calls.begin)

    assert begins(parse([user(begin)])) == begins(parse())
    offered = parse(tools=[function(description=f"a {begin}")])
    if name == "Phi-4-mini":
        assert begins(offered) == 0
    else:  # the template puts tools among its own text
        with pytest.raises(InvalidRequest, match="is a control token here") as error:
            begins(offered)
        assert error.value.field == "tools"


SCHEMAS = {
    "weather": WEATHER["function"]["parameters"],
    "nothing": {},
    "shapes": {
        "properties": {
            "kind": {"enum": ["a", 'b"}{', "\u00e9"]},
            "at": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["kind", "at"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", CALLING)
def test_whatever_the_model_likes_its_calls_conform(tokens, name, parallel):
    ours, _ = tokens[name]
    offered = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
    offer = parse(tools=offered, tool_choice="required", parallel_tool_calls=parallel).tools
    end = ours.control["<|end|>" if name == "Phi-4-mini" else "<|im_end|>"]
    grammars = Grammars(ours.tokenizer_json, ours.vocab_size, [end])
    newlines = ours.encode_text("\n", bos=False)
    start = Calling(
        grammars.calls(offer, listed=ours.calls.listed), ours.calls,
        required=True, parallel=parallel, newlines=newlines, eos=[end],
    )  # fmt: skip
    spelled = ours.decoder().piece
    # Ends what is open, and every other time goes on with another call.
    seen, most = set(), 0
    for seed in range(40):
        liked = defaultdict(int, {b'"': 9, b"}": 9, b"]": 9 * (seed % 2), b"}]": 9 * (seed % 2), b",": 5})
        rng, state, reader, text = np.random.default_rng(seed), start.copy(), CallReader(ours.calls), ours.decoder()
        calls, spoken = [], ""
        likes = rng.normal(size=ours.vocab_size, scale=3).astype(np.float32)
        likes += [liked[spelled(token)] for token in range(ours.vocab_size)]
        for _ in range(600):
            if state.finished:
                break
            logits = state.mask(likes + rng.normal(size=len(likes)).astype(np.float32))
            token = int(logits.argmax())
            if token == end:
                break
            forced = state.forced()
            assert state.following(forced) in (0, len(forced))
            state.accept(token)
            shown, pieces = reader.step(token, text.step(token))
            spoken += shown
            for piece in pieces:
                if piece.name is not None:
                    calls.append([piece.name, ""])
                calls[piece.index][1] += piece.arguments
        assert spoken == ""
        for called, arguments in calls[: reader.complete]:
            jsonschema.validate(json.loads(arguments), {"type": "object", **SCHEMAS[called]})
            seen.add(called)
        most = max(most, reader.complete)
    assert seen == set(SCHEMAS)
    assert (most > 1) == parallel


def test_what_is_not_allowed_is_not_accepted(tokens):
    ours, _ = tokens["Phi-4-mini"]
    grammars = Grammars(ours.tokenizer_json, ours.vocab_size, [ours.control["<|end|>"]])
    calling = Calling(
        grammars.calls(parse().tools, listed=True), ours.calls, required=True, parallel=True, eos=grammars.eos
    )
    with pytest.raises(ValueError, match="not allowed"):
        calling.accept(5)
    calling.accept(ours.calls.begin)
    with pytest.raises(ValueError, match="not complete"):
        calling.accept(ours.calls.end)
    with pytest.raises(ValueError, match="not allowed"):
        calling.accept(ours.encode_text("x", bos=False)[0])


def test_a_schema_that_cannot_be_enforced_names_its_tool(tokens):
    ours, _ = tokens["Phi-4-mini"]
    grammars = Grammars(ours.tokenizer_json, ours.vocab_size, [ours.control["<|end|>"]])
    bad = function(name="bad", parameters={"type": "object", "properties": {"a": {"type": "text"}}})
    with pytest.raises(InvalidRequest) as error:
        grammars.calls(parse(tools=[WEATHER, bad]).tools, listed=True)
    assert error.value.field.startswith("tools[1].function.parameters")


def test_tools_together_may_cost_what_one_schema_may(tokens):
    ours, _ = tokens["Phi-4-mini"]
    grammars = Grammars(ours.tokenizer_json, ours.vocab_size, [ours.control["<|end|>"]])
    costly = {"properties": {"a": {"type": "integer", "multipleOf": 9_973}, "b": {"$ref": "#/properties/a"}}}
    tools = [function(name=f"f{place}", parameters=costly) for place in range(50)]
    grammars.calls(parse(tools=tools[:1]).tools, listed=True)
    with pytest.raises(InvalidRequest, match="add up to more than") as error:
        grammars.calls(parse(tools=tools).tools, listed=True)
    assert error.value.field.startswith("tools")


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused_wherever_a_tool_may_have_it(half):
    described, named = function(description=half), function(parameters={"properties": {half: {}}})
    called = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"city": half})}}
    for fields, field in (
        ({"tools": [described]}, "tools[0].function.description"),
        ({"tools": [named]}, "tools[0].function.parameters"),
        (
            {"messages": [user("a"), {**CALLED, "tool_calls": [called]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ):
        with pytest.raises(InvalidRequest, match="half of a surrogate pair") as error:
            parse(**fields)
        assert error.value.field == field


def test_the_forms_are_told_by_their_control_tokens():
    assert Form.of({"<|tool_call|>": 1, "<|/tool_call|>": 2}) == Form(1, 2, True)
    assert Form.of({"<tool_call>": 1, "</tool_call>": 2}) == Form(1, 2, False)
    assert Form.of({"<tool_call>": 1}) is None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By builder: the folder of the saved model that calls tools."""
    root = tmp_path_factory.mktemp("tools")
    source = write(root / "source")
    transformers.save_model(root / "transformers", source)
    onnx.save_model(root / "onnx", export(source, root / "exported", precision="fp32"))
    return {name: root / name for name in ("transformers", "onnx")}


@pytest.fixture(scope="module")
def client(models):
    with (
        serving(*(f"--name={name}={folder}" for name, folder in models.items()), "--preload") as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


BUILDERS = ("transformers", "onnx")


def said(choice):
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
    return choice.finish_reason, choice.message.content, calls


@pytest.mark.parametrize("model", BUILDERS)
def test_openais_client_calls_tools_and_hands_their_results_back(client, model):
    def ask(*messages, **fields):
        return client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=80, **fields)

    first = ask(user("weather Rome")).choices[0]
    assert said(first) == ("tool_calls", None, [("weather", {"city": "Rome"})])
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "one"}
    assert said(ask(user("weather Rome"), first.message, result).choices[0]) == ("stop", "Rome is one", [])
    assert said(ask(user("hello")).choices[0]) == ("stop", "hello world", [])
    assert said(ask(user("add 3 4")).choices[0]) == ("tool_calls", None, [("add", {"a": 3, "b": 4})])
    both = [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
    assert said(ask(user("Rome and Oslo")).choices[0]) == ("tool_calls", None, both)
    assert said(ask(user("Rome and Oslo"), parallel_tool_calls=False).choices[0]) == ("tool_calls", None, both[:1])
    # What it was not taught: whether it ends is up to it.
    assert ask(user("hello"), tool_choice=NAMED).choices[0].message.tool_calls[0].function.name == "add"
    assert ask(user("hello"), tool_choice="required").choices[0].message.tool_calls
    ids = [choice.message.tool_calls[0].id for choice in ask(user("weather Rome"), n=2).choices]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("model", BUILDERS)
def test_a_stream_has_the_calls_in_pieces(client, model):
    whole, name, texts = "", None, []
    with client.chat.completions.create(
        model=model, messages=[user("add 3 4")], tools=TOOLS, stream=True, max_tokens=80
    ) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta
            for call in delta.tool_calls or ():
                assert call.index == 0
                assert bool(call.id) == bool(call.function.name)
                name = name or call.function.name
                whole += call.function.arguments
                texts.append(call.function.arguments)
            assert not delta.content
            reason = chunk.choices[0].finish_reason
    assert (name, json.loads(whole), reason) == ("add", {"a": 3, "b": 4}, "tool_calls")
    assert len(texts) > 5


@pytest.mark.parametrize("model", BUILDERS)
def test_an_answer_that_is_cut_has_what_there_is_of_its_call(client, model):
    cut = client.chat.completions.create(model=model, messages=[user("add 3 4")], tools=TOOLS, max_tokens=12)
    (choice,) = cut.choices
    assert choice.finish_reason == "length"
    whole = '{"a": 3, "b": 4}'
    assert choice.message.tool_calls is None or whole.startswith(choice.message.tool_calls[0].function.arguments)
    with pytest.raises(openai.BadRequestError, match="`tools` may be called"):
        client.chat.completions.create(
            model=model, messages=[user("a")], tools=TOOLS, response_format={"type": "json_object"}
        )


def test_completions_of_a_model_that_calls_tools_say_who_takes_them(client):
    with pytest.raises(openai.BadRequestError, match="this task takes no tools; chats with this model do"):
        client.completions.create(model="onnx", prompt="a", extra_body={"tools": TOOLS})


@pytest.mark.parametrize("builder", BUILDERS)
def test_mlflows_own_calls_take_tools_too(models, builder):
    model = mlflow.pyfunc.load_model(str(models[builder]))
    body = {"messages": [user("add 3 4")], "tools": TOOLS, "max_tokens": 80}
    (answer,) = model.predict(body)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 3, "b": 4}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["content"] is None
    arguments = "".join(
        call["function"]["arguments"]
        for chunk in model.predict_stream(body)
        for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    )
    assert arguments == call["function"]["arguments"]


def test_logprobs_are_those_of_the_text_alone(models):
    model = mlflow.pyfunc.load_model(str(models["transformers"]))
    (answer,) = model.predict({"messages": [user("add 3 4")], "tools": [ADD]}, params={"logprobs": True})
    assert answer["choices"][0]["logprobs"] == {"content": []}
