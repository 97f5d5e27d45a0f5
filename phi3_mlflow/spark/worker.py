"""A Python worker's side: a column's batches in, answers out. Knows nothing of how the model's process is started."""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow

from . import node
from .node import ModelProcessError, Spec

if TYPE_CHECKING:
    from phi3_mlflow.runtime.chat import Task

_ANSWER = pyarrow.struct(
    [
        ("content", pyarrow.string()),
        ("finish_reason", pyarrow.string()),
        ("prompt_tokens", pyarrow.int64()),
        ("completion_tokens", pyarrow.int64()),
        ("error", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class Patience:
    """Seconds: until the process must have loaded the model, and for how long it may make no progress."""

    start: float
    stall: float


def column_of(task: "Task") -> Any:
    """The Arrow type of a task's answers."""
    return pyarrow.string() if task == "flat" else _ANSWER


def evaluate(
    batches: Iterator[Any], spec: Spec, task: "Task", options: Mapping[str, Any], patience: Patience
) -> Iterator[Any]:
    """The answers of each batch, in the order of its rows.

    Raises:
        ModelProcessError: the model cannot be loaded here, or its process died or stood still twice. Spark gives the
            task to a worker again, as often as `spark.task.maxFailures` says.
    """
    asker = _Asker(spec, task, options, patience)
    try:
        for batch in batches:
            answers = asker.ask(batch.to_pylist())
            if task == "flat":
                answers = [answer and answer.get("content") for answer in answers]
            yield pyarrow.array(answers, column_of(task))
    finally:
        asker.close()


class _Asker:
    """One task's connection to the node's process, which is made when there is something to ask."""

    def __init__(self, spec: Spec, task: "Task", options: Mapping[str, Any], patience: Patience):
        self._spec = spec
        self._asked = {"task": task, "options": options}
        self._patience = patience
        self._connection: socket.socket | None = None
        self._process = 0
        self._again = True  # whether the process may be lost once more

    def ask(self, rows: Sequence[Any]) -> list[Any]:
        """The answer of each row; None for a null."""
        answers: list[Any] = [None] * len(rows)
        left = {index: row for index, row in enumerate(rows) if row is not None}
        while left:
            if self._connection is None:
                self._connection, self._process = node.connect(self._spec, self._patience.start, self._patience.stall)
            try:
                for index, answer in self._exchange(self._connection, left):
                    answers[index] = answer
                    del left[index]
            except (OSError, EOFError) as error:
                self.close()
                if isinstance(error, TimeoutError):
                    node.kill(self._spec, self._process)
                if not self._again:
                    raise ModelProcessError(f"{self._lost(error)}; {node.log_end(self._spec)}") from error
                self._again = False
        return answers

    def close(self) -> None:
        """Lets the process know that nobody waits any more."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(self, connection: socket.socket, rows: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        indices = list(rows)
        connection.sendall(json.dumps({**self._asked, "rows": [rows[index] for index in indices]}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            due = len(indices)
            while due:
                line = lines.readline()
                if not line.endswith(b"\n"):
                    raise EOFError
                if line != node.ALIVE:
                    number, answer = json.loads(line)
                    due -= 1
                    yield indices[number], answer

    def _lost(self, error: Exception) -> str:
        how = f"made no progress for {self._patience.stall:g} s" if isinstance(error, TimeoutError) else "died"
        return f"the model's process {how} while it answered, for the second time in this task"
