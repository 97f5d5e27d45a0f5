"""The protocol between the scheduler and a way to run the weights: token ids in, logits out.

A decoder keeps a number of sequences, one to a slot. It knows nothing of text, sampling, requests or threads: the
scheduler's one thread makes every call.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import InvalidRequest, Phi3Error


class CannotBatch(Phi3Error):
    """A folder that onnxruntime-genai may be able to run, but not a decoder of several sequences."""


@dataclass(frozen=True)
class Part:
    """What one step computes for one slot.

    Attributes:
        ids: token ids to append to its sequence, at least one.
        logits: for how many of the last positions logits are wanted, at most all of them.
    """

    ids: Sequence[int]
    logits: int = 0


class Growth(NamedTuple):
    """A sequence that begins with the first `held` tokens of a slot's, and may grow to `length`, which is no less."""

    slot: int
    held: int
    length: int


class Decoder(Protocol):
    """What the scheduler needs of a backend.

    Attributes:
        engine: what computes, by its package's name.
        slots: how many sequences can be kept at once, numbered from 0.
        context_length: the most tokens one sequence can hold.
        capacity: the most tokens all sequences can hold together, at least `context_length`; see `room`.
        chunk: prompts are computed in parts of so many tokens.
        mixed: whether one step takes any number of tokens for each of several slots, and keys and values do not depend
            on how a prompt is parted, but for parts of one token. Otherwise a step takes one part alone, or one token
            for each of several slots.
        cost: about how much longer a step takes for each token more, as a share of a step of one token.
        switch: a sequence that gets longer than this is computed anew, which takes long (LongRope); 0 for none.
        eos: the ids that end an answer, as the weights' own configuration names them.
    """

    engine: str
    slots: int
    context_length: int
    capacity: int
    chunk: int
    mixed: bool
    cost: float
    switch: int
    eos: frozenset[int]

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """Appends tokens to the sequences of several slots.

        Args:
            parts: by slot, at least one.

        Returns:
            By slot, where logits are wanted, (part.logits, vocabulary) float32: for the places behind the part's last
            positions. Valid until the next step.

        Raises:
            Exception: the step failed. Until they are rewound, its slots may hold any number of its tokens.
        """

    def rewind(self, slot: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a slot's sequence. What follows equals a fresh run."""

    def reserve(self, slot: int, length: int) -> bool:
        """Makes room for a sequence of so many tokens in a slot. Returns whether what it holds is still there."""
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes a slot's sequence the first `length` tokens of another's. Not called where `slots` is 1."""
        raise RuntimeError(f"{self.engine} keeps one sequence")

    def room(self, growths: Iterable[Growth]) -> int:
        """How much of `capacity` sequences take that grow to their lengths, where no others are kept.

        Changes nothing, and may be called from any thread at any time.
        """
        return sum(growth.length for growth in growths)

    def close(self) -> None:
        """Frees what the decoder holds. No call follows."""


def context_within(asked: int | None, own: int) -> int:
    """The most tokens of one sequence.

    Args:
        asked: the setting `context_length`; None for all that the weights have.
        own: what the weights have.

    Raises:
        InvalidRequest: it asks for more than they have.
    """
    if asked is not None and asked > own:
        raise InvalidRequest("context_length", f"is {asked}, and these weights have {own}; set at most that")
    return asked or own
