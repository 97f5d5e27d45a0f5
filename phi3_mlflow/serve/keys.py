"""API keys: where they come from, and whose a request's is. Knows no HTTP but the Authorization header."""

import hashlib
import hmac
import os
import re
from pathlib import Path

from phi3_mlflow.runtime.errors import Phi3Error

VARIABLE = "PHI3_MLFLOW_API_KEYS"
_LEAST = 8  # characters


class KeysError(Phi3Error):
    """A file or a variable that holds no usable keys. Its text never has a key in it."""


class Keys:
    """Several keys, each with a name for the log.

    Args:
        named: key by name.
    """

    def __init__(self, named: dict[str, str]):
        # Digests are of one length, so that a comparison takes the same time for every key.
        self._digests = {name: _digest(key) for name, key in named.items()}

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def name_of(self, authorization: str | None) -> str | None:
        """The name of the key that a request gives as `Authorization: Bearer KEY`; None where it gives no known one."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = None
        for name, digest in self._digests.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, given) and scheme.lower() == "bearer":
                found = name
        return found


def read(path: Path | None) -> Keys:
    """The keys of a file and of the variable PHI3_MLFLOW_API_KEYS.

    Args:
        path: a file with a key a line, as `NAME=KEY`; lines that begin with # are left out. The variable holds the
            same, separated by commas. Names are of small letters, digits, - and _, so that no part of a key is taken
            for one.

    Raises:
        KeysError: the file cannot be read, a line is not of that form, a name stands twice, or a key is too short.
    """
    lines: list[str] = []
    if VARIABLE in os.environ and not _meant(os.environ[VARIABLE].split(",")):
        # Who sets it wants keys: without any, the server would be open to all.
        raise KeysError(f"{VARIABLE} is set and holds no key: write NAME=KEY,NAME=KEY into it, or unset it")
    if path is not None:
        if not path.exists():  # and may be a key itself
            raise KeysError("the file of keys cannot be read: there is no such file; give its path, and never a key")
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"the file of keys {path} cannot be read: {type(error).__name__}") from error
        if not any(_meant(lines)):
            raise KeysError(f"the file of keys {path} holds none: write one a line, as NAME=KEY")
    named: dict[str, str] = {}
    places = [(f"line {number} of {path}", line) for number, line in enumerate(lines, 1)]
    places += [(f"entry {number} of {VARIABLE}", line) for number, line in _entries(os.environ.get(VARIABLE, ""))]
    for place, line in places:
        if not _meant([line]):
            continue
        name, _, key = (part.strip() for part in line.strip().partition("="))
        if not re.fullmatch(r"[a-z0-9_-]{1,32}", name) or not re.fullmatch(rf"[!-~]{{{_LEAST},}}", key):
            form = f"NAME of at most 32 small letters, digits, - and _, KEY of at least {_LEAST} printable characters"
            raise KeysError(f"{place} is not NAME=KEY: {form}, without spaces")
        if name in named:
            raise KeysError(f"{place} has the name {name!r} a second time: give each key a name of its own")
        named[name] = key
    return Keys(named)


def _entries(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.split(","), 1))


def _meant(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
