"""Names, sizes and sha256 of the weight files below a folder: writing the list, and checking files against it.

It knows nothing of what the files hold, where they came from or who loads them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from phi3_mlflow.runtime.errors import WeightsError, shorten

NAME = "manifest.json"
ALGORITHM = "sha256"


def write(folder: Path, within: Sequence[str] = ("",)) -> Path:
    """Writes `manifest.json` into the folder, over an older one, for every file below it except the manifest itself.

    Args:
        folder: the folder with the weight files. Symbolic links are followed, to files and to folders.
        within: the subfolders to list, where it holds other things too.

    Returns:
        The path of the manifest.

    Raises:
        WeightsError: the folder is missing or empty, or a file in it cannot be read.
    """
    names = sorted(name for part in within for name in _names(folder, folder / part))
    if not names:
        raise WeightsError(f"{folder} holds no files, so there is nothing to list: give the folder with the weights")
    files = {name: {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names}
    path = folder / NAME
    try:
        path.unlink(missing_ok=True)  # it may be a link to the manifest of the folder that this one was copied from
        path.write_text(json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from error
    return path


def verify(folder: Path) -> None:
    """Checks the folder's files against its manifest: all sizes first, then all hashes.

    Files that the manifest does not list are not looked at.

    Args:
        folder: a folder that `write` was called on, or a copy of it.

    Raises:
        WeightsError: the manifest is missing or makes no sense, or a file that it lists is missing, unreadable,
            of another size or of another content; the message names the file.
    """
    files = _read(folder)
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise WeightsError(f"{folder / name} is listed in {NAME} but cannot be read: {_why(error)}") from error
        if size != entry["size"]:
            raise WeightsError(
                f"{folder / name} has {size} bytes where {NAME} lists {entry['size']}: the file is incomplete or was "
                "changed; copy or download it again"
            )
    for name, entry in files.items():
        sha256 = hash_file(folder / name)
        if sha256 != entry["sha256"]:
            raise WeightsError(
                f"{folder / name} is damaged or was changed: its sha256 is {sha256}, {NAME} lists {entry['sha256']}; "
                "copy or download it again"
            )


def digest(folder: Path) -> str:
    """The identity of the weights: the sha256 of the manifest's content, whatever its layout. Reads no weight file.

    Returns:
        64 hexadecimal digits, equal for two folders whose manifests list the same files.

    Raises:
        WeightsError: the manifest is missing or makes no sense.
    """
    content = json.dumps({"algorithm": ALGORITHM, "files": _read(folder)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, ALGORITHM).hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {_why(error)}") from error


def _names(folder: Path, part: Path) -> Iterator[str]:
    """The files below a part of the folder as POSIX paths relative to the folder, without the manifest."""
    seen = set()
    for parent, folders, files in os.walk(part, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(parent, file)
            if path.is_file() and path != folder / NAME:
                yield path.relative_to(folder).as_posix()


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file name, each checked to be well formed."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {_why(error)}. Without it the weights cannot be checked; log the model again"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: copy it again, or log the model again") from error
    if not isinstance(content, dict) or content.get("algorithm") != ALGORITHM:
        raise WeightsError(f'{path} is not a manifest: it should be an object with "algorithm": "{ALGORITHM}"')
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise WeightsError(f'{path} lists no files under "files": copy it again, or log the model again')
    for name, entry in files.items():
        _check_entry(path, name, entry)
    return files


def _check_entry(path: Path, name: str, entry: object) -> None:
    windows = PureWindowsPath(name)
    if not name or PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise WeightsError(f"{path} lists {shorten(name)}, which is not a path inside the folder: do not use this copy")
    well_formed = (
        isinstance(entry, dict)
        and set(entry) == {"size", "sha256"}
        and type(entry["size"]) is int
        and entry["size"] >= 0
        and isinstance(entry["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )
    if not well_formed:
        raise WeightsError(f"{path} lists {shorten(name)} with {shorten(entry)} instead of its size and sha256")


def _why(error: OSError) -> str:
    return "it is not there" if isinstance(error, FileNotFoundError) else str(error.strerror)
