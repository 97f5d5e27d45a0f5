"""Adds torch and transformers to the environment that `mlflow run` made, for the entry points that need them.

MLflow gives all entry points of an MLproject file one environment, and the ONNX builder needs neither package. Any
other environment, such as that of `--env-manager local`, is left as it is. The versions are those of constraints.txt.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# On Linux the package index's torch brings gigabytes of CUDA; PyTorch's own index has a build for CPUs.
CPU_INDEX = ("--retries", "0", "--timeout", "20", "--index-url", "https://download.pytorch.org/whl/cpu")


def main() -> int:
    """Installs what is missing; returns the exit code."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    # mlflow.utils.virtualenv and mlflow.utils.conda name what they make mlflow-<sha1>.
    if not missing or re.fullmatch("mlflow-[0-9a-f]{40}", Path(sys.prefix).name) is None:
        return 0
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    lines = constraints.read_text("utf-8").splitlines()
    pins = [line for line in lines if line.partition("==")[0] in missing]
    torch = [line for line in pins if line.startswith("torch==")]
    if sys.platform == "linux" and torch and install(*torch, *CPU_INDEX) == 0:
        pins.remove(torch[0])
    return install(*pins, "--constraint", str(constraints)) if pins else 0


def install(*arguments: str) -> int:
    """Runs the environment's pip, which conda.yaml lists; returns its exit code."""
    print("Installing", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
