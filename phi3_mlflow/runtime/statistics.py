"""What a scheduler is doing and has done, in numbers. Knows no scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What a scheduler is doing, and has done since it began.

    Attributes:
        slots: how many answers can be computed at once.
        running: answers that have a slot.
        waiting: requests that wait to be begun.
        queue_limit: how many may; None for any number.
        capacity: how many tokens the KV cache has room for.
        held: how many tokens it holds, those kept for later prompts included.
        used: how many of them belong to answers that have a slot.
        computed: tokens of prompts that were computed.
        cached: tokens of prompts that were in the KV cache already.
        generated: tokens that were sampled.
        renewed: tokens of answers that idle time computed again.
        steps: of the decoder, those of idle time not counted.
        drafts: how many times tokens were proposed to follow an answer's last one.
        proposed: how many tokens.
        accepted: how many of them came.
        ended: answers that ended with a reason.
        failed: answers that ended with an error.
        alive: whether the scheduler's thread runs and takes requests.
        step_seconds: for how long the present step of the decoder has been going on; 0 between steps.
    """

    slots: int
    running: int
    waiting: int
    queue_limit: int | None
    capacity: int
    held: int
    used: int
    computed: int
    cached: int
    generated: int
    renewed: int
    steps: int
    drafts: int
    proposed: int
    accepted: int
    ended: int
    failed: int
    alive: bool
    step_seconds: float

    @property
    def has_room(self) -> bool:
        """Whether a request that comes now is taken."""
        return self.alive and (self.queue_limit is None or self.waiting < self.queue_limit)


@dataclass
class Counts:
    """What has been done so far; see Statistics. May be kept when the scheduler is gone."""

    computed: int = 0
    cached: int = 0
    generated: int = 0
    renewed: int = 0
    steps: int = 0
    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    ended: int = 0
    failed: int = 0
