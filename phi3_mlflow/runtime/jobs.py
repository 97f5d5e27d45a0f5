"""Jobs, and the queue in which they wait for a slot. Knows no decoder and starts no thread."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from .answers import Piece, StopReason
from .generation import Generation

# Jobs that are ended at a time, before others have their turn.
MOST = 50


class Job:
    """One choice of an answer that the scheduler is asked for.

    Args:
        generation: the choice in the making; the scheduler's thread alone touches it from now on.
        deliver: called in the scheduler's thread with every Piece, the last of which has a reason, or with the
            exception that ended the job. It must return at once.
        deadline: on time.monotonic()'s clock; the choice ends there with what it has. None for no limit.
        renew: whether a next turn may begin with this answer, so that idle time is well spent on it.

    Attributes:
        reused: how many of the prompt's tokens did not have to be computed.
        admitted: when it got a slot, on time.monotonic()'s clock; 0 before.
        read: when its prompt had been read, likewise.
    """

    def __init__(
        self,
        generation: Generation,
        deliver: Callable[[Piece | Exception], None],
        deadline: float | None = None,
        *,
        renew: bool = False,
    ):
        self.generation = generation
        self.reused = 0
        self.admitted = self.read = 0.0
        self.deliver = deliver
        self.deadline = deadline
        self.renew = renew
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


class Batch:
    """Jobs that came together and wait, made one at a time: a table may have a million.

    Args:
        jobs: gives them in the order in which they are to be served; is asked for the next one when the one before has
            got its slot. It must not raise.
        fail: called with the exception that ends all jobs which were not given a slot.

    Attributes:
        first: the job whose turn it is; None when none is left.
        came: when, on time.monotonic()'s clock.
        begun: whether one of the jobs got a slot.
    """

    def __init__(self, jobs: Iterable[Job], fail: Callable[[Exception], None]):
        self._jobs: Iterator[Job] = iter(jobs)
        self.fail = fail
        self.first = next(self._jobs, None)
        self.came = time.monotonic()
        self.begun = False

    def pop(self) -> Job:
        """Takes the first job out."""
        job = self.first
        assert job is not None
        self.first = next(self._jobs, None)
        return job


class Queue:
    """Batches that wait, first come, first served; of batches with several jobs one of each in turn.

    So a table of a thousand rows does not keep a single question waiting until its end. Not safe for threads.
    """

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()

    def __bool__(self) -> bool:
        """Whether a job waits."""
        return bool(self._batches)

    @property
    def unbegun(self) -> int:
        """How many batches wait to be begun."""
        return sum(not batch.begun for batch in self._batches)

    @property
    def first(self) -> Job:
        """The job whose turn it is."""
        job = self._batches[0].first
        assert job is not None
        return job

    def add(self, batch: Batch) -> None:
        """Puts a batch of at least one job at the end."""
        self._batches.append(batch)

    def pop(self) -> Job:
        """Takes the first job out; its batch goes behind the others."""
        batch = self._batches[0]
        job = batch.pop()
        batch.begun = True
        self._batches.popleft()
        if batch.first is not None:
            self._batches.append(batch)
        return job

    def take_ending(self) -> list[Job]:
        """Takes out jobs that must end, MOST at the most: a table's are made as they are taken, which takes time."""
        taken: list[Job] = []
        for batch in self._batches:
            while len(taken) < MOST and batch.first is not None and batch.first.ending():
                taken.append(batch.pop())
        self._batches = deque(batch for batch in self._batches if batch.first is not None)
        return taken

    def take_late(self, seconds: float) -> list[Batch]:
        """Takes out the batches that have waited so long without being begun."""
        limit = time.monotonic() - seconds
        late = [batch for batch in self._batches if not batch.begun and batch.came <= limit]
        self._batches = deque(batch for batch in self._batches if batch.begun or batch.came > limit)
        return late

    def take_all(self) -> list[Batch]:
        """Takes out everything."""
        taken, self._batches = list(self._batches), deque()
        return taken
