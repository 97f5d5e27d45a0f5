"""One thread that drives generations over a decoder: admits, computes steps, cancels, times out, reuses prefixes.

Knows token ids and slots, no text and no requests. Callers of any thread submit jobs and are called back.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np

from .answers import Piece
from .decoders.base import Decoder, Part
from .errors import Busy, Unavailable
from .jobs import MOST, Batch, Job, Queue
from .pace import Pace
from .prefixes import Prefixes, Reuse, Slot
from .statistics import Counts, Statistics
from .steps import TOKEN_GAP, Steps

_logger = logging.getLogger(__name__)

# Seconds between two looks at the jobs that wait: there may be thousands, and a step may take a millisecond.
_SWEEP = 0.05
# Seconds that `close` waits for the decoder to come back.
_CLOSING = 30.0


class Scheduler:
    """Runs jobs over a decoder, first come, first served; of several batches with many jobs one of each in turn.

    A job starts from the slot whose tokens share the longest prefix with its prompt, or from a copy of it. A job waits
    until the decoder has room for its prompt and the longest answer it may give; idle slots keep their tokens until
    the room is needed.

    With `reuse` at "exact" what decoding wrote is not used again (see Prefixes); so in idle time an answer that may
    have a next turn is computed once more, by prefill.

    What fails, fails alone: a step of the decoder ends the answer of its slot; one of several slots, or with tokens
    that were only proposed, is tried again slot by slot and without them. When the thread ends, for whatever reason,
    all jobs end with `Unavailable`, and so does `submit`.

    Args:
        decoder: all its calls are made in the scheduler's own thread, which `close` ends.
        queue_limit: how many requests may wait for a slot; None for any number.
        queue_timeout: how many seconds a request may wait until it is begun; None for any time.
        reuse: which keys and values of earlier prompts and answers a prompt may begin with.
        renew_after: seconds without work after which answers are prefilled again; None for never.
        token_gap: seconds that may pass between two tokens of an answer while prompts are read beside it, where the
            decoder mixes them.
        speculation: whether tokens that are likely to follow are computed together with an answer's last one.

    Attributes:
        counts: what has been done so far; the thread goes on counting in it.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        queue_limit: int | None = None,
        queue_timeout: float | None = None,
        reuse: Reuse = "exact",
        renew_after: float | None = 1.0,
        token_gap: float = TOKEN_GAP,
        speculation: bool = True,
    ):
        self._decoder = decoder
        self._queue_limit = queue_limit
        self._queue_timeout = queue_timeout
        self._renew_after = renew_after if reuse == "exact" else None
        self._pace = Pace()
        self._prefixes = Prefixes(decoder, reuse)
        self._slots = self._prefixes.slots
        self._waiting = Queue()
        self._turns = itertools.count()
        self._swept = time.monotonic()
        self._renew_at = 0.0  # on time.monotonic()'s clock
        self.counts = Counts()
        self._steps = Steps(decoder, self._prefixes, self.counts, self._fail, gap=token_gap, propose=speculation)
        self._step_began: float | None = None
        # Guards the queue, the slots' jobs and the counts. The thread waits on it for work; `submit` and `close` wake
        # it. Nobody is called back, and the decoder is not called, while it is held.
        self._wake = threading.Condition()
        self._closing = False
        self._ended: Unavailable | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="phi3-scheduler", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[Job], fail: Callable[[Exception], None]) -> None:
        """Queues jobs of one request, to be served in this order.

        Args:
            jobs: see Batch; the first one is asked for here, unless there is an error, the others in the scheduler's
                thread.
            fail: called in the scheduler's thread with what ends those jobs that never got a slot.

        Raises:
            Busy: as many requests as may are waiting already.
            Unavailable: the scheduler has ended, or lives in another process.
        """
        if os.getpid() != self._process:
            raise Unavailable(
                "the model was loaded before this process was forked, and its thread did not come along: load the "
                "model in the new process"
            )
        with self._wake:
            if self._ended or self._closing:
                raise self._ended or _closed()
            # Those that the thread is about to give to free slots do not have to wait.
            count = self._waiting.unbegun - sum(slot.job is None for slot in self._slots)
            if self._queue_limit is not None and count >= self._queue_limit:
                problem = "1 request is waiting" if count == 1 else f"{count} requests are waiting"
                # Whoever gets the next slot leaves a place in the queue.
                raise Busy(problem, self._pace.patience(self._slots, before=0))
            batch = Batch(jobs, fail)
            if batch.first is not None:
                self._waiting.add(batch)
                self._wake.notify()

    def statistics(self) -> Statistics:
        """What goes on, all of one moment."""
        forked = os.getpid() != self._process  # the lock may be held by a thread that is not here
        with nullcontext() if forked else self._wake:
            began = self._step_began
            return Statistics(
                slots=len(self._slots),
                running=sum(slot.job is not None for slot in self._slots),
                waiting=self._waiting.unbegun,
                queue_limit=self._queue_limit,
                capacity=self._decoder.capacity,
                held=self._prefixes.held(),
                alive=not (forked or self._ended or self._closing),
                used=self._prefixes.held(running=True),
                step_seconds=0.0 if began is None else time.monotonic() - began,
                **vars(self.counts),
            )

    def close(self, *, wait: bool = True) -> None:
        """Ends every job with an error, the thread and the decoder. Harmless where that has happened.

        Args:
            wait: whether to return when it is done. Where the decoder does not come back, that is after 30 s, and the
                jobs are ended all the same.
        """
        if os.getpid() != self._process:
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSING)
            self._abandon()

    def _abandon(self) -> None:
        """Ends the jobs of a thread that is in a step of the decoder for good; what else it may say is not heard."""
        with self._wake:
            if self._step_began is None:  # it has ended, or is calling somebody back
                return
            jobs = [slot.job for slot in self._slots if slot.job is not None]
            self.counts.failed += self._waiting.unbegun
            batches = self._waiting.take_all()
        error = Unavailable("the model was closed, and has not come back from its last step: load it again")
        for job in jobs:
            self._tell(job.deliver, error)
        for batch in batches:
            self._tell(batch.fail, error)

    def _run(self) -> None:
        why = _closed()
        try:
            while self._sleep_while_idle():
                self._turn()
        except BaseException as error:
            _logger.critical("the scheduler ended", exc_info=True)
            why = Unavailable(f"the model's thread ended ({type(error).__name__}): load the model again")
        finally:
            with self._wake:
                self._ended = why
            self._end_all(why, forget=False)
            self._decoder.close()

    def _turn(self) -> None:
        try:
            self._sweep()
            self._admit()
            self._end_overdue()
            for parts in filter(None, self._steps):
                self._step(parts)
            self._renew()
        except Exception as error:  # no step of the decoder, and nobody's callback: whom it concerns is not known
            _logger.exception("a fault in the scheduler itself")
            self._end_all(error)

    def _sleep_while_idle(self) -> bool:
        with self._wake:
            timeout = None
            if self._renew_after is not None and not self._has_work() and self._prefixes.renewable():
                timeout = max(0.0, self._renew_at - time.monotonic())
            self._wake.wait_for(self._has_work, timeout)
            return not self._closing

    def _has_work(self) -> bool:
        return bool(self._closing or self._waiting or any(slot.job for slot in self._slots))

    def _sweep(self) -> None:
        """Ends waiting jobs whose time is over."""
        now = time.monotonic()
        if not self._waiting or now < self._swept + _SWEEP:
            return
        self._swept = now
        with self._wake:
            ending = self._waiting.take_ending()
            late = [] if self._queue_timeout is None else self._waiting.take_late(self._queue_timeout)
            self.counts.ended += len(ending)
            self.counts.failed += len(late)
            patience = self._pace.patience(self._slots, before=self._waiting.unbegun)
        for job in ending:
            self._deliver_end(job)
        for batch in late:
            problem = f"the request waited for its turn for {self._queue_timeout:g} seconds"
            self._tell(batch.fail, Busy(problem, patience))

    def _admit(self) -> None:
        """Gives waiting jobs to free slots."""
        ended = 0
        while self._prefixes.free() and ended < MOST:
            with self._wake:
                if not self._waiting:
                    return
                generation = self._waiting.first.generation
                slot = self._prefixes.choose(generation)
                if slot is None:
                    return
                job = self._waiting.pop()
                if ending := job.ending():
                    self.counts.ended += 1
                else:
                    slot.job, slot.turn, slot.renew = job, next(self._turns), job.renew
                    job.admitted = time.monotonic()
            if ending:
                ended += 1
                self._deliver_end(job)
                continue
            try:
                self._prefixes.enter(slot, job)
                self.counts.cached += job.reused
            except Exception as error:
                _logger.exception("the decoder failed")
                self._fail(slot, error)

    def _end_overdue(self) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.ending():
                self._deliver_end(self._free(slot))

    def _step(self, parts: Mapping[int, Part]) -> None:
        try:
            logits = self._compute(parts)
        except Exception as error:
            # What is not given up yet: each part by itself, and no tokens that were only proposed.
            alone = {index: self._least(index, part) for index, part in parts.items()}
            if len(parts) == 1 and alone == parts:
                _logger.exception("the decoder failed")
                for index in parts:
                    self._fail(self._slots[index], error)
                return
            _logger.warning("the decoder failed on a step of %d slots; each is tried alone", len(parts), exc_info=True)
            for index, part in alone.items():
                try:
                    self._decoder.rewind(index, len(self._slots[index].tokens))
                except Exception as lost:
                    self._fail(self._slots[index], lost)
                else:
                    self._step({index: part})
            return
        self.counts.steps += 1
        for index, part in parts.items():
            try:
                self._take(self._slots[index], part, logits.get(index))
            except Exception as error:  # the answer's own failure, or numbers that are none
                self._fail(self._slots[index], error)

    def _least(self, index: int, part: Part) -> Part:
        """The part without what is only proposed."""
        return part if self._slots[index].pending else Part(part.ids[:1], 1)

    def _compute(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        self._step_began = time.monotonic()
        try:
            return self._decoder.step(parts)
        finally:
            self._step_began = None

    def _take(self, slot: Slot, part: Part, logits: np.ndarray | None) -> None:
        """What a step brought to the answer in a slot."""
        assert slot.job is not None
        ids = part.ids
        if self._prefixes.write(slot, ids):
            self.counts.computed += len(ids)
            if logits is None:
                return
            if slot.job.generation.reads_prompt:
                slot.job.generation.read(logits)
            if slot.pending:
                return
            slot.job.read = time.monotonic()
            ids, logits = ids[-1:], logits[-1:]
        assert logits is not None
        self._accept(slot, ids, logits)

    def _accept(self, slot: Slot, ids: Sequence[int], logits: np.ndarray) -> None:
        """Samples tokens, as long as each is the one that was proposed; what was computed behind another one goes.

        Args:
            slot: holds the ids.
            ids: what the answer goes on from, and what was proposed to follow.
            logits: (ids, vocabulary) float32, for the places behind them.
        """
        job = slot.job
        assert job is not None
        for place, row in enumerate(logits, 1):
            piece = job.generation.accept(row)
            right = place < len(ids) and job.generation.next == ids[place]
            if not right:
                self._prefixes.drop(slot, len(ids) - place)
            self.counts.generated += 1
            self.counts.accepted += right
            self._deliver(job if piece.reason is None else self._free(slot), piece)
            if not right or job.ending():
                return

    def _renew(self) -> None:
        """One chunk of an answer, which decoding wrote, by prefill; only after some time without any work."""
        start = time.monotonic()
        if self._renew_after is None or self._has_work() or start < self._renew_at:
            return
        slot = max(self._prefixes.renewable(), key=lambda slot: slot.turn, default=None)
        if slot is None:
            return
        try:
            if not slot.pending:
                self._prefixes.reopen(slot)
            part = Part(slot.pending[: self._decoder.chunk])
            self._compute({slot.index: part})
        except Exception:
            _logger.exception("the decoder failed while nothing was asked of it")
            self._prefixes.forget(slot)
        else:
            self._prefixes.write(slot, part.ids)
            self.counts.renewed += len(part.ids)
        # Nobody waits for it: others get as much of the machine, and of Python's global lock.
        now = time.monotonic()
        self._renew_at = now + (now - start)

    def _free(self, slot: Slot) -> Job:
        """Takes the job out of its slot."""
        with self._wake:
            job, slot.job, slot.pending = slot.job, None, ()
            assert job is not None
            self._renew_at = time.monotonic() + (self._renew_after or 0.0)
            self._pace.ended(job)
            self.counts.ended += 1
        return job

    def _fail(self, slot: Slot, error: Exception, *, forget: bool = True) -> None:
        """Ends a slot's answer with an error, and forgets what the slot holds: nobody knows whether it is sound."""
        with self._wake:
            job, slot.job = slot.job, None
            self.counts.failed += 1
        assert job is not None
        try:
            if forget:
                self._prefixes.forget(slot)
        finally:
            self._deliver(job, error)

    def _end_all(self, error: Exception, *, forget: bool = True) -> None:
        """Ends everything that runs or waits with an error; without a call of the decoder where nothing may follow."""
        with self._wake:
            self.counts.failed += self._waiting.unbegun
            batches = self._waiting.take_all()
        for slot in self._slots:
            if slot.job is not None:
                self._fail(slot, error, forget=forget)
        for batch in batches:
            self._tell(batch.fail, error)

    def _deliver_end(self, job: Job) -> None:
        try:
            event: Piece | Exception = job.generation.end(job.ending() or "cancelled")
        except Exception as error:
            event = error
        self._deliver(job, event)

    def _deliver(self, job: Job, event: Piece | Exception) -> None:
        if not self._tell(job.deliver, event):
            job.cancel()

    def _tell(self, callback: Callable[..., None], event: Piece | Exception) -> bool:
        """Calls a caller back; what it raises is its own affair."""
        try:
            callback(event)
        except BaseException:
            _logger.exception("a callback raised an error")
            return False
        return True


def _closed() -> Unavailable:
    return Unavailable("the model was closed: load it again")
