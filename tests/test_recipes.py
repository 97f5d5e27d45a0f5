"""The documentation's code runs as it stands: evaluation, comparison, tracing, and an answer without MLflow.

Run with: python -m pytest tests/test_recipes.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from documented import ROOT, blocks

from phi3_mlflow.builders import onnx

PATIENCE = 300


def code(heading: str, language: str = "python", page: str = "docs/recipes.md") -> str:
    """The one block of a language below a heading."""
    (block,) = blocks(page, heading, language)
    return block.code


def run(program: str, folder: Path, interpreter: tuple[str, ...] = (sys.executable, "-c")) -> str:
    """What code prints in a process of its own, where the embedded model lies as in a checkout."""
    (folder / "artifacts").symlink_to(ROOT / "artifacts")
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    done = subprocess.run(
        [*interpreter, program], cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def registered():
    """The model that the recipes name: its first version, also where other tests have registered one."""
    client = mlflow.MlflowClient()
    if client.search_registered_models("name = 'phi3'"):
        client.delete_registered_model("phi3")
    onnx.log_model(name="phi3", registered_model_name="phi3", alias="champion")


def test_evaluation_scores_the_models_answers(registered, tmp_path):
    after = "\nprint([metric.key for metric in mlflow.get_logged_model(model.model_id).metrics])"
    printed = run(code("Evaluate") + after, tmp_path)
    assert re.search(r"'right/mean': (np\.float64\()?1\.0", printed)
    assert "['right/mean']" in printed  # on the model's page


def test_a_candidate_that_is_equal_gets_the_champions_alias(registered, tmp_path):
    printed = run(code("Compare", "bash"), tmp_path, ("bash", "-ec"))
    assert "the alias champion of phi3 means version 2 (was version 1)" in printed
    assert str(mlflow.MlflowClient().get_model_version_by_alias("phi3", "champion").version) == "2"


def test_both_builders_models_are_compared_on_the_command_line_and_in_python(registered, tmp_path):
    start = code("Comparing models, and a gate before an alias", "bash", "docs/compare.md")
    log, _ = start.splitlines()  # the other one is the gate's, with other models
    run(log, tmp_path, ("bash", "-ec"))
    (tmp_path / "artifacts").unlink()
    assert run(code("Questions", page="docs/compare.md"), tmp_path).strip() == "[1.0, 1.0] 1.0"


def test_tracing_shows_the_tokens_on_the_models_page(registered, tmp_path):
    printed = run(code("Trace"), tmp_path)
    assert "The capital of Spain is Madrid." in printed
    assert "'input_tokens': 14, 'output_tokens': 8" in printed


def test_an_answer_streams_without_mlflow_and_pandas(tmp_path):
    program = code("How it works", page="docs/how-it-works.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    loaded = "\nimport sys\nprint({name.partition('.')[0] for name in sys.modules} & {'mlflow', 'pandas', 'torch'})"
    answer, modules = run(program + loaded, tmp_path).splitlines()
    assert answer == "The capital of Spain is Madrid. eos 8"
    assert modules == "set()"
