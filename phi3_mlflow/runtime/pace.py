"""How long answers take, and so how long a request waits for a slot. Knows no queue and no thread."""

import math
import time
from collections.abc import Sequence

from .jobs import Job
from .prefixes import Slot

# How much of an average the latest answer makes.
_WEIGHT = 0.2
# As many tokens of an answer say as much of its gaps as all that others were.
_PRIOR = 16


class Pace:
    """The time that answers take from admission to their end, by moving averages; 0 before there was one.

    Attributes:
        reading: seconds until the prompt has been read.
        tokens: that an answer has.
        gap: seconds from a token to the next.
    """

    def __init__(self) -> None:
        self.reading = self.tokens = self.gap = 0.0

    def ended(self, job: Job) -> None:
        """Learns from a job that ends now."""
        sampled = job.generation.sampled
        if sampled:
            self.reading = _average(self.reading, job.read - job.admitted)
            self.tokens = _average(self.tokens, sampled)
        if sampled > 1:
            self.gap = _average(self.gap, (time.monotonic() - job.read) / (sampled - 1))

    def patience(self, slots: Sequence[Slot], before: int) -> int:
        """Whole seconds until there is a slot, if answers go on as they do and are like those before; at least 1.

        Args:
            slots: all of them.
            before: how many requests get a slot first.
        """
        first = min(self._left(slot.job) if slot.job else 0.0 for slot in slots)
        return math.ceil(max(1.0, first + (self.reading + self.tokens * self.gap) * before / len(slots)))

    def _left(self, job: Job) -> float:
        """Seconds until a job's end. It takes as many tokens as others did; behind those, as many as it may."""
        now, generation = time.monotonic(), job.generation
        sampled, most = generation.sampled, generation.most_tokens + 1 - len(generation.prompt)
        left = min(most, self.tokens if self.tokens > sampled else most) - sampled
        if not sampled:
            return max(0.0, self.reading - (now - job.admitted)) + left * self.gap
        known = _PRIOR if self.gap else 0
        return left * (now - job.read + known * self.gap) / max(1, sampled - 1 + known)


def _average(before: float, value: float) -> float:
    return before + (value - before) * _WEIGHT if before else value
