"""Runs `mlflow models serve` for as long as a block lasts: for the demo, the notebooks and the tests."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from phi3_mlflow.runtime.errors import Phi3Error


class ServerError(Phi3Error):
    """A server that did not come up."""


@contextmanager
def served(
    model_uri: str,
    *,
    python: str | Path = sys.executable,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    start_timeout: float = 300.0,
) -> Iterator[str]:
    """Serves a logged model on a free port of 127.0.0.1 and stops the server at the end of the block.

    Args:
        model_uri: what `mlflow models serve -m` takes.
        python: the interpreter whose environment serves the model.
        cwd: the server's working directory.
        environment: variables to add.
        start_timeout: how long loading may take, in seconds.

    Yields:
        The server's address, such as http://127.0.0.1:54321.

    Raises:
        ServerError: the server ended or did not answer in time; holds the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["models", "serve", "-m", model_uri, "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    folder = str(Path(python).parent)  # MLflow starts uvicorn by name
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")]),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        **(environment or {}),
    }
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [str(python), "-m", "mlflow", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=variables,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + start_timeout
            while not _answers(f"{address}/ping"):
                ended = server.poll()
                if ended is not None or time.monotonic() > deadline:
                    why = f"gave no answer for {start_timeout:.0f} s" if ended is None else f"ended with code {ended}"
                    log.seek(0)
                    end = log.read().decode(errors="replace")[-2000:]
                    raise ServerError(f"`mlflow models serve -m {model_uri}` {why}; its output ends:\n{end}")
                time.sleep(0.1)
            yield address
        finally:
            # The group is the server and what it started itself: the shell, uvicorn and its workers.
            try:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=20)
            except ProcessLookupError:
                pass
            except BaseException as error:  # a second Ctrl-C must not leave it behind either
                os.killpg(server.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
