"""How long /ping takes while `mlflow models serve` answers four clients at full size, through both decoders.

python benchmarks/full_size.py && python benchmarks/ping.py       two cores: about 2 minutes, and 3 GB of disk
"""

import json
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import full_size
import numpy as np
import requests

from phi3_mlflow import machine
from phi3_mlflow.builders import onnx
from phi3_mlflow.serving import served

CLIENTS = 4
PAUSE = 0.02  # seconds between two pings


def busy_pings(address: str, rounds: int, prompt: int, tokens: int) -> np.ndarray:
    """Seconds of each /ping while the clients ask one question after the other."""
    random = Random(0)
    bodies = [
        {
            "messages": [{"role": "user", "content": "".join(random.choices("0123456789", k=prompt))}],
            "max_tokens": tokens,
            "repetition_guard": False,
        }
        for _ in range(CLIENTS * rounds)
    ]
    failures: list[str] = []

    def client(own: list[dict]) -> None:
        for body in own:
            answer = requests.post(f"{address}/invocations", json=body, timeout=600)
            if answer.status_code != 200:
                failures.append(answer.text)

    threads = [threading.Thread(target=client, args=(bodies[at::CLIENTS],)) for at in range(CLIENTS)]
    for thread in threads:
        thread.start()
    took = []
    with requests.Session() as session:
        while any(thread.is_alive() for thread in threads):
            start = time.perf_counter()
            session.get(f"{address}/ping", timeout=600).raise_for_status()
            took.append(time.perf_counter() - start)
            time.sleep(PAUSE)
    if failures:
        raise SystemExit(f"{len(failures)} requests failed, the first with {failures[0][:300]}")
    return np.asarray(took)


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="questions of each client")
    parser.add_argument("--prompt", type=int, default=64, help="tokens, about")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, at most")
    asked = parser.parse_args()
    lines = ["| `/ping` under 4 clients | median | p99 | slowest | pings |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(dir=asked.folder.parent) as temporary:
        path = Path(temporary) / "model"
        onnx.save_model(path, asked.folder, model_config={"context_length": 2048})
        for name, settings in (("genai", {}), ("batched", {"parallel": CLIENTS})):
            # MLflow's way to change a model's settings for one server.
            environment = {"MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps(settings)}
            with served(str(path), cwd=temporary, environment=environment) as address:
                took = busy_pings(address, asked.rounds, asked.prompt, asked.tokens) * 1000
            numbers = " | ".join(f"{value:.0f} ms" for value in (*np.quantile(took, [0.5, 0.99]), took.max()))
            lines.append(f"| {name} | {numbers} | {len(took)} |")
    print(f"\n{machine.line()}; {asked.folder.name}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
