"""One thread that drives generations over a decoder: admits, prefills in chunks, decodes, cancels, times out.

Knows token ids and slots, no text and no requests. Callers of any thread submit jobs and are called back.
"""

import itertools
import logging
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .decoders.base import Decoder
from .errors import Busy
from .jobs import Job, Queue

_logger = logging.getLogger(__name__)

Reuse = Literal["exact", "all"]
# Seconds between two looks at the jobs that wait: there may be thousands, and a step may take a millisecond.
_SWEEP = 0.05
# Tokens that are copied at least in the time in which one is computed: at full size 47 ms against 0.5 to 2.5 ms.
_COPIES = 16


@dataclass
class _Slot:
    index: int
    tokens: list[int] = field(default_factory=list)  # what the decoder's sequence holds
    usable: int = 0  # how many of them, from the first, another prompt may begin with
    job: Job | None = None
    pending: Sequence[int] = ()  # what is still to be prefilled: of the prompt, or without a job of the last answer
    next: int | None = None  # sampled, not decoded yet
    turn: int = 0  # the job's place in the order of admission
    fresh: bool = False  # admitted, and no chunk prefilled yet

    @property
    def kept(self) -> int:
        """How many tokens the slot keeps without a job, those included that idle time is computing again."""
        return len(self.tokens) + len(self.pending)


class Scheduler:
    """Runs jobs over a decoder, first come, first served; of several requests with many jobs one of each in turn.

    A job starts from the slot whose tokens share the longest prefix with its prompt, or from a copy of it. A job waits
    until the decoder has room for its prompt and the longest answer it may give; idle slots keep their tokens until
    the room is needed.

    With `reuse` at "exact", only whole chunks that prefill wrote are used again, so that every token of a prompt is
    computed in the same company as in a fresh run. What decoding wrote is close to that, and not bit-equal; so in idle
    time it is computed once more, by prefill, for the next turn of the conversation. With "all" it is used as it is.

    Args:
        decoder: all its calls are made in the scheduler's own thread, which `close` ends.
        queue_limit: how many requests may wait for a slot; None for any number.
        queue_timeout: how many seconds a request may wait until it is begun; None for any time.
        reuse: which keys and values of earlier prompts and answers a prompt may begin with.
        renew_after: seconds without work after which answers are prefilled again; None for never.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        queue_limit: int | None = None,
        queue_timeout: float | None = None,
        reuse: Reuse = "exact",
        renew_after: float | None = 1.0,
    ):
        self._decoder = decoder
        self._queue_limit = queue_limit
        self._queue_timeout = queue_timeout
        self._reuse = reuse
        self._renew_after = renew_after if reuse == "exact" else None
        self._pace = 0.0  # seconds that a job takes from admission to its end, a moving average
        self._slots = [_Slot(index) for index in range(decoder.slots)]
        self._waiting = Queue()
        self._turns = itertools.count()
        self._swept = time.monotonic()
        self._renew_at = 0.0  # on time.monotonic()'s clock
        self._wake = threading.Condition()  # its lock guards the queue
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="phi3-scheduler", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Puts the jobs of one request at the end of the queue.

        Raises:
            Busy: as many requests as may are waiting already; none of the jobs was taken.
            RuntimeError: the scheduler is closed.
        """
        if not jobs:
            return
        if len(self._slots) == 1:
            # Prompts that begin alike come one after the other: the slot keeps what the last one began with.
            ordered = sorted(jobs, key=lambda job: job.generation.prompt)
        else:
            # The longest first, so that the last ones to end together are short.
            ordered = sorted(jobs, key=lambda job: -job.generation.most_tokens)
        with self._wake:
            if self._closed:
                raise RuntimeError("the model was closed")
            # Those that the thread is about to give to free slots do not have to wait.
            count = self._waiting.requests - sum(slot.job is None for slot in self._slots)
            if self._queue_limit is not None and count >= self._queue_limit:
                raise Busy("1 request is waiting" if count == 1 else f"{count} requests are waiting", self._patience())
            self._waiting.add(ordered)
            self._wake.notify()

    def _patience(self) -> int:
        """Seconds until a request that comes now is begun, if the jobs are like those before."""
        now = time.monotonic()
        jobs = [slot.job for slot in self._slots]  # the scheduler's thread goes on meanwhile
        running = [now - job.admitted for job in jobs if job is not None]
        ahead = max(1, self._waiting.requests)
        return math.ceil(max(1.0, max(self._pace, *running, 0.0) * ahead / len(self._slots)))

    def close(self) -> None:
        """Ends every job with an error, and the thread; returns when the decoder is closed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._sleep_while_idle():
            for step in (self._sweep, self._admit, self._end_overdue, self._prefill, self._decode, self._renew):
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
            timeout = None
            if self._renew_after is not None and not self._has_work() and self._renewable():
                timeout = max(0.0, self._renew_at - time.monotonic())
            self._wake.wait_for(self._has_work, timeout)
            return not self._closed

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or any(slot.job for slot in self._slots))

    def _sweep(self) -> None:
        """Ends waiting jobs whose time is over."""
        now = time.monotonic()
        if not self._waiting or now < self._swept + _SWEEP:
            return
        self._swept = now
        with self._wake:
            ending = self._waiting.take_ending()
            late = [] if self._queue_timeout is None else self._waiting.take_unbegun(self._queue_timeout)
        for job in ending:
            self._deliver_end(job)
        for job in late:
            problem = f"the request waited for its turn for {self._queue_timeout:g} seconds"
            job.deliver(Busy(problem, self._patience()))

    def _admit(self) -> None:
        """Gives waiting jobs to free slots."""
        while self._waiting and (free := [slot for slot in self._slots if slot.job is None]):
            generation = self._waiting.first.generation
            running = sum(slot.job.generation.most_tokens for slot in self._slots if slot.job is not None)
            room = self._decoder.capacity - running - generation.most_tokens
            if room < 0:
                return
            with self._wake:
                job = self._waiting.pop()
            if job.ending():
                self._deliver_end(job)
                continue
            slot = self._choose(free, generation.prompt)
            slot.job, slot.fresh, slot.next, slot.turn = job, True, None, next(self._turns)
            job.admitted = time.monotonic()
            self._keep(slot, self._reusable(slot, generation.prompt))
            slot.pending = generation.prompt[len(slot.tokens) :]
            free.remove(slot)
            self._evict(free, room)

    def _choose(self, free: Sequence[_Slot], prompt: Sequence[int]) -> _Slot:
        """The free slot that loses next to nothing by beginning with the prompt, or else was used longest ago."""
        best = max(free, key=lambda slot: self._reusable(slot, prompt))
        shared = self._reusable(best, prompt)
        lost = best.usable - shared
        if len(self._slots) == 1 or lost < self._unit or lost * _COPIES <= shared:
            return best
        return min(free, key=lambda slot: (slot.usable >= self._unit, slot.turn))

    def _evict(self, idle: Sequence[_Slot], room: int) -> None:
        """Forgets what idle slots keep, longest unused first, until the rest has room."""
        kept = sum(slot.kept for slot in idle)
        for slot in sorted(idle, key=lambda slot: slot.turn):
            if kept > room:
                kept -= slot.kept
                self._keep(slot, 0)

    def _keep(self, slot: _Slot, length: int) -> None:
        # Also where nothing is left over: a decoder that failed may hold more than the slot knows of.
        self._decoder.rewind(slot.index, length)
        del slot.tokens[length:]
        slot.usable = length
        slot.pending = ()

    @property
    def _unit(self) -> int:
        """Prefixes are used again in multiples of so many tokens."""
        return self._decoder.chunk if self._reuse == "exact" else 1

    def _reusable(self, slot: _Slot, prompt: Sequence[int]) -> int:
        """How many of the slot's tokens the prompt may begin with; at least one of its own is left to compute."""
        limit = min(slot.usable, len(prompt) - 1)
        shared = bisect_left(range(limit), True, key=lambda at: slot.tokens[: at + 1] != prompt[: at + 1])
        return shared // self._unit * self._unit

    def _start(self, slot: _Slot, prompt: Sequence[int]) -> None:
        """Before the first chunk: begins with a copy of what another slot shares, if that is more.

        Here and not at admission, so that prompts that came together share too.
        """
        slot.fresh = False
        source = max(self._slots, key=lambda other: self._reusable(other, prompt))
        length = self._reusable(source, prompt)
        if length > len(slot.tokens):
            self._decoder.copy(source.index, slot.index, length)
            slot.tokens, slot.usable, slot.pending = source.tokens[:length], length, prompt[length:]

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
        slot.usable = len(slot.tokens)
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
            if self._reuse == "all":
                self._slots[index].usable += 1
        for index, row in logits.items():
            self._accept(self._slots[index], row)

    def _renew(self) -> None:
        """One chunk of an answer, which decoding wrote, by prefill; only after some time without any work."""
        start = time.monotonic()
        if self._renew_after is None or self._has_work() or start < self._renew_at:
            return
        slot = max(self._renewable(), key=lambda slot: slot.turn, default=None)
        if slot is None:
            return
        chunk = self._decoder.chunk
        if not slot.pending:
            kept, whole = (length // chunk * chunk for length in (slot.usable, len(slot.tokens)))
            answer = slot.tokens[kept:whole]
            self._keep(slot, kept)
            slot.pending = answer
        part, slot.pending = slot.pending[:chunk], slot.pending[chunk:]
        self._decoder.prefill(slot.index, part, last=False)
        slot.tokens += part
        slot.usable = len(slot.tokens)
        # Nobody waits for it: others get as much of the machine, and of Python's global lock.
        now = time.monotonic()
        self._renew_at = now + (now - start)

    def _renewable(self) -> list[_Slot]:
        """Idle slots of which another prompt could begin with more, were it prefilled."""
        chunk = self._decoder.chunk
        idle = [slot for slot in self._slots if slot.job is None and slot.usable]
        return [slot for slot in idle if slot.pending or slot.usable // chunk < len(slot.tokens) // chunk]

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
        job, slot.job, slot.pending = slot.job, None, ()
        assert job is not None
        now = time.monotonic()
        self._renew_at = now + (self._renew_after or 0.0)
        took = now - job.admitted
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
                slot.job = None
            slot.usable, slot.pending = 0, ()
