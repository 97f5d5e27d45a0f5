"""Jobs, and the queue in which they wait for a slot. Knows no decoder and starts no thread."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .generation import Generation, Step, StopReason


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
class _Request:
    """Jobs that came together, those that still wait."""

    jobs: deque[Job]
    came: float  # on time.monotonic()'s clock
    begun: bool = False


class Queue:
    """Jobs that wait, first come, first served; of requests with several jobs one of each in turn.

    So a table of a thousand rows does not keep a single question waiting until its end. Not safe for threads.
    """

    def __init__(self) -> None:
        self._requests: deque[_Request] = deque()

    def __bool__(self) -> bool:
        """Whether a job waits."""
        return bool(self._requests)

    def __iter__(self) -> Iterator[Job]:
        """All jobs that wait."""
        return (job for request in self._requests for job in request.jobs)

    @property
    def requests(self) -> int:
        """How many requests wait to be begun."""
        return sum(not request.begun for request in self._requests)

    def add(self, jobs: Iterable[Job]) -> None:
        """Puts one request's jobs at the end, to be served in this order."""
        self._requests.append(_Request(deque(jobs), time.monotonic()))

    @property
    def first(self) -> Job:
        """The job whose turn it is."""
        return self._requests[0].jobs[0]

    def pop(self) -> Job:
        """Takes the first job out; its request goes behind the others."""
        request = self._requests.popleft()
        job = request.jobs.popleft()
        request.begun = request.begun or not job.ending()
        if request.jobs:
            self._requests.append(request)
        return job

    def take_ending(self) -> list[Job]:
        """Takes out the jobs that must end."""
        return self._take(lambda request, job: job.ending() is not None)

    def take_unbegun(self, seconds: float) -> list[Job]:
        """Takes out the jobs of requests that have waited so long, and none of whose jobs was ever begun."""
        limit = time.monotonic() - seconds
        return self._take(lambda request, job: not request.begun and request.came <= limit)

    def _take(self, wanted: Callable[[_Request, Job], bool]) -> list[Job]:
        taken: list[Job] = []
        for request in self._requests:
            kept: deque[Job] = deque()
            for job in request.jobs:
                (taken if wanted(request, job) else kept).append(job)
            request.jobs = kept
        self._requests = deque(request for request in self._requests if request.jobs)
        return taken
