"""`mlflow run .` with each environment manager that needs no conda.

Run: pytest tests/test_mlproject.py
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def mlflow_run(tmp_path, *arguments: str, manager: str = "local") -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_EXPERIMENT")}
    environment = {
        **inherited,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        # Environments that MLflow makes are kept apart from the user's own.
        "MLFLOW_ENV_ROOT": str(tmp_path / "envs"),
    }
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", manager, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)


def logged(tmp_path) -> list[mlflow.entities.LoggedModel]:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    return list(client.search_logged_models(experiment_ids=["0"]))


def assert_linked(tmp_path) -> None:
    """The run has the logged models as its outputs, and they have it as their source."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(experiment_ids=["0"])
    models = logged(tmp_path)
    assert {model.source_run_id for model in models} == {run.info.run_id}
    outputs = client.get_run(run.info.run_id).outputs.model_outputs
    assert {output.model_id for output in outputs} == {model.model_id for model in models}
    assert run.info.status == "FINISHED"


def packages(tmp_path) -> set[str]:
    """What is installed in the environment that MLflow made."""
    return {path.name.partition("-")[0] for path in (tmp_path / "envs").rglob("site-packages/*.dist-info")}


def test_the_main_entry_point_logs_and_registers_both(tmp_path):
    done = mlflow_run(tmp_path, "-P", "register=phi3", "-P", "temperature=0.3", "-P", "max_tokens=64")

    assert done.returncode == 0, done.stderr
    assert sorted(model.name for model in logged(tmp_path)) == ["phi3-onnx", "phi3-transformers"]
    registry = mlflow.MlflowClient(registry_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    names = sorted(model.name for model in registry.search_registered_models())
    assert names == ["phi3-onnx", "phi3-transformers"]
    assert_linked(tmp_path)


def test_a_builder_has_an_entry_point_of_its_own(tmp_path):
    done = mlflow_run(tmp_path, "-e", "transformers", "-P", "name=mine")

    assert done.returncode == 0, done.stderr
    assert [model.name for model in logged(tmp_path)] == ["mine"]


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("temperature=hot", "`temperature` is 'hot'; it must be a number from 0 to 2"),
        ("weights=$(touch trap)", "$(touch trap)"),
    ],
)
def test_a_wrong_parameter_ends_with_one_clear_line(tmp_path, parameter, message):
    done = mlflow_run(tmp_path, "-e", "onnx", "-P", parameter)

    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ") and message in line], done.stderr
    assert not list(tmp_path.rglob("trap"))
    assert not (ROOT / "trap").exists()


@pytest.fixture
def pyenv(tmp_path, monkeypatch):
    """A `pyenv` that knows this interpreter alone; MLflow's virtualenv manager asks it for Python, and builds none."""
    version = platform.python_version()
    python = tmp_path / "pyenv" / "versions" / version / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    script = tmp_path / "bin" / "pyenv"
    script.parent.mkdir()
    answers = f'case "$*" in "install --list") echo "  {version}";; root) echo "{tmp_path / "pyenv"}";; esac'
    script.write_text(f"#!/bin/sh\n{answers}\n", "utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script


@pytest.mark.parametrize("manager", ["virtualenv", "uv"])
def test_mlflow_makes_the_environment_without_torch_until_an_entry_point_needs_it(tmp_path, manager, pyenv):
    done = mlflow_run(tmp_path, "-e", "onnx", manager=manager)

    assert done.returncode == 0, done.stderr[-4000:]
    assert [model.name for model in logged(tmp_path)] == ["phi3-onnx"]
    assert_linked(tmp_path)
    installed = packages(tmp_path)
    assert {"mlflow", "onnxruntime_genai"} <= installed
    assert not [name for name in installed if re.match("torch|transformers|nvidia|triton|cuda", name)]
    if manager == "uv":
        done = mlflow_run(tmp_path, "-e", "transformers", manager=manager)

        assert done.returncode == 0, done.stderr[-4000:]
        assert sorted(model.name for model in logged(tmp_path)) == ["phi3-onnx", "phi3-transformers"]
        assert {"torch", "transformers"} <= packages(tmp_path)


def test_an_environment_of_somebody_elses_is_left_alone(tmp_path):
    python = tmp_path / "mine" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "mine"], check=True)

    done = subprocess.run([python, ROOT / "scripts" / "project_environment.py"], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_environment_has_the_tested_versions():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line
    )
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text("utf-8"))
    packages = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))

    assert packages
    for package in packages:
        name, _, version = package.partition("==")
        assert pinned[name] == version
