"""The process with the model that a node's Python workers share: `python -m phi3_mlflow.spark.process`.

It listens at a socket in a private folder. A request is a line of JSON with a task, options and rows; its answers are
lines with a row's number and answer, as they end. It ends when nobody has been connected for a while.
"""

import json
import logging
import os
import shutil
import socket
import socketserver
import struct
import sys
import tempfile
import threading
import time
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import is_local_uri

from phi3_mlflow.runtime import model
from phi3_mlflow.runtime.answers import Answer, finish_reason
from phi3_mlflow.runtime.chat import Task
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error, Unavailable
from phi3_mlflow.runtime.service import Prepared, Service

from .node import ALIVE, ModelProcessError, Spec, room

_logger = logging.getLogger(__name__)

# Seconds between two looks at the progress, and for which a worker may leave its answers unread.
_LOOK, _UNREAD = 1.0, 60
# A table is one request, so that this is beyond what a node's tasks can ask at once.
_TASKS = 65_536
# What would make rows wait for other tasks' rows in vain, or work for turns that a table does not have.
_OVERRIDES = {"queue_limit": _TASKS, "queue_timeout": None, "idle_prefill": False}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path, service: Service):
        self.service = service
        self.prepared = 0  # rows so far
        self.connections: set[_Connection] = set()
        self.left = time.monotonic()  # when somebody was connected last
        super().__init__(str(path), _Connection)

    def watch(self, linger: float) -> None:
        """Tells the workers that there is progress, as long as there is. Returns when nobody has come for a while."""
        before = None
        while True:
            time.sleep(_LOOK)
            if not self.service.statistics().alive:
                _logger.error("the model takes no requests any more")
                os._exit(1)
            now = (self.prepared, *astuple(self.service.counts))
            if now != before:
                before = now
                for connection in list(self.connections):
                    connection.alive()
            if self.connections:
                self.left = time.monotonic()
            elif time.monotonic() - self.left > linger:
                return


class _Connection(socketserver.StreamRequestHandler):
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._sending = threading.Lock()
        limit = struct.pack("ll", _UNREAD, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.server.connections.add(self)

    def finish(self) -> None:
        self.server.connections.discard(self)
        super().finish()

    def handle(self) -> None:
        """Answers one table after the other, until the worker hangs up."""
        answered = 0
        try:
            self._send(b"%d\n" % os.getpid())
            for line in self.rfile:
                answered += self._table(json.loads(line))
        except OSError as error:
            _logger.info("a worker has gone: %s", error)
        _logger.info("a task has ended; rows answered: %d", answered)

    def alive(self) -> None:
        """Sends a sign of life, where nothing else is being sent; a worker that has bytes to read needs none."""
        if self._sending.acquire(blocking=False):
            try:
                self.connection.send(ALIVE, socket.MSG_DONTWAIT)
            except OSError:
                pass  # it has bytes to read, or it has gone, which the next answer finds out
            finally:
                self._sending.release()

    def _table(self, asked: dict[str, Any]) -> int:
        """Answers the rows as they end, and returns how many there were."""
        service, rows = self.server.service, asked["rows"]
        _logger.info("a table has come; rows: %d", len(rows))
        prepared: list[Prepared] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            try:
                prepared.append(_prepare(service, asked["task"], row, asked["options"]))
                numbers.append(number)
            except Exception as error:
                self._answer(number, error)
            self.server.prepared += 1
        table = service.run_table(prepared)
        try:
            for index, outcome in table:
                self._answer(numbers[index], outcome)
        finally:
            table.cancel()
        return len(rows)

    def _answer(self, number: int, outcome: Answer | Exception | None) -> None:
        self._send(json.dumps([number, _answer(outcome)]).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        with self._sending:
            self.connection.sendall(data)


def _prepare(service: Service, task: Task, row: Any, options: dict[str, Any]) -> Prepared:
    field = "messages" if task == "llm/v1/chat" else "prompt"
    # The clock of `max_time` would run while the row waits; 0 takes the model's own default back.
    body = {"max_time": 0, **options, field: row}
    return service.prepare(service.parse(body, task=task, stream=False))


def _answer(outcome: Answer | Exception | None) -> dict[str, Any]:
    """The struct of a row's answer, or of what came instead."""
    if isinstance(outcome, Answer):
        [choice] = outcome.choices
        return {
            "content": choice.text,
            "finish_reason": finish_reason(choice.reason),
            "prompt_tokens": outcome.prompt_tokens,
            "completion_tokens": choice.tokens,
        }
    if isinstance(outcome, Unavailable):
        _logger.error("%s", outcome)
        os._exit(1)  # the workers ask a new process
    if isinstance(outcome, InvalidRequest):
        return {"error": str(outcome)}
    _logger.error("the model failed on a row", exc_info=outcome)
    return {"error": "the model failed while it answered"}


def _fetch(spec: Spec) -> Path:
    """The model's folder on this node; downloaded the first time, and then kept.

    Raises:
        ModelProcessError: it is not here, or not the one that the driver has seen.
        MlflowException: the store does not answer.
    """
    if is_local_uri(spec.source):
        folder = Path(spec.source)
        if not (folder / "MLmodel").is_file():
            raise ModelProcessError(
                f"the model is in {folder} on the driver, and {socket.gethostname()} has no such folder; log the model "
                "to a store that every node can reach, or keep it in a folder that all nodes share"
            )
    else:
        models = room() / "models"
        models.mkdir(mode=0o700, exist_ok=True)
        folder = models / sha256(f"{spec.source} {spec.digest}".encode()).hexdigest()[:16]
        if not folder.is_dir():
            _download(spec.source, folder)
    if sha256((folder / "MLmodel").read_bytes()).hexdigest() != spec.digest:
        raise ModelProcessError(f"the model in {folder} on {socket.gethostname()} is another one than on the driver")
    return folder


def _download(source: str, folder: Path) -> None:
    part = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        found = mlflow.artifacts.download_artifacts(source, dst_path=str(part))
        try:
            os.rename(found, folder)
        except OSError:
            if not folder.is_dir():  # else a process with other settings was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main() -> None:
    """Loads the model that ./spec.json names, serves it, and ends when nobody has been connected for a while."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    spec = Spec(**json.loads(Path("spec.json").read_bytes()))
    mlflow.set_tracking_uri(spec.tracking_uri)
    mlflow.set_registry_uri(spec.registry_uri)
    try:
        predictor = model.load(_fetch(spec), {**spec.config, **_OVERRIDES})
    except (Phi3Error, MlflowException, OSError) as error:
        sys.exit(f"the model cannot be loaded: {error}")
    with _Server(Path("socket"), predictor.service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _logger.info("ready")
        server.watch(spec.linger)
        _logger.info("nobody has been connected for %g s", spec.linger)
        server.shutdown()
    predictor.close()


if __name__ == "__main__":
    main()
