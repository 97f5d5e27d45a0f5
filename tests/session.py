"""A shell in an empty folder and without a network, in which the documentation's commands run as they stand.

The ports that they name are its own, so that they may be in use elsewhere.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

PATIENCE = 600  # seconds for all of a session, on a busy machine
# Nothing of this process's own settings or of the test run's is handed down.
_KEPT = ("HOME", "LANG", "PATH", "TMPDIR", "USER")


class Session:
    """The script of one bash: steps are added, and then it runs.

    Attributes:
        folder: where it runs; the output of each step lies beside it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._outputs = folder.with_name(f"{folder.name}-outputs")
        self._outputs.mkdir()
        self._lines = ["set -em"]

    def run(self, name: str, code: str, text: str = "") -> None:
        """Adds a step: commands, and their standard input."""
        (self._outputs / f"{name}.in").write_text(text, "utf-8")
        self._lines.append(f"{{ {code.rstrip()}\n}} {self._files(name)}")

    def start(self, name: str, code: str, address: str) -> None:
        """Adds a server, and the wait until it answers at an address."""
        self.run(f"{name}-free", f"! curl -s {address}")
        (self._outputs / f"{name}.in").touch()
        self._lines.append(f"{{ {code.rstrip()}\n}} {self._files(name)} &")
        self._lines.append(f"until curl -sfo {os.devnull} {address}; do kill -0 $!; sleep 0.1; done; server=$!")

    def end(self, address: str) -> None:
        """Adds the end of the server."""
        self._lines.append(f"kill -- -$server; wait $server || true; while curl -so {os.devnull} {address}; do :; done")

    def play(self, path: str = "", **variables: str) -> None:
        """Runs the script; the first step that fails ends it, and the test.

        Args:
            path: what comes first in PATH.
            variables: of the environment.
        """
        command = ["bwrap", "--die-with-parent", "--unshare-net", "--unshare-pid", "--dev-bind", "/", "/"]
        command += ["--proc", "/proc", "bash", "-c", "\n".join(self._lines)]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | variables
        environment["PATH"] = f"{path}{os.pathsep if path else ''}{environment['PATH']}"
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if done.returncode:
            last = max(self._outputs.iterdir(), key=lambda path: path.stat().st_mtime_ns).stem
            pytest.fail(f"{last} ended it:\n{self.error(last)[-5000:]}\n{done.stderr[-1000:]}")

    def output(self, name: str) -> str:
        """What a step said on stdout."""
        return (self._outputs / f"{name}.out").read_text("utf-8")

    def error(self, name: str) -> str:
        """What a step said on stderr."""
        return (self._outputs / f"{name}.err").read_text("utf-8")

    def _files(self, name: str) -> str:
        place = shlex.quote(str(self._outputs / name))
        return f"<{place}.in >{place}.out 2>{place}.err"
