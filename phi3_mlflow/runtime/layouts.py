"""Where a chat template puts the messages of a conversation among text and control tokens.

Knows the names of control tokens; encodes nothing.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from tokenizers import AddedToken, Tokenizer, models

from .errors import InvalidRequest, WeightsError
from .templates import ChatTemplate

ROLES = ("system", "user", "assistant")
# What stands before a tool's result in Phi-4-mini's conversations.
_TOOL_RESPONSE = "<|tool_response|>"

# Layouts of longer conversations are not kept: a cache of them would hold hundreds of megabytes.
_CACHED_ROLES = 64
# A message's place, in white space that shows whether the template trims its messages.
_SPACE = "\u2003"
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)")


class Place(NamedTuple):
    """Where a message's content goes, and whether it is trimmed there."""

    message: int
    trimmed: bool

    def fill(self, contents: Sequence[Sequence[int | str]]) -> Sequence[int | str]:
        """What is put there, trimmed as Jinja's filter of that name does."""
        content = contents[self.message]
        if self.trimmed and len(content) == 1 and isinstance(content[0], str):
            return [content[0].strip()]
        return content


# An int is a control token's id.
Part = int | str | Place


class Layouts:
    """The prompts that a chat template makes, by the roles of a conversation.

    Each turn must begin with its role's mark. That is the control token `<|user|>` (Phi-3), or one that is followed by
    the role's name (`<|im_start|>user`, `<|start_header_id|>user`); where a template has neither, the text that stands
    before a user's message and behind it, which a user's own text can imitate.

    Args:
        template: the chat template.
        control: the ids of control tokens by their names.

    Attributes:
        marked: whether control tokens mark the turns, which no text can imitate.
        tools: where the template takes tools; see ChatTemplate.place_of_tools.

    Raises:
        WeightsError: the template cannot be used.
    """

    def __init__(self, template: ChatTemplate, control: Mapping[str, int]):
        self._template = template
        self._control = control
        self._roles = {id: role for role in ROLES if (id := control.get(f"<|{role}|>")) is not None}
        if (answer := control.get(_TOOL_RESPONSE)) is not None:
            self._roles[answer] = "tool"
        self._names = finder(control)
        self._cached = lru_cache(maxsize=256)(self._split)
        self.tools = template.place_of_tools
        if self.tools == "system" and _TOOL_RESPONSE not in control:
            self.tools = None
        try:
            self._marks = self._text_marks()
            self.layout(("user",))
        except InvalidRequest as error:
            raise WeightsError(f"the tokenizer's chat template cannot express a user's message: {error}") from error
        self.marked = self._marks is None
        if not self.marked:
            self.tools = None

    def layout(self, roles: tuple[str, ...], tools: str | None = None) -> Sequence[Part]:
        """The parts of a prompt for the next assistant message.

        Args:
            roles: of the messages; the first is the system's where there are tools with a place there.
            tools: the objects that a template with a variable for tools is given, as JSON text; for a place in the
                system message any text, whose own place is that of a message behind the last one.

        Raises:
            InvalidRequest: the template cannot express these roles in this order, or the tools name control tokens.
        """
        if tools is not None and self.tools == "variable":
            self._refuse_control(tools)
            return self._split(roles, tools)
        held = None if tools is None else ""
        return self._cached(roles, held) if len(roles) <= _CACHED_ROLES else self._split(roles, held)

    def _refuse_control(self, tools: str) -> None:
        """The template puts tools among its own text, in which the names of control tokens count."""
        found = [part for _, part in self._named(tools)] or re.findall("[\ue000\ue001]", tools)
        if found:
            raise InvalidRequest("tools", f"have the text {found[0]!r}, which is a control token here; leave it out")

    def _named(self, text: str) -> Iterator[tuple[int, str]]:
        """The control tokens that a text names: where each begins, and its name."""
        found = self._names.encode(text, add_special_tokens=False)
        return zip((start for start, _ in found.offsets), found.tokens, strict=True)

    def _split(self, roles: tuple[str, ...], tools: str | None) -> list[Part]:
        parts = self._parts(roles, tools)
        self._check(roles, parts, places=len(roles) + (tools == ""))
        return parts

    def _parts(self, roles: Sequence[str], tools: str | None = None) -> list[Part]:
        turns = [(role, _placeholder(i)) for i, role in enumerate(roles)]
        if self.tools == "system":
            turns = [("tool_response" if role == "tool" else role, text) for role, text in turns]
        given: dict[str, Any] = {}
        if tools is not None:
            given = {"tools": json.loads(tools)} if tools else {"in_system": _placeholder(len(roles))}
        try:
            rendered = self._template.render(turns, **given)
        except jinja2.TemplateError as error:
            wrong = bisect_left(range(len(roles) - 1), True, key=lambda i: self._template.refuses(turns[: i + 1]))
            raise _inexpressible(roles, wrong, f"; it says: {error}") from error
        if any("\ud800" <= char <= "\udfff" for char in set(rendered)):
            raise _inexpressible(roles, len(roles) - 1, "; it makes half of a surrogate pair")
        parts: list[Part] = []
        position = 0
        for match in _PLACEHOLDER.finditer(rendered):
            if bool(match[1]) != bool(match[3]):
                raise _inexpressible(roles, int(match[2]), "; it trims one side of it alone")
            parts += self._text(rendered[position : match.start()])
            parts.append(Place(int(match[2]), not match[1]))
            position = match.end()
        parts += self._text(rendered[position:])
        return parts

    def _text(self, text: str) -> Iterator[int | str]:
        """A text of the template's own, with its control tokens by their ids."""
        position = 0
        for start, name in self._named(text):
            if start > position:
                yield text[position:start]
            yield self._control[name]
            position = start + len(name)
        if position < len(text):
            yield text[position:]

    def _check(self, roles: tuple[str, ...], parts: Sequence[Part], places: int) -> None:
        """Every message must appear once, in order, and directly behind its own role's mark; tools in the first one."""
        opened: list[str] = []
        filled: list[tuple[str, int, int]] = []  # role, message, how many were opened until then
        for index, part in enumerate(parts):
            if isinstance(part, Place) and part.message == len(roles):
                places -= opened == ["system"]
            elif isinstance(part, Place):
                filled.append((opened[-1] if opened else "", part.message, len(opened)))
            else:
                opened += self._opened(part, parts[index + 1 : index + 2])
        # A system message of the template's own, where the conversation has none.
        own = int(opened[:1] == ["system"] != list(roles[:1]))
        count = own
        expected = []
        marks = []
        for index, role in enumerate(roles):
            if self._marks and role == "system" and index == 0:  # it needs no mark, being the first
                expected.append(("", 0, 0))
                continue
            if role == "tool" and self.tools == "variable":
                role = "user"  # results stand together in a turn of the user's
            if not (role == "user" and roles[index - 1 : index + 1] == ("tool", "tool")):
                count += 1
                marks.append(role)
            expected.append((role, index, count))
        if filled == expected and opened[own:] == [*marks, "assistant"] and places == len(roles):
            return
        wrong = next((i for i, (a, b) in enumerate(zip(filled, expected, strict=False)) if a != b), len(filled))
        raise _inexpressible(roles, min(wrong, len(roles) - 1))

    def _opened(self, part: int | str, following: Sequence[Part]) -> Iterator[str]:
        """The roles whose marks are in a part."""
        if self._marks:
            if isinstance(part, str):
                for match in re.finditer("|".join(map(re.escape, self._marks)), part):
                    yield self._marks[match[0]]
        elif isinstance(part, int):
            text = following[0] if following and isinstance(following[0], str) else ""
            role = self._roles.get(part) or next((r for r in ROLES if re.match(rf"{r}\b", text)), None)
            if role:
                yield role

    def _text_marks(self) -> dict[str, str] | None:
        """The roles by the text that marks them; None where control tokens do."""
        self._marks = None
        parts = self._parts(("user",))
        places = [index for index, part in enumerate(parts) if isinstance(part, Place)]
        if any(list(self._opened(part, parts[i + 1 : i + 2])) for i, part in enumerate(parts) if isinstance(part, int)):
            return None
        if len(places) != 1:
            raise _inexpressible(("user",), 0)
        before, behind = ("".join(p if isinstance(p, str) else "" for p in side).strip() for side in (
            parts[: places[0]], parts[places[0] + 1 :]
        ))  # fmt: skip
        marks = {before.rpartition("\n")[2]: "user", behind.rpartition("\n")[2]: "assistant"}
        if len(marks) < 2 or "" in marks:
            raise _inexpressible(("user",), 0, "; nothing in it tells who speaks")
        return marks


def finder(names: Iterable[str]) -> Tokenizer:
    """A tokenizer that gives the names in a text and leaves the rest out, the longest at each place.

    However many names there are, it takes the time of the text; an expression would try one after the other.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def _placeholder(message: int) -> str:
    return f"{_SPACE}\ue000{message}\ue001{_SPACE}"


def _inexpressible(roles: Sequence[str], wrong: int, reason: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"messages[{wrong}].role",
        f"is {roles[wrong]!r}, and this model's chat template cannot express that there (roles up to it: "
        f"{', '.join(roles[max(0, wrong - 9) : wrong + 1])}{reason}); use user and assistant in turn, beginning and "
        "ending with user",
    )
