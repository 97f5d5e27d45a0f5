"""The protocol between the scheduler and a way to run the weights: token ids in, logits out.

A decoder keeps a number of sequences, one to a slot. It knows nothing of text, sampling, requests or threads: the
scheduler's one thread makes every call.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class Decoder(Protocol):
    """What the scheduler needs of a backend.

    Attributes:
        slots: how many sequences can be kept at once, numbered from 0.
        context_length: the most tokens one sequence can hold.
        capacity: the most tokens all sequences can hold together, at least `context_length`.
        chunk: how many tokens the scheduler prefills between two looks at everything else.
        eos: the ids that end an answer, as the weights' own configuration names them.
    """

    slots: int
    context_length: int
    capacity: int
    chunk: int
    eos: frozenset[int]

    def prefill(self, slot: int, ids: Sequence[int], *, last: bool) -> np.ndarray | None:
        """Appends a part of a prompt to a slot's sequence.

        Args:
            slot: the sequence.
            ids: 1 to `chunk` token ids.
            last: whether the prompt ends here.

        Returns:
            For the last part (vocabulary,) float32 logits for the position behind it, else None. The array is valid
            until the next call.
        """

    def decode(self, tokens: Mapping[int, int]) -> Mapping[int, np.ndarray]:
        """Appends one token to each of several slots' sequences, in one step.

        Args:
            tokens: slot -> token id; at least one.

        Returns:
            slot -> (vocabulary,) float32 logits for the next position, valid until the next call.
        """

    def rewind(self, slot: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a slot's sequence. What follows equals a fresh run."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes a slot's sequence the first `length` tokens of another's. Not called where `slots` is 1."""

    def close(self) -> None:
        """Frees what the decoder holds. No call follows."""
