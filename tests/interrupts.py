"""A command that is ended by Ctrl-C while it works."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any


def interrupted(
    command: Sequence[str], begun: bytes | Callable[[], bool], seconds: float, **options: Any
) -> tuple[int, bytes, bytes]:
    """Sends the signal when a mark is on stderr, such as a progress bar's, or something is true; status and outputs.

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
        if isinstance(begun, bytes):
            while begun not in shown and (more := process.stderr.read1()):
                shown += more
            assert begun in shown, shown
        else:
            end = time.monotonic() + 10 * seconds
            while not begun():
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, shown + error
