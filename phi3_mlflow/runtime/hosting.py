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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


class _Executor(ThreadPoolExecutor):
    """Tells each call when it was handed over."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> "Future[Any]":
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
    loop.set_default_executor(_Executor(_THREADS, thread_name_prefix="phi3-request"))
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        if callable(before):  # uvicorn's, which waits for all that was begun
            signal.signal(number, partial(_end, end, before))


def _end(
    end: Callable[[], None], before: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None
) -> None:
    end()
    before(number, frame)
