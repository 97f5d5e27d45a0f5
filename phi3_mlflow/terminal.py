"""A conversation with a logged model in the terminal."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import mlflow.pyfunc
from mlflow.pyfunc import PyFuncModel

from phi3_mlflow.runtime.errors import Phi3Error

_HELP = (
    "/system TEXT sets a system message, /reset forgets the conversation, Ctrl-C clears the line or stops an answer, "
    "Ctrl-D ends."
)


@contextmanager
def given_or_embedded(model_uri: str | None) -> Iterator[str]:
    """The URI itself, or where there is none that of the embedded ONNX model, saved for as long as the block lasts."""
    if model_uri is not None:
        if ":" not in model_uri and not Path(model_uri).exists():
            raise Phi3Error(
                f"there is no folder {Path(model_uri).absolute()}; a model URI begins with models:/ or runs:/"
            )
        yield model_uri
        return
    from phi3_mlflow.builders import onnx

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        onnx.save_model(path)
        yield str(path)


@contextmanager
def loaded(model_uri: str | None) -> Iterator[PyFuncModel]:
    """A logged model, or the embedded ONNX one where there is no URI."""
    with given_or_embedded(model_uri) as uri:
        model = mlflow.pyfunc.load_model(uri, suppress_warnings=True)
        task = (model.metadata.metadata or {}).get("task")
        if task is None:
            raise Phi3Error(f"{uri} was not logged by phi3_mlflow")
        if task != "llm/v1/chat":
            raise Phi3Error(f"{uri} is a model for the task {task}; a conversation needs one for llm/v1/chat")
        yield model


class Conversation:
    """The messages so far, and the model that answers them.

    Args:
        model: a chat model that was loaded with mlflow.pyfunc.
        system: a system message, or None.
        options: of every request, by their names, checked.
    """

    def __init__(self, model: PyFuncModel, system: str | None = None, options: Mapping[str, Any] | None = None):
        self._model = model
        self.options = dict(options or {})
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.dropped = 0  # messages that the last answer was given without

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer in pieces. An answer that is broken off is forgotten with its question."""
        asked = [*self.turns, {"role": "user", "content": prompt}]
        body, params = self._split(asked)
        answer = ""
        chunks: Iterator[Any] = self._model.predict_stream(body, params=params)
        for chunk in chunks:
            text = chunk["choices"][0]["delta"].get("content", "")
            answer += text
            self.dropped = chunk.get("custom_outputs", {}).get("dropped_messages", 0)
            yield text
        self.turns = [*asked, {"role": "assistant", "content": answer}] if answer else self.turns

    def ask_whole(self, prompt: str) -> dict[str, Any]:
        """The whole completion object."""
        body, params = self._split([*self.turns, {"role": "user", "content": prompt}])
        completions: Any = self._model.predict(body, params=params)
        return completions[0]

    def _split(self, turns: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """In Python MLflow takes what its chat schema lacks as params."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        columns = set(self._model.metadata.get_input_schema().input_names())
        options = dict(self.options)
        fields: dict[str, Any] = {"messages": [*system, *turns]}
        if stop := options.pop("stop", None):
            fields["stop"] = list(stop)
        if bias := options.pop("logit_bias", None):
            fields["custom_inputs"] = {"logit_bias": {str(token): value for token, value in bias.items()}}
        fields |= {name: options.pop(name) for name in columns & options.keys()}
        return fields, options


def talk(conversation: Conversation) -> bool:
    """Reads questions until the input ends: from the terminal, or line by line from a pipe.

    Returns:
        Whether every question was answered.
    """
    terminal = sys.stdin.isatty()
    ask: Callable[[str], str] = _line_reader() if terminal else _pipe_reader()
    conversation.options.setdefault("context_overflow", "drop_oldest")
    if terminal:
        click.echo(_HELP, err=True)
    answered = True
    while True:
        try:
            line = ask("> ").strip()
            command, _, rest = line.partition(" ")
            if command == "/system":
                conversation.system = rest.strip() or None
            elif command == "/reset":
                conversation.turns = []
            elif line.startswith("/"):
                click.echo(_HELP, err=True)
            elif line:
                answered &= _answer(conversation, line)
        except EOFError:
            click.echo()
            return answered
        except KeyboardInterrupt:
            if not terminal:
                raise
            click.echo()
        except Phi3Error as error:
            answered = False
            click.echo(f"Error: {error}", err=True)


def read_prompt() -> str:
    """All of standard input as one prompt.

    Raises:
        Phi3Error: it is not text.
    """
    return _decoded(sys.stdin.buffer.read()).strip()


def _line_reader() -> Callable[[str], str]:
    """With the extra `ui`, a reader with editing and history; else plain input()."""
    with suppress(ImportError):
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession()
        return session.prompt

    def read(prompt: str) -> str:
        try:
            return input(prompt)
        except UnicodeDecodeError as error:
            raise _not_text(error) from None

    return read


def _pipe_reader() -> Callable[[str], str]:
    """Lines without prompts: stdout is for the answers."""
    lines = sys.stdin.buffer

    def read(_: str) -> str:
        if line := lines.readline():
            return _decoded(line)
        raise EOFError

    return read


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(error) from None


def _not_text(error: UnicodeDecodeError) -> Phi3Error:
    return Phi3Error(f"the input is not valid UTF-8: byte 0x{error.object[error.start]:02x} at place {error.start + 1}")


def _answer(conversation: Conversation, line: str) -> bool:
    """Prints an answer in pieces; returns whether there was one."""
    from mlflow.exceptions import MlflowException

    answer = conversation.ask(line)
    try:
        for text in answer:
            click.echo(text, nl=False)
        click.echo()
        if conversation.dropped:
            click.echo(f"(the context is full: answered without the oldest {conversation.dropped} messages)", err=True)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        click.echo("  [stopped]")
        if not sys.stdin.isatty():
            raise
    except MlflowException as error:
        click.echo(f"Error: {error.message}", err=True)
        return False
    return True
