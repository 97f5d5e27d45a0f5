"""Wire types: a request's fields in, OpenAI's completion objects and chunks out. Knows no model and no MLflow."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .answers import Answer, Choice, Piece, TokenLogprob, finish_reason
from .errors import InvalidRequest, shorten
from .layouts import ROLES
from .options import NAMES, RANGES, Options
from .tools import Offer, past_calls, refuse, take

Task = Literal["llm/v1/chat", "llm/v1/completions", "flat"]
TASKS: tuple[Task, ...] = get_args(Task)
Message = dict[str, Any]

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_MESSAGE_FIELDS = ("role", "content")
_UNSUPPORTED_MESSAGE_FIELDS = ("name", "refusal", "tool_calls", "tool_call_id")


@dataclass(frozen=True)
class Request:
    """One checked request.

    Attributes:
        prompt: chat messages; or text, or token ids, that are taken as they are.
        options: how it is to be answered.
        field: the caller's name for the prompt.
        echo: whether the answer begins with the prompt.
        tools: what the model may call; None for nothing.
    """

    prompt: tuple[Message, ...] | str | list[int]
    options: Options
    field: str = "messages"
    echo: bool = False
    tools: Offer | None = None


def parse(
    body: Mapping[str, Any], task: Task, defaults: Options, *, template: bool, stream: bool, tools: bool = False
) -> Request:
    """Checks a request for a task.

    Args:
        body: the request's fields; None means not given.
        task: what it is.
        defaults: the model's own options.
        template: for the tasks other than chat, whether a prompt is put into the chat template.
        stream: whether the caller can be sent a stream.
        tools: whether the model can call tools, which chats alone take.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    if task == "llm/v1/chat":
        return parse_chat(body, defaults, stream=stream, tools=tools)
    if task == "llm/v1/completions":
        return parse_completion(body, defaults, template=template, stream=stream, tools=tools)
    return parse_flat(body, defaults, template=template, tools=tools)


def parse_chat(body: Mapping[str, Any], defaults: Options, *, stream: bool = False, tools: bool = False) -> Request:
    """Checks a chat request.

    Args:
        body: `messages` and options by their names; None means not given.
        defaults: the model's own options.
        stream: whether the caller can be sent a stream.
        tools: whether the model can call tools.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    if not tools:
        refuse(body, elsewhere=False)
    values = _given(body, stream=stream)
    offer = take(values) if tools else None
    messages = _check_messages(values.pop("messages", None), tools=tools)
    return Request(messages, _parse_options(values, defaults), tools=offer)


def parse_completion(
    body: Mapping[str, Any], defaults: Options, *, template: bool, stream: bool = False, tools: bool = False
) -> Request:
    """Checks a completion request: `prompt`, put into the chat template as a user's message or taken as it is.

    Without template the prompt may be a list of token ids too, control tokens among them. Arguments are those of
    `parse`.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    refuse(body, elsewhere=tools)
    values = _given(body, stream=stream)
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, list) or template:
        prompt = check_text("prompt", prompt)
    elif not prompt or not all(type(token) is int and token >= 0 for token in prompt):
        raise InvalidRequest("prompt", f"is {shorten(prompt)}; as a list it must hold at least one id, and ids alone")
    if values.get("context_overflow") == "drop_oldest":
        raise InvalidRequest("context_overflow", "is 'drop_oldest', and a prompt has no turns to drop; use 'error'")
    if "top_logprobs" in values:
        raise InvalidRequest("top_logprobs", "is for chats; give the number as `logprobs`, as in OpenAI's completions")
    if "logprobs" in values:
        values["top_logprobs"] = RANGES["top_logprobs"].check("logprobs", values["logprobs"])
        values["logprobs"] = True
    options = _parse_options(values, defaults)
    return Request(({"role": "user", "content": prompt},) if template else prompt, options, "prompt")


def parse_flat(body: Mapping[str, Any], defaults: Options, *, template: bool, tools: bool = False) -> Request:
    """Checks a flat request: `prompt`, or `messages` as JSON text; `stop` and `response_format` as text or JSON text.

    Arguments are those of `parse`.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    refuse(body, elsewhere=tools)
    values = {name: value for name, value in body.items() if value is not None}
    for name in ("logprobs", "top_logprobs", "show_engine"):
        if values.pop(name, False):
            problem = "is given, and the answer is one string without a place for it; leave it out"
            raise InvalidRequest(name, problem)
    for name in ("messages", "stop", "response_format", "logit_bias"):
        if isinstance(values.get(name), str) and not (name == "stop" and not values[name].lstrip().startswith("[")):
            values[name] = _parse_json(name, values[name])
    if values.get("messages") is None:
        request = parse_completion(values, defaults, template=template)
    elif values.get("prompt") is not None:
        raise InvalidRequest("prompt", "is given together with `messages`; give one of them")
    else:
        request = parse_chat(values, defaults)
    if request.options.n != 1:
        raise InvalidRequest("n", f"is {request.options.n}; it must be 1, because the answer is one string")
    return request


def completion(answer: Answer, task: Task, model: str) -> dict[str, Any]:
    """The response object of a whole answer, in the shape of MLflow's output schema for the task."""
    chat = task == "llm/v1/chat"
    choices = []
    for index, choice in enumerate(answer.choices):
        body = {"message": message(choice)} if chat else {"text": choice.text}
        ended = {"finish_reason": finish_reason(choice.reason)}
        choices.append({"index": index, **body, **ended, **logprobs(choice.logprobs, chat=chat)})
    return {
        **_head(answer, "chat.completion" if chat else "text_completion", model),
        "choices": choices,
        **_tail(answer),
    }


def chunks(answer: Answer, task: Task, model: str, piece: Piece, opened: set[int]) -> Iterator[Any]:
    """The chunks of a piece: its text, and where it ends its choice, that.

    Args:
        answer: what is known of the whole; its id, time and choices are read.
        task: the shape to give the chunks; for `flat` they are strings.
        model: the model's name.
        piece: what is new.
        opened: the choices that have had a chunk, of which a chat's first one carries the role; added to.
    """
    if task == "flat":
        if piece.text:
            yield piece.text
        return
    chat = task == "llm/v1/chat"
    head = _head(answer, "chat.completion.chunk" if chat else "text_completion", model)
    first = piece.choice not in opened
    if piece.text or piece.calls or first:
        opened.add(piece.choice)
        delta = delta_of(answer.choices[piece.choice], piece, first=first)
        body: dict[str, Any] = {"delta": delta} if chat else {"text": piece.text}
        choice = {"index": piece.choice, **body, "finish_reason": None, **logprobs(piece.logprobs, chat=chat)}
        yield {**head, "choices": [choice]}
    if piece.reason is not None:
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        choice = {"index": piece.choice, **end, "finish_reason": finish_reason(piece.reason)}
        yield {**head, "choices": [choice], **(_tail(answer) if piece.last else {})}


def message(choice: Choice) -> dict[str, Any]:
    """A choice as OpenAI's message of the assistant: without text where there are calls alone."""
    if not choice.calls:
        return {"role": "assistant", "content": choice.text}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in choice.calls
    ]
    return {"role": "assistant", "content": choice.text or None, "tool_calls": calls}


def delta_of(choice: Choice, piece: Piece, *, first: bool) -> dict[str, Any]:
    """What a piece brings to the message of its choice, as OpenAI's chunks have it."""
    role = {"role": "assistant"} if first else {}
    content = {"content": piece.text} if piece.text or not piece.calls else {}
    calls: list[dict[str, Any]] = []
    for part in piece.calls:
        head = {"id": choice.calls[part.index].id, "type": "function"} if part.name is not None else {}
        name = {"name": part.name} if part.name is not None else {}
        calls.append({"index": part.index, **head, "function": {**name, "arguments": part.arguments}})
    return {**role, **content, **({"tool_calls": calls} if calls else {})}


def logprobs(likely: Sequence[TokenLogprob] | None, *, chat: bool) -> dict[str, Any]:
    """OpenAI's shape, of chat completions or of the older completions; nothing where they were not asked for."""
    if likely is None:
        return {}
    if chat:
        content = [
            {
                **_chat_logprob(each.token, each.logprob),
                "top_logprobs": [_chat_logprob(token, logprob) for token, logprob in each.top],
            }
            for each in likely
        ]
        return {"logprobs": {"content": content}}
    return {
        "logprobs": {
            "tokens": [_token_text(each.token) for each in likely],
            "token_logprobs": [each.logprob for each in likely],
            "top_logprobs": [_top_logprobs(each) for each in likely],
            "text_offset": [each.start for each in likely],
        }
    }


def _top_logprobs(likely: TokenLogprob) -> dict[str, float] | None:
    """None for the first token of a prompt, which nothing comes before."""
    if likely.logprob is None:
        return None
    # Two tokens may have one text, such as a letter and its byte: the likelier one counts, and comes last here.
    return {_token_text(token): value for token, value in reversed(likely.top)}


def _chat_logprob(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _token_text(token), "logprob": logprob, "bytes": list(token)}


def _token_text(token: bytes) -> str:
    """The token's text; where it is a part of a character its bytes, as OpenAI writes them."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _head(answer: Answer, kind: str, model: str) -> dict[str, Any]:
    prefix = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
    return {"id": prefix + answer.id, "object": kind, "created": answer.created, "model": model}


def _tail(answer: Answer) -> dict[str, Any]:
    completion_tokens = sum(choice.tokens for choice in answer.choices)
    custom: dict[str, Any] = {"stop_reason": [choice.reason for choice in answer.choices]}
    if answer.cached_tokens:
        custom["cached_tokens"] = answer.cached_tokens
    if answer.dropped:
        custom["dropped_messages"] = answer.dropped
    if answer.engine is not None:
        custom["engine"] = answer.engine
    return {
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": answer.prompt_tokens + completion_tokens,
        },
        "custom_outputs": custom,
    }


def _given(body: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """The fields that were given, those of custom_inputs among them.

    Raises:
        InvalidRequest: one of them cannot be honoured.
    """
    values = {name: value for name, value in body.items() if value is not None}
    wanted = values.pop("stream", False)
    if not isinstance(wanted, bool):
        raise InvalidRequest("stream", f"is {shorten(wanted)}; it must be true or false")
    if wanted and not stream:
        problem = "is true, and this call returns whole answers; leave it out, or use predict_stream"
        raise InvalidRequest("stream", problem)
    custom = values.pop("custom_inputs", {})
    if not isinstance(custom, Mapping):
        raise InvalidRequest("custom_inputs", f"is {shorten(custom)}; it must be an object")
    for name, value in custom.items():
        if name != "logit_bias":
            raise InvalidRequest(f"custom_inputs.{name}", "is not known; custom_inputs may hold `logit_bias`")
        if name in values:
            raise InvalidRequest(name, "is given twice, in custom_inputs too; give it once")
        values[name] = value
    return values


def _parse_options(values: Mapping[str, Any], defaults: Options) -> Options:
    for name in values:
        if name not in NAMES:
            raise InvalidRequest(str(name), f"is not a field of this request; the options are {', '.join(NAMES)}")
    return defaults.with_values(values)


def _check_messages(messages: Any, *, tools: bool = False) -> tuple[Message, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequest("messages", f"is {shorten(messages)}; it must be a list of at least one message")
    checked: list[Message] = []
    roles = (*ROLES, "tool") if tools else ROLES
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(name, f"is {shorten(message)}; it must be an object with `role` and `content`")
        role = message.get("role")
        own = {"assistant": "tool_calls", "tool": "tool_call_id"}.get(str(role)) if tools else None
        for key, value in message.items():
            if key in _UNSUPPORTED_MESSAGE_FIELDS and value is not None and key != own:
                raise InvalidRequest(f"{name}.{key}", "is given, and this model's chat template has no place for it")
            if key not in _MESSAGE_FIELDS + _UNSUPPORTED_MESSAGE_FIELDS:
                raise InvalidRequest(f"{name}.{key}", "is not known; a message has `role` and `content`")
        if role not in roles:
            raise InvalidRequest(f"{name}.role", f"is {shorten(role)}; it must be one of {', '.join(roles)}")
        content, calls = message.get("content"), message.get(own) if own == "tool_calls" else None
        if own == "tool_call_id":
            _check_result(message, name, checked)
        if calls is not None:
            kept = {"calls": past_calls(calls, f"{name}.tool_calls")}
            checked.append({"role": role, "content": check_text(f"{name}.content", content) if content else "", **kept})
        else:
            checked.append({"role": role, "content": check_text(f"{name}.content", content)})
    return tuple(checked)


def _check_result(message: Mapping[str, Any], name: str, before: Sequence[Message]) -> None:
    """A tool's result must follow the call that it belongs to."""
    called = next((each for each in reversed(before) if each["role"] != "tool"), {})
    known = [call.id for call in called.get("calls", ())]
    if message.get("tool_call_id") not in known:
        problem = f"is {shorten(message.get('tool_call_id'))}; it must be the id of a call in the message before it"
        raise InvalidRequest(f"{name}.tool_call_id", f"{problem} ({', '.join(known) or 'there is none'})")


def check_text(name: str, text: Any) -> str:
    """A text that a model can be given.

    Raises:
        InvalidRequest: it is empty, no string, or has a character that no text has.
    """
    if not isinstance(text, str) or not text:
        raise InvalidRequest(name, f"is {shorten(text)}; it must be a string of at least one character")
    if found := _CONTROL_CHARACTERS.search(text):
        problem = f"has the character U+{ord(found[0]):04X} at position {found.start()}; control characters other than"
        raise InvalidRequest(name, f"{problem} tab, newline and carriage return, and lone surrogates, are not allowed")
    return text


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = """; write a stop sequence that begins with [ as a list: '["[END]"]'""" if name == "stop" else ""
        raise InvalidRequest(name, f"is not valid JSON: {error}{hint}") from error
