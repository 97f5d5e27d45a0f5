"""The messages so far, the options, and the model that answers. Knows no terminal."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_mlflow.runtime.chat import check_text, parse_chat
from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.options import NAMES, Options, check

from . import texts
from .models import ChatError, Message, Model

_MAX_FILE = 64 * 2**20  # bytes of a saved conversation
# A conversation has one answer to each question, and shows its text alone.
_NOT_HERE = {"n", "logprobs", "top_logprobs", "show_engine"}
OPTIONS = tuple(name for name in NAMES if name not in _NOT_HERE)


@dataclass
class Facts:
    """What is known of an answer besides its text; None for what a server does not tell.

    Attributes:
        reason: why it ended, such as eos or max_tokens; of servers that do not tell, OpenAI's finish_reason.
        finish: OpenAI's finish_reason.
        prompt_tokens, cached_tokens, tokens: counts.
        dropped: messages that it was given without.
        asked, first, ended: when, on time.monotonic()'s clock; 0 for what has not happened.
    """

    reason: str | None = None
    finish: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: int | None = None
    dropped: int = 0
    asked: float = field(default_factory=time.monotonic)
    first: float = 0.0
    ended: float = 0.0

    def note(self, chunk: Mapping[str, Any]) -> str:
        """Takes what a chunk tells; its text.

        Raises:
            ChatError: it is no chunk of a chat completion.
        """
        try:
            text = self._text(chunk)
        except (AttributeError, TypeError, IndexError, KeyError):
            raise ChatError("the answer has not the shape of a chat completion") from None
        if text and not self.first:
            self.first = time.monotonic()
        return text

    def _text(self, chunk: Mapping[str, Any]) -> str:
        custom = chunk.get("custom_outputs") or {}
        self.dropped = _count(custom, "dropped_messages") or self.dropped
        if usage := chunk.get("usage"):
            self.prompt_tokens, self.tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = _count(details, "cached_tokens") or _count(custom, "cached_tokens")
        if not (choices := chunk.get("choices")):
            return ""
        choice = choices[0]
        if finish := choice.get("finish_reason"):
            self.finish = str(finish)
            self.reason = str((custom.get("stop_reason") or [choice.get("stop_reason") or finish])[0])
        content = (choice.get("delta") or {}).get("content")
        return content if isinstance(content, str) else ""

    def __str__(self) -> str:
        seconds = self.ended - self.asked
        told = [f"{seconds:.2f} s" if self.tokens is None else f"{self.tokens} tokens in {seconds:.2f} s"]
        if self.tokens and seconds:
            told.append(f"{self.tokens / seconds:.1f} tokens/s")
        if self.first:
            told.append(f"the first after {self.first - self.asked:.2f} s")
        if self.prompt_tokens:
            told.append(f"prompt of {self.prompt_tokens} tokens")
        if self.cached_tokens:
            told.append(f"{self.cached_tokens} of them cached")
        return f"{', '.join(told)}; ended by {texts.line(self.reason) if self.reason else 'you'}"


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    number = counts.get(name)
    return number if isinstance(number, int) else None


class Conversation:
    """A conversation with a model.

    Args:
        model: who answers.
        system: a system message, or None.
        options: of every request, by their names, checked.

    Attributes:
        turns: questions and answers so far.
        asked: the last question, answered or not; None before the first.
        facts: of the last answer; None before the first.
    """

    def __init__(self, model: Model, system: str | None = None, options: Mapping[str, Any] | None = None):
        self.model = model
        self.system = system
        self.options = dict(options or {})
        self.turns: list[Message] = []
        self.asked: str | None = None
        self.facts: Facts | None = None
        self._before: list[Message] = []  # the turns that the last question came after

    @property
    def messages(self) -> list[Message]:
        """The turns, below the system message."""
        return self._below_system(self.turns)

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer in pieces.

        One that is stopped (the iterator closed, or a KeyboardInterrupt) is kept as far as it came; one that fails is
        forgotten with its question.

        Raises:
            InvalidRequest: the prompt is no text.
            ChatError: there is no answer, or no whole one; with the first piece or a later one.
        """
        self.asked, self._before = check_text("message", prompt), self.turns
        return self._answer(self.asked)

    def retry(self) -> Iterator[str]:
        """Another answer to the last question, in place of the one that it got; that is kept where this one fails.

        Raises:
            ChatError: there was no question; and as `ask`.
        """
        if self.asked is None:
            raise ChatError("there is no question to ask again")
        return self._answer(self.asked)

    def ask_whole(self, prompt: str) -> dict[str, Any]:
        """The whole completion object; raises as `ask`."""
        question = {"role": "user", "content": check_text("message", prompt)}
        return self.model.whole([*self.messages, question], self.options)

    def set(self, name: str, value: Any) -> None:
        """Sets an option; None takes it back.

        Raises:
            InvalidRequest: there is no such option, or its value is not allowed.
        """
        if name in _NOT_HERE:
            raise InvalidRequest(name, "has no use in a conversation, which shows the text of one answer")
        if value is not None or name not in OPTIONS:
            checked = check(name, value)
            # What stands for none is kept as it is: it takes a model's own default back.
            value = value if checked is None else checked
            texts.check_whole(name, value)
        self.options = {key: kept for key, kept in self.options.items() if key != name}
        if value is not None:
            self.options[name] = value

    def set_system(self, text: str | None) -> None:
        """Sets the system message, or takes it away.

        Raises:
            InvalidRequest: it is no text.
        """
        self.system = check_text("system", text) if text else None

    def clear(self) -> None:
        """Forgets the turns."""
        self.turns, self.asked, self.facts, self._before = [], None, None, []

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Writes the conversation to a file that its owner alone can read.

        Raises:
            ChatError: there is such a file already, or something that is no file.
            OSError: it cannot be written.
        """
        if overwrite and path.exists() and not path.is_file():
            raise ChatError(f"{path} is no file")
        target = Path(os.path.realpath(path))
        saved = {"model": self.model.name, "options": self.options, "messages": self.messages}
        content = json.dumps(saved, indent=2, ensure_ascii=False) + "\n"
        if not overwrite:
            try:
                target.open("x").close()
            except FileExistsError:
                raise ChatError(f"{path} exists already; `/save -f {path}` overwrites it") from None
        try:
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".phi3-")
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(content)
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        except BaseException:
            if not overwrite:
                target.unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation: its messages, and its options where it has them.

        Raises:
            ChatError, InvalidRequest: it is no conversation; everything stays as it was then.
            OSError: it cannot be read.
        """
        saved = _read(path)
        messages, options = saved.get("messages"), saved.get("options")
        system, turns = _split(messages)
        if options is not None:
            if not isinstance(options, dict):
                raise InvalidRequest("options", f"is {shorten(options)}; it must be an object")
            checked = Conversation(self.model)
            for name, value in options.items():
                checked.set(name, value)
            self.options = checked.options
        self.clear()
        self.system, self.turns = system, turns
        if turns:
            self.asked, self._before = turns[-2]["content"], turns[:-2]

    def _answer(self, prompt: str) -> Iterator[str]:
        asked = [*self._before, {"role": "user", "content": prompt}]
        options = {"context_overflow": "drop_oldest"} if self.model.drops_oldest else {}
        self.facts = facts = Facts()
        answer = ""
        try:
            for chunk in self.model.chunks(self._below_system(asked), options | self.options):
                text = facts.note(chunk)
                answer += text
                if text:
                    yield text
        except (KeyboardInterrupt, GeneratorExit):
            self._keep(asked, answer, facts)
            raise
        self._keep(asked, answer, facts)

    def _below_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def _keep(self, asked: Sequence[Message], answer: str, facts: Facts) -> None:
        facts.ended = time.monotonic()
        if answer := texts.storable(answer):
            self.turns = [*asked, {"role": "assistant", "content": answer}]


def _read(path: Path) -> dict[str, Any]:
    """The fields of a saved conversation."""
    if not path.is_file():
        raise ChatError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    if path.stat().st_size > _MAX_FILE:
        raise ChatError(f"{path} is larger than {_MAX_FILE} bytes, and no conversation")
    try:
        saved = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path} is not valid JSON: {texts.line(str(error))}") from None
    if not isinstance(saved, dict) or "messages" not in saved:
        raise ChatError(f"{path} is no conversation: it must be an object with `messages`")
    for name in saved:
        if name not in ("model", "options", "messages"):
            raise InvalidRequest(name, "is not known; a conversation has `messages`, `options` and `model`")
    return saved


def _split(messages: Any) -> tuple[str | None, list[Message]]:
    """The system message, and the turns: questions and answers by turns."""
    checked = list(parse_chat({"messages": messages}, Options()).prompt) if messages != [] else []
    system = checked.pop(0)["content"] if checked and checked[0]["role"] == "system" else None  # type: ignore[index]
    for index, message in enumerate(checked):
        role = ("user", "assistant")[index % 2]
        if message["role"] != role:  # type: ignore[index]
            place = f"messages[{index + (system is not None)}].role"
            raise InvalidRequest(place, f"is {message['role']!r}; it must be {role!r}, in turns")  # type: ignore[index]
    if len(checked) % 2:
        raise InvalidRequest("messages", "ends with a question; the last one must be an answer")
    return system, checked  # type: ignore[return-value]
