"""MLflow's scoring server as the host of a loaded model: how long a request has waited, and when the server ends.

The server hands requests to the default executor of its event loop, min(32, cores + 4) threads; whatever waits for one
of them is seen by nobody, and after the server's timeout (a 504) it is computed all the same. Nor does anything tell
`predict` that the process was asked to end: uvicorn waits for all that was begun. Both are mended from within, when a
model is loaded in the server's process. Elsewhere nothing is touched.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT

from .errors import Unavailable
from .runs import Run

# Set by mlflow.pyfunc.scoring_server: by the server's command for its workers, and when it has loaded the model.
_WORKER = "__pyfunc_model_path__"
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
# Seconds until uvicorn runs at the latest, and between two looks at it.
_STARTS, _LOOK = 600.0, 0.1
# Threads that wait for answers, so that requests wait in the model's own queue, which has a limit and a clock.
_THREADS = 256

_arrival = threading.local()


class Hosted:
    """One request that is answered in other threads, as its host sees it.

    Attributes:
        runs: what was begun for it.
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._lock = threading.Lock()
        self._left = False
        self._ends: list[Callable[[], None]] = []

    def add(self, end: Callable[[], None]) -> None:
        """Has `end` called when the client leaves."""
        with self._lock:
            self._ends.append(end)
            left = self._left
        if left:
            end()

    def begin(self, run: Run) -> None:
        """Notes a run that is about to be begun.

        Raises:
            Unavailable: the client has left; who counts the request has counted its runs.
        """
        with self._lock:
            if self._left:
                raise Unavailable("the client has left")
            self.runs.append(run)

    def leave(self) -> None:
        """Ends the work, and lets none begin: the client has left."""
        with self._lock:
            self._left = True
            ends = list(self._ends)
        for end in ends:
            end()


# Of the request that this context belongs to.
_current: ContextVar[Hosted | None] = ContextVar("current", default=None)


class RequestExecutor(ThreadPoolExecutor):
    """Threads for an event loop's requests, each of which can tell when it was handed over."""

    def __init__(self, threads: int = _THREADS) -> None:
        super().__init__(threads, thread_name_prefix="phi3-request")

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
def hosted() -> Iterator[Hosted]:
    """For a block that answers a request in other threads: what they do for it."""
    request = Hosted()
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)


def call_when_left(end: Callable[[], None]) -> None:
    """Has `end` called when the client of this thread's request leaves, where the host can tell."""
    if (request := _current.get()) is not None:
        request.add(end)


def watch() -> Callable[[Run], object]:
    """What is to be called, in any thread, with each run that is begun for this thread's request; see Hosted.begin."""
    request = _current.get()
    return (lambda run: None) if request is None else request.begin


def attend(end: Callable[[], None]) -> None:
    """Called when a model was loaded; where the process is a worker of the scoring server, mends what it leaves open.

    Args:
        end: called once when the process is told to end (SIGINT or SIGTERM), in a thread of its own.
    """
    if _WORKER in os.environ and threading.current_thread() is threading.main_thread():
        threading.Thread(target=_attend, args=(end,), name="phi3-host", daemon=True).start()


def _attend(end: Callable[[], None]) -> None:
    """The model is loaded before uvicorn's event loop runs: waits for it, and then for its end."""
    limit = time.monotonic() + _STARTS
    while (server := _uvicorn()) is None or not getattr(server, "servers", None):
        if time.monotonic() > limit:  # something else runs in such an environment
            return
        time.sleep(_LOOK)
    # Gone again, where the server was told to end in this very moment.
    with suppress(RuntimeError, IndexError):
        loop = server.servers[0].get_loop()
        loop.call_soon_threadsafe(loop.set_default_executor, RequestExecutor())
    while not server.should_exit:
        time.sleep(_LOOK)
    end()


def _uvicorn() -> Any:
    """The server of this process: whose method handles SIGTERM while it runs."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if hasattr(server, "should_exit") else None
