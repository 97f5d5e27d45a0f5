"""Tracking stores that tests run for themselves: PostgreSQL, and `mlflow server` which keeps the artifacts too."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 180  # seconds until a server answers, on a busy machine


def _program(name: str) -> str:
    """Debian keeps PostgreSQL's programs beside the version that they belong to."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found, f"PostgreSQL's {name} is not installed (make programs)"
    return found


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of an empty database, served on a socket in a temporary folder by a user without rights."""
    # PostgreSQL does not run as root.
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    owner = {"user": user} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pg") as temporary:  # the path of a socket is at most 107 bytes long
        folder = Path(temporary)
        if owner:
            shutil.chown(folder, user)
        data = folder / "data"
        make = [_program("initdb"), "--pgdata", data, "--auth", "trust", "--username", "tests", "--no-sync"]
        make += ["--encoding", "UTF8", "--locale", "C"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **owner)
        command = [_program("postgres"), "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        log = folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, **owner)
        try:
            end = time.monotonic() + PATIENCE
            while "ready to accept connections" not in log.read_text("utf-8"):
                assert process.poll() is None, log.read_text("utf-8")
                assert time.monotonic() < end
                time.sleep(0.05)
            yield f"postgresql+psycopg2://tests@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGQUIT)  # at once
            process.wait()


@contextmanager
def server(folder: Path, store: str, artifacts: str | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """MLflow's tracking server, which keeps the artifacts too: its address and its process.

    Args:
        folder: for its artifacts and its log.
        store: the URI of the database behind it.
        artifacts: where it keeps the artifacts, if not in that folder.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `mlflow server` hands to its workers, of which one is enough.
    environment = {
        "_MLFLOW_SERVER_FILE_STORE": store,
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts or str(folder / "artifacts"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    code = "from mlflow.server import app; from werkzeug import run_simple; "
    code += f"run_simple('127.0.0.1', {port}, app, threaded=True)"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=os.environ | environment)
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=10):
                break
            time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()
