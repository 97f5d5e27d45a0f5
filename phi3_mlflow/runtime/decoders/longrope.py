"""Sequences of LongRope weights (Phi-3-mini-128k, Phi-3.5-mini, Phi-4-mini) on both sides of the switch.

LongRope has two rotary tables: one for sequences of up to so many tokens (original_max_position_embeddings of the
weights' config.json), one for longer ones. What was computed with one cannot be read with the other, so a sequence that
outgrows the first table is computed anew, which is what Phi3ForCausalLM.prepare_inputs_for_generation means to do too.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..errors import WeightsError
from . import exported, onnx_file
from .base import CannotBatch, Decoder, Growth, Part
from .onnx_lengths import Lengths


class Switching(Decoder):
    """A decoder that keeps each sequence computed with the table for its length, all of it.

    The step in which a sequence comes to the other side, by growing or because it was rewound, takes as long as
    prefilling the whole sequence.

    Args:
        decoder: computes a part with the table for the length that its sequence then has; or, where it has
            `least_width`, for that length, if it is more.
        switch: the most tokens for which the first table is.
    """

    def __init__(self, decoder: Decoder, switch: int):
        self._decoder, self.switch = decoder, switch
        self.engine, self.cost = decoder.engine, decoder.cost
        self.slots, self.context_length, self.capacity = decoder.slots, decoder.context_length, decoder.capacity
        self.chunk, self.mixed, self.eos = decoder.chunk, decoder.mixed, decoder.eos
        self._ids: list[list[int]] = [[] for _ in range(self.slots)]
        self._held = [0] * self.slots  # how many of them the decoder holds
        self._long = [False] * self.slots  # with which table

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        logits: dict[int, np.ndarray] = {}
        longs = {slot: len(self._ids[slot]) + len(part.ids) > self.switch for slot, part in parts.items()}
        for long in sorted(set(longs.values())):
            group = {slot: part for slot, part in parts.items() if longs[slot] == long}
            if hasattr(self._decoder, "least_width"):
                self._decoder.least_width = self.switch + 1 if long else 0
            for slot, part in group.items():
                group[slot] = self._up_to_date(slot, part, long)
            logits |= self._decoder.step(group)
            for slot in group:
                self._ids[slot] += parts[slot].ids
                self._held[slot] = len(self._ids[slot])
        return logits

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        del self._ids[slot][length:]
        self._held[slot] = min(self._held[slot], length)
        self._decoder.rewind(slot, self._held[slot])

    def copy(self, source: int, target: int, length: int) -> None:
        """See Decoder."""
        self._ids[target] = self._ids[source][:length]
        self._held[target], self._long[target] = min(self._held[source], length), self._long[source]
        self._decoder.copy(source, target, self._held[target])

    def reserve(self, slot: int, length: int) -> bool:
        """See Decoder."""
        kept = self._decoder.reserve(slot, length)
        if not kept:
            self._ids[slot].clear()
            self._held[slot] = 0
        return kept

    def room(self, growths: Iterable[Growth]) -> int:
        """See Decoder."""
        return self._decoder.room(growths)

    def close(self) -> None:
        """See Decoder."""
        self._decoder.close()

    def _up_to_date(self, slot: int, part: Part, long: bool) -> Part:
        """Sees to it that the sequence is computed with a table; the part, and what is to be computed with it."""
        if long != self._long[slot]:
            self._held[slot] = 0
            self._decoder.rewind(slot, 0)
            self._long[slot] = long
        if not hasattr(self._decoder, "least_width"):
            # In parts, the first ones would be computed with the first table.
            return Part([*self._ids[slot][self._held[slot] :], *part.ids], part.logits)
        while (start := self._held[slot]) < len(self._ids[slot]):
            again = self._ids[slot][start : start + self.chunk]
            self._decoder.step({slot: Part(again)})
            self._held[slot] += len(again)
        return part


def switch_of(folder: Path) -> int | None:
    """The most tokens for which an exported folder has the first of two rotary tables; None where it has one.

    Read from the graph; where that shows none, from config.json, which need not be there.
    """
    try:
        shape = exported.read(folder)
        lengths = Lengths(onnx_file.read(folder / shape.filename), shape.attention_mask)
        if lengths.switch is not None:
            return lengths.switch
    except (CannotBatch, OSError, KeyError, ValueError, WeightsError):
        pass  # onnxruntime-genai may know what is unknown here
    try:
        return switch_in(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, AttributeError):
        return None


def switch_in(config: Mapping[str, object]) -> int | None:
    """Likewise, from a config.json of transformers 4 or 5 (Phi-3's `su` was renamed to `longrope`)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return None
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return original if isinstance(original, int) else None
