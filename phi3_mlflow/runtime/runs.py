"""Requests under way: what the scheduler delivers, on its way to whoever asked. Knows no model and no wire format."""

import asyncio
import logging
import queue
import threading
import time
import weakref
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .answers import Answer, Choice, Piece
from .errors import Unavailable
from .generation import Generation
from .jobs import Job

_logger = logging.getLogger(__name__)

Event = Piece | Exception
# Seconds after its deadline for which a caller goes on waiting for the decoder to come back.
_GRACE = 60.0


class Run:
    """One request under way. Its pieces are taken once: by iterating, by `async for`, or by the callback.

    An answer that nobody takes any more should be cancelled; closing the iterator early does that. What a request holds
    is then free within one step.

    Args:
        prompt_tokens: of the prompt.
        dropped: messages that did not fit.
        generations: one for each choice.
        deadline: on time.monotonic()'s clock; the answer ends there with what it has. None for no limit.
        deliver: called with each Piece, the last of which has `last`, or with the exception that ended the request; in
            the scheduler's thread, so it must return at once. What it raises cancels the request.
        renew: whether a next turn may begin with the answer.
        logprobs: whether they are wanted.
        engine: what computes, where the answer is to say so.

    Attributes:
        answer: what has come so far.
        error: what ended the request, where it failed.
        jobs: one for each choice, until the request has ended.
        came, begun, first_token, ended: when, on time.monotonic()'s clock; 0 for what has not happened yet.
        gaps: seconds between each token of a choice and the one before it.
        on_end: called in the scheduler's thread when all choices have ended, or one failed.
    """

    def __init__(
        self,
        prompt_tokens: int,
        dropped: int,
        generations: Sequence[Generation],
        *,
        deadline: float | None = None,
        deliver: Callable[[Event], object] | None = None,
        renew: bool = False,
        logprobs: bool = False,
        engine: str | None = None,
    ):
        choices = [Choice(logprobs=[] if logprobs else None) for _ in generations]
        # The list that the first choice fills while it reads the prompt.
        likely = generations[0].prompt_logprobs
        self.answer = Answer(prompt_tokens, choices, dropped, prompt_logprobs=likely, engine=engine)
        self.jobs = [Job(each, self._deliver, deadline, renew=renew) for each in generations]
        self.came = time.monotonic()
        self.begun = self.first_token = self.ended = 0.0
        self.gaps = array("d")
        self._latest = [0.0] * len(generations)  # when each choice got its last token
        self.error: Exception | None = None
        self.on_end: Callable[[], object] = lambda: None
        self._deadline = deadline
        self._open = len(generations)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._taken = deliver is not None
        # Held while an event goes on its way, so that none is lost or overtaken where the way changes.
        self._way = threading.Lock()
        self._sink: Callable[[Event], object] = deliver or self._events.put

    def fail(self, error: Exception) -> None:
        """Ends the request with an error. Called in the scheduler's thread."""
        self._deliver(error)

    def cancel(self) -> None:
        """Ends what is still going on. Harmless where nothing is; safe from any thread."""
        for job in self.jobs:
            job.cancel()

    def cancel_with(self, pieces: Iterator[Any]) -> None:
        """Cancels the run when an iterator is gone: a generator that was never begun does not get to its `finally`."""
        # Weakly, because the iterator may hang on the run's own error, and what is to be called holds on to nothing.
        weakref.finalize(pieces, _cancel, weakref.ref(self)).atexit = False

    def wait(self) -> Answer:
        """The whole answer.

        Raises:
            Exception: what ended the request.
        """
        for _ in self:
            pass
        return self.answer

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come.

        Raises:
            Exception: what ended the request.
        """
        self._take()
        pieces = self._pieces()
        self.cancel_with(pieces)
        return pieces

    def _pieces(self) -> Iterator[Piece]:
        try:
            while True:
                try:
                    event = self._events.get(timeout=_patience(self._deadline))
                except queue.Empty:
                    raise _stuck() from None
                if isinstance(event, Exception):
                    raise event.with_traceback(None)  # other requests may have been given the same one
                yield event
                if event.last:
                    return
        finally:
            self.cancel()

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces as they come, in the running event loop; no thread waits for them."""
        self._take()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        with self._way:
            # The loop may be closed while answers still come: `_deliver` then cancels the request.
            self._sink = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
            while not self._events.empty():
                events.put_nowait(self._events.get())
        return self._pieces_async(events)

    async def _pieces_async(self, events: "asyncio.Queue[Event]") -> AsyncIterator[Piece]:
        try:
            while True:
                try:
                    async with asyncio.timeout(
                        _patience(self._deadline)
                    ):  # wait_for may lose a cancellation in Python 3.11
                        event = await events.get()
                except TimeoutError:
                    raise _stuck() from None
                if isinstance(event, Exception):
                    raise event.with_traceback(None)
                yield event
                if event.last:
                    return
        finally:
            self.cancel()

    def _take(self) -> None:
        if self._taken:
            raise RuntimeError("the pieces of this run are taken already")
        self._taken = True

    def _deliver(self, event: Event) -> None:
        if not self._open:
            return  # a choice beside one that failed
        if isinstance(event, Exception):
            self._open, self.error = 0, event
            self.cancel()
        else:
            event = self._note(event)
            if not (event.text or event.reason or event.calls):
                return
        if not self._open:
            self.begun = self.jobs[0].admitted
            self.ended = time.monotonic()  # before whoever takes the last piece looks
            self.jobs.clear()  # each of them holds this run
        try:
            with self._way:
                self._sink(event)
        except BaseException:
            _logger.exception("a request is cancelled, because what takes its pieces raised an error")
            self._sink = lambda event: None
            self.cancel()
        if not self._open:
            self.on_end()

    def _note(self, piece: Piece) -> Piece:
        """Adds a piece to the answer."""
        job, choice = self.jobs[piece.choice], self.answer.choices[piece.choice]
        if job.generation.sampled > choice.tokens:
            now = time.monotonic()
            if choice.tokens:
                self.gaps.append(now - self._latest[piece.choice])
            elif not self.first_token:
                self.begun, self.first_token = job.admitted, now
            self._latest[piece.choice] = now
        self.answer.cached_tokens = self.jobs[0].reused
        choice.text += piece.text
        for call in piece.calls:
            choice.take(call)
        choice.tokens = job.generation.sampled
        if choice.logprobs is not None:
            choice.logprobs += piece.logprobs or ()
        if piece.reason is None:
            return piece
        choice.reason = piece.reason
        self._open -= 1
        return piece if self._open else replace(piece, last=True)


class Table:
    """Many requests that came together. Each is made when its turn comes, and only its answer is kept when it ended.

    Args:
        rows: numbers of the requests, in the order in which they are to be served.
        make: the run of one of them. Called in the scheduler's thread, but for the first.
        deadline: on time.monotonic()'s clock; what was not begun by then gets no answer. None for no limit.
    """

    def __init__(self, rows: Sequence[int], make: Callable[[int], Run], deadline: float | None):
        self._rows = rows
        self._make = make
        self._deadline = deadline
        self._runs: dict[int, Run] = {}  # those under way
        # Rows and how they ended, or what ends all that are left.
        self._events: queue.SimpleQueue[tuple[Sequence[int], Answer | Exception | None] | Exception]
        self._events = queue.SimpleQueue()
        self._cancelled = False

    def jobs(self) -> Iterator[Job]:
        """The jobs, one after the other, for the scheduler's queue."""
        for position, row in enumerate(self._rows):
            if self._cancelled or (self._deadline is not None and time.monotonic() >= self._deadline):
                self._events.put((self._rows[position:], None))
                return
            try:
                run = self._runs[row] = self._make(row)
            except Exception as error:
                self._events.put(error)
                return
            if self._cancelled:  # while it was made, so that `cancel` may not have seen it
                run.cancel()
            run.on_end = partial(self._end, row)
            yield from run.jobs

    def _end(self, row: int) -> None:
        run = self._runs.pop(row)
        self._events.put(((row,), run.error or run.answer))

    def fail(self, error: Exception) -> None:
        """Ends all rows that have no answer with an error. Called when none of those that were made has a slot."""
        for run in list(self._runs.values()):
            run.fail(error)
        self._events.put(error)

    def cancel(self) -> None:
        """Ends what is still going on."""
        self._cancelled = True
        for run in list(self._runs.values()):
            run.cancel()

    def __iter__(self) -> Iterator[tuple[int, Answer | Exception | None]]:
        """Each row with its answer, as they end; with what ended it instead; or with None where it was never begun."""
        left = dict.fromkeys(self._rows)
        try:
            while left:
                try:
                    event = self._events.get(timeout=_patience(self._deadline))
                except queue.Empty:
                    event = _stuck()
                rows, outcome = (list(left), event) if isinstance(event, Exception) else event
                for row in rows:
                    del left[row]
                    yield row, outcome
        finally:
            self.cancel()


def _cancel(run: "weakref.ref[Run]") -> None:
    if (left := run()) is not None:
        left.cancel()


def _patience(deadline: float | None) -> float | None:
    """Seconds to wait for the next event: for ever without a deadline, since the thread's end is an event too."""
    return None if deadline is None else max(0.0, deadline - time.monotonic()) + _GRACE


def _stuck() -> Unavailable:
    return Unavailable(f"the model has not come back {_GRACE:.0f} seconds after the request's time was over")
