"""Run with: python -m pytest tests/test_kv.py"""

import mmap
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_mlflow.runtime.decoders.kv import KVCache, held_by, machine_memory, position_bytes
from phi3_mlflow.runtime.errors import InvalidRequest

ROWS, HEADS, SIZE = 4, 2, 32


def cache(length=100, rows=ROWS, layers=2):
    return KVCache(rows=rows, layers=layers, heads=HEADS, length=length, head_size=SIZE)


def write(kv, row, start, end, mark):
    """Writes positions as the graph would, each with numbers of its own."""
    for index, array in enumerate(kv.arrays):
        for head in range(HEADS):
            for at in range(start, end):
                array[row, head, at] = [hash((index, head, at, mark)) % 9973] * SIZE
    kv.lengths[row] = end


def holds(kv, row):
    """What a row holds, position by position."""
    return [tuple(float(array[row, head, at, 0]) for array in kv.arrays for head in range(HEADS))
            for at in range(kv.lengths[row])]  # fmt: skip


def test_rows_hold_their_own_through_random_swaps_copies_and_truncations():
    kv, random_ = cache(), random.Random(0)
    expected = [[] for _ in range(ROWS)]
    for step in range(300):
        row, other = random_.sample(range(ROWS), 2)
        action = random_.choice(["write", "write", "swap", "truncate", "copy"])
        if action == "write":
            end = min(kv.lengths[row] + random_.randint(1, 40), 100)
            write(kv, row, kv.lengths[row], end, step)
            expected[row] += holds(kv, row)[len(expected[row]) :]
        elif action == "swap":
            kv.swap(row, other)
            expected[row], expected[other] = expected[other], expected[row]
        elif action == "truncate":
            length = random_.randint(0, kv.lengths[row])
            kv.truncate(row, length)
            del expected[row][length:]
        else:
            length = random_.randint(0, kv.lengths[row])
            kv.copy(row, other, length)
            expected[other] = expected[row][:length]
        assert [holds(kv, row) for row in range(ROWS)] == expected


def test_the_capacity_is_the_length_in_whole_pages():
    page = mmap.PAGESIZE // (SIZE * 4)  # positions
    assert [cache(length).capacity for length in (1, page, page + 1, 5 * page)] == [page, page, 2 * page, 5 * page]
    kv = cache()
    assert kv.pointer(1, 2) - kv.pointer(1, 1) == kv.arrays[1][0].nbytes


def test_a_position_takes_a_key_and_a_value_in_every_layer():
    # Phi-3-mini's: 32 layers, 32 heads of 96 numbers.
    assert position_bytes(32, 32, 96) == 786432
    assert cache().position_bytes == sum(array[0, :, 0].nbytes for array in cache().arrays)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_used_for_what_was_written_and_given_back_when_it_is_forgotten():
    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6

    before = used()
    kv = cache(8192, rows=64)  # 2 GB of address space
    assert used() - before < 20
    for row in (3, 5):
        for array in kv.arrays:
            array[row, :, :8192] = 1
        kv.lengths[row] = 8192
    written = used() - before
    assert written == pytest.approx(2 * 8192 * kv.position_bytes / 1e6, rel=0.2)
    kv.truncate(3, 2048)
    assert used() - before == pytest.approx(written * 0.625, rel=0.2)
    kv.swap(3, 5)
    assert used() - before == pytest.approx(written * 0.625, rel=0.2)
    kv.truncate(3, 0)
    kv.truncate(5, 0)
    assert used() - before < 20
    assert not np.any(kv.arrays[0][3])


def test_the_machines_memory_is_known():
    assert 2**28 < machine_memory() < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_swap_takes_memory_for_one_layers_part_besides(monkeypatch):
    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    kv = cache(8192, rows=2, layers=16)
    for array in kv.arrays:
        array[0] = 1
    kv.lengths[0] = 8192
    before, most, give_back = used(), [], kv._give_back

    def watched(*arguments):
        most.append(used())
        give_back(*arguments)

    monkeypatch.setattr(kv, "_give_back", watched)
    kv.swap(0, 1)
    part = kv.arrays[0][0].nbytes
    assert len(most) == 32
    assert max(most) - before < 2.5 * part
    assert np.all(kv.arrays[31][1] == 1)


def test_a_system_that_does_not_tell_its_memory_is_asked_for_nothing(monkeypatch):
    monkeypatch.delattr("os.sysconf")
    assert machine_memory() is None
    with pytest.raises(InvalidRequest, match=r"`kv_budget` is not set, and this system does not tell .*; set it"):
        held_by(None, 1000, 64, 64)
    assert held_by(64_000, 1000, 64, 64) == 64


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_name_that_the_system_does_not_know_is_no_error(monkeypatch, error):
    def sysconf(name):
        raise error(name)

    monkeypatch.setattr("os.sysconf", sysconf)
    assert machine_memory() is None
