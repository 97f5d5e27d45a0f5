"""`phi3-mlflow chat`, or another verb, on a terminal of its own, read and written as a person does."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pyte

_COLUMNS, _LINES = 160, 500
PATIENCE = 120  # seconds; only what is broken takes as long
CTRL_C, CTRL_D, UP, ENTER, BACKSPACE = "\x03", "\x04", "\x1b[A", "\r", "\x7f"
NEW_LINE = "\x1b\r"  # Alt-Enter
# Also where the tests run in the background, where Ctrl-C is ignored.
_CONTROLLING = (
    "import fcntl, os, signal, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
)
_MAIN = "from phi3_mlflow.cli import main\nmain()\n"


def paste(text: str) -> str:
    """What a terminal sends for a pasted text (bracketed paste)."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """A process on a terminal.

    Args:
        arguments: of the verb.
        folder: where it runs and keeps its history.
        verb: of `phi3-mlflow`.
        environment: variables to add.
    """

    def __init__(self, *arguments: str, folder: Path, verb: str = "chat", environment: Mapping[str, str] | None = None):
        self.keys, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CONTROLLING + _MAIN, verb, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={
                **os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1",
                "XDG_CACHE_HOME": str(folder / "cache"), **(environment or {}),
            },
        )  # fmt: skip
        os.close(theirs)
        # So long that nothing leaves it at the top.
        self._screen = pyte.Screen(_COLUMNS, _LINES)
        self._stream = pyte.ByteStream(self._screen)
        self._line = 0  # where the last keys were pressed
        self.shown = b""  # all that the terminal was sent

    @property
    def text(self) -> str:
        """What the screen has had since the last keys were pressed, from that line on."""
        lines = (line.rstrip() for line in self._screen.display[self._line :])
        return "\n".join(lines).rstrip()

    def type(self, keys: str | bytes) -> None:
        """Presses keys."""
        self._line = self._screen.cursor.y
        os.write(self.keys, keys.encode() if isinstance(keys, str) else keys)

    def see(self, text: str) -> None:
        """Waits until the text is on the screen."""
        self.match(re.escape(text))

    def see_prompt(self, after: str) -> None:
        """Waits until a prompt stands below the text."""
        self.match(re.escape(after) + r"(?s:.*)^>\Z")

    def match(self, pattern: str) -> None:
        """Waits until the screen has the pattern in it."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text, re.MULTILINE):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} was not shown: {self.text!r}"
            assert self._read(left), f"ended before {pattern!r} was shown: {self.text!r}"

    def say(self, line: str, answer: str = "") -> str:
        """Types a line and waits for the prompt that follows the answer; what the screen then has."""
        self.type(line + ENTER)
        self.match(re.escape(line) + r"\n(?s:.*)" + re.escape(answer) + r"(?s:.*)^>\Z")
        return self.text

    def end(self) -> int:
        """Waits for the end of the process: its exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        return self.process.wait(timeout=1)

    def close(self) -> None:
        """Ends the process where it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self.keys)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.keys], [], [], seconds)[0]:
            return True
        try:
            content = os.read(self.keys, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.shown += content
        self._stream.feed(content)
        return bool(content)
