"""One thread that drives generations over a decoder: admits, prefills in chunks, decodes, cancels, times out.

Knows token ids and slots, no text and no requests. Callers of any thread submit jobs and are called back.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .decoders.base import Decoder
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


class Scheduler:
    """Runs jobs over a decoder, first come, first served.

    A job starts from the slot whose tokens share the longest prefix with its prompt. Only whole chunks that prefill
    wrote are used again, so that every token is computed in the same company as in a fresh run and greedy answers
    repeat to the bit.

    Args:
        decoder: all its calls are made in the scheduler's own thread, which `close` ends.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._slots = [_Slot(index) for index in range(decoder.slots)]
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="phi3-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue.

        Raises:
            RuntimeError: the scheduler is closed.
        """
        with self._wake:
            if self._closed:
                raise RuntimeError("the model was closed")
            self._waiting.append(job)
            self._wake.notify()

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
            job = self._waiting.popleft()
            prompt = job.generation.prompt
            slot = max(free, key=lambda slot: self._reusable(slot, prompt))
            reused = self._reusable(slot, prompt)
            slot.job, slot.pending, slot.next = job, prompt[reused:], None
            # Also where nothing is left over: a decoder that failed may hold more than the slot knows of.
            self._decoder.rewind(slot.index, reused)
            del slot.tokens[reused:]
            slot.prefilled = reused

    def _reusable(self, slot: _Slot, prompt: Sequence[int]) -> int:
        """How many of the slot's tokens a fresh run of the prompt would compute in just the same chunks."""
        limit = min(slot.prefilled, len(prompt) - 1)
        shared = next((i for i in range(limit) if slot.tokens[i] != prompt[i]), limit)
        return shared - shared % self._decoder.chunk

    def _end_overdue(self) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.ending():
                self._deliver_end(slot.job)
                slot.job = None

    def _prefill(self) -> None:
        """One chunk of one prompt, so that a long prompt does not stop the others."""
        slot = next((slot for slot in self._slots if slot.job is not None and slot.pending), None)
        if slot is None:
            return
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
            slot.job.deliver(error)
            slot.job = None
            return
        slot.next = step.token
        job = slot.job
        if step.reason is not None:
            slot.job = None
        job.deliver(step)

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
