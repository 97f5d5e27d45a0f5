"""The int4 ONNX model through plain onnxruntime on the CPU: several sequences, decoded together.

Runs the folder that onnxruntime-genai runs. Its graph takes rows of different lengths where past and present are the
same memory and the attention mask's row sums are the lengths.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import exported
from .base import CannotBatch, Decoder, Part, context_within
from .exported import Exported
from .kv import KVCache, held_by, position_bytes
from .processor import ONNXRUNTIME_COST

# Read by onnxruntime when it is first imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort

# Prepared bindings that are kept; each names all layers' keys and values.
_MAX_BINDINGS = 64
# Rows that decode together differ from rows alone by rounding: by less than a hundredth of the logits' spread, where
# it was measured. A graph that mixes rows or positions up is off by the whole spread. Both as shares of the spread.
_TOLERANCE = 0.1


class BatchedDecoder(Decoder):
    """One onnxruntime session that decodes several rows in one step.

    A row's tokens are those it would get alone, but for rounding: matrix products of several rows add up in another
    order, which can turn the choice between two tokens that are all but equally likely.

    Args:
        folder: holds genai_config.json and the ONNX file with its data.
        slots: how many sequences, at least 1.
        context_length: at most this many tokens for one sequence; None for all that the model has.
        threads: for the matrix products; None leaves it to onnxruntime (one for each physical core).
        kv_budget: bytes that the keys and values of all sequences may take together, at least one whole sequence.
            None for a quarter of the machine's memory.

    Attributes:
        least_width: of the attention mask, in tokens; a graph with two rotary tables chooses one of them by that.

    Raises:
        CannotBatch: the folder cannot be loaded this way; the message says why.
        InvalidRequest: the budget does not hold one whole sequence, or the context_length is more than the weights
            have.
    """

    engine = "onnxruntime"
    mixed = False
    cost = ONNXRUNTIME_COST
    switch = 0
    # As for onnxruntime-genai, so that prompts are computed in the same company and give the same logits. It is how
    # long the other sequences wait: 0.5 to 0.7 s at full size on two cores.
    chunk = 16

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        context_length: int | None = None,
        threads: int | None = None,
        kv_budget: int | None = None,
    ):
        self.slots = slots
        self.least_width = 0
        shape = exported.read(folder)
        self.eos = shape.eos
        self.context_length = context_within(context_length, shape.context_length)
        token_bytes = position_bytes(shape.layers, shape.heads, shape.head_size)
        self.capacity = held_by(kv_budget, token_bytes, self.context_length, self.context_length)
        options = ort.SessionOptions()
        # A pattern would be kept for every length of the mask.
        options.enable_mem_pattern = False
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(folder / shape.filename), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises whatever its C++ side throws
            raise CannotBatch(f"onnxruntime cannot load {folder / shape.filename}: {error}") from error
        self._vocabulary = _check_graph(self._session, shape)
        self._shape = shape
        try:
            self._kv = KVCache(
                rows=slots,
                layers=shape.layers,
                heads=shape.heads,
                length=self.context_length,
                head_size=shape.head_size,
            )
        except OSError as error:
            raise CannotBatch(f"the memory for {slots} sequences cannot be had: {error}") from error
        self._rows = list(range(slots))  # slot -> row
        self._slots = list(range(slots))  # row -> slot
        self._decoded = range(0)  # the rows of the last decode
        self._bindings: dict[tuple[int, int, bool], Any] = {}
        self._prove()

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        if len(parts) == 1:
            ((slot, part),) = parts.items()
            if not self._kv.lengths[self._rows[slot]]:
                self._move_beside_the_others(slot)
            row = self._rows[slot]
            if len(part.ids) == 1:
                self._decoded = range(row, row + 1)
            logits = self._run(row, np.asarray([part.ids], np.int64), wanted=part.logits > 0)
            return {slot: logits[0, -part.logits :]} if part.logits else {}
        rows = self._decoded = self._gather({self._rows[slot] for slot in parts})
        slots = [self._slots[row] for row in rows]
        logits = self._run(rows.start, np.asarray([parts[slot].ids for slot in slots], np.int64))
        return {slot: logits[place] for place, slot in enumerate(slots)}

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        self._kv.truncate(self._rows[slot], length)

    def copy(self, source: int, target: int, length: int) -> None:
        """See Decoder."""
        self._kv.copy(self._rows[source], self._rows[target], length)

    def close(self) -> None:
        """See Decoder."""
        self._bindings.clear()
        del self._session, self._kv

    def _gather(self, rows: Collection[int]) -> range:
        """Makes the given rows neighbours, by copying as little as possible; the graph takes no gaps."""
        count, lengths = len(rows), self._kv.lengths
        first = min(rows)
        if max(rows) - first < count:
            return range(first, first + count)

        def moved(start: int) -> int:
            window = range(start, start + count)
            return sum(lengths[row] for row in rows if row not in window) + sum(
                lengths[row] for row in window if row not in rows
            )

        start = min(range(self.slots - count + 1), key=moved)
        window = range(start, start + count)
        outside = [row for row in rows if row not in window]
        for row, hole in zip(outside, [row for row in window if row not in rows], strict=True):
            self._swap(row, hole)
        return window

    def _move_beside_the_others(self, slot: int) -> None:
        """Gives a slot that holds nothing the free row next to those that decode, which costs nothing."""
        rows = self._decoded or range(1)
        free = [row for row, length in enumerate(self._kv.lengths) if length == 0]
        nearest = min(free, key=lambda row: max(rows.start - row, row - rows.stop, 0))
        self._swap(self._rows[slot], nearest)

    def _swap(self, left: int, right: int) -> None:
        if left == right:
            return
        self._kv.swap(left, right)
        self._slots[left], self._slots[right] = self._slots[right], self._slots[left]
        self._rows[self._slots[left]], self._rows[self._slots[right]] = left, right

    def _run(self, row: int, ids: np.ndarray, *, wanted: bool = True) -> np.ndarray:
        """Appends ids to neighbouring rows.

        Args:
            row: the first row.
            ids: (rows, tokens); several tokens for one row only.
            wanted: whether the logits are.

        Returns:
            (rows, tokens, vocabulary) float32 logits; nothing of use where they are not wanted.
        """
        count, new = ids.shape
        lengths = self._kv.lengths
        for index in range(row, row + count):
            lengths[index] += new
        ends = np.asarray(lengths[row : row + count])
        mask = (np.arange(max(ends.max(), self.least_width)) < ends[:, None]).astype(np.int64)
        logits = np.empty((count, new, self._vocabulary) if wanted else 0, np.float32)
        binding = self._binding(row, count, wanted)
        shape = self._shape
        positions = ends[:, None] - new + np.arange(new)
        binding.bind_input(shape.input_ids, "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input(shape.attention_mask, "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
        if shape.position_ids is not None:
            binding.bind_input(shape.position_ids, "cpu", 0, np.int64, positions.shape, positions.ctypes.data)
        if wanted:
            binding.bind_output(shape.logits, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def _binding(self, row: int, count: int, wanted: bool) -> Any:
        key = row, count, wanted
        if key not in self._bindings:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            binding = self._session.io_binding()
            kv, shape = self._kv, self._shape
            size = (count, shape.heads, kv.capacity, shape.head_size)
            for index, (past, present) in enumerate(zip(shape.past, shape.present, strict=True)):
                pointer = kv.pointer(index, row)
                binding.bind_input(past, "cpu", 0, np.float32, size, pointer)
                binding.bind_output(present, "cpu", 0, np.float32, size, pointer)
            self._bindings[key] = binding
        return self._bindings[key]

    def _prove(self) -> None:
        """Runs two rows of different lengths together and each alone, which only a fitting graph does alike."""
        prompts = [[5, 6, 7, 8, 9], [10, 11, 12]][: self.slots]
        last = Part([13], 1)
        try:
            for slot, prompt in enumerate(prompts):
                self.step({slot: Part(prompt[:2])})
                self.step({slot: Part(prompt[2:], 1)})
            alone = [self.step({slot: last})[slot].copy() for slot in range(len(prompts))]
            for slot, prompt in enumerate(prompts):
                self.rewind(slot, len(prompt))
            together = self.step(dict.fromkeys(range(len(prompts)), last))
            for slot, prompt in enumerate(prompts):
                self.rewind(slot, 0)
                # A prompt at once, where it was in parts before.
                self.step({slot: Part([*prompt, 13])})
                self.rewind(slot, len(prompt))
                once = self.step({slot: last})[slot]
                for other in (together[slot], once):
                    if not np.abs(alone[slot] - other).max() <= _TOLERANCE * np.std(alone[slot]):
                        raise CannotBatch("the graph gives other logits to rows that are decoded together")
                self.rewind(slot, 0)
        except CannotBatch:
            raise
        except Exception as error:  # onnxruntime raises whatever its C++ side throws
            raise CannotBatch(f"the graph does not run with past and present in the same memory: {error}") from error


def check_budget(folder: Path, context_length: int | None, budget: int) -> None:
    """Checks a budget without loading the weights.

    Args:
        folder: as for BatchedDecoder.
        context_length: as for BatchedDecoder.
        budget: bytes.

    Raises:
        CannotBatch: the folder's configuration does not allow batching.
        InvalidRequest: the budget does not hold one whole sequence.
    """
    shape = exported.read(folder)
    length = context_within(context_length, shape.context_length)
    held_by(budget, position_bytes(shape.layers, shape.heads, shape.head_size), length, length)


def _check_graph(session: Any, shape: Exported) -> int:
    """The logits' last dimension, where the graph has the inputs and outputs that genai_config.json names."""
    expected = {shape.input_ids: "tensor(int64)", shape.attention_mask: "tensor(int64)"}
    if shape.position_ids is not None:
        expected[shape.position_ids] = "tensor(int64)"
    expected |= dict.fromkeys(shape.past, "tensor(float)")
    _compare("input", expected, session.get_inputs())
    _compare("output", dict.fromkeys([shape.logits, *shape.present], "tensor(float)"), session.get_outputs())
    vocabulary = next(output.shape[-1] for output in session.get_outputs() if output.name == shape.logits)
    if not isinstance(vocabulary, int):
        raise CannotBatch(f"the graph's output {shape.logits} has no fixed number of logits")
    return vocabulary


def _compare(kind: str, expected: Mapping[str, str], found: Sequence[Any]) -> None:
    has = {value.name: value.type for value in found}
    for name in sorted(has.keys() | expected.keys()):
        if has.get(name) != expected.get(name):
            problem = f"the graph's {kind} {name} is {has.get(name, 'missing')}"
            raise CannotBatch(f"{problem}; batching takes {expected.get(name, 'no such ' + kind)}")
