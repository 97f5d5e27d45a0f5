"""Sends eight different questions at once to one served model, and pings it all the while.

    python scripts/concurrency.py [MODEL_URI]

Without MODEL_URI both forms of the embedded model are saved and shown.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.serving import served

COUNTRIES = ("Spain", "France", "Italy", "Japan", "Germany", "Portugal", "Greece", "Norway")
ROUNDS = 5


def main() -> None:
    """Prints the answers, the time of each and of the slowest ping."""
    if len(sys.argv) > 1:
        show(sys.argv[1], sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        for label, builder in (("transformers", transformers), ("onnxruntime-genai", onnx)):
            model = Path(folder) / label
            builder.save_model(model)
            show(label, str(model))


def show(label: str, model_uri: str) -> None:
    """Serves one model, and prints what eight clients and one pinger saw."""
    print(f"\n{label}: {ROUNDS} rounds of {len(COUNTRIES)} requests at once")
    with served(model_uri) as address, ThreadPoolExecutor(len(COUNTRIES)) as clients:
        done, pings = threading.Event(), []
        pinger = threading.Thread(target=keep_pinging, args=(address, done, pings))
        pinger.start()
        started = time.monotonic()
        answers = [answer for _ in range(ROUNDS) for answer in clients.map(lambda name: ask(address, name), COUNTRIES)]
        seconds = time.monotonic() - started
        done.set()
        pinger.join()
    for country, (text, took) in zip(COUNTRIES, answers, strict=False):
        print(f"  {country:<10} {took:6.2f} s  {text}")
    print(f"  {len(answers)} answers in {seconds:.2f} s")
    print(f"  /ping: {len(pings)} times, median {statistics.median(pings):.0f} ms, slowest {max(pings):.0f} ms")


def ask(address: str, country: str) -> tuple[str, float]:
    """One question: the answer and the seconds it took."""
    body = json.dumps({"messages": [{"role": "user", "content": f"What is the capital of {country}?"}]}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as response:
        completion = json.load(response)[0]
    return completion["choices"][0]["message"]["content"], time.monotonic() - started


def keep_pinging(address: str, done: threading.Event, pings: list[float]) -> None:
    """Collects the milliseconds of each ping until told to stop."""
    while not done.wait(0.02):
        started = time.monotonic()
        with urllib.request.urlopen(f"{address}/ping", timeout=60):
            pings.append((time.monotonic() - started) * 1000)


if __name__ == "__main__":
    main()
