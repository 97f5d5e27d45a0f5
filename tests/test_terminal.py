"""`phi3-mlflow chat` on a terminal: what the keys do.

Run: pytest tests/test_terminal.py
"""

import os
import re
import select
import subprocess
import sys
import time

import pytest

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

READERS = {
    "the plain reader": "import sys; sys.modules['prompt_toolkit'] = None\n",
    "prompt_toolkit": "",
}
MAIN = "from phi3_mlflow.cli import main\nmain()\n"


class Terminal:
    """A process on a terminal of its own, read and written as a person does."""

    def __init__(self, code: str, *arguments: str, cwd):
        self._own, theirs = pty.openpty()
        script = f"import fcntl, os, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{code}{MAIN}"
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        """Presses keys; what was shown before is forgotten."""
        self.shown = ""
        os.write(self._own, keys.encode())

    def see(self, text: str, seconds: float = 60) -> None:
        """Waits until the text is on the screen."""
        end = time.monotonic() + seconds
        while text not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown):
            left = end - time.monotonic()
            assert left > 0, f"{text!r} was not shown: {self.shown!r}"
            assert self._read(left), f"ended before {text!r} was shown: {self.shown!r}"

    def see_prompt_after(self, text: str) -> None:
        """Waits until a prompt stands behind the text: the one before it is drawn again with what is typed."""
        self.see(text)
        shown = re.escape(text) + r"[^>]*>"
        end = time.monotonic() + 60
        while not re.search(shown, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown)):
            assert time.monotonic() < end, f"no prompt after {text!r}: {self.shown!r}"
            assert self._read(0.1), f"ended before a prompt was shown: {self.shown!r}"

    def end(self, seconds: float = 60) -> int:
        """Waits for the end of the process: its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        return self.process.wait(timeout=1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._own], [], [], seconds)[0]:
            return True
        try:
            content = os.read(self._own, 4096)
        except OSError:  # Linux: the other side is closed
            return False
        self.shown += content.decode("utf-8", "replace")
        return bool(content)


@pytest.fixture(params=READERS)
def chat(request, saved, tmp_path):
    terminal = Terminal(READERS[request.param], "chat", str(saved["onnx"]), cwd=tmp_path)
    terminal.see("Ctrl-D ends.")
    terminal.see(">")
    yield terminal
    terminal.close()


def test_ctrl_c_clears_the_line_and_keeps_the_conversation_and_ctrl_d_ends(chat):
    chat.type("What is the capital of Spain?\r")
    chat.see_prompt_after("The capital of Spain is Madrid.")
    chat.type("And what nonsense is")
    time.sleep(0.5)
    chat.type("\x03")
    chat.see(">")
    chat.type("\x03")
    chat.see(">")
    chat.type("And of France?\r")
    chat.see_prompt_after("Paris")
    chat.type("\x04")

    assert chat.end() == 0
    assert "Traceback" not in chat.shown
