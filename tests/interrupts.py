"""A command that is ended by Ctrl-C while it works."""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def interrupted(command: Sequence[str], mark: bytes, seconds: float, **options: Any) -> tuple[int, bytes, bytes]:
    """Sends the signal when a mark is on stderr, such as a progress bar's; status, stdout and all of stderr.

    What is left to do may take so many seconds.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a shell has the signal ignored, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    shown = b""
    try:
        while mark not in shown and (more := process.stderr.read1()):
            shown += more
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert mark in shown, shown
    return process.returncode, out, shown + error
