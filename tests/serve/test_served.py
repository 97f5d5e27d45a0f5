"""One model in memory: what it is loaded with, what it is asked, and that its memory returns when it is closed.

Run: pytest tests/serve/test_served.py
"""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.errors import FormatError, Phi3Error
from phi3_mlflow.serve.served import Spec, load

ROOT = Path(__file__).resolve().parent.parent.parent

# Loads and closes a model several times; prints the MiB in memory before, with it, and after each time.
CYCLES = """
import sys
import weakref
from phi3_mlflow.machine import resident
from phi3_mlflow.serve.served import Spec, load

def cycle():
    loaded = load(Spec("m", sys.argv[1]), parallel=int(sys.argv[2]))
    loaded.service.start({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).wait()
    most = resident()
    loaded.close()
    return most

cycle()  # what libraries keep for good
print([(cycle() / 2**20, resident() / 2**20) for _ in range(4)])
"""


@pytest.fixture(autouse=True)
def _leaves_the_environment(monkeypatch):
    """MLflow's scoring app notes in the environment that it serves."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "false")


@pytest.mark.parametrize("builder", ["onnx", "transformers"])
def test_a_model_answers_its_own_example(saved, builder):
    loaded = load(Spec("m", str(saved[builder])))

    assert loaded.example["messages"][0]["content"] == "What is the capital of Spain?"
    loaded.ask(60)
    with pytest.raises(Phi3Error, match="was not answered within 0 seconds"):
        loaded.ask(0)
    loaded.close()
    loaded.close()


@pytest.mark.parametrize("task", ["llm/v1/completions", "flat"])
@pytest.mark.parametrize("own", [True, False])
def test_a_model_of_another_task_is_asked_too_with_or_without_an_example_of_its_own(task, own, tmp_path):
    onnx.save_model(tmp_path / "m", task=task)
    if not own:
        lines = (tmp_path / "m" / "MLmodel").read_text("utf-8").split("\n")
        begin = lines.index("saved_input_example_info:")
        end = next(at for at in range(begin + 1, len(lines)) if not lines[at].startswith(" "))
        (tmp_path / "m" / "MLmodel").write_text("\n".join(lines[:begin] + lines[end:]), "utf-8")
    loaded = load(Spec("m", str(tmp_path / "m")))

    loaded.ask(60)

    assert loaded.example["prompt"] == "What is the capital of Spain?"
    loaded.close()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match="MLmodel"):
        load(Spec("m", str(tmp_path)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("parallel", [1, 4])
def test_the_memory_of_a_closed_model_returns(parallel, tmp_path):
    pytest.importorskip("onnx")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import full_size

    # Large enough to be seen beside what libraries keep: some 100 MiB, in pieces of a few.
    shape = full_size.Shape(hidden=1024, layers=8, heads=8, intermediate=2816, vocabulary=2560, context=1024)
    onnx.save_model(tmp_path / "m", full_size.make(tmp_path / "weights", shape))

    done = subprocess.run(
        [sys.executable, "-c", CYCLES, str(tmp_path / "m"), str(parallel)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    cycles = json.loads(done.stdout.replace("(", "[").replace(")", "]"))
    size = cycles[0][0] - cycles[0][1]
    assert size > 50, cycles
    lowest = min(after for _, after in cycles)
    assert all(after < lowest + 0.25 * size for _, after in cycles), cycles


@pytest.mark.parametrize("builder", ["onnx", "transformers"])
def test_nothing_holds_a_model_that_was_closed(builder, saved):
    loaded = load(Spec("m", str(saved[builder])))
    predictor = weakref.ref(loaded.predictor)
    loaded.ask(60)

    loaded.close()
    del loaded

    assert predictor() is None
