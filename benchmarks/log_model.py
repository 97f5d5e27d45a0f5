"""How long logging takes at full size: weights embedded and by reference, against `cp` of the same files.

    python benchmarks/full_size.py                      makes the folder that is logged, 2.7 GB
    python benchmarks/log_model.py [--folder FOLDER] [--rounds 5] [--place DIRECTORY]

The three take turns, each on files that the page cache has, with the disk at rest before each; once until they return,
and once until all that was written is on the disk (sync). No hash is remembered from an earlier round. All that is
written is in one temporary folder, three times the size of the weights at most.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from full_size import options

os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}  # read when the libraries are imported

COMMIT = "0" * 40


def main() -> None:
    """Measures what the command line says."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="Where to write. Default: the system's temporary folder.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.place) as temporary:
        room = Path(temporary)
        os.environ |= {"HF_HUB_CACHE": str(room / "hub"), "XDG_CACHE_HOME": str(room / "cache"), "TMPDIR": temporary}
        tempfile.tempdir = temporary
        snapshot = room / "hub" / "models--bench--full-size" / "snapshots" / COMMIT
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(arguments.folder, snapshot, ignore=shutil.ignore_patterns("manifest.json", ".gitignore"))
        size = sum(path.stat().st_size for path in snapshot.iterdir())
        seconds = measured(room, snapshot, arguments.rounds)
    from phi3_mlflow import machine
    from phi3_mlflow.layout import markdown

    rows = []
    for name, values in seconds.items():
        row = [name]
        for until in range(2):
            took = [each[until] for each in values]
            ratio = statistics.median(
                each[until] / base[until] for each, base in zip(values, seconds["cp"], strict=True)
            )
            row += [f"{statistics.median(took):.1f} s ({min(took):.1f} to {max(took):.1f})", f"{ratio:.2f}"]
        rows.append(row)
    print(f"{machine.line()}; {size / 1e9:.2f} GB, medians of {arguments.rounds} rounds\n")
    print(markdown(["", "until it returns", "of cp", "until it is on the disk", "of cp"], rows))


def measured(room: Path, snapshot: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each round until it returned and until the disk was at rest, by what was done."""
    import mlflow

    from phi3_mlflow.builders import onnx

    mlflow.set_tracking_uri(f"sqlite:///{room / 'mlflow.db'}")
    mlflow.create_experiment("bench", artifact_location=(room / "written").as_uri())
    mlflow.set_experiment("bench")

    def log(*, reference: bool) -> None:
        onnx.log_model("bench/full-size", revision=COMMIT, reference=reference)

    def copy() -> None:
        subprocess.run(["cp", "-r", snapshot, room / "written"], check=True)

    ways: dict[str, Callable[[], None]] = {
        "cp": copy,
        "log_model": lambda: log(reference=False),
        "log_model(reference=True)": lambda: log(reference=True),
    }
    log(reference=True)  # imports, and the database's tables
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            shutil.rmtree(room / "written", ignore_errors=True)
            shutil.rmtree(room / "cache", ignore_errors=True)
            os.sync()
            began = time.perf_counter()
            way()
            returned = time.perf_counter() - began
            os.sync()
            seconds[name].append((returned, time.perf_counter() - began))
    return seconds


if __name__ == "__main__":
    main()
