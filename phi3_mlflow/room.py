"""The folder beside a destination in which it is made: one run's at a time, and the next one's when that was killed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3_mlflow.runtime.errors import Phi3Error


@contextmanager
def room(destination: Path, *, wait: bool = False) -> Iterator[Path]:
    """An empty folder on the destination's disk, for the length of a block; its parents are made.

    A lock on the folder tells a run that goes on from one that was killed, whose files are removed then.

    Args:
        destination: what is to be made.
        wait: whether to wait for another run that makes it; else that is an error.

    Raises:
        Phi3Error: another run makes it.
    """
    folder = destination.parent / f".{destination.name}.making"
    handle = _locked(folder, destination, wait)
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(folder: Path, destination: Path, wait: bool) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another run has just ended
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise Phi3Error(f"another run is making {destination}: wait for it, or end it") from None
        os.close(handle)  # the folder of a run that has just ended
