"""Work that nobody waits for: a bounded queue, and one daemon thread that empties it. Knows nothing of the work."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from phi3_mlflow.runtime.errors import without_passwords

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_ELEMENT = 64  # bytes, about what one of Python's objects takes besides its text


class Background(Generic[Item]):
    """Does work in a thread of its own. Whoever puts something in is never held up; what finds no room is lost.

    What is lost is counted, and said once: again only after all that waited was done.

    Args:
        name: what the work is called in the log.
        work: called in the thread with one item after the other. Where it raises, the item is lost. It may take long.
        items: how many may wait.
        room: how much they may weigh together.

    Attributes:
        done: how many items were worked off.
        lost: how many were not, for whatever reason.
    """

    def __init__(self, name: str, work: Callable[[Item], object], *, items: int, room: int):
        self.done = self.lost = 0
        self._name = name
        self._work = work
        self._items = items
        self._room = room
        self._queue: deque[tuple[Item, int]] = deque()
        self._weight = 0
        self._telling = False  # whether a loss was said of late
        self._closing = False
        # Guards all of the above. The thread waits on it for items; `put` and `close` wake it.
        self._wake = threading.Condition()
        self._thread = self._start()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._queue)

    def put(self, item: Item, weight: int = 0, *, first: bool = False) -> bool:
        """Queues an item, or loses it. Safe from any thread.

        Args:
            item: for `work`.
            weight: its part of `room`.
            first: whether it goes before all others.

        Returns:
            Whether it was queued.
        """
        with self._wake:
            full = len(self._queue) >= self._items or self._weight + weight > self._room
            if not (full or self._closing):
                (self._queue.appendleft if first else self._queue.append)((item, weight))
                self._weight += weight
                self._wake.notify()
                return True
        self._lose(1, "it was closed" if self._closing else "too many wait already")
        return False

    def close(self, seconds: float = 5.0) -> None:
        """Takes nothing more, and gives what waits some time to be done; the rest is lost. Harmless the second time."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)
        with self._wake:
            left = len(self._queue)
            self._queue.clear()
            self._weight = 0
        if left:
            self._lose(left, f"they were not done within {seconds:g} seconds")

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=f"phi3-{self._name}", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._do(item[0])
        except BaseException:
            # No Exception gets here: something ends the thread itself. The item is lost, and not those behind it.
            with self._wake:
                if not self._closing:
                    self._thread = self._start()
            raise

    def _next(self) -> tuple[Item, int] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            item = self._queue.popleft()
            self._weight -= item[1]
            return item

    def _do(self, item: Item) -> None:
        try:
            self._work(item)
        except BaseException as error:
            self._lose(1, f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise
        else:
            with self._wake:
                self.done += 1
                self._telling = self._telling and bool(self._queue)

    def _lose(self, count: int, why: str) -> None:
        with self._wake:
            self.lost += count
            told, self._telling = self._telling, True
        if not told:
            line = without_passwords(why.partition("\n")[0])[:300]
            with contextlib.suppress(Exception):  # the log may be what is broken
                _logger.warning("%s: %d lost (%s); more of them are counted and not said", self._name, count, line)


def weigh(value: Any, limit: int) -> int:
    """About how many bytes a value of JSON takes in memory; stops to count beyond the limit.

    Args:
        value: what json.loads gives.
        limit: in bytes.

    Returns:
        The bytes, or a number above the limit.
    """
    weight, left = 0, [value]
    while left and weight <= limit:
        each = left.pop()
        weight += _ELEMENT
        if isinstance(each, str):
            weight += len(each)
        elif isinstance(each, (dict, list, tuple)):
            weight += _ELEMENT * len(each)
            if weight <= limit:
                left.extend(each.values() if isinstance(each, dict) else each)
    return weight
