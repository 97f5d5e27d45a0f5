"""Blocking work beside the event loop. Knows nothing of what is done."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(
    work: Callable[[], T], *, name: str, discard: Callable[[T], object] = lambda result: None
) -> "asyncio.Future[T]":
    """Begins blocking work in a daemon thread of its own, from within the event loop.

    Unlike the loop's executor it lends no thread that others wait for, and work that never returns keeps neither the
    loop nor the interpreter from ending.

    Args:
        work: is called in the thread.
        name: of the thread.
        discard: called in a thread with a result that came when the future was cancelled or the loop closed.

    Returns:
        What becomes of the work.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def give(result: T) -> None:
        if future.done():
            threading.Thread(target=discard, args=(result,), name=name, daemon=True).start()
        else:
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            _tell(loop, fail, error)
        else:
            if not _tell(loop, give, result):
                discard(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[T], object], value: T) -> bool:
    try:
        loop.call_soon_threadsafe(callback, value)
    except RuntimeError:  # the loop was closed
        return False
    return True
