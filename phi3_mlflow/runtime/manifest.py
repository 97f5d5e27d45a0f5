"""Names, sizes and sha256 of the weight files below a folder: writing the list, and checking a folder against it.

It knows nothing of what the files hold, where they came from or who loads them.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from phi3_mlflow.runtime import mlmodel
from phi3_mlflow.runtime.errors import WeightsError, shorten
from phi3_mlflow.runtime.hashes import hash_file, hash_once, why

NAME = "manifest.json"
ALGORITHM = "sha256"
# A signature of the whole model, which is made after the manifest (sigstore's model-signing writes this name).
SIGNATURE = "model.sig"
_MOST_BYTES = 16 * 2**20  # of a manifest


def write(
    folder: Path,
    within: Sequence[str] = ("",),
    *,
    elsewhere: Sequence[Path] = (),
    hashes: Mapping[str, str] | None = None,
) -> Path:
    """Writes `manifest.json` into the folder, over an older one, for every file below it except the manifest itself.

    Args:
        folder: the folder with the weight files. Symbolic links are followed, to files and to folders.
        within: the subfolders to list, where it holds other things too.
        elsewhere: files of another folder, which are listed in place of this one's, by their plain names. A large one
            that is known from an earlier time is not read again.
        hashes: sha256 by name, for files that were read already.

    Returns:
        The path of the manifest.

    Raises:
        WeightsError: the folder is missing or empty, or a file in it cannot be read.
    """
    if elsewhere:
        paths = {path.name: path for path in sorted(elsewhere)}
    else:
        names = sorted(name for part in within for name in _names(folder, folder / part))
        paths = {name: folder / name for name in names}
    if not paths:
        raise WeightsError(f"{folder} holds no files, so there is nothing to list: give the folder with the weights")
    known, hash_of = hashes or {}, hash_once if elsewhere else hash_file
    files = {
        name: {"size": path.stat().st_size, "sha256": known.get(name) or hash_of(path)} for name, path in paths.items()
    }
    path = folder / NAME
    try:
        path.unlink(missing_ok=True)  # it may be a link to the manifest of the folder that this one was copied from
        path.write_text(json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from error
    return path


def verify(folder: Path, within: Sequence[str] = ("",), *, full: bool = True, files: Path | None = None) -> None:
    """Checks that the folder holds exactly the files of its manifest, and that its model was logged with that manifest.

    Args:
        folder: a folder that `write` was called on, or a copy of it.
        within: as for `write`.
        full: whether every file is read; else a large one only where it is not known from an earlier time.
        files: as for `compare`.

    Raises:
        WeightsError: the manifest is missing or makes no sense, the model's MLmodel states the digest of another one or
            none, a file is missing, unreadable, of another size or of another content, or the manifest does not list
            it; the message names the file.
        FormatError: MLmodel cannot be read.
    """
    check_stated(folder)
    for _, problem in compare(folder, within, hash_of=hash_file if full else hash_once, files=files):
        if problem is not None:
            raise WeightsError(problem)


def compare(
    folder: Path,
    within: Sequence[str] = ("",),
    progress: Callable[[int], None] | None = None,
    *,
    hash_of: Callable[[Path, Callable[[int], None] | None], str] = hash_file,
    files: Path | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Compares files with the manifest: all names and sizes first, then all hashes.

    Args:
        folder: as for `verify`.
        within: as for `write`.
        progress: called with the number of bytes that were hashed since the last call.
        hash_of: gives a file's hash.
        files: the folder that the listed files are in, where it is another one; what else is there does not matter.

    Yields:
        A name and what is wrong with that file, once or not at all for each file with a problem; at the end the name
        of each file without one, and None.

    Raises:
        WeightsError: the manifest is missing or makes no sense.
    """
    listed = _read(folder)
    bad = set()
    for name, problem in _outside(files or folder, () if files else within, listed):
        bad.add(name)
        yield name, problem
    for name, entry in listed.items():
        if name in bad:
            continue
        path = (files or folder) / name
        sha256 = hash_of(path, progress)
        if sha256 != entry["sha256"]:
            bad.add(name)
            yield (
                name,
                f"{path} is damaged or was changed: its sha256 is {sha256}, {NAME} lists {entry['sha256']}; copy or "
                "download it again",
            )
    for name in listed:
        if name not in bad:
            yield name, None


def sizes(folder: Path) -> dict[str, int]:
    """The listed files, as paths below their folder, with their bytes.

    Raises:
        WeightsError: the manifest is missing or makes no sense.
    """
    return {name: entry["size"] for name, entry in _read(folder).items()}


def stated(folder: Path) -> tuple[Path, str | None] | None:
    """What the MLmodel file of the model that a folder belongs to says the manifest's digest is.

    Args:
        folder: the model's own folder, or `artifacts/weights` in it.

    Returns:
        The path of MLmodel and its `metadata.weights.sha256`, None where it states none. None where there is no
        MLmodel, as for a folder of weights that is no part of a model.

    Raises:
        FormatError: MLmodel cannot be read.
    """
    folder = Path(os.path.abspath(folder))  # not `resolve`: the folder may be a link, and MLmodel beside that
    places = [folder, folder.parent.parent] if folder.parts[-2:] == ("artifacts", "weights") else [folder]
    place = next((place for place in places if (place / mlmodel.NAME).is_file()), None)
    if place is None:
        return None
    metadata = mlmodel.read(place).get("metadata") or {}
    return place / mlmodel.NAME, (metadata.get("weights") or {}).get("sha256")


def check_stated(folder: Path) -> None:
    """Compares the manifest with the digest in the model's MLmodel, where the folder belongs to a model.

    MLflow's own registry and its logged models have no digest of their own (3.17), so this is what a registered
    version says of its weights.

    Raises:
        WeightsError: they differ, or MLmodel has no digest.
        FormatError: MLmodel cannot be read.
    """
    found = stated(folder)
    if found is None:
        return
    path, sha256 = found
    if sha256 is None:
        raise WeightsError(f"{path} has no metadata.weights.sha256 to compare the weights with: log the model again")
    if sha256 != (own := digest(folder)):
        raise WeightsError(
            f"{folder / NAME} has the digest {own}, and metadata.weights.sha256 in {path} is {shorten(sha256, 80)}: "
            "the weights are not those that the model was logged with; copy both again from where they came from"
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


def _outside(folder: Path, within: Sequence[str], files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What can be seen of the files without reading them: names that are missing or too many, and sizes."""
    for name, entry in files.items():
        try:
            found = (folder / name).stat()
        except OSError as error:
            yield name, f"{folder / name} is listed in {NAME} but cannot be read: {why(error)}"
            continue
        if _is_endless(found):
            yield name, f"{folder / name} is no file: do not use this copy"
            continue
        size = found.st_size
        if size != entry["size"]:
            yield (
                name,
                f"{folder / name} has {size} bytes where {NAME} lists {entry['size']}: the file is incomplete or was "
                "changed; copy or download it again",
            )
    present = {name for part in within for name in _names(folder, folder / part)}
    for name in sorted(present - files.keys() - {SIGNATURE}):
        yield name, f"{folder / name} is not listed in {NAME}: it is no part of the model; remove it"


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file name, each checked to be well formed."""
    path = folder / NAME
    try:
        found = path.stat()
        if _is_endless(found):
            raise WeightsError(f"{path} is no file: do not use this copy")
        if (size := found.st_size) > _MOST_BYTES:
            raise WeightsError(f"{path} has {size} bytes, and at most {_MOST_BYTES} are read: do not use this copy")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {why(error)}. Without it the weights cannot be checked; log the model again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: copy it again, or log the model again") from error
    if not isinstance(content, dict) or content.get("algorithm") != ALGORITHM:
        raise WeightsError(f'{path} is not a manifest: it should be an object with "algorithm": "{ALGORITHM}"')
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise WeightsError(f'{path} lists no files under "files": copy it again, or log the model again')
    for name, entry in files.items():
        _check_entry(path, name, entry)
    return files


def _is_endless(found: os.stat_result) -> bool:
    """Whether reading may never come to an end, as with a pipe or a device."""
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode))


def _may_exist(name: str) -> bool:
    """Whether a file system can be asked for a file of that name."""
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a character
        return False


def _check_entry(path: Path, name: str, entry: object) -> None:
    windows = PureWindowsPath(name)
    leaves = PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if leaves or not _may_exist(name):
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
