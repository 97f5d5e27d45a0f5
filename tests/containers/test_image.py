"""The Dockerfile: read by a linter, and its steps carried out without an engine, up to a server that answers.

No image is built here. RUN is left out, this machine's virtual environment stands for what pip would install;
`python scripts/container_steps.py FOLDER` does that too. Run: pytest tests/containers/test_image.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import container_steps
import pytest
from click.testing import CliRunner
from process import MADRID

import phi3_mlflow.serve.keys as keys
from phi3_mlflow.cli import cli
from phi3_mlflow.containers.write import USER

BIN = Path(sys.executable).parent
BWRAP = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed (Debian's bubblewrap)")
KEY = {"PHI3_MLFLOW_API_KEYS": "probe=key-of-the-probe"}


def instructions(folder: Path) -> list[tuple[str, str]]:
    return list(container_steps.steps((folder / "Dockerfile").read_text()))


def test_the_linter_finds_nothing(folder, torch_folder):
    for path in (folder / "Dockerfile", torch_folder / "Dockerfile"):
        done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /opt && pip install mlflow\n")
    done = subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_weights_are_layers_of_their_own_before_all_else_of_the_model(folder, torch_folder):
    for path, weights in ((folder, ["artifacts"]), (torch_folder, ["components", "model"])):
        copies = [json.loads(value) for name, value in instructions(path) if name == "COPY" and value.startswith("[")]
        assert [each[0].removeprefix("model/") for each in copies[: len(weights)]] == weights
        copied = {name.removeprefix("model/") for *names, _ in copies for name in names}
        assert copied == {each.name for each in (path / "model").iterdir()}


def test_the_base_image_is_an_argument_and_the_user_has_a_number(folder):
    found = instructions(folder)

    assert found[0] == ("ARG", f"BASE_IMAGE=python:3.{sys.version_info[1]}-slim")
    assert {value.partition(" ")[0] for name, value in found if name == "FROM"} == {"${BASE_IMAGE}", "server"}
    # Kubernetes knows only of a number that it is not root's.
    assert ("USER", f"{USER}:{USER}") in found


def test_only_what_is_copied_is_sent_to_the_builder(folder, torch_folder):
    for path in (folder, torch_folder):
        lines = (path / ".dockerignore").read_text().splitlines()
        kept = {line[1:] for line in lines if line.startswith("!")}
        copied = [value for name, value in instructions(path) if name == "COPY" and not value.startswith("--from")]
        names = [name for value in copied for name in (json.loads(value) if value[0] == "[" else value.split())[:-1]]
        assert "*" in lines
        assert {name.split("/")[0] for name in names} == kept


@BWRAP
def test_the_command_runs_as_nobody_over_files_that_it_cannot_write_and_its_probes_answer(folder, tmp_path):
    image = container_steps.build(folder, tmp_path, virtualenv=Path(sys.prefix), run=False)
    lines = (folder / "kubernetes" / "settings.env").read_text().splitlines()
    variables = KEY | dict(line.split("=", 1) for line in lines)

    found = container_steps.probe(image, variables=variables, port=8000, key="key-of-the-probe")

    assert found["user"] == [USER, USER]
    assert found["written"] == ["/tmp"]
    # It was alive while the model was loaded, and not ready.
    assert found["starting"] in ([], [200])
    assert found["healthcheck"] == 0
    assert found["without key"] == found["metrics without key"] == 401
    status, text = found["answer"]
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == MADRID
    # The settings are the environment's.
    assert 'phi3_mlflow_slots{model_name="phi3"} 2.0' in found["metrics"]
    assert 'phi3_mlflow_kv_cache_capacity_tokens{model_name="phi3"} 4096.0' in found["metrics"]
    assert found["ended"] == 0
    assert found["healthcheck afterwards"] == 1


@BWRAP
def test_the_command_does_not_start_without_keys_where_the_variable_is_empty(folder, tmp_path):
    image = container_steps.build(folder, tmp_path, virtualenv=Path(sys.prefix), run=False)

    done = container_steps.inside(image, image.entrypoint, variables={"PHI3_MLFLOW_API_KEYS": ""}, seconds=120)

    assert done.returncode == 1
    assert "PHI3_MLFLOW_API_KEYS is set and holds no key" in done.stderr


def test_a_variable_without_keys_is_no_server_without_keys(monkeypatch):
    for text in ("", " ", ",", "# name=long-enough-key"):
        monkeypatch.setenv(keys.VARIABLE, text)
        with pytest.raises(keys.KeysError, match="holds no key"):
            keys.read(None)
    monkeypatch.delenv(keys.VARIABLE)
    assert not keys.read(None)


def test_every_option_of_serve_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_SERVE_PORT", "many")
    result = CliRunner().invoke(cli, ["serve"])

    assert result.exit_code == 2
    assert "'--port': 'many'" in result.stderr


def test_what_this_machine_has_of_the_dockerfile_is_known_to_the_script(folder, torch_folder):
    """An instruction that the script would not carry out ends it."""
    known = {
        *("ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE"),
        *("HEALTHCHECK", "ENTRYPOINT"),
    }
    assert {name for path in (folder, torch_folder) for name, _ in instructions(path)} == known
    assert os.access(container_steps.PROBE, os.R_OK)
