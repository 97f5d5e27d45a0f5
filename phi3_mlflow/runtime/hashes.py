"""The sha256 of a file, and the memory of it: a large file that has not changed is not read again."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from phi3_mlflow.runtime.errors import WeightsError

_CHUNK = 2**20
_LARGE = 16 * 2**20  # bytes; a smaller file is read in no time
# Seconds that a file must have been left alone before it is read: within the resolution of its times it could change
# without a trace.
_SETTLED = 2


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hexadecimal.

    Args:
        path: the file.
        progress: called with the number of bytes that were read since the last call.

    Raises:
        WeightsError: the file cannot be read.
    """
    hasher = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(_CHUNK))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                if progress:
                    progress(count)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {why(error)}") from error
    return hasher.hexdigest()


def hash_once(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, from memory where the same file was read before and has not changed since.

    The same is what has the same device and inode, size, and times of modification and of change (mtime, ctime). The
    memory is one small file for each large one, below the user's cache folder. Where it cannot be kept, or where others
    could write to it, the file is read. Arguments and errors are those of `hash_file`.
    """
    try:
        before = path.stat()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {why(error)}") from error
    if before.st_size < _LARGE:
        return hash_file(path, progress)
    memory = folder() / f"{before.st_dev:x}-{before.st_ino:x}.json"
    if (known := _recall(memory, before)) is not None:
        return known
    began = time.time()
    sha256 = hash_file(path, progress)
    if began - max(before.st_mtime, before.st_ctime) > _SETTLED and _identity(path.stat()) == _identity(before):
        _remember(memory, before, sha256)
    return sha256


def folder() -> Path:
    """Where hashes are remembered: `phi3_mlflow/hashes` below XDG_CACHE_HOME, or else below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "phi3_mlflow", "hashes")


def why(error: OSError) -> str:
    """What is wrong, in words."""
    return "it is not there" if isinstance(error, FileNotFoundError) else str(error.strerror)


def _identity(stat: os.stat_result) -> dict[str, int]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _recall(memory: Path, stat: os.stat_result) -> str | None:
    try:
        known = json.loads(memory.read_bytes()) if _private(memory.parent) else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(known, dict) or not known.items() >= _identity(stat).items():
        return None
    sha256 = known.get("sha256")
    return sha256 if isinstance(sha256, str) else None


def _remember(memory: Path, stat: os.stat_result, sha256: str) -> None:
    try:
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(memory.parent):
            return
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix=".", suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(_identity(stat) | {"sha256": sha256}, file)
            os.replace(name, memory)
        except OSError:
            os.unlink(name)
    except OSError:
        pass  # a full disk, or no home: the file is read again next time


def _private(place: Path) -> bool:
    """Whether nobody else can write there. Where the system has no such bits, the user's folder is taken to be so."""
    if not hasattr(os, "getuid"):
        return True
    stat = place.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022
