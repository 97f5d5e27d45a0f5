"""How often `phi3-mlflow compare A B --gate` decides rightly: spoiled candidates, each followed by an equal one.

    python benchmarks/gate.py               20 of each, many minutes
    python benchmarks/gate.py --times 4     the four whole layers

A spoiled candidate is the embedded model with the scales of one layer, then of one matrix, times 1.05. The alias must
stay and the exit code be 1; an equal one must take it with 0. Prints each comparison and the counts; exits 1 on a miss.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow

from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.decoders import onnx_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from spoiled import WEIGHTS, spoil

LIMIT = 600  # seconds for one comparison


def parts(seed: int) -> list[str]:
    """The four layers, then the matrices in them and the head, shuffled."""
    nodes = onnx_file.read(WEIGHTS / "model.onnx").nodes
    matrices = [node.inputs[2] for node in nodes if node.op == "MatMulNBits"]
    random.Random(seed).shuffle(matrices)
    return [f"layers.{layer}." for layer in range(4)] + matrices


def decide(version: int, seed: int) -> tuple[bool, str]:
    """Runs the command against version 1. Returns whether the alias moved, and what was said of the bounds."""
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("gate", "champion", "1")
    command = [sys.executable, "-m", "phi3_mlflow", "compare", "models:/gate@champion", f"models:/gate/{version}"]
    command += ["--gate", "champion", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    moved = str(client.get_model_version_by_alias("gate", "champion").version) == str(version)
    said = [line for line in done.stdout.splitlines() if line.startswith(("kept", "broken"))]
    if done.returncode != (not moved) or not said:
        raise SystemExit(f"exit code {done.returncode}, alias {'moved' if moved else 'unmoved'}: {done.stderr}")
    return moved, "; ".join(said)


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="candidates of each kind, at most 25")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    refused = passed = 0
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{room / 'mlflow.db'}"
        os.environ["MLFLOW_EXPERIMENT_NAME"] = "gate"
        mlflow.create_experiment("gate", artifact_location=(room / "artifacts").as_uri())
        onnx.log_model(registered_model_name="gate")
        onnx.log_model(registered_model_name="gate")
        chosen = parts(asked.seed)[: asked.times]
        for index, part in enumerate(chosen):
            onnx.log_model(spoil(room / f"weights{index}", part), registered_model_name="gate")
            moved, said = decide(index + 3, index)
            refused += not moved
            print(f"{part}: {'MISSED' if moved else 'refused'}: {said}", flush=True)
            moved, said = decide(2, index)
            passed += moved
            print(f"equal: {'passed' if moved else 'MISSED'}: {said}", flush=True)
    print(f"refused {refused} of {len(chosen)} spoiled, passed {passed} of {len(chosen)} equal")
    sys.exit(min(refused, passed) < len(chosen))


if __name__ == "__main__":
    main()
