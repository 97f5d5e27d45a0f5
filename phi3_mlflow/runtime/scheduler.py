"""One thread that drives generations over a decoder: admits, prefills in chunks, decodes, cancels, times out.

Knows token ids and slots, no text and no requests. Callers of any thread submit jobs and are called back.
"""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .decoders.base import Decoder
from .errors import Busy
from .generation import Generation, Step, StopReason

_logger = logging.getLogger(__name__)


class Job:
    """One answer that the scheduler is asked for.

    Args:
        generation: the answer in the making; the scheduler's thread alone touches it from now on.
        deliver: called in the scheduler's thread with every Step, the last of which has a reason, or with the
            exception that ended the job. It must return at once.
        deadline: on time.monotonic()'s clock; the answer ends there with what it has. None for no limit.
    """

    def __init__(
        self, generation: Generation, deliver: Callable[[Step | Exception], None], deadline: float | None = None
    ):
        self.generation = generation
        self.reused = 0  # how many of the prompt's tokens did not have to be computed
        self.request: object = self  # what it was submitted with
        self.admitted = 0.0  # on time.monotonic()'s clock
        self.deliver = deliver
        self.deadline = deadline
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the job within one step. Safe from any thread, also when the job has ended already."""
        self._cancelled = True

    def ending(self) -> StopReason | None:
        """Why the job must end now, if it must."""
        if self._cancelled:
            return "cancelled"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "max_time"
        return None


@dataclass
class _Slot:
    index: int
    tokens: list[int] = field(default_factory=list)  # what the decoder's sequence holds
    prefilled: int = 0  # how many of them, from the first, prefill wrote
    job: Job | None = None
    pending: Sequence[int] = ()  # the part of the prompt that is still to be prefilled
    next: int | None = None  # sampled, not decoded yet
    turn: int = 0  # the job's place in the order of admission
    fresh: bool = False  # admitted, and no chunk prefilled yet


class Scheduler:
    """Runs jobs over a decoder, first come, first served.

    A job starts from the slot whose tokens share the longest prefix with its prompt, or from a copy of it. Only whole
    chunks that prefill wrote are used again, so that every token of a prompt is computed in the same company as in a
    fresh run. A job waits until the decoder has room for its prompt and the longest answer it may give; idle slots
    keep their tokens until the room is needed.

    Args:
        decoder: all its calls are made in the scheduler's own thread, which `close` ends.
        queue_limit: how many requests may wait for a slot; None for any number.
    """

    def __init__(self, decoder: Decoder, queue_limit: int | None = None):
        self._decoder = decoder
        self._queue_limit = queue_limit
        self._pace = 0.0  # seconds that a job takes from admission to its end, a moving average
        self._slots = [_Slot(index) for index in range(decoder.slots)]
        self._waiting: deque[Job] = deque()
        self._turns = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="phi3-scheduler", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Puts the jobs of one request at the end of the queue.

        Raises:
            Busy: as many requests as may are waiting already; none of the jobs was taken.
            RuntimeError: the scheduler is closed.
        """
        for job in jobs:
            job.request = jobs
        with self._wake:
            if self._closed:
                raise RuntimeError("the model was closed")
            if self._queue_limit is not None:
                waiting = len({id(job.request) for job in self._waiting})
                if waiting >= self._queue_limit:
                    raise Busy(waiting, self._patience())
            self._waiting.extend(jobs)
            self._wake.notify()

    def _patience(self) -> int:
        """Seconds until the jobs that wait will have been admitted, if they are like those before."""
        now = time.monotonic()
        jobs = [slot.job for slot in self._slots]  # the scheduler's thread goes on meanwhile
        running = [now - job.admitted for job in jobs if job is not None]
        return math.ceil(max(1.0, max(self._pace, *running, 0.0) * len(self._waiting) / len(self._slots)))

    def close(self) -> None:
        """Ends every job with an error, and the thread; returns when the decoder is closed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._sleep_while_idle():
            for step in (self._admit, self._end_overdue, self._prefill, self._decode):
                try:
                    step()
                except Exception as error:  # whatever a backend raises ends the answers in the making, not the thread
                    _logger.exception("the decoder failed")
                    self._fail_all(error)
        self._fail_all(RuntimeError("the model was closed"))
        for job in self._waiting:
            job.deliver(RuntimeError("the model was closed"))
        self._decoder.close()

    def _sleep_while_idle(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or any(slot.job for slot in self._slots))
            return not self._closed

    def _admit(self) -> None:
        """Gives waiting jobs to free slots; jobs whose time is over while they wait end here."""
        with self._wake:
            overdue = [job for job in self._waiting if job.ending()]
            for job in overdue:
                self._waiting.remove(job)
        for job in overdue:
            self._deliver_end(job)
        while self._waiting and (free := [slot for slot in self._slots if slot.job is None]):
            generation = self._waiting[0].generation
            running = sum(slot.job.generation.most_tokens for slot in self._slots if slot.job is not None)
            room = self._decoder.capacity - running - generation.most_tokens
            if room < 0:
                return
            slot = self._choose(free, generation.prompt)
            slot.job, slot.fresh, slot.next, slot.turn = self._waiting.popleft(), True, None, next(self._turns)
            slot.job.admitted = time.monotonic()
            self._keep(slot, self._reusable(slot, generation.prompt))
            slot.pending = generation.prompt[len(slot.tokens) :]
            free.remove(slot)
            self._evict(free, room)

    def _choose(self, free: Sequence[_Slot], prompt: Sequence[int]) -> _Slot:
        """The free slot that loses nothing by beginning with the prompt, or else was used longest ago."""
        best = max(free, key=lambda slot: self._reusable(slot, prompt))
        chunk = self._decoder.chunk
        if len(self._slots) == 1 or best.prefilled // chunk == self._reusable(best, prompt) // chunk:
            return best
        return min(free, key=lambda slot: (slot.prefilled >= chunk, slot.turn))

    def _evict(self, idle: Sequence[_Slot], room: int) -> None:
        """Forgets what idle slots keep, longest unused first, until the rest has room."""
        kept = sum(len(slot.tokens) for slot in idle)
        for slot in sorted(idle, key=lambda slot: slot.turn):
            if kept > room:
                kept -= len(slot.tokens)
                self._keep(slot, 0)

    def _keep(self, slot: _Slot, length: int) -> None:
        # Also where nothing is left over: a decoder that failed may hold more than the slot knows of.
        self._decoder.rewind(slot.index, length)
        del slot.tokens[length:]
        slot.prefilled = length

    def _reusable(self, slot: _Slot, prompt: Sequence[int]) -> int:
        """How many of the slot's tokens a fresh run of the prompt would compute in just the same chunks."""
        limit = min(slot.prefilled, len(prompt) - 1)
        chunk = self._decoder.chunk
        shared = 0
        while shared + chunk <= limit and slot.tokens[shared : shared + chunk] == prompt[shared : shared + chunk]:
            shared += chunk
        return shared

    def _start(self, slot: _Slot, prompt: Sequence[int]) -> None:
        """Before the first chunk: begins with a copy of what another slot shares, if that is more.

        Here and not at admission, so that prompts that came together share too.
        """
        slot.fresh = False
        source = max(self._slots, key=lambda other: self._reusable(other, prompt))
        length = self._reusable(source, prompt)
        if length > len(slot.tokens):
            self._decoder.copy(source.index, slot.index, length)
            slot.tokens, slot.prefilled, slot.pending = source.tokens[:length], length, prompt[length:]

    def _end_overdue(self) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.ending():
                self._deliver_end(self._free(slot))

    def _prefill(self) -> None:
        """One chunk of the oldest prompt, so that a long prompt does not stop the others."""
        pending = [slot for slot in self._slots if slot.job is not None and slot.pending]
        if not pending:
            return
        slot = min(pending, key=lambda slot: slot.turn)
        assert slot.job is not None
        if slot.fresh:
            self._start(slot, slot.job.generation.prompt)
            slot.job.reused = len(slot.tokens)
        chunk, slot.pending = slot.pending[: self._decoder.chunk], slot.pending[self._decoder.chunk :]
        logits = self._decoder.prefill(slot.index, chunk, last=not slot.pending)
        slot.tokens += chunk
        slot.prefilled = len(slot.tokens)
        if logits is not None:
            self._accept(slot, logits)

    def _decode(self) -> None:
        """One token for every slot that has one to decode."""
        tokens = {slot.index: slot.next for slot in self._slots if slot.job is not None and slot.next is not None}
        if not tokens:
            return
        logits = self._decoder.decode(tokens)
        for index, token in tokens.items():
            self._slots[index].tokens.append(token)
        for index, row in logits.items():
            self._accept(self._slots[index], row)

    def _accept(self, slot: _Slot, logits: np.ndarray) -> None:
        assert slot.job is not None
        try:
            step = slot.job.generation.accept(logits)
        except Exception as error:  # this answer's own failure; what the decoder holds is sound
            self._free(slot).deliver(error)
            return
        slot.next = step.token
        job = slot.job if step.reason is None else self._free(slot)
        job.deliver(step)

    def _free(self, slot: _Slot) -> Job:
        """Takes the job out of its slot."""
        job, slot.job = slot.job, None
        assert job is not None
        took = time.monotonic() - job.admitted
        self._pace += (took - self._pace) * (0.2 if self._pace else 1.0)
        return job

    def _deliver_end(self, job: Job) -> None:
        try:
            job.deliver(job.generation.end(job.ending() or "cancelled"))
        except Exception as error:
            job.deliver(error)

    def _fail_all(self, error: Exception) -> None:
        for slot in self._slots:
            if slot.job is not None:
                slot.job.deliver(error)
                slot.job, slot.prefilled = None, 0
