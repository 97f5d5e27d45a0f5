"""The int4 ONNX model through OpenVINO's CPU kernels: several sequences with a paged KV cache, any mix in one step.

Runs the folder that onnxruntime-genai runs; the weights stay in its files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from ..errors import InvalidRequest, WeightsError, shorten
from . import exported, onnx_file
from .base import CannotBatch, Decoder, Growth, Part, context_within
from .blocks import Blocks
from .kv import held_by
from .openvino_attention import BLOCK, give_caches, ov, prove_attention
from .openvino_graph import build

KvCache = Literal["u8", "f32"]

# Rows that are computed in other company may differ by rounding: by a hundred-thousandth of the logits' spread where
# it was measured. A graph that mixes rows or positions up is off by the whole spread. Both as shares of the spread.
_TOLERANCE = 0.1
_PROGRESS_AFTER, _PROGRESS_EVERY = 2.0, 1.0  # seconds
_POLL = 500  # milliseconds between two looks of the bar


class OpenVinoDecoder(Decoder):
    """One compiled OpenVINO model whose steps take any number of tokens for each of several slots.

    A sequence's keys and values are in blocks of 32 positions. Sequences that were copied share blocks until one of
    them writes there. Memory is used as blocks are; `kv_budget` bounds it.

    Args:
        folder: holds genai_config.json and the ONNX file with its data, which have to stay as they are meanwhile.
        slots: how many sequences, at least 1.
        context_length: at most this many tokens for one sequence; None for all that the model has.
        threads: for the computation; None leaves it to OpenVINO (one for each physical core).
        kv_budget: bytes that the keys and values of all sequences may take together, at least one whole sequence.
            None for a quarter of the machine's memory.
        kv_cache: how keys and values are kept: "u8" (8 bits, with a scale and a zero point for each token and head) or
            "f32", which takes about 3.7 times as much.
        quiet: whether no bar is shown while the weights are packed, which takes long at full size.

    Raises:
        CannotBatch: the folder cannot be run this way; the message says why.
        InvalidRequest: the budget does not hold one whole sequence, or the context_length is more than the weights
            have.
    """

    # As for the other decoders, so that prompts are computed in the same company.
    engine = "openvino"
    chunk = 16
    # Any number of tokens for each of several slots.
    mixed = True
    # At full size on two cores one token takes 71 ms, and 16 take 242.
    cost = 0.16

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        context_length: int | None = None,
        threads: int | None = None,
        kv_budget: int | None = None,
        kv_cache: KvCache = "u8",
        quiet: bool = False,
    ):
        shape = exported.read(folder)
        if shape.position_ids is not None:
            raise CannotBatch(f"{folder} has the input {shape.position_ids}, which this translation does not know")
        self.slots = slots
        self.eos = shape.eos
        self.context_length = context_within(context_length, shape.context_length)
        if kv_cache not in ("u8", "f32"):
            raise InvalidRequest("kv_cache", f"is {shorten(kv_cache)}; it must be u8 or f32")
        bytes_each = block_bytes(shape.layers, shape.heads, shape.head_size, kv_cache)
        # The longest sequence that there can be, in blocks.
        longest = -(-self.context_length // BLOCK)
        # More than all slots can hold is of no use.
        blocks = min(held_by(kv_budget, bytes_each, longest, self.context_length), slots * longest)
        self.capacity = blocks * BLOCK
        self._blocks = Blocks(blocks, slots, BLOCK)
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._long = [False] * slots  # which of the two rotary tables a sequence was computed with
        bar = tqdm(
            desc="OpenVINO packs the weights",
            bar_format="{desc}: {elapsed}",
            delay=_PROGRESS_AFTER,
            mininterval=_PROGRESS_EVERY,
            miniters=0,
            leave=False,
            disable=quiet,
        )
        with bar:
            try:
                self._load(folder / shape.filename, shape, _properties(threads, kv_cache))
                if (held := sum(cache.byte_size for cache in self._caches)) != blocks * bytes_each:
                    raise CannotBatch(
                        f"OpenVINO takes {held // blocks} bytes for a block of keys and values on this processor, and "
                        f"{bytes_each} are reckoned with"
                    )
                # OpenVINO lays the weights out anew in its first inference, and makes its kernels in the first one of a
                # size: both belong to loading.
                self._infer({0: Part([5] * self.chunk, 1)}, bar)
                self.rewind(0, 0)
                prove_attention(self._heads, _properties(threads, kv_cache), self.context_length)
                self._prove()
            except CannotBatch:
                raise
            except Exception as error:  # OpenVINO raises whatever its C++ side throws
                raise CannotBatch(f"OpenVINO cannot run {folder / shape.filename}: {_line(error)}") from error

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder. Where it raises, the sequences are as they were.

        A model with two rotary tables (LongRope) computes a whole sequence with the table for its length: in the step
        in which one outgrows the first table it is computed anew, which takes as long as its prompt did.
        """
        for slot, part in parts.items():
            end = len(self._ids[slot]) + len(part.ids)
            if end > self.context_length:
                raise ValueError(f"slot {slot} would hold {end} tokens; the context has {self.context_length}")
            self._turn_over(slot, end)
        logits = self._infer(parts)
        for slot, part in parts.items():
            self._ids[slot] += part.ids
        return logits

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        del self._ids[slot][length:]
        self._blocks.truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """See Decoder. It takes no time and no memory: the blocks are shared."""
        self._ids[target] = self._ids[source][:length]
        self._blocks.share(source, target, min(length, self._blocks.lengths[source]))
        self._long[target] = self._long[source]

    def room(self, growths: Iterable[Growth]) -> int:
        """See Decoder. A block that several sequences share counts once."""
        return BLOCK * self._blocks.taken(self._own(growth) for growth in growths)

    def close(self) -> None:
        """See Decoder."""
        self._views.clear()
        self._caches.clear()
        del self._request, self._compiled, self._weights

    def _load(self, path: Path, shape: exported.Exported, properties: Mapping[str, Any]) -> None:
        try:
            built = build(onnx_file.read(path), shape)
        except (OSError, KeyError, WeightsError) as error:
            raise CannotBatch(f"{path} cannot be read: {error!r}") from error
        if (built.layers, built.heads.key, built.heads.size) != (shape.layers, shape.heads, shape.head_size):
            raise CannotBatch(
                f"{path} has {built.layers} layers with {built.heads.key} heads of {built.heads.size} for keys, and "
                f"genai_config.json says {shape.layers}, {shape.heads} and {shape.head_size}"
            )
        self._heads, self.switch, self._weights = built.heads, built.switch or 0, built.weights
        self._compiled = ov.Core().compile_model(built.model, "CPU", dict(properties))
        self._request = self._compiled.create_infer_request()
        self._caches = give_caches(self._compiled, self._request, self.capacity // BLOCK)
        self._views = [cache.data for cache in self._caches]

    def _infer(self, parts: Mapping[int, Part], bar: Any = None) -> dict[int, np.ndarray]:
        """Appends to sequences whose keys and values are up to date.

        Args:
            parts: see Decoder.
            bar: is moved while the work lasts.

        Returns:
            See Decoder. Where it raises, the sequences are as they were.
        """
        starts = {slot: self._blocks.lengths[slot] for slot in parts}
        copies = self._blocks.grow({slot: start + len(parts[slot].ids) for slot, start in starts.items()})
        try:
            for copy in copies:
                for view in self._views:
                    view[copy.target] = view[copy.source]
            for name, values in self._inputs(parts, starts).items():
                self._request.set_tensor(name, ov.Tensor(np.asarray(values, np.int32)))
            if bar is None:
                self._request.infer()
            else:
                self._request.start_async()
                while not self._request.wait_for(_POLL):
                    bar.update(0)
        except BaseException:
            for slot, start in starts.items():
                self._blocks.truncate(slot, start)
            raise
        # A copy: the next step may give the memory back that the tensor has now.
        logits = self._request.get_output_tensor(0).data[:, 0].copy()
        ends = np.cumsum([part.logits for part in parts.values()])
        rows = zip(parts.items(), ends, strict=True)
        return {slot: logits[end - part.logits : end] for (slot, part), end in rows if part.logits}

    def _inputs(self, parts: Mapping[int, Part], starts: Mapping[int, int]) -> dict[str, Any]:
        """What Built's inputs are for a step; the sequences have grown already."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        begins, blocks, block_begins = [0], [], [0]
        for slot, part in parts.items():
            ids += part.ids
            offset = self.switch if self._long[slot] else 0
            positions += range(offset + starts[slot], offset + self._blocks.lengths[slot])
            wanted += range(len(ids) - part.logits, len(ids))
            begins.append(len(ids))
            blocks += self._blocks.tables[slot]
            block_begins.append(len(blocks))
        return {
            "ids": ids,
            "positions": positions,
            "wanted": wanted,
            "past_lens": list(starts.values()),
            "subsequence_begins": begins,
            "block_indices": blocks,
            "block_indices_begins": block_begins,
            "max_context_len": max(self._blocks.lengths[slot] for slot in parts),
        }

    def _own(self, growth: Growth) -> Growth:
        """The growth; from nothing, of which none is shared, where `step` may compute the sequence anew meanwhile."""
        slot, held, length = growth
        anew = held < length and self.switch and (self._long[slot] or length > self.switch)
        return Growth(slot, 0, length) if anew else growth

    def _turn_over(self, slot: int, end: int) -> None:
        """Computes a sequence anew that is on the other side of the switch than it was computed for."""
        long = 0 < self.switch < end
        if long != self._long[slot]:
            self._blocks.truncate(slot, 0)
            self._long[slot] = long
        while (start := self._blocks.lengths[slot]) < len(self._ids[slot]):
            self._infer({slot: Part(self._ids[slot][start : start + self.chunk])})

    def _prove(self) -> None:
        """Runs two sequences alone, together and anew, which only a fitting graph does alike."""
        prompts = [[5, 6, 7, 8, 9], [10, 11, 12]][: self.slots]
        alone = {}
        for slot, prompt in enumerate(prompts):
            self.step({slot: Part(prompt[:2])})
            self.step({slot: Part(prompt[2:])})
            alone[slot] = self.step({slot: Part([13], 1)})[slot]
            self.rewind(slot, len(prompt))
        tried = [self.step({slot: Part([13], 1) for slot in alone})]
        self.rewind(0, 0)
        for slot in range(1, len(prompts)):
            self.rewind(slot, len(prompts[slot]))
        # A whole prompt and single tokens in one step, where they came one after the other before.
        mixed = {slot: Part([13], 1) for slot in alone} | {0: Part([*prompts[0], 13], 1)}
        tried.append(self.step(mixed))
        if len(prompts) > 1:
            self.copy(0, 1, len(prompts[0]))
            again = self.step({1: Part([13], 1)})[1]
            self.rewind(0, len(prompts[0]))
            tried.append({0: again})
            tried.append(self.step({0: Part([13], 1)}))
        for slot in alone:
            self.rewind(slot, 0)
        for found in tried:
            for slot, logits in found.items():
                if not np.abs(alone[slot] - logits).max() <= _TOLERANCE * np.std(alone[slot]):
                    raise CannotBatch("the graph gives other logits to rows that are computed in other company")


def block_bytes(layers: int, heads: int, size: int, kv_cache: KvCache) -> int:
    """Bytes of a block: the keys and values of 32 positions in each layer.

    Args:
        layers: of the model.
        heads: for keys.
        size: numbers in a head.
        kv_cache: see OpenVinoDecoder.
    """
    # With 8 bits each head of each token has a scale and a zero point, in f32.
    head = size + 8 if kv_cache == "u8" else 4 * size
    return 2 * layers * BLOCK * heads * head


def check_budget(folder: Path, context_length: int | None, budget: int, kv_cache: KvCache = "u8") -> None:
    """Checks a budget without loading the weights.

    Args:
        folder: as for OpenVinoDecoder.
        context_length: as for OpenVinoDecoder.
        budget: bytes.
        kv_cache: as for OpenVinoDecoder.

    Raises:
        CannotBatch: the folder's configuration does not allow it.
        InvalidRequest: the budget does not hold one whole sequence.
    """
    shape = exported.read(folder)
    length = context_within(context_length, shape.context_length)
    held_by(budget, block_bytes(shape.layers, shape.heads, shape.head_size, kv_cache), -(-length // BLOCK), length)


def _properties(threads: int | None, kv_cache: KvCache) -> dict[str, Any]:
    """How OpenVINO computes."""
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",  # the other hint takes one thread for each request
        # bf16, the default where the CPU has it, reads short prompts at half the speed.
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": kv_cache,
        # By channel, what a sequence holds depends on what its last block held before it was rewound.
        "KEY_CACHE_QUANT_MODE": "BY_TOKEN",
        # Several models, and other processes, share the cores.
        "ENABLE_CPU_PINNING": False,
    }
    return properties | ({"INFERENCE_NUM_THREADS": threads} if threads is not None else {})


def _line(error: Exception) -> str:
    """What OpenVINO says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith("Exception from"))
    return said[:300] or repr(error)
