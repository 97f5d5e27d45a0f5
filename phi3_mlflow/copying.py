"""Files of weights in a second place: cloned where the file system can, so that both share blocks, else copied."""

import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from phi3_mlflow.runtime.hashes import hash_file

# FICLONE of linux/fs.h: btrfs, XFS, bcachefs and others.
_FICLONE = 0x40049409
_CHUNK = 8 * 2**20
_BUFFERS = 4


def put(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> str:
    """Clones or copies a file, links followed. A change of one of the two never shows in the other.

    Args:
        source: the file.
        target: the path to write; there must be no file.
        progress: called with the number of bytes that were read since the last call.

    Returns:
        The sha256 of what was read, in hexadecimal.

    Raises:
        OSError: one of them cannot be read or written.
        WeightsError: a cloned file cannot be read.
    """
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as written:
        if clone(read.fileno(), written.fileno()):
            return hash_file(source, progress)
        hasher = hashlib.sha256()
        buffers = deque(memoryview(bytearray(_CHUNK)) for _ in range(_BUFFERS))
        hashed: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as hashing:  # of what was read a little earlier
            while count := read.readinto(buffers[0]):
                chunk = buffers[0][:count]
                buffers.rotate(-1)
                hashed.append(hashing.submit(hasher.update, chunk))
                done = 0
                while done < count:
                    done += written.write(chunk[done:]) or 0
                if len(hashed) == _BUFFERS:
                    hashed.popleft().result()
                if progress:
                    progress(count)
        return hasher.hexdigest()


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
