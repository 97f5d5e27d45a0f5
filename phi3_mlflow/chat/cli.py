"""The verb `chat`."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import click

from phi3_mlflow.runtime.options import check
from phi3_mlflow.verbs import Number, emit, parse_config


@click.command()
@click.argument("uri", metavar="[MODEL]", required=False)
@click.option("-p", "--prompt", help="Ask this, print the answer and end; - reads the prompt from standard input.")
@click.option("--system", help="A system message.")
@click.option("-o", "--option", multiple=True, metavar="NAME=VALUE", help="Such as temperature=0.7. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="With -p: print the whole completion object.")
@click.option("--url", help="Talk to the server with OpenAI's API at this address, such as http://127.0.0.1:8000.")
@click.option("--model", "name", help="With --url: which of its models. Default: the only one.")
@click.option(
    "--timeout",
    type=Number(0.1),
    default=300.0,
    show_default=True,
    help="With --url: seconds for which the server may say nothing.",
)
@click.option("--no-history", is_flag=True, help="Keep nothing of what is typed in the user's cache folder.")
def chat(
    uri: str | None,
    prompt: str | None,
    system: str | None,
    option: tuple[str, ...],
    as_json: bool,
    url: str | None,
    name: str | None,
    timeout: float,
    no_history: bool,
) -> None:
    """Talk to a logged model, to the embedded one, or to a server.

    MODEL is any model URI of MLflow: models:/NAME@alias, models:/m-..., runs:/..., or a folder. From a pipe each line
    is a question of one conversation; the exit code is 1 where one was not answered. A server's API key stands in the
    environment variable PHI3_MLFLOW_API_KEY.

    \b
    Examples:
      phi3-mlflow chat -p "What is the capital of Spain?"
      phi3-mlflow chat models:/phi3@champion --system "You are brief." -o temperature=0.7
      phi3-mlflow chat --url http://127.0.0.1:8000 --model phi3
    """

    options = {name: check(name, value) for name, value in parse_config(option).items()}
    if as_json and prompt is None:
        raise click.UsageError("--json needs -p")
    if url is not None and uri is not None:
        raise click.UsageError("MODEL is for a model that is loaded here; with --url give --model")
    if name is not None and url is None:
        raise click.UsageError("--model needs --url; a model that is loaded here is given as MODEL")
    for what, text in (("prompt", prompt), ("system message", system)):
        # Bytes of the command line that are no text arrive as lone surrogates.
        if text is not None and not text.isascii() and text.encode("utf-8", "replace").decode() != text:
            raise click.UsageError(f"the {what} is not valid UTF-8")
    from . import terminal
    from .conversation import Conversation
    from .models import Logged, Model
    from .server import Server
    from .talk import talk

    if prompt in (None, "-") and sys.stdin is None:
        raise click.UsageError("there is no standard input; give a question with -p")
    if sys.stdout is None:
        raise click.UsageError("there is no standard output for the answer")
    if prompt == "-":
        prompt = terminal.decoded(sys.stdin.buffer.read()).strip()
    if prompt is not None and not prompt:
        raise click.UsageError("the prompt is empty")
    if options.get("n", 1) != 1 and not as_json:
        raise click.UsageError("n above 1 needs -p and --json")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have what the terminal's encoding lacks
    interactive = prompt is None and sys.stdin.isatty()
    with (
        _no_bars() if as_json else nullcontext(),
        terminal.keys_kept() if interactive else nullcontext(),
        _logged_in_lines(),
    ):
        if interactive:
            terminal.tell("Connecting to the server ..." if url else f"Loading {uri or 'the embedded model'} ...")
        model: Model = Server(url, name, timeout) if url else Logged(uri)
        conversation = Conversation(model, None, options)
        try:
            if isinstance(model, Server) and model.exposes_key:
                terminal.tell("Warning: the key goes to the server unencrypted; https protects it")
            conversation.set_system(system)
            if as_json and prompt is not None:
                emit(json.dumps(conversation.ask_whole(prompt), indent=2, ensure_ascii=False))
            elif prompt is not None:
                for text in conversation.ask(prompt):
                    terminal.write(text)
                click.echo()
            else:
                for each, value in options.items():
                    conversation.set(each, value)
                if not talk(conversation, keep_history=not no_history):
                    raise click.exceptions.Exit(1)
        finally:
            conversation.model.close()


def _no_bars() -> AbstractContextManager[None]:
    """Imported only where it is needed, because MLflow, which a server does not need, takes seconds."""
    from phi3_mlflow.bars import no_bars

    return no_bars()


@contextmanager
def _logged_in_lines() -> Iterator[None]:
    """Has what the toolkit logs told in lines, without tracebacks, until the block ends."""
    from . import terminal, texts

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            terminal.tell(texts.line(record.getMessage() + (f": {error!r}" if error else "")))

    logger, handler = logging.getLogger("phi3_mlflow"), Lines(logging.WARNING)
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
