"""The errors a user sees. Every message says what was wrong, with the value, and what to do next."""

import copyreg
import re
from collections.abc import Iterator
from typing import Any

_MAX_FIELD = 200  # characters
# What a terminal would obey, and what hides or turns around the text after it; tab and newline are left.
_OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Picklable(BaseException):
    """An error that crosses the border of a process, whatever arguments it was made with."""

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class Phi3Error(Picklable, Exception):
    """Base of every error that is meant for a person: its text is shown as one line, without a traceback.

    It may quote the names of files and what else came with a model; no terminal obeys them.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class InvalidRequest(Phi3Error):
    """A request that cannot be answered as it stands.

    Args:
        field: the request's field at fault, as the caller wrote it, for example `messages[2].content`.
        problem: what is wrong with it, with the value, and what is allowed.
    """

    def __init__(self, field: str, problem: str):
        # A part of the name may be the caller's own, and of any length.
        self.field = "".join(c if c.isprintable() else repr(c)[1:-1] for c in field[:_MAX_FIELD])
        super().__init__(f"`{self.field}{'...' if len(field) > _MAX_FIELD else ''}` {problem}")


class WeightsError(Phi3Error):
    """Weights that are missing, incomplete, damaged or of the wrong kind."""


class Busy(Phi3Error):
    """Too many requests are waiting already.

    Args:
        problem: what is the matter.
        seconds: after which a new attempt may succeed, estimated.
    """

    def __init__(self, problem: str, seconds: int):
        self.seconds = seconds
        super().__init__(f"{problem}; try again in {seconds} second{'' if seconds == 1 else 's'}")


class Unavailable(Phi3Error):
    """A model that takes no requests: it was closed, its thread ended, or it stayed behind in another process."""


class FormatError(Phi3Error):
    """A logged model whose format this runtime cannot read."""


def shown(text: str) -> str:
    """The text as a terminal may have it: control characters are written out, carriage returns left out."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text.replace("\r", ""))


def without_passwords(text: str) -> str:
    """The text without what stands before the host in addresses."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def shorten(value: object, limit: int = 60) -> str:
    """The value as an error message shows it: its repr, cut to `limit` characters. Takes no longer for a large one."""
    text = ""
    try:
        for piece in _repr(value, limit):
            text += piece
            if len(text) > limit:
                return text[:limit] + "..."
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text


def _repr(value: object, limit: int) -> Iterator[str]:
    """The pieces of a value's repr; what comes behind the limit may differ."""
    if type(value) is dict:
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _repr(key, limit)
            yield ": "
            yield from _repr(item, limit)
        yield "}"
    elif type(value) is list:
        yield "["
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _repr(item, limit)
        yield "]"
    else:
        yield repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
