"""The engine against a bare onnxruntime-genai loop, on one folder, in alternation: prints a table with the machine.

    python benchmarks/full_size.py && python benchmarks/engine.py            two cores: about 10 minutes
    python benchmarks/engine.py --folder artifacts/onnx --tokens 24          a quick look at the embedded model

All rates are of decoding: tokens per second between the first token and the last, while as many requests as the row
says decode together and nobody prefills. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import platform
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pandas as pd

from phi3_mlflow.runtime.decoders.base import Decoder
from phi3_mlflow.runtime.decoders.kv import machine_memory
from phi3_mlflow.runtime.engine import Engine
from phi3_mlflow.runtime.model import Predictor, _onnx_decoder
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
CONCURRENCIES = (1, 4, 8)
PREFIX, NEW = 400, 16  # tokens, of the prefix measurement
TICK = 0.01  # seconds that the thread sleeps which stands for a health check


class Watched:
    """A decoder that notes when its calls begin and end.

    Attributes:
        calls: (start, end, rows) of each decode, and rows 0 for each prefill, in order.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self.calls: list[tuple[float, float, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, slot: int, ids: Sequence[int], *, last: bool) -> np.ndarray | None:
        """See Decoder."""
        start = time.perf_counter()
        logits = self._decoder.prefill(slot, ids, last=last)
        self.calls.append((start, time.perf_counter(), 0))
        return logits

    def decode(self, tokens: Mapping[int, int]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        start = time.perf_counter()
        logits = self._decoder.decode(tokens)
        self.calls.append((start, time.perf_counter(), len(tokens)))
        return logits

    def rate(self, rows: int) -> float:
        """Tokens per second in all, between neighbouring decodes of so many rows."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        steps = [after[1] - before[1] for before, after in pairs if before[2] == after[2] == rows]
        return rows * len(steps) / sum(steps) if steps else float("nan")

    def overhead(self) -> float:
        """Seconds per token between two decodes: sampling, stops and guards, the scheduler."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        return median((after[0] - before[1]) / before[2] for before, after in pairs if before[2] and after[2])


class Bench:
    """One loaded model and what is asked of it."""

    def __init__(self, folder: Path, **settings: Any):
        self.watched = Watched(_onnx_decoder(folder, settings))
        self.predictor = Predictor(Engine(Tokens.from_folder(folder), self.watched), {})
        self._random = random.Random(0)
        # The answers are as long as they are asked to be.
        self._params = {
            "logit_bias": dict.fromkeys(map(str, self.watched.eos), -100),
            "repetition_guard": False,
            "self_talk_guard": False,
        }

    def text(self, tokens: int) -> str:
        """A message that no other begins with, of about so many tokens (digits are tokens of their own)."""
        return "".join(self._random.choices("0123456789", k=tokens))

    def ask(self, text: str, tokens: int) -> float:
        """One request through predict; the seconds that it took."""
        data = pd.DataFrame({"messages": [[{"role": "user", "content": text}]]})
        start = time.perf_counter()
        (answer,) = self.predictor.predict(data, params={**self._params, "max_tokens": tokens})
        assert answer["usage"]["completion_tokens"] == tokens
        return time.perf_counter() - start

    def together(self, requests: int, prompt: int, tokens: int) -> float:
        """Tokens per second while all of some requests decode that came one after the other."""
        self.watched.calls.clear()
        threads = [
            threading.Thread(target=self.ask, args=(self.text(prompt), tokens * (2 if requests > 1 else 1)))
            for _ in range(requests)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.05 * self._random.random())
        for thread in threads:
            thread.join()
        return self.watched.rate(requests)


def bare(model: og.Model, prompt: int, tokens: int) -> float:
    """Tokens per second of onnxruntime-genai's own loop."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=prompt + tokens + 1, min_length=prompt + tokens + 1, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.random.default_rng(0).integers(100, 1000, (1, prompt)).astype(np.int32))
    generator.generate_next_token()
    start = time.perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    return (tokens - 1) / (time.perf_counter() - start)


def stalls(bench: Bench, prompt: int, tokens: int) -> float:
    """The 99th percentile, in seconds, of how late a sleeping thread wakes while requests are answered."""
    late: list[float] = []
    done = threading.Event()

    def sleep() -> None:
        while not done.is_set():
            start = time.perf_counter()
            time.sleep(TICK)
            late.append(time.perf_counter() - start - TICK)

    thread = threading.Thread(target=sleep)
    thread.start()
    bench.together(4, prompt, tokens)
    done.set()
    thread.join()
    return float(np.quantile(late, 0.99))


def resident() -> float:
    """GiB of memory that this process uses now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def machine() -> str:
    """The machine in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("ascii").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} logical cores, {machine_memory() / 2**30:.0f} GiB, {platform.system()}"


def measure(folder: Path, rounds: int, prompt: int, tokens: int, threads: int | None, context: int) -> dict[str, float]:
    """Medians of all numbers by their names."""
    settings = {"context_length": context} | ({"threads": threads} if threads else {})
    before = resident()
    batched = Bench(folder, parallel=max(CONCURRENCIES), **settings)
    loaded = resident()
    found: dict[str, list[float]] = defaultdict(list)
    batched.together(max(CONCURRENCIES), prompt, tokens)
    held = sum(batched.watched._kv.lengths) * batched.watched._kv.position_bytes / 2**30
    above = resident() - loaded - held
    genai = Bench(folder, **settings)
    genai.ask(genai.text(prompt), 2)
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", flush=True)
        found["bare loop"].append(bare(genai.watched._model, prompt, tokens))
        found["genai 1"].append(genai.together(1, prompt, tokens))
        found["genai overhead"].append(genai.watched.overhead())
        for count in CONCURRENCIES:
            found[f"batched {count}"].append(batched.together(count, prompt, tokens))
            found[f"batched overhead {count}"].append(batched.watched.overhead())
        for name, bench in (("genai", genai), ("batched", batched)):
            shared = bench.text(PREFIX)
            found[f"{name} cold"].append(bench.ask(shared + bench.text(NEW), 1))
            found[f"{name} warm"].append(bench.ask(shared + bench.text(NEW), 1))
            found[f"{name} stall"].append(stalls(bench, prompt, max(2, tokens // 4)))
    medians = {name: median(values) for name, values in found.items()}
    return medians | {"weights": loaded - before, "cache": held, "above": above}


def table(found: Mapping[str, float]) -> str:
    """The numbers in Markdown."""
    lines = ["| | tokens/s | against |", "|---|---|---|"]
    lines.append(f"| bare generate loop | {found['bare loop']:.1f} | 1 |")
    one = found["batched 1"]
    lines.append(f"| predict through genai | {found['genai 1']:.1f} | {found['genai 1'] / found['bare loop']:.2f} |")
    lines.append(f"| batched, 1 request | {one:.1f} | {one / found['bare loop']:.2f} |")
    for count in CONCURRENCIES[1:]:
        rate = found[f"batched {count}"]
        lines.append(f"| batched, {count} requests | {rate:.1f} | {rate / one:.2f} of one request |")
    lines += ["", "| | genai | batched |", "|---|---|---|"]
    for label, key, scale, unit in (
        (f"first token, {PREFIX + NEW} tokens", "cold", 1, "s"),
        (f"first token, {PREFIX} of them cached", "warm", 1, "s"),
        ("late wake-up of a Python thread, p99", "stall", 1000, "ms"),
    ):
        values = [
            f"{found[f'{name} {key}'] * scale:.{0 if unit == 'ms' else 2}f} {unit}" for name in ("genai", "batched")
        ]
        lines.append(f"| {label} | {values[0]} | {values[1]} |")
    overheads = [found["genai overhead"], found[f"batched overhead {CONCURRENCIES[-1]}"]]
    lines.append(f"| sampling, stops, guards per token | {overheads[0] * 1000:.2f} ms | {overheads[1] * 1000:.2f} ms |")
    lines.append("")
    lines.append(
        f"Memory of the batched engine: {found['weights']:.2f} GiB after loading, {found['cache']:.2f} GiB of KV cache "
        f"in use, {found['above']:.2f} GiB besides."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / "full-size")
    parser.add_argument("--rounds", type=int, default=3, help="alternations; the table has the medians")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer; twice as many where several decode")
    parser.add_argument("--threads", type=int, help="of onnxruntime; its own choice where left out")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    asked = parser.parse_args()
    found = measure(asked.folder, asked.rounds, asked.prompt, asked.tokens, asked.threads, asked.context)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"\n{machine()}; {asked.folder.name}, medians of {asked.rounds}\n\n{table(found)}")


if __name__ == "__main__":
    main()
