"""The keys and values of several sequences, in memory that is taken and given back page by page.

Knows rows, positions and bytes; no tokens and no graph.
"""

import mmap
import os
import sys
from pathlib import Path

import numpy as np

from ..errors import InvalidRequest

# Anonymous memory that the system is not asked to set aside; Python 3.11 does not name the flag.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_GIVE_BACK = getattr(mmap, "MADV_DONTNEED" if sys.platform == "linux" else "MADV_FREE", None)


class KVCache:
    """One key and one value array for each layer, of shape (rows, heads, capacity, head_size), float32.

    All rows have room for the longest sequence from the start, but only as address space: memory is used for the
    positions that were written, rounded up to a page for each head. So arrays never move, and sequences grow and
    shrink without copies.

    Args:
        rows: how many sequences.
        layers: how many layers have a cache.
        heads: key-value heads.
        length: the most positions of one sequence. `capacity` is this, rounded up to whole pages.
        head_size: numbers in one head.

    Raises:
        OSError: the system has no such memory, or not that much address space.
    """

    def __init__(self, *, rows: int, layers: int, heads: int, length: int, head_size: int):
        if _GIVE_BACK is None:
            raise OSError(f"memory cannot be given back page by page on {sys.platform}")
        position = head_size * 4
        # Each head's part begins with a page of its own, so that whole pages can be given back.
        step = np.lcm(position, mmap.PAGESIZE) // position
        self.capacity = int(-(-length // step) * step)
        self.position_bytes = position_bytes(layers, heads, head_size)
        self.lengths = [0] * rows
        self._heads = heads
        self._head_bytes = self.capacity * position
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._maps = [mmap.mmap(-1, rows * heads * self._head_bytes, flags=flags) for _ in range(2 * layers)]
        shape = (rows, heads, self.capacity, head_size)
        self.arrays = [np.frombuffer(memory, np.float32).reshape(shape) for memory in self._maps]

    def pointer(self, array: int, row: int) -> int:
        """The address of a row's first number in one of the arrays (2 * layer for keys, 2 * layer + 1 for values)."""
        return self.arrays[array].ctypes.data + row * self._heads * self._head_bytes

    def truncate(self, row: int, length: int) -> None:
        """Forgets what a row holds from a position on, and gives the memory back."""
        old, self.lengths[row] = self.lengths[row], length
        for memory in self._maps:
            self._give_back(memory, row, length, old)

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes a row begin with what another one begins with, and end there."""
        self.truncate(target, 0)
        for array in self.arrays:
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target] = length

    def swap(self, left: int, right: int) -> None:
        """Exchanges what two rows hold. Takes memory for one layer's part of a row besides."""
        ahead, behind = (left, right) if self.lengths[left] >= self.lengths[right] else (right, left)
        longer, shorter = self.lengths[ahead], self.lengths[behind]
        for array, memory in zip(self.arrays, self._maps, strict=True):
            kept = array[behind, :, :shorter].copy()
            array[behind, :, :longer] = array[ahead, :, :longer]
            array[ahead, :, :shorter] = kept
            self._give_back(memory, ahead, shorter, longer)
        self.lengths[ahead], self.lengths[behind] = shorter, longer

    def _give_back(self, memory: mmap.mmap, row: int, start: int, end: int) -> None:
        """Gives back the pages that lie wholly behind `start`, of those that positions up to `end` have used."""
        assert _GIVE_BACK is not None
        position = self._head_bytes // self.capacity
        first, last = (-(-at * position // mmap.PAGESIZE) * mmap.PAGESIZE for at in (start, end))
        if first >= last:
            return
        own = row * self._heads * self._head_bytes
        if start == 0:
            memory.madvise(_GIVE_BACK, own, self._heads * self._head_bytes)
            return
        for head in range(self._heads):
            memory.madvise(_GIVE_BACK, own + head * self._head_bytes + first, last - first)


def position_bytes(layers: int, heads: int, head_size: int) -> int:
    """Bytes that one token of one sequence takes: a key and a value in each layer, float32."""
    return 2 * layers * heads * head_size * 4


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or the container's where that is less.

    None where the system does not tell (os.sysconf is Unix's, and not every Unix has these names).
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    # The limits of control groups, version 2 and version 1.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text("ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def held_by(budget: int | None, bytes_each: int, least: int, context_length: int) -> int:
    """How many positions, or blocks of them, a budget holds.

    Args:
        budget: bytes, the setting `kv_budget`; None for a quarter of the machine's memory, or what `least` takes.
        bytes_each: of a position, or of a block.
        least: how many one whole sequence takes.
        context_length: tokens of that sequence, for the message.

    Raises:
        InvalidRequest: it does not hold one whole sequence, or it is not set and the machine's memory is not known.
    """
    if budget is None:
        memory = machine_memory()
        if memory is None:
            raise InvalidRequest(
                "kv_budget", "is not set, and this system does not tell how much memory it has; set it"
            )
        return max(memory // 4 // bytes_each, least)
    if budget < least * bytes_each:
        raise InvalidRequest(
            "kv_budget",
            f"is {budget} bytes, and one sequence of {context_length} tokens takes {least * bytes_each}; "
            "raise it, or set a smaller context_length",
        )
    return budget // bytes_each
