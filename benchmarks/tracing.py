"""What tracing costs a request: the span of an answer without an active trace, and below one; predict both ways.

python benchmarks/tracing.py        the embedded model, about 1 minute
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import mlflow
import numpy as np

from phi3_mlflow import machine
from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.tracing import Span

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


def span() -> None:
    """What `predict` adds for tracing."""
    with Span("phi3", None, QUESTION) as own:
        own.outputs = QUESTION


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    asked = parser.parse_args()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    took: dict[str, list[float]] = {}

    def measure(name: str, call) -> None:
        start = time.perf_counter()
        call()
        took.setdefault(name, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as temporary:
        mlflow.set_tracking_uri(f"sqlite:///{temporary}/mlflow.db")
        path = Path(temporary) / "model"
        onnx.save_model(path)
        model = mlflow.pyfunc.load_model(str(path))
        for _ in range(asked.rounds):
            measure("span, no trace", span)
            measure("predict, no trace", lambda: model.predict(QUESTION))
            with mlflow.start_span("benchmark"):
                measure("span, below a trace", span)
                measure("predict, below a trace", lambda: model.predict(QUESTION))
        mlflow.flush_trace_async_logging()
    print(f"\n{machine.line()}\n\n| | median | p90 |\n|---|---:|---:|")
    for name, seconds in sorted(took.items()):
        median, p90 = np.quantile(seconds, [0.5, 0.9]) * 1000
        print(f"| {name} | {median:.3f} ms | {p90:.3f} ms |")


if __name__ == "__main__":
    main()
