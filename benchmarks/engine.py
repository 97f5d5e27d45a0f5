"""The engine against a bare onnxruntime-genai loop, and against llama.cpp where it is installed: in alternation.

    python benchmarks/full_size.py && python benchmarks/engine.py            two cores: about 8 minutes
    python benchmarks/engine.py --folder artifacts/onnx --tokens 24          a quick look at the embedded model

Prints two tables below the name of the machine. All rates are of decoding: tokens per second in all while so many
requests decode together and nobody prefills. Nothing else should run meanwhile. llama_cpp_peer.py says how llama.cpp
is installed.
"""

import argparse
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import full_size
import llama_cpp_peer
import numpy as np
import onnxruntime_genai as og
import pandas as pd
from llama_cpp_peer import CONCURRENCIES

from phi3_mlflow import machine
from phi3_mlflow.runtime.decoders.base import Decoder, Part
from phi3_mlflow.runtime.loading import onnx_decoder
from phi3_mlflow.runtime.model import Predictor
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens


class Watched:
    """A decoder that notes when its steps begin and end.

    Attributes:
        calls: (start, end, rows) of each step that decodes, and rows 0 for each part of a prompt, in order.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self.calls: list[tuple[float, float, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        start = time.perf_counter()
        logits = self._decoder.step(parts)
        decodes = all(len(part.ids) == part.logits == 1 for part in parts.values())
        self.calls.append((start, time.perf_counter(), len(parts) if decodes else 0))
        return logits

    def rate(self, rows: int) -> float:
        """Tokens per second in all, between neighbouring decodes of so many rows."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        steps = [after[1] - before[1] for before, after in pairs if before[2] == after[2] == rows]
        return rows * len(steps) / sum(steps)

    def overhead(self) -> float:
        """Seconds per token between two decodes: sampling, stops and guards, the scheduler."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        return median((after[0] - before[1]) / before[2] for before, after in pairs if before[2] and after[2])


class Bench:
    """One loaded model and what is asked of it.

    Args:
        folder: an onnxruntime-genai folder.
        settings: of the model.
    """

    def __init__(self, folder: Path, **settings: Any):
        self.watched = Watched(onnx_decoder(folder, settings))
        # What idle time computes for the next turn of a conversation would disturb the next measurement; and random
        # weights go round in circles, which proposals would make fast: speculation.py measures them. Where a decoder
        # mixes them, prompts are to be read at once, so that all decode together soon.
        service = Service(Tokens.from_folder(folder), self.watched, renew_after=None, speculation=False, token_gap=60.0)
        self.predictor = Predictor(service)
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

    def ask(self, text: str, tokens: int, **options: Any) -> dict[str, Any]:
        """The completion of one request through predict."""
        data = pd.DataFrame({"messages": [[{"role": "user", "content": text}]]})
        (answer,) = self.predictor.predict(data, params={**self._params, **options, "max_tokens": tokens})
        assert answer["usage"]["completion_tokens"] == tokens
        return answer

    def first_token(self, text: str) -> float:
        """Seconds until the first token of an answer."""
        start = time.perf_counter()
        self.ask(text, 1)
        return time.perf_counter() - start

    def together(self, requests: int, prompt: int, tokens: int) -> float:
        """Tokens per second while all of some requests decode that came one after the other.

        Args:
            requests: threads that call predict.
            prompt: tokens of each prompt, about.
            tokens: that all decode together, at least; those that came first give more.
        """
        self.watched.calls.clear()
        # While the last ones are prefilled, the first ones decode a token after each chunk.
        chunks = -(-(prompt + 16) // self.watched.chunk)
        threads = [
            threading.Thread(target=self.ask, args=(self.text(prompt), tokens + chunks * (requests - 1)))
            for _ in range(requests)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.001 * self._random.random())
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


def measure(asked: argparse.Namespace) -> dict[str, list[float]]:
    """All numbers by their names, one for each round: rates in tokens/s, times in s; memory in GiB, once."""
    settings = {"context_length": asked.context} | ({"threads": asked.threads} if asked.threads else {})
    prompt, tokens = asked.prompt, asked.tokens
    batched = Bench(asked.folder, engine="onnxruntime", parallel=max(CONCURRENCIES), **settings)
    loaded = machine.resident()
    machine.forget_peak()
    batched.together(max(CONCURRENCIES), prompt, 4)
    cache = sum(batched.watched._kv.lengths) * batched.watched._kv.position_bytes
    memory = {"loaded": loaded, "cache": cache, "above": machine.peak() - loaded - cache}
    several = {"batched": batched}
    if find_spec("openvino"):
        several["openvino"] = Bench(asked.folder, engine="openvino", parallel=max(CONCURRENCIES), **settings)
        several["openvino"].together(max(CONCURRENCIES), prompt, 4)
    genai = Bench(asked.folder, **settings)
    genai.ask(genai.text(prompt), 2)
    peer = None
    if asked.folder == full_size.FOLDER and llama_cpp_peer.available():
        if not llama_cpp_peer.FILE.exists():
            llama_cpp_peer.make()
        peer = llama_cpp_peer.LlamaCpp(threads=asked.threads)
        peer.rate(1, prompt, 2)
    found: dict[str, list[float]] = defaultdict(list)
    for index in range(asked.rounds):
        print(f"round {index + 1} of {asked.rounds}", flush=True)
        found["bare"].append(bare(genai.watched._model, prompt, tokens))
        found["genai 1"].append(genai.together(1, prompt, tokens))
        found["genai overhead"].append(genai.watched.overhead())
        for count in CONCURRENCIES:
            for name, bench in several.items():
                found[f"{name} {count}"].append(bench.together(count, prompt, tokens))
                found[f"{name} overhead {count}"].append(bench.watched.overhead())
            if peer is not None:
                found[f"llama.cpp {count}"].append(peer.rate(count, prompt, tokens))
    return found | {f"memory {name}": [amount / 2**30] for name, amount in memory.items()}


def rates(found: Mapping[str, float]) -> Iterator[str]:
    """Decoding in Markdown: tokens per second in all."""
    counts = [f"{count}" for count in CONCURRENCIES]
    yield f"| tokens/s in all, requests: | {' | '.join(counts)} |"
    yield "|---|" + "---:|" * len(counts)
    yield f"| bare generate loop of onnxruntime-genai | {found['bare']:.1f} |" + " |" * (len(counts) - 1)
    yield f"| `predict`, through onnxruntime-genai | {found['genai 1']:.1f} |" + " |" * (len(counts) - 1)
    labels = {
        "batched": "`predict`, `parallel` = 8, through onnxruntime",
        "openvino": "`predict`, `parallel` = 8, through OpenVINO",
        "llama.cpp": "llama.cpp, Q4_0",
    }
    for name, label in labels.items():
        if f"{name} 1" in found:
            numbers = [f"{found[f'{name} {count}']:.1f}" for count in counts]
            yield f"| {label} | {' | '.join(numbers)} |"


def targets(found: Mapping[str, float]) -> Iterator[str]:
    """What the engine is to reach, and what it did, in Markdown."""
    one = found["batched 1"]
    yield "| | aim | measured |"
    yield "|---|---:|---:|"
    yield f"| `predict` against the bare loop | at least 0.97 | {found['genai 1'] / found['bare']:.2f} |"
    yield f"| `parallel`, 1 request, against the bare loop | at least 0.97 | {one / found['bare']:.2f} |"
    for count, least in ((4, 2.2), (8, 2.5)):
        yield f"| {count} requests against 1 | at least {least} | {found[f'batched {count}'] / one:.2f} |"
    aims = {"batched": (1.0, 1.3, 1.5), "openvino": (0.9, 1.6, 2.1)}
    for name, engine in (("batched", "onnxruntime"), ("openvino", "OpenVINO")):
        for count, least in zip((1, 4, 8), aims[name], strict=True):
            if f"llama.cpp {count}" in found and f"{name} {count}" in found:
                ratio = found[f"{name} {count}"] / found[f"llama.cpp {count}"]
                requests = f"{count} request{'s' * (count > 1)}"
                yield f"| {engine}, {requests} against llama.cpp | at least {least} | {ratio:.2f} |"
    for label, key in (("1 request", "genai overhead"), ("8 requests", "batched overhead 8")):
        yield f"| sampling, stops, guards per token, {label} | at most 2 ms | {found[key] * 1000:.2f} ms |"
    yield (
        f"| memory besides the loaded model ({found['memory loaded']:.2f} GiB) and the KV cache in use "
        f"({found['memory cache']:.2f} GiB) | at most 0.6 GiB | {found['memory above']:.2f} GiB |"
    )


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternations; the tables have the medians")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="that all requests of a measurement decode together")
    parser.add_argument("--threads", type=int, help="of onnxruntime and llama.cpp; their own choice where left out")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    asked = parser.parse_args()
    measured = measure(asked)
    if asked.json:
        asked.json.write_text(json.dumps(measured) + "\n", "utf-8")
    found = {name: median(values) for name, values in measured.items()}
    print(f"\n{machine.line()}; {asked.folder.name}, medians of {asked.rounds} alternations\n")
    print("\n".join([*rates(found), "", *targets(found)]))


if __name__ == "__main__":
    main()
