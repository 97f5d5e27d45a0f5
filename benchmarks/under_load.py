"""What `mlflow models serve` does with more requests than it can answer: 70 at once, each of a few seconds.

python benchmarks/under_load.py [--parallel 8]        the embedded model; two cores: about 3 minutes
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests

from phi3_mlflow import machine, weights
from phi3_mlflow.builders import onnx
from phi3_mlflow.serving import served


def body(tokens: int, eos: list[int]) -> dict:
    """A request whose answer has exactly so many tokens."""
    return {
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": tokens,
        "repetition_guard": False,
        "self_talk_guard": False,
        "custom_inputs": {"logit_bias": {str(token): -100 for token in eos}},
    }


def ask(address: str, request: dict) -> tuple[str, int, float]:
    """What came back, with how many tokens, and after how many seconds."""
    start = time.perf_counter()
    response = requests.post(f"{address}/invocations", json=request, timeout=600)
    took = time.perf_counter() - start
    if response.status_code != 200:
        return str(response.status_code), 0, took
    [answer] = response.json()
    whole = answer["custom_outputs"]["stop_reason"] == ["max_tokens"]
    return f"200, {'whole' if whole else 'cut by `max_time`'}", answer["usage"]["completion_tokens"], took


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=70, help="sent at the same time")
    parser.add_argument("--tokens", type=int, default=900, help="of each answer")
    parser.add_argument("--timeout", type=int, default=60, help="the server's, in seconds")
    parser.add_argument("--parallel", type=int, default=1, help="the model's setting")
    asked = parser.parse_args()
    folder = weights.resolve(weights.EMBEDDED, "onnx").folder
    eos = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["eos_token_id"]
    environment = {
        # An answer that may not end goes round in circles, which proposals would make short work of.
        "MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps({"parallel": asked.parallel, "speculation": "off"}),
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(asked.timeout),
    }
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        onnx.save_model(path)
        with served(str(path), cwd=temporary, environment=environment) as address:
            ask(address, body(16, eos))
            *_, alone = ask(address, body(asked.tokens, eos))
            answers: dict[str, list[tuple[int, float]]] = defaultdict(list)
            with ThreadPoolExecutor(asked.requests) as clients:
                sent = [clients.submit(ask, address, body(asked.tokens, eos)) for _ in range(asked.requests)]
                for what, count, seconds in (each.result() for each in sent):
                    answers[what].append((count, seconds))
            *_, after = ask(address, body(1, eos))
            leaving = ThreadPoolExecutor(20)
            for _ in range(20):
                leaving.submit(ask, address, body(asked.tokens, eos))
            time.sleep(2.0)
            end = time.monotonic()
        leaving.shutdown(wait=True)
        ended = time.monotonic() - end
    print(f"\n{machine.line()}; parallel = {asked.parallel}\n")
    print(f"{asked.requests} requests at once; one alone has {asked.tokens} tokens and takes {alone:.1f} s")
    print(f"the server's timeout is {asked.timeout} s\n")
    print("| answer | requests | tokens, median | after, median | after, at most |\n|---|---:|---:|---:|---:|")
    for what, each in sorted(answers.items()):
        amount, median = np.median(np.asarray(each), axis=0)
        print(f"| {what} | {len(each)} | {amount:.0f} | {median:.1f} s | {max(took for _, took in each):.1f} s |")
    print(f"\na request of one token after them: {after:.2f} s")
    print(f"from SIGTERM, while 20 requests run and wait, until all of them were told: {ended:.2f} s")


if __name__ == "__main__":
    main()
