"""Bodies of /v1/responses, for text and without state: OpenAI's fields in, its response object and typed events out.

The shapes are those of https://platform.openai.com/docs/api-reference/responses. Knows no HTTP, no model and no MLflow.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from phi3_mlflow.runtime import chat
from phi3_mlflow.runtime.answers import Answer, Piece
from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.options import NAMES, Flag, Options

from .openai import MEANINGLESS, Wanted, text_of, usage

# Chat options that have another name or another place here.
_ELSEWHERE = {
    "max_tokens": "`max_output_tokens`",
    "response_format": "`text.format`",
    "n": "one response",
    "logprobs": "no log probabilities",
    "show_engine": "no engine",
    "context_overflow": '`truncation`: "auto" or "disabled"',
}
_OPTIONS = tuple(name for name in NAMES if name not in _ELSEWHERE and name != "top_logprobs")
_FORMATS = {"text": set(), "json_object": set(), "json_schema": {"name", "description", "schema", "strict"}}
_NO_TOOLS = "this route takes no tools; /v1/chat/completions does where the model was trained to call them"
_REFUSED = {
    "previous_response_id": "responses are not stored here: send the whole conversation as `input`",
    "conversation": "conversations are not stored here: send the whole conversation as `input`",
    "background": "responses are answered at once",
    "prompt": "prompt templates are not stored here: send `instructions` and `input`",
    "reasoning": "Phi-3 has no reasoning to set",
    "include": "there is nothing more to include",
    "max_tool_calls": _NO_TOOLS,
}


def parse(body: Mapping[str, Any], defaults: Options) -> Wanted:
    """Checks a body of /v1/responses.

    Args:
        body: without `model`.
        defaults: the model's own options.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    values = {name: value for name, value in body.items() if value is not None and name not in MEANINGLESS}
    if values.pop("store", False) is not False:
        raise InvalidRequest("store", "is true, and nothing is stored here; leave it out, or set it to false")
    for name, reason in _REFUSED.items():
        if values.pop(name, None) not in (None, [], False):
            raise InvalidRequest(name, f"is given, and {reason}")
    for name, allowed in (("tools", ([],)), ("tool_choice", ("none", "auto")), ("parallel_tool_calls", (True, False))):
        if (given := values.pop(name, None)) is not None and given not in allowed:
            raise InvalidRequest(name, f"is {shorten(given)}, and {_NO_TOOLS}")
    stream = Flag().check("stream", values.pop("stream", False))
    if values.pop("stream_options", None) not in (None, {}, {"include_obfuscation": False}):
        raise InvalidRequest("stream_options", "is given; a stream of typed events ends with the usage anyway")
    options: dict[str, Any] = {name: values.pop(name) for name in _OPTIONS if name in values}
    if "max_output_tokens" in values:
        most = values.pop("max_output_tokens")
        if type(most) is not int or most < 1:
            raise InvalidRequest("max_output_tokens", f"is {shorten(most)}; it must be an integer of at least 1")
        options["max_tokens"] = most
    truncation = values.pop("truncation", "disabled")
    if truncation not in ("auto", "disabled"):
        raise InvalidRequest("truncation", f"is {shorten(truncation)}; it must be 'auto' or 'disabled'")
    options["context_overflow"] = "drop_oldest" if truncation == "auto" else "error"
    if (text := values.pop("text", None)) is not None:
        options["response_format"] = _format(text)
    messages = _messages(values.pop("instructions", None), values.pop("input", None))
    for name in values:
        where = f"; it has {_ELSEWHERE[name]} for that" if name in _ELSEWHERE else ""
        raise InvalidRequest(name, f"is not a field of this request{where}")
    request = replace(chat.parse_chat({"messages": messages, **options}, defaults), field="input")
    # The model's own defaults for what a response has no place for.
    request = replace(request, options=replace(request.options, n=1, logprobs=False, top_logprobs=0))
    return Wanted("llm/v1/chat", [request], stream, include_usage=True)


def renamed(error: InvalidRequest, body: Mapping[str, Any]) -> InvalidRequest:
    """An error of the chat that a body came to, with the names that its sender knows."""
    field, problem = error.field, str(error).partition("` ")[2]
    if found := re.match(r"messages\[(\d+)\]", field):
        index = int(found[1]) - (body.get("instructions") is not None)
        place = "instructions" if index < 0 else f"input[{index}]" if isinstance(body.get("input"), list) else "input"
        field = place + (field[found.end() :] if place.endswith("]") else "")
    elif field.startswith("response_format"):
        field = "text.format" + field.removeprefix("response_format").removeprefix(".json_schema")
    return InvalidRequest(field, problem)


def _format(text: Any) -> dict[str, Any]:
    """Chat's `response_format` of `text.format`, which has a schema's name and schema at its top level."""
    if not isinstance(text, Mapping):
        raise InvalidRequest("text", f"is {shorten(text)}; it must be an object with `format`")
    for name, value in text.items():
        if name != "format" and value is not None:
            raise InvalidRequest(f"text.{name}", "is not known; it may hold `format`")
    wanted = {"type": "text"} if text.get("format") is None else text["format"]
    if not isinstance(wanted, Mapping) or wanted.get("type") not in tuple(_FORMATS):  # which may be a list
        raise InvalidRequest("text.format", f"is {shorten(wanted)}; its `type` must be one of {', '.join(_FORMATS)}")
    given = {name: value for name, value in wanted.items() if name != "type" and value is not None}
    for name in given:
        if name not in _FORMATS[wanted["type"]]:
            raise InvalidRequest(f"text.format.{name}", f"is not known for the type {wanted['type']}")
    return {"type": wanted["type"], **({"json_schema": given} if given else {})}


def _messages(instructions: Any, given: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        if not isinstance(instructions, str):
            raise InvalidRequest("instructions", f"is {shorten(instructions)}; it must be a string")
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input", f"is {shorten(given)}; it must be a string or a list of messages")
    for index, item in enumerate(given):
        place = f"input[{index}]"
        if not isinstance(item, Mapping) or item.get("type", "message") != "message":
            raise InvalidRequest(place, f"is {shorten(item)}; this model reads messages with `role` and `content`")
        for name, value in item.items():
            if name not in ("type", "role", "content", "id", "status") and value:
                raise InvalidRequest(f"{place}.{name}", "is not known; a message has `role` and `content`")
        content = item.get("content")
        if isinstance(content, list):
            content = text_of(content, f"{place}.content", ("input_text", "output_text", "text"))
        role = "system" if item.get("role") == "developer" else item.get("role")
        messages.append({"role": role, "content": content})
    return messages


class Shape:
    """The response object and the events of one response.

    Args:
        body: the request, parts of which the object repeats.
        options: what it came to.
        answer: in the making.
        model: what the response names as the model.
    """

    def __init__(self, body: Mapping[str, Any], options: Options, answer: Answer, model: str):
        self._body = body
        self._options = options
        self._answer = answer
        self._model = model
        self._item = f"msg_{answer.id}"
        self._number = 0

    def whole(self) -> dict[str, Any]:
        """The response object, when the answer has ended."""
        choice = self._answer.choices[0]
        cut = chat.finish_reason(choice.reason) == "length"
        counts = usage([self._answer])
        return {
            **self._object("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message("incomplete" if cut else "completed", choice.text)],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                # Nothing is stored for a price: what the cache holds is what was computed anyway.
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """The events before the first piece."""
        yield self._event("response.created", response=self._object("in_progress"))
        yield self._event("response.in_progress", response=self._object("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", None))
        yield self._text_event("response.content_part.added", part=_part(""))

    def pieces(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece; with the last one the answer's end."""
        if piece.text:
            yield self._text_event("response.output_text.delta", delta=piece.text, logprobs=[])
        if piece.reason is None:
            return
        whole = self.whole()
        text = self._answer.choices[0].text
        yield self._text_event("response.output_text.done", text=text, logprobs=[])
        yield self._text_event("response.content_part.done", part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, message: str, code: str | None) -> dict[str, Any]:
        """The event that ends a response in its middle."""
        # The reference has no other codes for what may happen here.
        error = {"code": code if code == "rate_limit_exceeded" else "server_error", "message": message}
        return self._event("response.failed", response={**self._object("failed"), "error": error})

    def _object(self, status: str) -> dict[str, Any]:
        options, body = self._options, self._body
        return {
            "id": f"resp_{self._answer.id}",
            "object": "response",
            "created_at": self._answer.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self._model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": options.top_p,
            "truncation": body.get("truncation") or "disabled",
            "usage": None,
            "metadata": body.get("metadata") or {},
        }

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **values}

    def _text_event(self, kind: str, **values: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **values)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
