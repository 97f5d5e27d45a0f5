"""A long step in a process of its own, whose memory is given back when it ends and which ends with this one."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from phi3_mlflow.runtime.errors import WeightsError

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_LONGEST = 500  # characters of a step's own words that are repeated


def follow() -> None:
    """Called by the step's process, first of all: ends it at once when the process that has started it is gone.

    Linux does that whatever goes on here. The thread does it elsewhere, and where that process was gone before; it has
    to wait for native code that holds Python's lock.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_follow, name="phi3-follow", daemon=True).start()


def _follow() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def run(command: Sequence[str], what: str, report: Callable[[str], None] | None = None) -> None:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        what: names the step in an error.
        report: called with each line that it prints.

    Raises:
        WeightsError: it failed; the message has the last line that it printed.
    """
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        command,
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.PIPE,  # ends with this process, however that ends; see `follow`
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    last.append(line.strip())
                    if report:
                        report(line.rstrip())
            process.wait()  # whose input stays open until then
        except BaseException:
            process.kill()
            raise
    if process.returncode == -9:
        raise WeightsError(f"{what} was killed, as the system does when memory runs out: close other programs")
    if process.returncode != 0:
        reason = last[0][:_LONGEST] if last else "it printed nothing"
        raise WeightsError(f"{what} failed with exit code {process.returncode}: {reason}")
