"""The README's code runs as it stands there: evaluation, tracing, Spark, and an answer without MLflow.

Run with: python -m pytest tests/test_recipes.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_mlflow.builders import onnx

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # Spark on two busy cores


def blocks(heading: str) -> list[str]:
    """The Python code below a heading of the README."""
    chapter = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#+ |\Z)", without_code_comments(), re.M | re.S)
    assert chapter, heading
    return [code.replace("\0", "#") for code in re.findall(r"^```python\n(.*?)^```", chapter[1], re.M | re.S)]


def without_code_comments() -> str:
    """The README with the `#` of its code replaced, since it begins headings elsewhere."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.sub(r"^```.*?^```", lambda block: block[0].replace("#", "\0"), text, flags=re.M | re.S)


def run(code: str, folder: Path) -> str:
    """What code prints in a process of its own, where the embedded model lies as in a checkout."""
    (folder / "artifacts").symlink_to(ROOT / "artifacts")
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def registered():
    """The models that the recipes name."""
    onnx.log_model(name="phi3", registered_model_name="phi3", alias="champion")
    onnx.log_model(name="phi3-flat", task="flat", registered_model_name="phi3-flat", alias="champion")


def rows(table: str) -> list[list[str]]:
    """The cells of tables as Spark shows them, with their heads."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_evaluation_scores_the_models_answers(registered, tmp_path):
    [code] = blocks("### Evaluate")
    after = "\nprint([metric.key for metric in mlflow.get_logged_model(model.model_id).metrics])"
    printed = run(code + after, tmp_path)
    assert re.search(r"'right/mean': (np\.float64\()?1\.0", printed)
    assert "['right/mean']" in printed  # on the model's page


def test_tracing_shows_the_tokens_on_the_models_page(registered, tmp_path):
    [code] = blocks("### Trace")
    printed = run(code, tmp_path)
    assert "The capital of Spain is Madrid." in printed
    assert "'input_tokens': 14, 'output_tokens': 8" in printed


@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_spark_answers_texts_and_chats_and_leaves_null_where_it_cannot(registered, tmp_path):
    printed = run("\n".join(blocks("### Spark")), tmp_path)
    assert rows(printed) == [
        ["prompt", "answer"],
        ["What is the capital of Spain?", "The capital of Spain is Madrid."],
        ["", "NULL"],
        ["What is the capital of France?", "The capital of France is Paris."],
        ["answer", "reason"],
        ["The capital of Spain is Madrid.", "stop"],
        ["NULL", "NULL"],
    ]


def test_an_answer_streams_without_mlflow_and_pandas(tmp_path):
    [code] = blocks("## How it works")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    loaded = "\nimport sys\nprint({name.partition('.')[0] for name in sys.modules} & {'mlflow', 'pandas', 'torch'})"
    answer, modules = run(code + loaded, tmp_path).splitlines()
    assert answer == "The capital of Spain is Madrid. eos 8"
    assert modules == "set()"
