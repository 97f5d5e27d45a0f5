"""`mlflow models generate-dockerfile` of our models: what it writes, and its command run without an engine.

Run: pytest tests/containers/test_mlflow_image.py
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import container_steps
import pytest
from click.testing import CliRunner
from command import ROOT
from mlflow.cli import cli as mlflow_cli
from process import MADRID

from phi3_mlflow import verify

DOCUMENT = (ROOT / "docs" / "containers.md").read_text("utf-8")


@pytest.fixture(scope="module")
def generated(onnx_model, tmp_path_factory) -> Path:
    """What the document's command writes."""
    folder = tmp_path_factory.mktemp("mlflow-image") / "out"
    (command,) = re.findall(r"^mlflow (models generate-dockerfile .*)$", DOCUMENT, re.MULTILINE)
    arguments = [{"models:/phi3@champion": str(onnx_model), "./phi3-mlflow-image": str(folder)}.get(part, part)
                 for part in shlex.split(command)]  # fmt: skip
    result = CliRunner().invoke(mlflow_cli, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_it_installs_the_models_own_requirements_and_no_torch(generated):
    text = (generated / "Dockerfile").read_text()
    (model,) = (generated / "model_dir").iterdir()
    requirements = (model / "requirements.txt").read_text()

    assert "_install_pyfunc_deps('/opt/ml/model'" in text
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim$", text, re.MULTILINE)
    assert "torch" not in text + requirements


def test_the_model_in_it_is_whole(generated):
    (model,) = (generated / "model_dir").iterdir()
    checks = verify.run(str(model))

    assert checks
    assert not [check for check in checks if check.status == "failed"]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed (Debian's bubblewrap)")
def test_its_command_answers_with_the_documents_settings(generated, tmp_path):
    image = container_steps.build(generated, tmp_path, virtualenv=Path(sys.prefix), run=False)
    (command,) = re.findall(r"^docker run (.*phi3-mlflow-image)$", DOCUMENT.replace("\\\n", ""), re.MULTILINE)
    words = shlex.split(command)
    variables = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--env")
    assert {"MLFLOW_MODELS_WORKERS", "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"} <= set(variables)
    # This machine's environment is not the image's: its path is, and nginx, which is not asked here.
    image.environment["PATH"] = "/opt/venv/bin:/usr/bin:/bin"
    variables |= {"DISABLE_NGINX": "true", "HOME": "/tmp"}

    # Its root can be written, and its user is root; it is run as another one over a root that cannot.
    image.user = "10001:10001"
    found = container_steps.probe(image, variables=variables, port=8000, key=None, path="/invocations", ready="/ping")

    status, text = found["answer"]
    assert status == 200
    assert json.loads(text)[0]["choices"][0]["message"]["content"] == MADRID
    assert found["without key"] == 200  # it knows none
