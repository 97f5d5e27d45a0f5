"""Tools in OpenAI's shape: what a request offers the model, and the calls in a conversation. Knows no model.

The shape is that of https://platform.openai.com/docs/guides/function-calling.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest, shorten
from .schemas import check_size
from .surrogates import half

FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
MAX_TOOLS = 64
MAX_CALLS = 64  # of one message
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_NAMED = "must be 1 to 64 of a-z, A-Z, 0-9, _ and -"


@dataclass(frozen=True)
class Function:
    """One tool.

    Attributes:
        name: unique among a request's tools.
        description: what it is good for; None where nothing was said.
        parameters: the JSON schema of its arguments, an object.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]

    def as_told(self) -> dict[str, Any]:
        """What a model is told of it."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters}


@dataclass(frozen=True)
class Offer:
    """What a request lets the model call.

    Attributes:
        functions: all that the model is told of.
        names: those that it may call.
        required: whether it has to call one.
        parallel: whether it may make several calls in one answer.
    """

    functions: tuple[Function, ...]
    names: tuple[str, ...]
    required: bool
    parallel: bool


@dataclass(frozen=True)
class PastCall:
    """A call that an earlier answer made: the function's name, and its arguments as `json.dumps` writes an object."""

    id: str
    name: str
    arguments: str


def refuse(values: Mapping[str, Any], *, elsewhere: bool) -> None:
    """Refuses tools in a request that cannot offer any.

    Args:
        values: the request's fields.
        elsewhere: whether the model can call tools, in chats.

    Raises:
        InvalidRequest: there are some; names the field.
    """
    for name in FIELDS:
        if values.get(name) is not None:
            if elsewhere:
                problem = "this task takes no tools; chats with this model do (llm/v1/chat, /v1/chat/completions)"
            else:
                problem = "this model was not trained to call tools; leave it out"
            raise InvalidRequest(name, f"is given, and {problem}")


def take(values: dict[str, Any]) -> Offer | None:
    """Takes the tools out of a request's fields; None where none may be called.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    tools, choice, parallel = (values.pop(name, None) for name in FIELDS)
    if parallel is not None and not isinstance(parallel, bool):
        raise InvalidRequest("parallel_tool_calls", f"is {shorten(parallel)}; it must be true or false")
    if tools is None:
        for name, value in (("tool_choice", choice), ("parallel_tool_calls", parallel)):
            if value not in (None, "none"):
                raise InvalidRequest(name, f"is {shorten(value)}, and no `tools` are given; leave it out")
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not 0 < len(tools) <= MAX_TOOLS:
        raise InvalidRequest("tools", f"is {shorten(tools)}; it must be a list of 1 to {MAX_TOOLS} tools, or left out")
    functions = tuple(_function(tool, f"tools[{place}]") for place, tool in enumerate(tools))
    names = tuple(function.name for function in functions)
    for place, each in enumerate(names):
        if each in names[:place]:
            raise InvalidRequest(f"tools[{place}].function.name", f"is {each!r} a second time; names must be unique")
    if choice == "none":
        return None
    parallel = parallel is not False
    if choice in (None, "auto", "required"):
        return Offer(functions, names, choice == "required", parallel)
    chosen = choice.get("function", {}) if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    named: Any = chosen.get("name") if isinstance(chosen, Mapping) else None
    if named not in names:
        shape = f'{{"type": "function", "function": {{"name": "{names[0]}"}}}}'
        problem = f"it must be none, auto, required or name one of the tools, such as {shape}"
        raise InvalidRequest("tool_choice", f"is {shorten(choice)}; {problem}")
    return Offer(functions, (named,), True, parallel)


def _function(tool: Any, field: str) -> Function:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        shape = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        raise InvalidRequest(field, f"is {shorten(tool)}; it must be {shape}")
    _only(tool, ("type", "function"), field)
    function = {key: value for key, value in tool["function"].items() if value is not None}
    field = f"{field}.function"
    _only(function, ("name", "description", "parameters", "strict"), field)
    name: Any = function.get("name")
    description, strict = function.get("description"), function.get("strict", True)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{field}.name", f"is {shorten(name)}; it {_NAMED}")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{field}.description", f"is {shorten(description)}; it must be a text")
    if not isinstance(strict, bool):
        raise InvalidRequest(f"{field}.strict", f"is {shorten(strict)}; it must be true or false")
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidRequest(f"{field}.parameters", f"is {shorten(parameters)}; it must be the schema of an object")
    check_size(parameters, f"{field}.parameters")
    _encoded(f"{field}.description", description or "")
    _encoded(f"{field}.parameters", parameters)
    return Function(name, description, {"type": "object", "properties": {}, **parameters})


def past_calls(calls: Any, field: str) -> tuple[PastCall, ...]:
    """The `tool_calls` of a message of the assistant.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not 0 < len(calls) <= MAX_CALLS:
        raise InvalidRequest(field, f"is {shorten(calls)}; it must be a list of 1 to {MAX_CALLS} calls, or left out")
    return tuple(_past_call(call, f"{field}[{place}]") for place, call in enumerate(calls))


def _past_call(call: Any, field: str) -> PastCall:
    function = call.get("function") if isinstance(call, Mapping) and call.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
        shape = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise InvalidRequest(field, f"is {shorten(call)}; it must be {shape}")
    _only(call, ("id", "type", "function", "index"), field)
    _only(function, ("name", "arguments"), f"{field}.function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{field}.function.name", f"is {shorten(name)}; it {_NAMED}")
    field = f"{field}.function.arguments"
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(field, f"is {shorten(arguments)}; it must be the JSON text of an object")
    return PastCall(call["id"], name, _encoded(field, parsed))


def _encoded(field: str, value: Any) -> str:
    """The value as JSON, with all characters as they are; InvalidRequest where that is no text."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {' '.join(str(error).split())}") from None
    if half(text) is not None:
        raise InvalidRequest(field, "has half of a surrogate pair, which no text has; leave it out")
    return text


def _only(given: Mapping[str, Any], known: Sequence[str], field: str) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            raise InvalidRequest(f"{field}.{key}", f"is not known; it may hold {', '.join(known)}")
