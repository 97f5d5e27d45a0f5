"""MLflow's scoring server as the host of a loaded model: how long a request has waited, and when the server ends.

The server hands requests to the default executor of its event loop, min(32, cores + 4) threads; whatever waits for one
of them is seen by nobody, and after the server's timeout (a 504) it is computed all the same. Nor does anything tell
`predict` that the process was asked to end: uvicorn waits for all that was begun. Both are mended from within, when a
model is loaded in the server's process. Elsewhere nothing is touched.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any

from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT

# Set by mlflow.pyfunc.scoring_server: by the server's command for its workers, and when it has loaded the model.
_WORKER = "__pyfunc_model_path__"
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
# Threads that wait for answers, so that requests wait in the model's own queue, which has a limit and a clock.
_THREADS = 256

_arrival = threading.local()


class _Leave:
    """What ends the work of one request; called once, maybe before the work was begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = False
        self._ends: list[Callable[[], None]] = []

    def add(self, end: Callable[[], None]) -> None:
        with self._lock:
            self._ends.append(end)
            left = self._left
        if left:
            end()

    def __call__(self) -> None:
        with self._lock:
            self._left = True
            ends = list(self._ends)
        for end in ends:
            end()


# Of the request that this context belongs to.
_current: ContextVar[_Leave | None] = ContextVar("current", default=None)


class RequestExecutor(ThreadPoolExecutor):
    """Threads for an event loop's requests, each of which can tell when it was handed over."""

    def __init__(self) -> None:
        super().__init__(_THREADS, thread_name_prefix="phi3-request")

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> "Future[Any]":
        """See ThreadPoolExecutor."""
        came = time.monotonic()

        def call() -> Any:
            _arrival.time = came
            try:
                return function(*arguments, **keywords)
            finally:
                del _arrival.time

        return super().submit(call)


def serving() -> bool:
    """Whether this process is MLflow's scoring server."""
    return os.environ.get(_SERVING) == "true"


def deadline() -> float | None:
    """When the scoring server gives up the request of this thread, on time.monotonic()'s clock.

    A tenth of its timeout (at most 2 s) earlier, because the answer has to get there. None where nobody gives up.
    """
    if not serving():
        return None
    timeout = float(MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get())
    came = getattr(_arrival, "time", time.monotonic())
    return float(came + timeout - min(2.0, timeout / 10))


@contextmanager
def leaving() -> Iterator[Callable[[], None]]:
    """For a block that answers a request in other threads: gives what ends their work when the client has left."""
    leave = _Leave()
    token = _current.set(leave)
    try:
        yield leave
    finally:
        _current.reset(token)


def call_when_left(end: Callable[[], None]) -> None:
    """Has `end` called when the client of this thread's request leaves, where the host can tell."""
    if (leave := _current.get()) is not None:
        leave.add(end)


def attend(end: Callable[[], None]) -> None:
    """Called when a model was loaded; where the process is a worker of the scoring server, mends what it leaves open.

    Args:
        end: called once when the process is told to end (SIGINT or SIGTERM), in the main thread; returns at once.
    """
    if _WORKER not in os.environ or threading.current_thread() is not threading.main_thread():
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # the model is loaded by something else that runs in such an environment
        return
    loop.set_default_executor(RequestExecutor())
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        if callable(before):  # uvicorn's, which waits for all that was begun
            signal.signal(number, partial(_end, end, before))


def _end(
    end: Callable[[], None], before: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None
) -> None:
    end()
    before(number, frame)
