"""Block tables: which blocks of a common store hold each slot's sequence, shared until one of the sequences changes.

Knows blocks, positions and slots; no keys, no values and no token.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .base import Growth


class OutOfBlocks(RuntimeError):
    """A sequence cannot grow: all blocks are in use."""


@dataclass(frozen=True)
class Copy:
    """What is in one block has to be copied to another one before anything is written there."""

    source: int
    target: int


class Blocks:
    """Sequences in blocks, after PagedAttention (Kwon et al. 2023, arXiv:2309.06180).

    A block may be part of several sequences. One that is to be written to belongs to one sequence alone: else that
    sequence gets a block of its own first, and the caller copies what was in the shared one.

    Args:
        count: how many blocks there are, numbered from 0.
        slots: how many sequences.
        size: positions in a block.
    """

    def __init__(self, count: int, slots: int, size: int):
        self.size = size
        self.lengths = [0] * slots  # positions of each sequence
        self.tables: list[list[int]] = [[] for _ in range(slots)]  # a sequence's blocks, in order
        self._users = [0] * count  # of each block: in how many tables it is
        # The lowest is taken first, so that memory is used from the front.
        self._free = list(range(count))[::-1]

    @property
    def free(self) -> int:
        """How many blocks no sequence holds."""
        return len(self._free)

    def taken(self, growths: Iterable[Growth]) -> int:
        """How many blocks sequences take that grow, copies of shared ones included, where no others are kept."""
        users: Counter[int] = Counter()
        writers: Counter[int] = Counter()
        more = 0
        for slot, held, length in growths:
            table = self.tables[slot][: self._blocks(held)]
            users.update(table)
            more += self._blocks(length) - len(table)
            if table and held % self.size and held < length:
                writers[table[-1]] += 1
        # Of those that write to one block, the last one left may keep it.
        return len(users) + more + sum(min(count, users[block] - 1) for block, count in writers.items())

    def grow(self, lengths: Mapping[int, int]) -> list[Copy]:
        """Makes sequences longer: all of them, or none.

        Args:
            lengths: slot -> its new length.

        Returns:
            What has to be copied before the new positions are written.

        Raises:
            OutOfBlocks: there are not enough blocks; nothing has changed.
        """
        ends = [max(length, lengths.get(slot, 0)) for slot, length in enumerate(self.lengths)]
        taken = self.taken(map(Growth, range(len(ends)), self.lengths, ends))
        if (needed := taken - (len(self._users) - self.free)) > self.free:
            raise OutOfBlocks(f"{needed} blocks of {self.size} tokens are needed, and {self.free} are free")
        copies = []
        for slot, length in lengths.items():
            table = self.tables[slot]
            if length > self.lengths[slot]:
                if self._writes_to_shared(slot):
                    shared, table[-1] = table[-1], self._take()
                    self._drop(shared)
                    copies.append(Copy(shared, table[-1]))
                table += [self._take() for _ in range(self._blocks(length) - len(table))]
                self.lengths[slot] = length
        return copies

    def truncate(self, slot: int, length: int) -> None:
        """Forgets a sequence's positions from `length` on."""
        table, kept = self.tables[slot], self._blocks(length)
        for block in reversed(table[kept:]):
            self._drop(block)
        del table[kept:]
        self.lengths[slot] = min(length, self.lengths[slot])

    def share(self, source: int, target: int, length: int) -> None:
        """Makes a slot's sequence the first `length` positions of another's, in the same blocks."""
        if source == target:
            return self.truncate(target, length)
        self.truncate(target, 0)
        self.tables[target] = self.tables[source][: self._blocks(length)]
        for block in self.tables[target]:
            self._users[block] += 1
        self.lengths[target] = length
        return None

    def _blocks(self, length: int) -> int:
        return -(-length // self.size)

    def _writes_to_shared(self, slot: int) -> bool:
        """Whether the sequence's next position is in a block that others hold too."""
        return bool(self.lengths[slot] % self.size) and self._users[self.tables[slot][-1]] > 1

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            self._free.append(block)
