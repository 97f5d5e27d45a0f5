"""Folders of this machine's disks, before they are made."""

import errno
import os
from pathlib import Path


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_writable(folder: Path) -> None:
    """Looks whether files can be made in a folder, which may have to be made first.

    Raises:
        OSError: they cannot; it has the path that is in the way.
    """
    place = existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it may not be written", str(place))
