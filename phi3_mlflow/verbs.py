"""What verbs of the command line share: options, and a result that is not lost with the output."""

import errno
import json
import math
import os
import sys
from typing import Any

import click

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")


class Number(click.FloatRange):
    """A range of numbers; nan, which is within any range of click's, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click.BadParameter where it is none of the range."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a valid number", param, ctx)
        return number


def parse_config(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be, else text; an empty value means not given."""
    config = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise click.UsageError(f"{pair!r} is not of the form NAME=VALUE")
        if value:
            try:
                config[name] = json.loads(value)
            except (ValueError, RecursionError):
                config[name] = value
    return config


def emit(text: str, kept: str | None = None) -> None:
    """Prints a result on stdout; where that takes nothing (a full disk, a reader that is gone), on stderr.

    Args:
        text: the result.
        kept: says where it is to be found too, and is told in its place.

    Raises:
        ClickException: it was not written to stdout.
    """
    try:
        if sys.stdout is None:  # it was closed when Python began
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        click.echo(text)
    except OSError as error:
        if kept is None:
            click.echo(text, err=True)
            kept = "the result stands above"
        raise untaken(error, kept) from None


def untaken(error: OSError, *kept: str) -> click.ClickException:
    """What is to be told where stdout takes nothing; what Python still holds for it goes to nowhere.

    Otherwise Python would complain of that when it ends.
    """
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return click.ClickException("; ".join([f"the output takes nothing ({error.strerror})", *kept]))
