"""The decoders for several rows against each other, and against OpenVINO GenAI where it is installed: in alternation.

    python benchmarks/full_size.py && python benchmarks/decoders.py
    python benchmarks/decoders.py --long 1500                          rows behind a long context, and memory, too
    python benchmarks/decoders.py --folder artifacts/onnx --rounds 1   a quick look at the embedded model

Prints tables below the name of the machine: tokens per second of reading a prompt in chunks, of decoding some rows
together, and memory. No scheduler, no sampling and no text. Nothing else should run meanwhile. openvino_genai_peer.py
says how the peer is installed.
"""

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import full_size
import numpy as np
import openvino_genai_peer
from llama_cpp_peer import CONCURRENCIES

from phi3_mlflow import machine
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.openvino import OpenVinoDecoder

CHUNKS = (16, 64)
SLOTS = max(CONCURRENCIES)


class Rows:
    """A decoder, and sequences of random tokens in its slots.

    Args:
        name: of the engine: `openvino` or `onnxruntime`.
        folder: an onnxruntime-genai folder.
        context: the most tokens of a sequence.
        threads: the engine's own choice where it is None.
    """

    def __init__(self, name: str, folder: Path, context: int, threads: int | None):
        start, before = time.perf_counter(), _memory()
        kind = {"openvino": OpenVinoDecoder, "onnxruntime": BatchedDecoder}[name]
        self.decoder: Any = kind(folder, slots=SLOTS, context_length=context, threads=threads)
        self.loading = time.perf_counter() - start
        self.loaded = _memory() - before
        self._random = np.random.default_rng(0)

    def close(self) -> None:
        """Gives the memory back."""
        self.decoder.close()
        gc.collect()

    def read(self, slot: int, tokens: int, chunk: int) -> float:
        """Tokens per second of reading a prompt in chunks."""
        ids = self._random.integers(3, 2000, tokens).tolist()
        self.decoder.rewind(slot, 0)
        start = time.perf_counter()
        for at in range(0, tokens, chunk):
            part = ids[at : at + chunk]
            self.decoder.step({slot: Part(part, int(at + chunk >= tokens))})
        return tokens / (time.perf_counter() - start)

    def fill(self, context: int, *, shared: bool) -> None:
        """Gives each slot a sequence of so many tokens; the same tokens, which cost what others would.

        Args:
            context: tokens.
            shared: whether the decoder may keep them once.
        """
        self.read(0, context, 64)
        for slot in range(1, SLOTS):
            self.decoder.copy(0, slot, context)
            if not shared and isinstance(self.decoder, OpenVinoDecoder):
                _unshare(self.decoder, slot)

    def decode(self, rows: int, context: int, steps: int) -> float:
        """Tokens per second in all of some rows that decode together, behind so many tokens in each slot."""
        for slot in range(rows):
            self.decoder.rewind(slot, context)
        took = []
        for _ in range(steps):
            start = time.perf_counter()
            self.decoder.step({slot: Part([9], 1) for slot in range(rows)})
            took.append(time.perf_counter() - start)
        return rows / median(took)


def _unshare(decoder: OpenVinoDecoder, slot: int) -> None:
    """Gives a slot blocks of its own with what it shares."""
    blocks = decoder._blocks
    for place, shared in enumerate(blocks.tables[slot]):
        own = blocks.tables[slot][place] = blocks._take()
        for view in decoder._views:
            view[own] = view[shared]
        blocks._drop(shared)


def _memory() -> float:
    """GiB of memory that this process has for itself, mapped files not counted, where the system says it."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 2**20


class Found(defaultdict[tuple[str, str], list[float]]):
    """Rates by engine and row of the table, one for each round; each is shown as it comes."""

    def __init__(self) -> None:
        super().__init__(list)

    def add(self, name: str, row: str, value: float) -> None:
        """Notes one more."""
        self[name, row].append(value)
        print(f"{name}, {row}: {value:.2f}", file=sys.stderr, flush=True)


def measure(asked: argparse.Namespace) -> Found:
    """All rates by engine and row of the table, one for each round."""
    found = Found()
    longest = max(asked.context, asked.long) + 2 * asked.steps + max(CHUNKS)
    engines = {name: Rows(name, asked.folder, longest, asked.threads) for name in ("onnxruntime", "openvino")}
    for name, rows in engines.items():
        found.add(name, "loading, s", rows.loading)
        found.add(name, "memory when loaded, GiB", rows.loaded)
    peer = None
    if asked.folder == full_size.FOLDER and asked.peer and openvino_genai_peer.available():
        if not openvino_genai_peer.FILE.exists():
            openvino_genai_peer.make()
        peer = openvino_genai_peer.OpenVinoGenai(threads=asked.threads)
    for _ in range(asked.rounds):
        for name, rows in engines.items():
            for chunk in CHUNKS:
                found.add(name, f"read, chunks of {chunk}", rows.read(SLOTS - 1, asked.context, chunk))
            rows.fill(asked.context, shared=False)
            for count in CONCURRENCIES:
                row = f"decode at {asked.context}, rows: {count}"
                found.add(name, row, rows.decode(count, asked.context, asked.steps))
        if peer is not None:
            found.add("OpenVINO GenAI", "read, chunks of 64", peer.prefill_rate(asked.context))
            for count in CONCURRENCIES:
                row = f"decode at {asked.context}, rows: {count}"
                found.add("OpenVINO GenAI", row, peer.rate(count, asked.context, asked.steps + 1))
    if asked.long:
        _measure_long(engines, asked, found)
    for rows in engines.values():
        rows.close()
    return found


def _measure_long(engines: Mapping[str, Rows], asked: argparse.Namespace, found: Found) -> None:
    """Rows behind a long context, each with its own, and where the decoder may keep it once."""
    for shared in (True, False):
        for name, rows in engines.items():
            before = _memory()
            rows.fill(asked.long, shared=shared)
            if not shared:
                found.add(name, f"memory of {SLOTS} sequences of {asked.long}, GiB", _memory() - before)
        for _ in range(asked.rounds):
            for name, rows in engines.items():
                for count in CONCURRENCIES:
                    row = f"decode at {asked.long}{', shared' if shared else ''}, rows: {count}"
                    found.add(name, row, rows.decode(count, asked.long, asked.steps))
        for rows in engines.values():
            for slot in range(SLOTS):
                rows.decoder.rewind(slot, 0)


def table(found: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """In Markdown, with the ratio of OpenVINO to each of the others."""
    names = list(dict.fromkeys(name for name, _ in found))
    others = [name for name in names if name != "openvino"]
    yield f"| tokens/s in all, where nothing else is said | {' | '.join(names)} |" + "".join(
        f" openvino / {name} |" for name in others
    )
    yield "|---|" + "---:|" * (len(names) + len(others))
    for row in dict.fromkeys(row for _, row in found):
        values = [found.get((name, row)) for name in names]
        own = found.get(("openvino", row))
        ratios = [found.get((name, row)) for name in others]
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        cells += ["" if not value or own is None else f"{own / value:.2f}" for value in ratios]
        yield f"| {row} | {' | '.join(cells)} |"


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternations; the table has the medians")
    parser.add_argument("--context", type=int, default=100, help="tokens of each sequence")
    parser.add_argument("--long", type=int, default=0, help="tokens of each sequence in a second part; 0 for none")
    parser.add_argument("--steps", type=int, default=6, help="decoded at each number of rows")
    parser.add_argument("--threads", type=int, help="the engines' own choice where left out")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without OpenVINO GenAI")
    asked = parser.parse_args()
    found = {key: median(values) for key, values in measure(asked).items()}
    print(f"\n{machine.line()}; {asked.folder.name}, medians of {asked.rounds} alternations\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
