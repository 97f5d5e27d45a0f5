"""A mixed load for each engine in alternation: requests at random times, with short and long prompts and answers.

    python benchmarks/full_size.py && python benchmarks/load.py          some minutes for each engine in each round
    python benchmarks/load.py --folder artifacts/onnx --rate 20          a quick look at the embedded model

Prompts have 32 to 1,024 tokens, half of them begin alike; answers have 16 to 128. Prints the time until the last answer
is there, and median and 95th percentile of the time to the first token and of the time between two tokens. The engines
are this toolkit's service over each decoder, and OpenVINO GenAI where it is installed (see openvino_genai_peer.py).
"""

import argparse
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import full_size
import openvino_genai_peer

from phi3_mlflow import machine
from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder
from phi3_mlflow.runtime.decoders.openvino import OpenVinoDecoder
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.steps import TOKEN_GAP
from phi3_mlflow.runtime.tokens import Tokens

CONTEXT = 1024 + 128 + 16  # tokens
PATIENCE = 3600  # seconds; only a broken engine takes as long


@dataclass(frozen=True)
class Arrival:
    """One request of the load.

    Attributes:
        at: seconds after the beginning.
        prompt: token ids.
        tokens: of the answer.
    """

    at: float
    prompt: list[int]
    tokens: int


def arrivals(count: int, rate: float, seed: int) -> list[Arrival]:
    """The load: the same for the same numbers.

    Args:
        count: requests.
        rate: how many come in a second, on average; the times between them are exponential.
        seed: of all that is random.
    """
    random, at, found = Random(seed), 0.0, []
    shared = [random.randrange(100, 1000) for _ in range(1024)]
    for index in range(count):
        at += random.expovariate(rate)
        # As many from 32 to 64 tokens as from 512 to 1,024.
        length = round(32 * 32 ** random.random())
        prompt = [random.randrange(100, 1000) for _ in range(length)]
        if index % 2:
            prompt[: length * 3 // 4] = shared[: length * 3 // 4]
        found.append(Arrival(at, prompt, random.randint(16, 128)))
    return found


class Ours:
    """This toolkit's service over a decoder."""

    def __init__(self, decoder: Any, folder: Path, **settings: Any):
        # Random weights go round in circles, which proposals would make fast: speculation.py measures them.
        settings |= {"queue_limit": None, "renew_after": None, "speculation": False}
        self.service = Service(Tokens.from_folder(folder), decoder, **settings)
        self._never = dict.fromkeys(decoder.eos, -100.0)

    def play(self, load: Sequence[Arrival]) -> list[list[float]]:
        """When each token of each request came, in seconds after the beginning."""
        times: list[list[float]] = [[] for _ in load]
        ended = threading.Semaphore(0)
        errors: list[Exception] = []
        start = time.perf_counter()
        for arrival, own in zip(load, times, strict=True):
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            options = Options(
                max_tokens=arrival.tokens, logit_bias=self._never, repetition_guard=False, self_talk_guard=False
            )

            def deliver(event: Any, own: list[float] = own) -> None:
                if isinstance(event, Exception):
                    errors.append(event)
                own.append(time.perf_counter() - start)
                if isinstance(event, Exception) or event.last:
                    ended.release()

            self.service.run(self.service.prepare(Request(arrival.prompt, options, "prompt")), deliver=deliver)
        for _ in load:
            if not ended.acquire(timeout=PATIENCE):
                raise RuntimeError("the engine is stuck")
        if errors:
            raise errors[0]
        return times

    def close(self) -> None:
        """Frees the weights."""
        self.service.close()


class Peer:
    """OpenVINO GenAI's continuous batching."""

    def __init__(self, threads: int | None):
        if not openvino_genai_peer.FILE.exists():
            openvino_genai_peer.make()
        self._model = openvino_genai_peer.OpenVinoGenai(threads=threads, prefix_caching=True)

    def play(self, load: Sequence[Arrival]) -> list[list[float]]:
        """See Ours."""
        times: list[list[float]] = [[] for _ in load]
        running: dict[int, Any] = {}
        start = time.perf_counter()
        coming = list(enumerate(load))
        while coming or running:
            while coming and coming[0][1].at <= time.perf_counter() - start:
                index, arrival = coming.pop(0)
                running[index] = self._model.add(arrival.prompt, arrival.tokens)
            if not running:
                time.sleep(max(0.0, start + coming[0][1].at - time.perf_counter()))
                continue
            self._model.step()
            now = time.perf_counter() - start
            for index, handle in list(running.items()):
                times[index] += [now] * self._model.tokens(handle)
                if len(times[index]) >= load[index].tokens:
                    del running[index]
        return times

    def close(self) -> None:
        """Nothing; it ends with the process."""


def measure(asked: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """All times by engine and row of the table, one for each round."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    shared: dict[str, Any] = {"context_length": CONTEXT, "threads": asked.threads}
    engines: dict[str, Ours | Peer] = {}
    if "onnxruntime-genai" in asked.engines:
        engines["onnxruntime-genai"] = Ours(GenaiDecoder(asked.folder, **shared), asked.folder)
    if "onnxruntime" in asked.engines:
        batched = BatchedDecoder(asked.folder, slots=asked.parallel, **shared)
        engines["onnxruntime"] = Ours(batched, asked.folder)
    for gap in asked.token_gap if "openvino" in asked.engines else ():
        paged = OpenVinoDecoder(asked.folder, slots=asked.openvino_parallel, **shared)
        engines[f"openvino, {gap:g} s"] = Ours(paged, asked.folder, token_gap=gap)
    if "peer" in asked.engines and asked.folder == full_size.FOLDER and openvino_genai_peer.available():
        engines["OpenVINO GenAI"] = Peer(asked.threads)
    for index in range(asked.rounds):
        load = arrivals(asked.requests, asked.rate, index)
        for name, engine in engines.items():
            print(f"round {index + 1} of {asked.rounds}: {name}", flush=True)
            for row, value in summary(load, engine.play(load)).items():
                found[name, row].append(value)
    for engine in engines.values():
        engine.close()
    return found


def summary(load: Sequence[Arrival], times: Sequence[Sequence[float]]) -> dict[str, float]:
    """What the table says of one round, in seconds."""
    first = [own[0] - arrival.at for arrival, own in zip(load, times, strict=True)]
    between = [after - before for own in times for before, after in pairwise(own)]
    return {
        "until the last answer is there": max(own[-1] for own in times),
        "first token, median": median(first),
        "first token, 95th percentile": quantiles(first, n=20)[-1],
        "between two tokens, median": median(between),
        "between two tokens, 95th percentile": quantiles(between, n=20)[-1],
    }


def table(found: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """In Markdown."""
    names = list(dict.fromkeys(name for name, _ in found))
    yield f"| seconds | {' | '.join(names)} |"
    yield "|---|" + "---:|" * len(names)
    for row in dict.fromkeys(row for _, row in found):
        yield f"| {row} | {' | '.join(f'{found[name, row]:.2f}' for name in names)} |"


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternations, each with a load of its own")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.2, help="requests that come in a second, on average")
    parser.add_argument("--parallel", type=int, default=8, help="slots of onnxruntime")
    parser.add_argument(
        "--openvino-parallel", type=int, default=24, help="slots of openvino, which takes memory as it is used"
    )
    parser.add_argument(
        "--token-gap", type=float, nargs="+", default=[TOKEN_GAP], help="seconds; openvino is measured with each"
    )
    parser.add_argument("--threads", type=int, help="the engines' own choice where left out")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=["onnxruntime-genai", "onnxruntime", "openvino", "peer"],
        default=["onnxruntime", "openvino", "peer"],
    )
    asked = parser.parse_args()
    found = {key: median(values) for key, values in measure(asked).items()}
    print(
        f"\n{machine.line()}; {asked.folder.name}, {asked.requests} requests, {asked.rate:g} a second, medians of "
        f"{asked.rounds} alternations\n"
    )
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
