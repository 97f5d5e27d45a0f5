"""Logs both forms of the embedded model, serves each with `mlflow models serve`, and asks both the same question."""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

QUESTION = "What is the capital of Spain?"
STORE = Path(__file__).resolve().parent.parent / ".demo"


def main() -> None:
    """Runs the demo; everything it writes goes to .demo."""
    STORE.mkdir(exist_ok=True)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{STORE / 'mlflow.db'}")
    os.chdir(STORE)
    say("Loading MLflow and the toolkit ...")
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from phi3_mlflow.builders import onnx, transformers

    logged = []
    for label, builder in (("transformers", transformers), ("onnxruntime-genai", onnx)):
        started = time.monotonic()
        info = builder.log_model()
        say(f"Logged the {label} model as {info.model_uri} in {time.monotonic() - started:.1f} s")
        logged.append((label, info.model_uri))
    answers = [ask(label, model_uri) for label, model_uri in logged]
    print(f"\n{QUESTION}\n")
    print(f"  {'runtime':<18} {'answer':<34} {'prompt':>6} {'answer':>6} {'finish':>7} {'time':>8}")
    print(f"  {'':<18} {'':<34} {'tokens':>6} {'tokens':>6}")
    for label, completion, seconds in answers:
        choice, usage = completion["choices"][0], completion["usage"]
        counts = f"{usage['prompt_tokens']:>6} {usage['completion_tokens']:>6}"
        text = choice["message"]["content"]
        print(f"  {label:<18} {text:<34} {counts} {choice['finish_reason']:>7} {seconds * 1000:>5.0f} ms")
    print_next_steps(logged[1][1])


def ask(label: str, model_uri: str) -> tuple[str, dict, float]:
    """One question to a freshly started server; the time is that of the request alone."""
    from phi3_mlflow.serving import served

    say(f"Serving the {label} model with `mlflow models serve` ...")
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]}).encode()
    with served(model_uri) as address:
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        started = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as response:
            completion = json.load(response)[0]
        return label, completion, time.monotonic() - started


def print_next_steps(model_uri: str) -> None:
    """The commands to go on with, ready to be pasted."""
    store = os.environ["MLFLOW_TRACKING_URI"]
    print(
        f"""
Go on with:

  source .venv/bin/activate
  export MLFLOW_TRACKING_URI={store}

  phi3-mlflow chat {model_uri}
  mlflow models serve -m {model_uri} -p 5000 --env-manager local
  curl -s http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' \\
       -d '{{"messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
  mlflow ui -p 5001
"""
    )


def say(line: str) -> None:
    """Progress, beside the results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
