"""What a decoder computes next: the last token of each answer, tokens proposed to follow it, and parts of prompts.

Knows slots, sizes and the time that steps took; calls no step.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from .decoders.base import Decoder, Part
from .prefixes import Prefixes, Slot
from .statistics import Counts

_logger = logging.getLogger(__name__)

# Seconds that may pass between two tokens of an answer while prompts are read, where nobody says.
TOKEN_GAP = 0.25
# Tokens of prompts in a step: at the least, and in multiples, where answers wait for it.
_LEAST = 4
# Tokens in a step that reads prompts: at the most, for the sake of memory and of those who wait for its end; and above
# the size of a block in multiples of it, which OpenVINO's products are made for: at full size 64 take 1.0 s, 68 take
# 1.6 s, and 128 take 1.9 s.
_MOST, _BLOCK = 256, 64
# Above so many answers there is no time to be saved by proposals: a step is full of them without.
_PROPOSING = 2
# How much of the pace the latest step says.
_WEIGHT = 0.5


class Steps:
    """Composes steps, so that answers go on while prompts are read.

    Where the decoder mixes them, a step reads as much of the prompts as it can in the time that may pass between two
    tokens of an answer, which is found out by measuring. What is proposed to follow an answer's last token does not
    depend on time: an answer that runs alone repeats.

    Args:
        decoder: what it can take decides what a step may hold.
        prefixes: which slots there are, and what they hold.
        counts: of what is proposed, and found in the cache.
        fail: called with a slot whose answer cannot go on, and why.
        gap: seconds that may pass between two tokens of an answer while prompts are read.
        propose: whether tokens may be proposed.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefixes: Prefixes,
        counts: Counts,
        fail: Callable[[Slot, Exception], None],
        *,
        gap: float,
        propose: bool,
    ):
        self._decoder = decoder
        self._prefixes = prefixes
        self._counts = counts
        self._fail = fail
        self._gap = gap
        self._propose = propose
        self._pace = 0.0  # seconds of a step of one token, reckoned from steps of any size; 0 before there was one

    def __iter__(self) -> Iterator[Mapping[int, Part]]:
        """The steps until all answers have got a token, each composed when the one before is done; some are empty."""
        if self._decoder.mixed:
            answers = self._answers()
            least = _LEAST if answers else self._decoder.chunk
            # Where nobody waits for a token, a step may take twice the time: prompts are read faster so.
            room = self._room(_tokens(answers), least, self._gap if answers else 2 * self._gap)
            parts = answers | self._prompts(room, least)
            began = time.monotonic()
            yield parts
            if parts:
                pace = (time.monotonic() - began) / (1 + (_tokens(parts) - 1) * self._decoder.cost)
                self._pace += (pace - self._pace) * (_WEIGHT if self._pace else 1.0)
        else:
            yield self._prompts(self._decoder.chunk, self._decoder.chunk)
            yield self._answers()

    def _room(self, taken: int, least: int, seconds: float) -> int:
        """How many tokens of prompts have room beside so many of answers in that time; at least as many as that."""
        fitting = 1 + (seconds / self._pace - 1) / self._decoder.cost if self._pace else 0
        size = int(min(fitting, _MOST))
        return max((size if size < _BLOCK else size // _BLOCK * _BLOCK) - taken, least)

    def _answers(self) -> dict[int, Part]:
        """The last token of every answer, and what is proposed to follow it."""
        last = [(slot, slot.job.generation.next) for slot in self._prefixes.slots if slot.job is not None]
        running = [(slot, token) for slot, token in last if token is not None]
        most = 0
        if self._propose and 0 < len(running) <= (_PROPOSING if self._decoder.mixed else 1):
            most = self._decoder.chunk // len(running) - 1
        parts = {}
        for slot, token in running:
            assert slot.job is not None
            # What is only proposed does not take a sequence over the switch, from where it may have to go back.
            ahead = self._decoder.switch - len(slot.tokens)
            here = min(most, ahead - 1) if ahead > 0 else most
            try:
                proposed = slot.job.generation.propose(here, self._decoder.cost) if here else []
            except Exception as error:
                self._fail(slot, error)
                continue
            self._counts.drafts += bool(proposed)
            self._counts.proposed += len(proposed)
            parts[slot.index] = Part([token, *proposed], 1 + len(proposed))
        return parts

    def _prompts(self, room: int, unit: int) -> dict[int, Part]:
        """Parts of prompts: of a single one, or where the decoder mixes them of as many as have room.

        Args:
            room: how many tokens.
            unit: parts end at multiples of it, or where the prompt does. Without company these are whole chunks and
                the rest behind them, as in a fresh run.
        """
        parts: dict[int, Part] = {}
        for slot in self._in_order():
            assert slot.job is not None
            if self._prefixes.awaits(slot, (self._prefixes.slots[index] for index in parts)):
                continue
            try:
                self._counts.cached += self._prefixes.share(slot, slot.job)
            except Exception as error:
                _logger.exception("the decoder failed")
                self._fail(slot, error)
                continue
            ids = slot.pending[: _size(slot, room, unit)]
            wanted = len(ids) if slot.job.generation.reads_prompt else int(len(ids) == len(slot.pending))
            parts[slot.index] = Part(ids, wanted)
            room -= len(ids)
            if room < _LEAST or not self._decoder.mixed:
                break
        return parts

    def _in_order(self) -> Sequence[Slot]:
        """Those whose prompts are to be read, the next one first: who waits longest for what is left to read.

        So a short prompt does not wait for a long one, and no number of short ones stops a long one (after the highest
        response ratio next, Brinch Hansen 1971).
        """
        now = time.monotonic()
        waiting = [(slot, slot.job) for slot in self._prefixes.slots if slot.job is not None and slot.pending]
        waiting.sort(key=lambda one: (-(now - one[1].admitted) / len(one[0].pending), one[0].turn))
        return [slot for slot, _ in waiting]


def _size(slot: Slot, room: int, unit: int) -> int:
    """How many tokens of a prompt have room: up to a multiple of the unit, or what is behind the last one."""
    start, left = len(slot.tokens), len(slot.pending)
    end = start + min(left, room)
    whole = end // unit * unit
    if left <= room and (whole <= start or unit == _LEAST):
        return left
    return (whole if whole > start else end // _LEAST * _LEAST) - start


def _tokens(parts: Mapping[int, Part]) -> int:
    return sum(len(part.ids) for part in parts.values())
