"""Block tables against sequences that are simply lists. Run with: python -m pytest tests/test_blocks.py"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.runtime.decoders.base import Growth
from phi3_mlflow.runtime.decoders.blocks import Blocks, Copy, OutOfBlocks

SIZE, COUNT, SLOTS = 4, 12, 3


class Store:
    """Blocks with something in them, and what each sequence has to read back."""

    def __init__(self):
        self.blocks = Blocks(COUNT, SLOTS, SIZE)
        self.content = [[None] * SIZE for _ in range(COUNT)]
        self.expected = [[] for _ in range(SLOTS)]
        self._new = itertools.count()

    def grow(self, lengths):
        for copy in self.blocks.grow(lengths):
            self.content[copy.target] = list(self.content[copy.source])
        for slot, length in lengths.items():
            while len(self.expected[slot]) < length:
                at, value = len(self.expected[slot]), next(self._new)
                self.content[self.blocks.tables[slot][at // SIZE]][at % SIZE] = value
                self.expected[slot].append(value)

    def read(self, slot):
        values = [value for block in self.blocks.tables[slot] for value in self.content[block]]
        return values[: self.blocks.lengths[slot]]

    def check(self):
        for slot, expected in enumerate(self.expected):
            assert self.read(slot) == expected
            assert len(self.blocks.tables[slot]) == -(-len(expected) // SIZE)
        assert self.blocks.free == COUNT - len({block for table in self.blocks.tables for block in table})


slots, lengths = st.integers(0, SLOTS - 1), st.integers(0, COUNT * SIZE)
operations = st.one_of(
    st.tuples(st.just("grow"), st.dictionaries(slots, st.integers(1, 3 * SIZE), min_size=1)),
    st.tuples(st.just("truncate"), slots, lengths),
    st.tuples(st.just("share"), slots, slots, lengths),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operations, max_size=30))
def test_whatever_is_shared_cut_and_grown_each_sequence_reads_what_it_wrote(steps):
    store = Store()
    for operation, *arguments in steps:
        if operation == "grow":
            wanted = {slot: len(store.expected[slot]) + more for slot, more in arguments[0].items()}
            tables = [list(table) for table in store.blocks.tables]
            ends = {slot: max(wanted.get(slot, 0), len(store.expected[slot])) for slot in range(SLOTS)}
            taken = store.blocks.taken(Growth(slot, len(store.expected[slot]), end) for slot, end in ends.items())
            try:
                store.grow(wanted)
            except OutOfBlocks:
                assert taken > COUNT
                assert store.blocks.tables == tables
            else:
                # What was foretold is what it took.
                assert store.blocks.free == COUNT - taken
        elif operation == "truncate":
            slot, length = arguments
            store.blocks.truncate(slot, length)
            del store.expected[slot][length:]
        else:
            source, target, length = arguments
            length = min(length, len(store.expected[source]))
            store.blocks.share(source, target, length)
            store.expected[target] = store.expected[source][:length]
        store.check()


def test_a_prefix_that_several_sequences_share_takes_its_blocks_once():
    blocks = Blocks(10, 4, SIZE)
    blocks.grow({0: 16})
    for slot in (1, 2, 3):
        blocks.share(0, slot, 16)
    assert blocks.free == 6
    assert blocks.grow({0: 17, 1: 17, 2: 17, 3: 17}) == []
    assert blocks.free == 2


def test_a_shared_block_is_copied_for_the_one_that_writes_and_the_last_one_keeps_it():
    blocks = Blocks(10, 3, SIZE)
    blocks.grow({0: 6})
    blocks.share(0, 1, 6)
    blocks.share(0, 2, 5)
    assert blocks.taken([Growth(0, 6, 7), Growth(1, 6, 7), Growth(2, 5, 5)]) == 4
    assert blocks.taken([Growth(0, 6, 7), Growth(1, 6, 7), Growth(2, 5, 7)]) == 4
    assert blocks.taken([Growth(0, 6, 7), Growth(1, 6, 7)]) == 3
    assert blocks.grow({1: 7}) == [Copy(1, 2)]
    assert blocks.grow({0: 7, 2: 6}) == [Copy(1, 3)]
    assert blocks.tables == [[0, 3], [0, 2], [0, 1]]


def test_a_sequence_that_does_not_fit_changes_nothing():
    blocks = Blocks(2, 2, SIZE)
    blocks.grow({0: 5})
    with pytest.raises(OutOfBlocks, match="1 blocks of 4 tokens are needed, and 0 are free"):
        blocks.grow({0: 8, 1: 1})
    assert (blocks.lengths, blocks.tables) == ([5, 0], [[0, 1], []])
    blocks.truncate(0, 4)
    blocks.grow({1: 1})
    assert blocks.tables == [[0], [1]]


def test_lengths_that_are_held_already_take_nothing():
    blocks = Blocks(2, 2, SIZE)
    blocks.grow({0: 5})
    blocks.share(0, 1, 5)
    assert blocks.grow({0: 5, 1: 3}) == []
    assert blocks.free == 0


def test_sequences_that_are_still_to_begin_like_another_one_take_their_own_blocks_only():
    blocks = Blocks(10, 4, SIZE)
    blocks.grow({0: 10, 3: 4})
    assert blocks.taken([Growth(0, 10, 13)]) == 4
    assert blocks.taken([Growth(0, 10, 13), Growth(0, 8, 13)]) == 6
    assert blocks.taken([Growth(0, 10, 13), Growth(0, 9, 13)]) == 6
    assert blocks.taken([Growth(0, 10, 13), Growth(0, 0, 13)]) == 8
    assert blocks.taken([]) == 0
