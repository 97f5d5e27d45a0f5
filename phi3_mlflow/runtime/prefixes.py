"""What a decoder's sequences hold, and which of them a prompt begins with. Knows no queue and no thread."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .decoders.base import Decoder, Growth
from .generation import Generation
from .jobs import Job

_logger = logging.getLogger(__name__)

Reuse = Literal["exact", "all"]
# Tokens that are copied at least in the time in which one is computed: at full size 47 ms against 0.5 to 2.5 ms.
_COPIES = 16


@dataclass
class Slot:
    """One sequence of the decoder, and the job that has it.

    Attributes:
        tokens: what the sequence holds.
        usable: how many of them, from the first, another prompt may begin with.
        pending: what is still to be prefilled: of the prompt, or without a job of the last answer.
        turn: the job's place in the order of admission.
        renew: whether idle time should compute the answer again.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    usable: int = 0
    job: Job | None = None
    pending: Sequence[int] = ()
    turn: int = 0
    renew: bool = False

    @property
    def kept(self) -> int:
        """How many tokens the slot keeps without a job, those included that idle time is computing again."""
        return len(self.tokens) + len(self.pending)


class Prefixes:
    """The slots of a decoder, and the prefixes of prompts that they keep.

    With `reuse` at "exact", only whole chunks that prefill wrote are used again, so that every token of a prompt is
    computed in the same company as in a fresh run (or by a decoder that does not depend on it, see Decoder.mixed). What
    decoding wrote, one token or several that were proposed, is close to that, and not bit-equal. With "all" it is used
    as it is.

    Args:
        decoder: called by the methods that change what a slot holds.
        reuse: which keys and values of earlier prompts and answers a prompt may begin with.
    """

    def __init__(self, decoder: Decoder, reuse: Reuse):
        self.slots = [Slot(index) for index in range(decoder.slots)]
        self.reuse = reuse
        self._decoder = decoder
        # Prefixes are used again in multiples of so many tokens.
        self._unit = decoder.chunk if reuse == "exact" else 1

    def held(self, *, running: bool = False) -> int:
        """How much of the decoder's capacity is in use, of answers that have a slot alone where that is asked for."""
        slots = [slot for slot in self.slots if slot.job is not None or not running]
        return self._decoder.room(Growth(slot.index, len(slot.tokens), len(slot.tokens)) for slot in slots)

    def free(self) -> list[Slot]:
        """The slots without a job."""
        return [slot for slot in self.slots if slot.job is None]

    def choose(self, generation: Generation) -> Slot | None:
        """The free slot that loses next to nothing by beginning with the prompt, or else was used longest ago.

        Returns None where the decoder has no room for the longest answer until another one ends.
        """
        free = self.free()
        best = max(free, key=lambda slot: self._reusable(slot, generation))
        if not self._fits(generation, best):
            return None
        shared = self._reusable(best, generation)
        lost = best.usable - shared
        if len(self.slots) == 1 or lost < self._unit or lost * _COPIES <= shared:
            return best
        if shared and not self._fits(generation, best, best):
            return best
        return min(free, key=lambda slot: (slot.usable >= self._unit, slot.turn))

    def enter(self, slot: Slot, job: Job) -> None:
        """Gives a slot to a job: leaves there what the prompt begins with, and notes what is still to be prefilled.

        Others are forgotten, longest unused first, until the rest has room.
        """
        generation = job.generation
        kept = self._decoder.reserve(slot.index, generation.most_tokens)
        self.keep(slot, self._reusable(slot, generation) if kept else 0)
        source = self._source(slot, generation)
        idle = sorted((other for other in self.free() if other is not source), key=lambda other: other.turn)
        while idle and not self._fits(generation, slot, *idle, *((source,) if source.job is None else ())):
            self.forget(idle.pop(0))
        job.reused = len(slot.tokens)
        slot.pending = generation.prompt[job.reused :]
        self.share(slot, job)

    def share(self, slot: Slot, job: Job) -> int:
        """Begins a slot with a copy of what another one has come to hold of the prompt, if that is more.

        Returns how many tokens need not be computed for it.
        """
        source = self._source(slot, job.generation)
        length, before = self._reusable(source, job.generation), len(slot.tokens)
        if source is slot or length <= before:
            return 0
        self._decoder.copy(source.index, slot.index, length)
        slot.tokens, slot.usable = source.tokens[:length], length
        slot.pending = job.generation.prompt[length:]
        job.reused += length - before
        return length - before

    def awaits(self, slot: Slot, others: Iterable[Slot]) -> bool:
        """Whether a part of a slot's prompt is about to be computed for one of the others."""
        if slot.job is None or slot.job.generation.reads_prompt:
            return False
        prompt, held = slot.job.generation.prompt, len(slot.tokens)
        limit = len(prompt) - 1
        prompts = [other.job.generation.prompt for other in others if other.job is not None]
        return any(_common(other, prompt, limit) // self._unit * self._unit > held for other in prompts)

    def _source(self, slot: Slot, generation: Generation) -> Slot:
        """The slot that holds most of what the prompt begins with; the given one where none holds more."""
        return max([slot, *self.slots], key=lambda other: self._reusable(other, generation))

    def _fits(self, generation: Generation, slot: Slot, *idle: Slot) -> bool:
        """Whether the longest answer has room beside those that run, and some idle slots.

        Args:
            generation: begins with what is shared most.
            slot: which one it is, or may be, in.
            idle: their tokens are to be kept.
        """
        source = self._source(slot, generation)
        growths = [Growth(source.index, self._reusable(source, generation), generation.most_tokens)]
        for other in self.slots:
            if other.job is not None and other is not slot:
                growths.append(Growth(other.index, len(other.tokens), other.job.generation.most_tokens))
        # Idle time may write again what is not usable.
        growths += [Growth(other.index, other.usable, other.kept) for other in idle]
        return self._decoder.room(growths) <= self._decoder.capacity

    def write(self, slot: Slot, ids: Sequence[int]) -> bool:
        """Notes what the decoder appended. Returns whether it was a part of `pending`."""
        prefilled = bool(slot.pending)
        slot.tokens += ids
        slot.pending = slot.pending[len(ids) :]
        if prefilled or self.reuse == "all":
            slot.usable = len(slot.tokens)
        return prefilled

    def drop(self, slot: Slot, count: int) -> None:
        """Forgets the last tokens, which were proposed and did not come."""
        if count:
            del slot.tokens[-count:]
            slot.usable = min(slot.usable, len(slot.tokens))
            self._decoder.rewind(slot.index, len(slot.tokens))

    def keep(self, slot: Slot, length: int) -> None:
        """Forgets all but the first tokens."""
        # Also where nothing is left over: a decoder that failed may hold more than the slot knows of.
        self._decoder.rewind(slot.index, length)
        del slot.tokens[length:]
        slot.usable = length
        slot.pending = ()

    def forget(self, slot: Slot) -> None:
        """Makes a slot as good as new. Should the decoder fail at that, the slot's next job will try again."""
        slot.tokens.clear()
        slot.usable, slot.pending, slot.renew = 0, (), False
        try:
            self._decoder.rewind(slot.index, 0)
        except Exception:
            _logger.exception("the decoder failed while slot %d was emptied", slot.index)

    def renewable(self) -> list[Slot]:
        """Idle slots of which a next turn could begin with more, were it prefilled."""
        chunk = self._decoder.chunk
        idle = [slot for slot in self.slots if slot.job is None and slot.renew and slot.usable]
        return [slot for slot in idle if slot.pending or slot.usable // chunk < len(slot.tokens) // chunk]

    def reopen(self, slot: Slot) -> None:
        """Turns the part of an answer that decoding wrote into one that is to be prefilled."""
        chunk = self._decoder.chunk
        kept, whole = (length // chunk * chunk for length in (slot.usable, len(slot.tokens)))
        answer = slot.tokens[kept:whole]
        self.keep(slot, kept)
        slot.pending = answer

    def _reusable(self, slot: Slot, generation: Generation) -> int:
        """How many of the slot's tokens the prompt may begin with; at least one of its own is left to compute."""
        prompt = generation.prompt
        limit = 0 if generation.reads_prompt else min(slot.usable, len(prompt) - 1)
        return _common(slot.tokens, prompt, limit) // self._unit * self._unit


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many tokens two sequences begin with alike, at most the limit."""
    pairs = zip(itertools.islice(one, limit), other, strict=False)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(limit, len(one), len(other)))
