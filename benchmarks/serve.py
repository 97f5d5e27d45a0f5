"""What `phi3-mlflow serve` adds to the engine: until the first byte of a stream, and for each token on the wire.

    python benchmarks/serve.py                                  the embedded model: about a minute
    python benchmarks/full_size.py && python benchmarks/serve.py --folder .bench/full-size    some minutes, 6 GB

The same requests go in turn to the engine in this process, through the runtime's public seam, and to the server in a
process of its own, over one kept connection. No prompt comes twice, so that no prefix is reused. The seconds of a token
are of the wall clock: its cost in the server's process is what a stream takes longer than the engine alone.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import httpx
import numpy as np
import psutil
from serve_soak import ENDLESS, server

from phi3_mlflow import machine
from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve.served import Spec, load


def of_the_engine(service: Service, body: dict) -> list[float]:
    """Seconds from the request to each piece."""
    start = time.perf_counter()
    return [time.perf_counter() - start for piece in service.start(body) if piece.text]


def of_the_server(client: httpx.Client, address: str, body: dict) -> list[float]:
    """Seconds from the request to each event with text."""
    start = time.perf_counter()
    times = []
    with client.stream("POST", f"{address}/v1/chat/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line:
                times.append(time.perf_counter() - start)
    return times


def processor(pid: int, ask: Callable[[], list[float]]) -> tuple[list[float], float]:
    """The times, and the seconds of processor time that a process takes for them."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    times = ask()
    return times, sum(process.cpu_times()[:2]) - before


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="weights; the embedded model's by default")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="characters")
    arguments = parser.parse_args()
    random = Random(0)
    bias = {} if arguments.folder else ENDLESS  # random weights do not end by themselves

    def body() -> dict:
        text = "".join(random.choices("0123456789", k=arguments.prompt))
        messages = [{"role": "user", "content": text}]
        return {"messages": messages, "max_tokens": arguments.tokens, "repetition_guard": False, **bias}

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        onnx.save_model(model, *([arguments.folder] if arguments.folder else []))
        loaded = load(Spec("phi3", str(model)))  # as the server does
        with server(f"--name=phi3={model}") as (address, process), httpx.Client(timeout=600) as client:
            first: dict[str, list[float]] = {"engine": [], "server": []}
            gaps: dict[str, list[float]] = {"engine": [], "server": []}
            spent: dict[str, list[float]] = {"engine": [], "server": []}
            for number in range(arguments.rounds + 3):
                for who in ("engine", "server") if number % 2 else ("server", "engine"):
                    if who == "engine":
                        pid, ask = psutil.Process().pid, partial(of_the_engine, loaded.service, body())
                    else:
                        pid, ask = process.pid, partial(of_the_server, client, address, body())
                    times, took = processor(pid, ask)
                    if number < 3:
                        continue  # until all is warm
                    first[who].append(times[0])
                    gaps[who].append((times[-1] - times[0]) / (len(times) - 1))
                    spent[who].append(took / len(times))
        loaded.close()

    def ms(values: list[float]) -> dict[str, float]:
        return {f"p{p}": round(1000 * float(np.percentile(values, p)), 3) for p in (10, 50, 90)}

    found = {
        "machine": machine.line(),
        "rounds": arguments.rounds,
        "first_ms": {who: ms(values) for who, values in first.items()},
        "first_added_ms": round(1000 * float(np.median(first["server"]) - np.median(first["engine"])), 2),
        "token_ms": {who: ms(values) for who, values in gaps.items()},
        "token_added_ms": round(1000 * float(np.median(gaps["server"]) - np.median(gaps["engine"])), 3),
        "processor_ms_per_token": {who: ms(values) for who, values in spent.items()},
        "processor_added_ms_per_token": round(1000 * float(np.mean(spent["server"]) - np.mean(spent["engine"])), 3),
    }
    print(json.dumps(found, indent=1))
    sys.exit(found["first_added_ms"] > 20 or found["token_added_ms"] > 1)


if __name__ == "__main__":
    main()
