"""API keys: where they come from, and whose a request's is. Knows no HTTP but the Authorization header."""

import hashlib
import hmac
import os
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
        path: a file with one key a line, or `NAME=KEY`; lines that begin with # are left out. The variable holds the
            same, separated by commas.

    Raises:
        KeysError: the file cannot be read, a name stands twice, or a key is too short to be one.
    """
    lines: list[str] = []
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"the file of keys {path} cannot be read: {error}") from error
        if not any(_meant(lines)):
            raise KeysError(f"the file of keys {path} holds none: write one a line, as NAME=KEY")
    named: dict[str, str] = {}
    for index, line in enumerate(_meant([*lines, *os.environ.get(VARIABLE, "").split(",")])):
        name, separator, key = line.partition("=")
        name, key = (name.strip(), key.strip()) if separator else (f"key-{index + 1}", line)
        if len(key) < _LEAST or not key.isascii() or not key.isprintable() or " " in key:
            raise KeysError(f"the key {name!r} must be at least {_LEAST} printable ASCII characters without spaces")
        if name in named:
            raise KeysError(f"the key {name!r} is given twice: give each a name of its own")
        named[name] = key
    return Keys(named)


def _meant(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
