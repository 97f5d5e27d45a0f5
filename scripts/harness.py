"""lm-evaluation-harness, unmodified, against `phi3-mlflow serve` with the embedded model and two tasks of three lines.

    python -m venv .harness && .harness/bin/pip install "lm-eval[api]==0.4.13"
    python scripts/harness.py .harness/bin/lm_eval

It has an environment of its own because it brings some seventy packages; torch and transformers are not among them, and
nothing is loaded from the network: the tokenizer is the server's. Ends with status 1 where an answer is wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from serve_soak import server

TASKS = Path(__file__).resolve().parent.parent / "benchmarks" / "harness"
# The kind of model, its route, its task, and the metric.
CASES = [
    ("local-completions", "/v1/completions", "phi3_choices", "acc,none", ["--batch_size", "3"]),
    ("local-chat-completions", "/v1/chat/completions", "phi3_answers", "exact_match,none", ["--apply_chat_template"]),
]


def main() -> None:
    """Runs both."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} LM_EVAL, its command; see the head of this file")
    harness = str(Path(sys.argv[1]).absolute())
    wrong = False
    with server() as (address, _), tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": folder}
        environment.pop("PYTHONPATH", None)
        for kind, path, task, metric, more in CASES:
            given = f"model=phi3,base_url={address}{path},max_length=4096"
            command = [harness, "--model", kind, "--model_args", given, "--tasks", task, "--include_path", "."]
            output = Path(folder) / task
            subprocess.run(
                [*command, "--output_path", str(output), *more], cwd=TASKS, env=environment, check=True, timeout=600
            )
            (results,) = output.rglob("results_*.json")
            value = json.loads(results.read_text("utf-8"))["results"][task][metric]
            print(f"{kind}: {task} {metric.removesuffix(',none')} {value:g}")
            wrong |= value != 1
    sys.exit(wrong)


if __name__ == "__main__":
    main()
