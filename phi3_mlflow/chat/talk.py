"""The loop: a line in, an answer out, until the user leaves."""

import sys
from collections.abc import Iterator

import click

from phi3_mlflow.runtime.errors import Phi3Error

from . import terminal
from .commands import Commands, Leave
from .conversation import Conversation

_CUT = {
    "max_tokens": "`/set max_tokens` allows more tokens",
    "context": "the context is full; /clear begins anew",
    "max_time": "max_time is over",
}


def talk(conversation: Conversation, *, keep_history: bool = True) -> bool:
    """Reads questions and commands until the input ends: from the terminal, or line by line from a pipe.

    Returns:
        Whether everything from a pipe was answered; at a terminal the user has seen what was not.
    """
    interactive = sys.stdin.isatty()
    read = terminal.pipe_reader()
    if interactive:
        read = terminal.reader(terminal.history(kept=keep_history))
        terminal.tell(f"Model: {conversation.model.name}. /help lists the commands, Ctrl-D ends.")
    commands = Commands(conversation, terminal.tell, terminal.KEYS if interactive else ())
    answered = True
    while True:
        try:
            answer = commands.take(read())
            if answer is not None:
                answered &= _print(answer, commands, interactive)
        except (EOFError, Leave):
            return answered or interactive
        except KeyboardInterrupt:
            if not interactive:
                raise
        except Phi3Error as error:
            answered = False
            terminal.tell_error(error)


def _print(answer: Iterator[str], commands: Commands, interactive: bool) -> bool:
    """Prints an answer in pieces; returns whether there was one."""
    conversation, begun = commands.conversation, False
    try:
        for text in answer:
            begun = True
            terminal.write(text)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        click.echo()
        if not interactive:
            raise
        terminal.tell("(stopped)")
        return True
    except Phi3Error:
        if begun:
            click.echo()
        raise
    click.echo()
    facts = conversation.facts
    if facts is None:
        return True
    if facts.dropped:
        terminal.tell(f"(the context is full: answered without the oldest {facts.dropped} messages)")
    if facts.finish == "length":
        terminal.tell(f"(cut off: {_CUT.get(facts.reason or '', _CUT['max_tokens'])})")
    if not begun:
        terminal.tell("(the answer is empty)")
    if commands.always_stats:
        commands.tell_stats()
    return True
