"""What any file of weights may be: there, inside its folder, no native library, no pickle; JSON without repetition.

It knows nothing of what the files mean.
"""

import json
import pickletools
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import WeightsError, shorten
from ..surrogates import half

MiB = 2**20

# Mach-O for 32 and 64 bits in both byte orders, and the universal binaries that hold several of them.
_LIBRARIES = {
    b"\x7fELF": "a native library (ELF)",
    **dict.fromkeys(
        (
            b"\xfe\xed\xfa\xce",
            b"\xfe\xed\xfa\xcf",
            b"\xce\xfa\xed\xfe",
            b"\xcf\xfa\xed\xfe",
            b"\xca\xfe\xba\xbe",
            b"\xca\xfe\xba\xbf",
            b"\xbe\xba\xfe\xca",
            b"\xbf\xba\xfe\xca",
        ),
        "a native library (Mach-O)",
    ),
    **dict.fromkeys((b"PK\x03\x04", b"PK\x05\x06"), "a zip archive, as pickled weights are"),
}
# The PROTO opcode with the protocols in use, and what may follow it (Lib/pickle.py): LONG1 begins torch's old format.
# The opcodes are looked at because the raw numbers of a weight file may begin like anything.
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x8a\x95\x8c\x8d\x8e(\]})cXKMJGBCN\x88\x89q]")
# Opcodes that call what was named before, in the protocols that have no header (Lib/pickletools.py).
_CALLS = frozenset({"INST", "OBJ", "REDUCE", "BUILD"})
_START = 4096  # bytes of a file that are looked at
_MOST_DEPTH = 64  # of JSON
_GIT_LFS = b"version https://git-lfs"


def needed(path: Path) -> Path:
    """The path itself, of a file that is there, has something in it, stays in its folder and is what it should be.

    Raises:
        WeightsError: it is not; the message names the file and what to do.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing: the model is incomplete; copy or download it again")
    _check_link(path)
    start = _check_start(path)
    if not start:
        raise WeightsError(f"{path} is empty: copy or download it again")
    if start.startswith(_GIT_LFS):
        raise WeightsError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its clone")
    return path


def check_all(folder: Path) -> None:
    """Checks every file below a folder: no link that leaves it, no native library, no pickle.

    Raises:
        WeightsError: there is one; the message names it.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            _check_link(path, folder)
            if path.is_file():
                _check_start(path)
            elif path.exists() and not path.is_dir():
                raise WeightsError(f"{path} is no plain file: do not use this copy")


def beside(owner: Path, name: object) -> Path:
    """The file of that name in the folder of the file that names it.

    Raises:
        WeightsError: the name is not that of a file beside it.
    """
    plain = isinstance(name, str) and name.isprintable() and PurePosixPath(name).name == name
    if not plain or name in ("", "..") or set(str(name)) & set("\\:"):
        raise WeightsError(f"{owner} names {shorten(name)}, which is not a file beside it: do not use this copy")
    return owner.parent / str(name)


def text(path: Path, limit: int = MiB) -> str:
    """A file's text, where it is UTF-8.

    Args:
        path: the file; it must be there, see `needed`.
        limit: of its size, in bytes.

    Raises:
        WeightsError: it is missing, larger, cannot be read, or is no UTF-8.
    """
    size = needed(path).stat().st_size
    if size > limit:
        raise WeightsError(f"{path} has {size} bytes, and at most {limit} are read: do not use this copy")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is not UTF-8 text: copy or download it again") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: names and values in their order, a name perhaps more than once."""


def json_object(path: Path, limit: int = MiB) -> Pairs:
    """A JSON object from a file, with what `json.loads` would drop: names that come twice.

    Raises:
        WeightsError: as for `text`, and where it is no JSON object.
    """
    return parse(path, text(path, limit))


def parse(owner: Path | str, content: str | bytes) -> Pairs:
    """The JSON object that a text, or UTF-8, is; see `json_object`.

    Args:
        owner: what has it, for an error.
        content: the JSON.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=Pairs, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{owner} is not JSON: copy or download it again") from error
    if not isinstance(found, Pairs):
        raise WeightsError(f"{owner} is not a JSON object: copy or download it again")
    return found


def plain(path: Path, pairs: Pairs) -> dict[str, Any]:
    """The object as a dict, at every depth.

    Raises:
        WeightsError: a name comes twice in one object, and two readers could take either; the message has its path. Or
            it nests deeper than any file of weights, and a reader could fail at it.
    """
    plain: dict[str, Any] = _plain_value(path, pairs, "", 0)
    return plain


def encodable(path: Path, content: Any) -> None:
    """Checks that all text in what was read can be written as UTF-8.

    Raises:
        WeightsError: it has half of a surrogate pair, which JSON can spell.
    """
    if half(json.dumps(content, ensure_ascii=False)) is not None:
        raise WeightsError(f"{path} has half of a surrogate pair: do not use this copy")


def join(where: str, name: str) -> str:
    """A dotted path with one more name; what is not plain ASCII is shown escaped."""
    shown = name if re.fullmatch(r"[\w.-]{1,80}", name, re.ASCII) else ascii(name[:80])
    return f"{where}.{shown}" if where else shown


def _plain_value(path: Path, value: Any, where: str, depth: int) -> Any:
    if depth > _MOST_DEPTH:
        raise WeightsError(f"{path} has values more than {_MOST_DEPTH} deep: do not use this copy")
    if isinstance(value, Pairs):
        found = dict(value)
        if len(found) < len(value):
            twice = next(name for name, count in Counter(name for name, _ in value).items() if count > 1)
            raise WeightsError(f"{path} has the key {join(where, twice)} twice: do not use this copy")
        # Of a vocabulary's hundred thousands nothing is looked at singly.
        inner = ((name, each) for name, each in value if isinstance(each, list))
        return found | {name: _plain_value(path, each, join(where, name), depth + 1) for name, each in inner}
    return [_plain_value(path, each, where, depth + 1) if isinstance(each, list) else each for each in value]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_link(path: Path, folder: Path | None = None) -> None:
    """Refuses a link that leaves the folder, unless it leads to the blobs of the hub's cache that the folder is in."""
    if not path.is_symlink() and folder is None:
        return
    try:
        folder, target = (folder or path.parent).resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 raises the second for links in a circle
        raise WeightsError(f"{path} is a link that leads nowhere: do not use this copy") from error
    if target.is_relative_to(folder):
        return
    # The cache: models--ORGANIZATION--NAME/snapshots/COMMIT/FILE links to models--ORGANIZATION--NAME/blobs/HASH.
    repositories = [place.parent for place in folder.parents if place.name == "snapshots"]
    if not any(place.name.startswith("models--") and target.parent == place / "blobs" for place in repositories):
        raise WeightsError(f"{path} is a link to {target}, outside its folder: put the file itself there")


def _check_start(path: Path) -> bytes:
    """The first bytes of a file that is neither a native library nor a pickle."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_START)
            kind = _LIBRARIES.get(start[:4])
            if start[:2] == b"MZ" and len(start) >= 64:
                # A program for Windows, where its header says where the next one is.
                stream.seek(int.from_bytes(start[60:64], "little"))
                kind = "a native library (PE)" if stream.read(4) == b"PE\0\0" else None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if kind is None and (_PICKLE.match(start) or _is_old_pickle(start)):
        kind = "a pickle, which can run code when it is loaded"
    if kind is not None:
        raise WeightsError(f"{path} is {kind}, and no file of weights is one: do not use this copy")
    return start


def _is_old_pickle(start: bytes) -> bool:
    """Whether a file begins as one of protocol 0 or 1, which have no header: it is one as a whole, or makes a call."""
    named = False
    try:
        for opcode, value, position in pickletools.genops(start):
            if opcode.name in ("GLOBAL", "INST"):
                named = re.fullmatch(r"[\w.]+ [\w.]+", str(value)) is not None
            if named and opcode.name in _CALLS:
                return True
            if opcode.name == "STOP":
                # Text and numbers may hold a STOP anywhere, and hardly one that ends both the pickle and the file.
                return 0 < (position or 0) == len(start) - 1 < _START - 1
    except ValueError:  # no pickle, or more than the start
        pass
    return False
