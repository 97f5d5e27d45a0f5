"""One process with the model for all Python workers of a node: found, started and ended. Knows no rows.

Whoever holds the lock on the file `lock` is the process, or is about to start it and hands the lock over. So there is
one at most, nothing is left locked by the dead, and a worker that is killed while the model is loaded changes nothing.
"""

import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_mlflow.runtime.errors import Phi3Error

# What the process sends when it takes a connection begins with its number; then this, while there is progress.
ALIVE = b"\n"
_LOOK = 0.1  # seconds between two attempts to connect
_LOG_END = 2000  # characters
_LONGEST_SOCKET = 100  # bytes; the system's limit is 104 or 108


class ModelProcessError(Phi3Error):
    """A node's process cannot be started, or was lost."""


@dataclass(frozen=True)
class Spec:
    """What a process serves. Workers with equal ones share it.

    Attributes:
        source: the model's folder, or an address from which a node can download it.
        digest: the sha256 of its MLmodel file.
        config: the model_config.
        tracking_uri, registry_uri: the driver's.
        linger: seconds for which the process stays when nobody is connected.
        version: of this package.
    """

    source: str
    digest: str
    config: dict[str, Any]
    tracking_uri: str
    registry_uri: str
    linger: float
    version: str

    @property
    def folder(self) -> Path:
        """The process's files on this node: its lock, socket and log."""
        text = json.dumps([asdict(self), sys.prefix], sort_keys=True)
        return room() / hashlib.sha256(text.encode()).hexdigest()[:16]


def room() -> Path:
    """The folder of this user's processes on this node. It is nobody else's to enter.

    Raises:
        ModelProcessError: it is not private, or sockets in it would have too long a name.
    """
    path = Path(tempfile.gettempdir()) / f"phi3-mlflow-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ModelProcessError(f"{path} must be a folder that only its owner may enter; remove it, or set TMPDIR")
    if len(os.fsencode(path)) + 24 > _LONGEST_SOCKET:
        raise ModelProcessError(f"{path} is too long a name to have a socket below it; set TMPDIR to a shorter one")
    return path


def connect(spec: Spec, start_timeout: float, stall_timeout: float) -> tuple[socket.socket, int]:
    """A connection to the process, which is started where it does not run.

    Args:
        spec: what it serves.
        start_timeout: seconds in which it must have come up.
        stall_timeout: seconds after which what is asked on the connection raises TimeoutError.

    Returns:
        The connection, and the number of the process.

    Raises:
        ModelProcessError: the process ended before it was ready, or was not ready in time; holds the end of its log.
    """
    deadline = time.monotonic() + start_timeout
    spec.folder.mkdir(mode=0o700, exist_ok=True)
    child: subprocess.Popen[bytes] | None = None
    while True:
        with suppress(OSError, EOFError):
            return _dial(spec, stall_timeout)
        if child is not None and child.poll() is not None:
            raise ModelProcessError(f"the model's process ended with code {child.returncode}; {log_end(spec)}")
        if child is None:
            child = _start(spec)
        if time.monotonic() > deadline:
            if child is not None:
                child.kill()
                child.wait()
            raise ModelProcessError(f"the model was not ready after {start_timeout:g} s; {log_end(spec)}")
        time.sleep(_LOOK)


def kill(spec: Spec, process: int) -> None:
    """Ends a process that hangs, if it is still the one that runs."""
    with open(spec.folder / "lock", "a+b") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return  # it has ended
        lock.seek(0)
        if lock.read() == b"%d" % process:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def log_end(spec: Spec) -> str:
    """The end of the process's log, for an error message."""
    try:
        text = (spec.folder / "log").read_text("utf-8", "replace").strip()
    except OSError as error:
        return f"its log cannot be read: {error}"
    return f"its log ends:\n{text[-_LOG_END:]}"


def _dial(spec: Spec, stall_timeout: float) -> tuple[socket.socket, int]:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(stall_timeout)
        connection.connect(str(spec.folder / "socket"))
        hello = b""
        while not hello.endswith(b"\n"):
            if not (part := connection.recv(32)):
                raise EOFError
            hello += part
        return connection, int(hello)
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            with suppress(OSError, ValueError):
                kill(spec, int((spec.folder / "lock").read_bytes()))
        raise


def _start(spec: Spec) -> "subprocess.Popen[bytes] | None":
    """Starts the process; None where it runs already, or another worker is starting it."""
    folder = spec.folder
    with open(folder / "lock", "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        lock.truncate(0)
        (folder / "socket").unlink(missing_ok=True)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)), "utf-8")
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))}
        # Spark sets it to the task's cores, and the process works for all tasks. `threads` is the model's setting.
        variables.pop("OMP_NUM_THREADS", None)
        with open(folder / "log", "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "phi3_mlflow.spark.process"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=variables,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Spark ends groups of processes, of which others may be using this one
            )
        lock.write(b"%d" % child.pid)
        lock.flush()
        return child
