"""How long jobs take, and so how long a request waits until it is begun. Knows no queue and no thread."""

import math
import time
from collections.abc import Sequence

from .jobs import Job
from .prefixes import Slot

# How much of it the latest job says.
_WEIGHT = 0.2


class Pace:
    """The time that jobs take from admission to their end.

    Attributes:
        seconds: a moving average; 0 before a job has ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def ended(self, job: Job) -> None:
        """Takes the time of a job that ends now."""
        took = time.monotonic() - job.admitted
        self.seconds += (took - self.seconds) * (_WEIGHT if self.seconds else 1.0)

    def patience(self, slots: Sequence[Slot], waiting: int) -> int:
        """Seconds until a request that comes now is begun, if the jobs are like those before.

        Args:
            slots: all of them.
            waiting: how many requests come before it.
        """
        taken = max([self.seconds, *map(self.taken, slots)])
        return math.ceil(max(1.0, taken * max(1, waiting) / len(slots)))

    def taken(self, slot: Slot) -> float:
        """Seconds that a slot's job takes at least; before any has ended, what it takes in all at its present pace."""
        job = slot.job
        if job is None:
            return 0.0
        taken = time.monotonic() - job.admitted
        done = len(slot.tokens) - job.reused
        if self.seconds or done <= 0:
            return taken
        return taken * (job.generation.most_tokens - job.reused) / done
