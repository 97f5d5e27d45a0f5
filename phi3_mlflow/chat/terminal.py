"""The terminal: a prompt with editing, completion and history; what is printed to it."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from phi3_mlflow.runtime.errors import shown

from . import texts
from .commands import COMMANDS, WORDS
from .conversation import OPTIONS
from .models import ChatError

KEYS = (
    "Enter sends, Alt-Enter (or Esc and Enter) begins a new line. Up and down go through what was typed before.",
    "Ctrl-C stops an answer or empties the line; Ctrl-C or Ctrl-D at the empty prompt ends.",
)
_MAX_HISTORY = 2**20  # bytes


def tell(text: str) -> None:
    """A line that is no answer: to stderr, dim where that is a terminal."""
    click.secho(shown(text), err=True, dim=True)


def tell_error(error: Exception) -> None:
    """What went wrong, in one line."""
    click.echo(f"{click.style('Error:', fg='red')} {texts.line(str(error))}", err=True)


def write(text: str) -> None:
    """A piece of an answer: to stdout, where that is a terminal without what it would obey."""
    click.echo(shown(text) if sys.stdout.isatty() else text, nl=False)


def reader(history: History) -> Callable[[], str]:
    """Reads a line, or several, from the terminal.

    The function raises EOFError where the user leaves, and ChatError for bytes that are no text.
    """
    session: PromptSession[str] = PromptSession(
        ANSI("\x1b[1m> \x1b[0m"),
        multiline=True,
        prompt_continuation="  ",
        history=history,
        key_bindings=_keys(),
        completer=_Completer(),
        complete_while_typing=False,
        enable_suspend=True,
        output=create_output(always_prefer_tty=True),
    )

    def read() -> str:
        text = session.prompt()
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes arrive as lone surrogates
            raise not_text(ord(text[error.start]) & 0xFF, error.start) from None
        return text

    return read


def not_text(byte: int, place: int) -> ChatError:
    """What is said of bytes that are no UTF-8."""
    return ChatError(f"the input is not valid UTF-8: byte 0x{byte:02x} at place {place + 1}")


def history(*, kept: bool) -> History:
    """What was typed before: in a private file of the user's cache folder, or of this run alone."""
    if not kept:
        return InMemoryHistory()
    path = platformdirs.user_cache_path("phi3-mlflow", appauthor=False) / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if not path.is_file():
            return InMemoryHistory()  # such as a link to /dev/null
        path.chmod(0o600)
        _shorten(path)
    except OSError as error:
        tell(f"What you type is not kept: {error}")
        return InMemoryHistory()
    return _KeptHistory(path)


class _KeptHistory(FileHistory):
    """A file that cannot be written any more, or a text that is none, does not cost the question."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _shorten(path: Path) -> None:
    """Forgets the older half of a history that has grown too long."""
    if path.stat().st_size <= _MAX_HISTORY:
        return
    with path.open("rb") as file:
        file.seek(-_MAX_HISTORY // 2, 2)
        content = file.read()
    start = content.find(b"\n# ")  # of an entry
    path.write_bytes(content[start:] if start >= 0 else b"")


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def empty_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError)

    return keys


class _Completer(Completer):
    """Completes commands, options and file names, by Tab."""

    _files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        command, space, after = document.text_before_cursor.partition(" ")
        if space and command in ("/save", "/load"):
            yield from self._files.get_completions(Document(after.removeprefix("-f ")), event)
            return
        option, value, begun = after.partition(" ")
        words: Iterable[str] = ()
        if not space and command.startswith("/"):
            words, begun = COMMANDS, command
        elif command == "/stats":
            words, begun = ("on", "off"), after
        elif command == "/set" and not value:
            words, begun = OPTIONS, option
        elif command == "/set":
            words = WORDS.get(option, ())
        yield from (Completion(word, -len(begun)) for word in words if word.startswith(begun))


@contextmanager
def keys_kept() -> Iterator[None]:
    """What is typed while no prompt is there is not shown, and the next prompt has it as it was typed.

    Else the terminal would show it amid an answer. Ctrl-C stays what it is. Stdin is a terminal.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    modes = list(before)
    modes[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def pipe_reader() -> Callable[[], str]:
    """Lines of stdin without prompts: stdout is for the answers. Raises as `reader`."""
    lines: Iterator[bytes] = iter(sys.stdin.buffer.readline, b"")

    def read() -> str:
        for content in lines:
            return decoded(content)
        raise EOFError

    return read


def decoded(content: bytes) -> str:
    """Text that came as bytes.

    Raises:
        ChatError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_text(content[error.start], error.start) from None
