"""The first answer after a load against later ones, for each engine in turn.

    python benchmarks/full_size.py && python benchmarks/first.py        about a minute for each engine in each round
    python benchmarks/first.py --folder artifacts/onnx --rounds 1       a quick look at the embedded model

Prints, for answers of one token to prompts that have nothing in common, how long loading takes, the first answer, and
the median of those that come later. Nothing else should run meanwhile.
"""

import importlib.util
import random
import time
from collections import defaultdict
from statistics import median

import full_size

from phi3_mlflow import machine
from phi3_mlflow.runtime import loading

ENGINES = ("genai", "onnxruntime", "openvino")
AIM = 1.5  # times a later one
LATER = 5


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    asked = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    raw = {"task": "llm/v1/completions", "template": False, "idle_prefill": False}
    for index in range(asked.rounds):
        for engine in asked.engines:
            if engine == "openvino" and importlib.util.find_spec("openvino") is None:
                continue
            start = time.perf_counter()
            service = loading.load(asked.folder, engine=engine, **raw)
            loaded = time.perf_counter() - start
            took, rng = [], random.Random(index)
            for _ in range(1 + LATER):
                prompt = [rng.randrange(100, 1000) for _ in range(asked.prompt)]
                start = time.perf_counter()
                service.start({"prompt": prompt, "max_tokens": 1}).wait()
                took.append(time.perf_counter() - start)
            service.close()
            found[service.engine].append((loaded, took[0], median(took[1:])))
    print(
        f"{machine.line()}; {asked.folder.name}, prompts of {asked.prompt} tokens, medians of {asked.rounds} rounds\n"
    )
    print(f"| | loading | first answer | later | first / later (aim: at most {AIM:g}) |\n|---|---:|---:|---:|---:|")
    for name, rounds in found.items():
        loaded, first, later = (median(values) for values in zip(*rounds, strict=True))
        ratio = median(first / later for _, first, later in rounds)
        print(f"| {name} | {loaded:.2f} s | {first:.3f} s | {later:.3f} s | {ratio:.2f} |")


if __name__ == "__main__":
    main()
