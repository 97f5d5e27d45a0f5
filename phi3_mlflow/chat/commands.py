"""What a line of the user does: a question, or a command that begins with a slash. Knows no terminal."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_mlflow.runtime.chat import check_text
from phi3_mlflow.runtime.options import RANGES

from . import texts
from .conversation import OPTIONS, Conversation
from .models import ChatError, Model

# The values of options that have few.
WORDS = {
    "context_overflow": ("error", "drop_oldest"),
    "repetition_guard": ("true", "false"),
    "self_talk_guard": ("true", "false"),
}
_KINDS = {
    "stop": "a string, or a list of strings",
    "logit_bias": "an object of token ids with a number from -100 to 100 each",
    "response_format": 'an object such as {"type": "json_object"}',
    **{name: " or ".join(words) for name, words in WORDS.items()},
}
_DEFAULT = "default"


class Leave(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: what is written after it.
        does: for the help.
        run: takes what is written after it; where it asks a question, gives the answer's pieces.
    """

    usage: str
    does: str
    run: Callable[["Commands", str], Iterator[str] | None]


class Commands:
    """Carries out the user's lines.

    Args:
        conversation: what they change.
        tell: called with each line of what is to be told.
        keys: lines about the keyboard, for the help.

    Attributes:
        always_stats: whether to tell the numbers of each answer.
    """

    def __init__(self, conversation: Conversation, tell: Callable[[str], None], keys: Sequence[str] = ()):
        self.conversation = conversation
        self.always_stats = False
        self._tell = tell
        self._keys = keys

    def take(self, line: str) -> Iterator[str] | None:
        """Carries out one line; where it asks something, the pieces of the answer.

        Args:
            line: the text, which may have several lines; // at the beginning is a slash of the text itself.

        Raises:
            Phi3Error: it cannot be done; nothing was changed.
            Leave: the user wants to leave.
        """
        line = line.strip()
        if not line:
            return None
        if not line.startswith("/") or line.startswith("//"):
            return self.conversation.ask(line.removeprefix("/") if line.startswith("//") else line)
        parts = line.split(maxsplit=1)
        if (command := COMMANDS.get(parts[0])) is None:
            problem = f"there is no command {texts.line(parts[0])}; /help lists them"
            raise ChatError(f"{problem}, and // begins a message with a slash")
        try:
            return command.run(self, parts[1] if len(parts) == 2 else "")
        except OSError as error:  # of a file
            raise ChatError(f"{texts.line(line)}: {error.strerror or error}") from None

    def tell_stats(self) -> None:
        """Tells the numbers of the last answer."""
        facts = self.conversation.facts
        if facts is None or not facts.ended:
            raise ChatError("there is no answer to tell of")
        self._tell(str(facts))

    def _help(self, _: str) -> None:
        width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self._tell(f"{f'{name} {command.usage}':{width}}  {command.does}")
        for line in self._keys:
            self._tell(line)

    def _system(self, text: str) -> None:
        self.conversation.set_system(text)
        self._tell("The system message is set." if text else "There is no system message.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            self._list_options()
            return
        if not (value := value.strip()):
            raise ChatError(f"/set {texts.line(name)} needs a value; `{_DEFAULT}` takes it back")
        self.conversation.set(name, None if value == _DEFAULT else texts.parse(value))
        self._tell(self._option(name, ""))

    def _list_options(self) -> None:
        width = max(map(len, OPTIONS))
        shown = {name: self._option(name, " " * (width - len(name))) for name in OPTIONS}
        column = max(map(len, shown.values()))
        for name, text in shown.items():
            self._tell(f"{text:{column}}  {RANGES.get(name) or _KINDS[name]}")

    def _option(self, name: str, space: str) -> str:
        """An option and its value, in brackets where nobody has set it."""
        if name in self.conversation.options:
            return f"{name}{space} {_written(self.conversation.options[name])}"
        model = self.conversation.model
        default: Any = "drop_oldest" if name == "context_overflow" and model.drops_oldest else None
        if default is None:
            default = getattr(model.defaults, name, "the server's own")
        return f"{name}{space} ({_written(default)})"

    def _model(self, name: str) -> None:
        model = self.conversation.model
        if not name:
            self._tell(f"Model: {model.name}")
            if names := model.known():
                self._tell(f"The server has {', '.join(names)}")
            return
        self._tell(f"Changing to {name} ...")
        other: Model = model.other(check_text("model", name))
        self.conversation.model = other
        model.close()
        self._tell(f"Model: {other.name}")

    def _save(self, text: str) -> None:
        overwrite = text.startswith("-f ")
        path = _path(text.removeprefix("-f ") if overwrite else text)
        self.conversation.save(path, overwrite=overwrite)
        self._tell(f"Saved {_messages(len(self.conversation.messages))} to {path}.")

    def _load(self, text: str) -> None:
        path = _path(text)
        self.conversation.load(path)
        self._tell(f"Loaded {_messages(len(self.conversation.messages))} from {path}.")

    def _retry(self, _: str) -> Iterator[str]:
        return self.conversation.retry()

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self._tell("The conversation is forgotten.")

    def _stats(self, text: str) -> None:
        if text not in ("", "on", "off"):
            raise ChatError(f"/stats takes on, off or nothing, not {texts.line(text)}")
        if text:
            self.always_stats = text == "on"
            self._tell(f"The numbers of each answer are {'' if self.always_stats else 'not '}shown.")
        else:
            self.tell_stats()

    def _quit(self, _: str) -> None:
        raise Leave


COMMANDS = {
    "/system": Command("TEXT", "sets the system message; without TEXT takes it away", Commands._system),
    "/set": Command("OPTION VALUE", f"sets an option ({_DEFAULT} takes it back); alone shows them all", Commands._set),
    "/model": Command("NAME", "changes the model: a URI, or a name of the server; alone tells which", Commands._model),
    "/retry": Command("", "asks the last question again", Commands._retry),
    "/clear": Command("", "forgets the conversation, not the settings", Commands._clear),
    "/save": Command("[-f] FILE", "writes the conversation as JSON; -f overwrites a file", Commands._save),
    "/load": Command("FILE", "goes on with a saved conversation", Commands._load),
    "/stats": Command("[on|off]", "tokens and times of the last answer, or of each", Commands._stats),
    "/help": Command("", "this list", Commands._help),
    "/quit": Command("", "ends, as Ctrl-D does", Commands._quit),
}


def _path(text: str) -> Path:
    if not text.strip():
        raise ChatError("the name of a file is missing")
    return Path(os.path.expanduser(check_text("file", text.strip())))  # an unknown user's ~ stays as it is


def _messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"


def _written(value: Any) -> str:
    """A value as it would be typed."""
    if value is None or value in ((), {}):
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=dict)
