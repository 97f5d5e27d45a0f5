"""Files of weights in a second place: cloned where the file system can, so that both share blocks, else copied."""

import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import BinaryIO

from phi3_mlflow.runtime.hashes import hash_file

# FICLONE of linux/fs.h: btrfs, XFS, bcachefs and others.
_FICLONE = 0x40049409
_CHUNK = 8 * 2**20


def put(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> str:
    """Clones or copies a file, links followed. A change of one of the two never shows in the other.

    Args:
        source: the file.
        target: the path to write; there must be no file.
        progress: called with the number of bytes that were read since the last call.

    Returns:
        The sha256 of the file, in hexadecimal.

    Raises:
        OSError: one of them cannot be read or written.
        WeightsError: the file cannot be read to its end.
    """
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as written:
        if clone(read.fileno(), written.fileno()):
            return hash_file(source, progress)
        stop = Event()
        with ThreadPoolExecutor(1) as copying:  # while the same file is hashed, which takes longer
            copied = copying.submit(_copy, read, written, stop)
            try:
                sha256 = hash_file(source, progress)
            except BaseException:
                stop.set()
                raise
            copied.result()
        return sha256


def _copy(read: BinaryIO, written: BinaryIO, stop: Event) -> None:
    """Copies the rest of a file, within the kernel where it can, until it is told to stop."""
    try:
        while not stop.is_set() and os.sendfile(written.fileno(), read.fileno(), None, _CHUNK):  # type: ignore[arg-type]
            pass
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTSOCK):
            raise
        while not stop.is_set() and (chunk := read.read(_CHUNK)):
            while chunk:
                chunk = chunk[written.write(chunk) :]


def clone(source: int, target: int) -> bool:
    """Gives an empty file the content of another one on the same file system, without copying it.

    Args:
        source: a descriptor that can be read.
        target: a descriptor that can be written.

    Returns:
        False where the system or the file system cannot; nothing has been written then.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def move(source: Path, target: Path) -> bool:
    """Moves a file within one file system.

    Returns:
        False where the two are on different ones; nothing has been moved then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def linked(source: Path, target: Path) -> bool:
    """Makes a hard link to a file, links followed.

    Returns:
        False where the file system cannot.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
