"""Texts of models, servers and files on their way to a terminal or back into a request."""

import json
import re
from typing import Any

from phi3_mlflow.runtime.errors import InvalidRequest, shown
from phi3_mlflow.runtime.surrogates import half

# What no request may have.
_REFUSED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_LINE = 500  # characters


def line(text: str) -> str:
    """The text as one line of a message, shortened."""
    flat = shown(" ".join(text.split()))
    return flat if len(flat) <= _LINE else f"{flat[:_LINE]}..."


def storable(text: str) -> str:
    """The text without characters for which a later request would be refused."""
    return _REFUSED.sub("", text)


def parse(text: str) -> Any:
    """A value that a person wrote: JSON where it can be, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def check_whole(name: str, value: Any) -> None:
    """Refuses half characters (lone surrogates) anywhere in a JSON value.

    Raises:
        InvalidRequest: there is one.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest(name, "is nested too deeply to be read") from None
    if (place := half(text)) is not None:
        raise InvalidRequest(name, f"has half a character, the lone surrogate U+{ord(text[place]):04X}")
