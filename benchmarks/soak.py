"""Random requests for as long as asked: arrivals, lengths, cancellations, bad requests. Ends with 1 where it fails.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 30 --engine openvino --kv-budget 9MB

Fails where a request stays unanswered or fails, a slot is not given back, or the memory at the end is above that after
the first third by more than 64 MiB. Counts greedy answers that differ from most others to the same question.
"""

import argparse
import math
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from phi3_mlflow.machine import resident
from phi3_mlflow.runtime import loading, model
from phi3_mlflow.runtime.model import Predictor, RequestRefused, TryLater

ROOT = Path(__file__).resolve().parent.parent
GROWTH = 64  # MiB
PATIENCE = 300  # seconds after which a request counts as unanswered
TEXTS = [
    "What is the capital of Spain?",
    "What is 12 + 7?",
    "Say hello to me in a friendly way, please.",
    "The sky is blue and the grass is green. " * 20 + "What is the capital of Italy?",
    "Once upon a time " * 100,
]
BAD: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "robot", "content": "hello"}]},
    {"messages": [{"role": "user", "content": "x" * 100_000}]},
]


class Soak:
    """The clients of one model and what they saw."""

    def __init__(self, folder: Path, **settings: Any):
        self.predictor = Predictor(loading.load(folder, threads=1, queue_timeout=5.0, **settings))
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.answers: dict[tuple[str, int], Counter[str]] = {}
        self._lock = threading.Lock()

    def client(self, number: int, end: float) -> None:
        """Asks until the end."""
        rng = random.Random(number)
        while time.monotonic() < end:
            time.sleep(rng.expovariate(20))
            try:
                kind = self._ask(rng)
            except RequestRefused:
                kind = "refused"
            except TryLater:
                kind = "busy"
            except Exception as error:
                kind = "failed"
                self.failures.append(repr(error))
            with self._lock:
                self.counts[kind] += 1

    def _ask(self, rng: random.Random) -> str:
        if rng.random() < 0.1:
            self.predictor.predict(pd.DataFrame([rng.choice(BAD)]))
            raise AssertionError("a bad request was answered")
        text, most = rng.choice(TEXTS), rng.choice([1, 5, 20, 60])
        data = {"messages": [{"role": "user", "content": text}]}
        params: dict[str, Any] = {"max_tokens": most}
        if rng.random() < 0.3:
            params |= {"temperature": 1.0, "n": rng.randint(1, 3)}
        if rng.random() < 0.1:
            params["max_time"] = 0.01
        if rng.random() < 0.1:
            params |= {"logprobs": True, "top_logprobs": 5}
        if rng.random() < 0.05:
            rows = pd.DataFrame([data] * rng.randint(2, 9))
            assert len(self.predictor.predict(rows, params)) == len(rows)
            return "table"
        if rng.random() < 0.3:
            stream = self.predictor.predict_stream(data, params)
            for _ in range(rng.randint(0, 10)):
                next(stream, None)
            stream.close()
            return "closed early"
        (answer,) = self.predictor.predict(pd.DataFrame([data]), params)
        if params.keys() == {"max_tokens"}:
            with self._lock:
                said = self.answers.setdefault((text, most), Counter())
                said[answer["choices"][0]["message"]["content"]] += 1
        return "answered"

    def odd_answers(self) -> int:
        """Greedy answers that are not the usual one to their question: two tokens were all but equally likely."""
        return sum(said.total() - said.most_common(1)[0][1] for said in self.answers.values())

    def slots_taken(self) -> int:
        """Slots that are still taken, and requests that still wait, when all clients are gone."""
        limit = time.monotonic() + 10
        while True:
            now = self.predictor.service.statistics()
            taken = now.running + now.waiting
            if not taken or time.monotonic() >= limit:
                return taken
            time.sleep(0.05)


def main() -> None:
    """Soaks as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "artifacts" / "onnx")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--queue-limit", type=int, default=6)
    parser.add_argument("--engine", default="auto", help="auto, genai, onnxruntime or openvino")
    parser.add_argument("--kv-budget", help="so little that requests wait for room, such as 9MB")
    asked = parser.parse_args()
    settings = {"parallel": asked.parallel, "queue_limit": asked.queue_limit, "engine": asked.engine}
    soak = Soak(asked.folder, **settings, kv_budget=asked.kv_budget)
    print(f"through {soak.predictor.service.engine}", flush=True)
    model.PROGRESS_AFTER = math.inf
    begin = time.monotonic()
    end = begin + asked.minutes * 60
    threads = [threading.Thread(target=soak.client, args=(number, end), daemon=True) for number in range(asked.clients)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, float]] = []
    shown = begin
    while time.monotonic() < end:
        time.sleep(min(1.0, asked.minutes))
        memory.append((time.monotonic() - begin, resident() / 2**20))
        if time.monotonic() - shown >= 60:
            shown = time.monotonic()
            print(f"{memory[-1][0] / 60:5.1f} min  {memory[-1][1]:7.1f} MiB  {dict(soak.counts)}", flush=True)
    for thread in threads:
        thread.join(max(0.0, end + PATIENCE - time.monotonic()))
    whole = asked.minutes * 60
    third = median([used for at, used in memory if whole / 3 <= at < whole / 2] or [memory[0][1]])
    last = median([used for at, used in memory if at >= whole * 5 / 6] or [memory[-1][1]])
    alive, taken = sum(thread.is_alive() for thread in threads), soak.slots_taken()
    print(f"{soak.counts.total()} requests: {dict(soak.counts)}")
    print(f"memory {third:.1f} MiB after a third, {last:.1f} MiB at the end; {alive} unanswered; {taken} slots taken")
    print(
        f"{soak.odd_answers()} of {sum(said.total() for said in soak.answers.values())} greedy answers unlike the rest"
    )
    for failure in soak.failures[:10]:
        print(failure, file=sys.stderr)
    soak.predictor.close()
    sys.exit(bool(alive or taken or soak.failures or last - third > GROWTH))


if __name__ == "__main__":
    main()
