"""`phi3-mlflow containerize`: what is refused before the first byte, and what the folder holds.

Run: pytest tests/containers/test_containerize.py
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest
from command import containerize

from phi3_mlflow import verify
from phi3_mlflow.cli import cli
from phi3_mlflow.containers import plan as planning
from phi3_mlflow.containers.memory import MIB, Memory, Shape, kv_budget, shape
from phi3_mlflow.containers.plan import SERVE_PACKAGES
from phi3_mlflow.containers.write import settings
from phi3_mlflow.serve.cli import serve

GIVEN = ("--memory", "500MiB")  # nothing is loaded


def changed(model: Path, folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of a model with other text in a file."""
    shutil.copytree(model, folder)
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    return folder


def test_it_has_help_with_an_example_and_is_in_the_list_of_verbs():
    assert "containerize" in cli.list_commands(None)
    result = containerize("--help", "")  # click looks at options first

    assert "phi3-mlflow containerize models:/phi3@champion" in result.output


def test_the_model_in_the_folder_is_whole_and_can_be_read_by_everybody(folder):
    assert not [check for check in verify.run(str(folder / "model")) if check.status == "failed"]
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path


def test_the_toolkit_in_the_folder_is_this_one_without_its_weights(folder):
    import phi3_mlflow

    here, there = Path(phi3_mlflow.__file__).parent, folder / "toolkit" / "phi3_mlflow"
    listed = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}

    assert Path("serve/cli.py") in listed
    assert all((there / path).read_bytes() == (here / path).read_bytes() for path in listed)
    assert not [path for path in listed if path.suffix in (".onnx", ".data", ".safetensors", ".pyc")]


def test_an_onnx_model_is_installed_without_torch_and_with_all_that_serve_imports(folder, onnx_model):
    lines = (folder / "requirements.txt").read_text().splitlines()

    assert lines[: len(lines) - len(SERVE_PACKAGES)] == (onnx_model / "requirements.txt").read_text().splitlines()
    assert [f"{name}=={version(name)}" for name in SERVE_PACKAGES] == lines[-len(SERVE_PACKAGES) :]
    assert not [line for line in lines if re.match("torch|transformers", line)]
    # What the server imports at all comes from one of these lines, or from MLflow's own requirements.
    code = (
        "import sys, phi3_mlflow.containers.measure, phi3_mlflow.serve.cli, phi3_mlflow.serve.page; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded
    assert "openvino" not in loaded


def test_a_transformers_models_torch_is_a_step_of_its_own(torch_folder):
    docker = (torch_folder / "Dockerfile").read_text()

    assert "torch==" not in (torch_folder / "requirements.txt").read_text()
    assert re.search(r'--index-url "\$\{TORCH_INDEX\}" "torch==[\d.]+"', docker)
    assert "PARALLEL" not in (torch_folder / "kubernetes" / "settings.env").read_text()


def test_the_memory_is_the_measured_one_and_room_for_the_cache(folder, written):
    said = re.search(r"Memory: (\d+) MiB, at most (\d+) MiB", written.stderr)
    text = (folder / "kubernetes" / "deployment.yaml").read_text()
    loaded, peak, kv = (int(number) for number in re.findall(r"(\d+) MiB (?:of|at most while)", text))
    config = json.loads((folder / "model" / "artifacts" / "weights" / "genai_config.json").read_text())["model"]
    decoder = config["decoder"]
    position = 8 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]

    # The process has Python, MLflow and onnxruntime in it, and a model of a few MiB.
    assert 100 < loaded <= peak < 2000
    # At least one whole sequence: 2 x 1,024 tokens are fewer.
    assert kv == config["context_length"] * position // MIB
    assert 0 <= int(said[1]) - (loaded + kv) <= 2
    assert int(said[2]) >= int(said[1]) + 256
    assert f"kv_budget={config['context_length'] * position}" in (folder / "kubernetes" / "settings.env").read_text()


def test_how_the_memory_is_computed():
    small, large = Memory(300 * MIB, 310 * MIB, 24 * MIB, True), Memory(3000 * MIB, 5000 * MIB, 3000 * MIB, True)

    assert (small.request, small.limit) == (324, 580)
    assert (large.request, large.limit) == (6000, 7200)
    assert Memory(1000 * MIB, 9000 * MIB, MIB, True).limit == 9451
    phi3 = Shape(position=786_432, context_length=4096)
    assert kv_budget(phi3, None, 8) == 8192 * 786_432
    assert kv_budget(phi3, None, 4) == kv_budget(phi3, None, 1) == 4096 * 786_432
    assert kv_budget(phi3, 2048, 1) == 2048 * 786_432


def test_both_builders_say_how_large_their_cache_is(onnx_model, transformers_model):
    assert shape(onnx_model / "artifacts" / "weights") == shape(transformers_model / "model")


def test_every_setting_is_an_option_of_serve(folder):
    names = dict(line.split("=", 1) for line in (folder / "kubernetes" / "settings.env").read_text().splitlines())
    options = {f"PHI3_MLFLOW_SERVE_{parameter.name.upper()}" for parameter in serve.params}

    assert len(names) >= 6
    assert set(names) <= options


def test_no_key_and_nothing_of_this_machine_is_written(onnx_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_API_KEYS", "name=a-key-that-is-secret")
    assert containerize(onnx_model, tmp_path / "out", *GIVEN).exit_code == 0

    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and "toolkit" not in path.parts and "model" not in path.parts:
            text = path.read_text()
            assert "a-key-that-is-secret" not in text
            assert str(tmp_path) not in text
            assert str(onnx_model) not in text


@pytest.mark.parametrize("held", ["folder", "file", "link"])
def test_nothing_is_overwritten(held, onnx_model, tmp_path):
    target = tmp_path / "out"
    if held == "folder":
        target.mkdir()
        (target / "mine").write_text("kept")
    elif held == "file":
        target.write_text("kept")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")

    result = containerize(onnx_model, target, *GIVEN)

    assert result.exit_code == 1
    assert "is not empty" in result.stderr or "is no folder" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"folder": ["out"], "file": ["out"], "link": ["out", "elsewhere"]}[held]
    )
    if held == "folder":
        assert [path.name for path in target.iterdir()] == ["mine"]


def test_an_empty_folder_is_used_as_it_is(onnx_model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    before = target.stat().st_ino

    assert containerize(onnx_model, target, *GIVEN).exit_code == 0
    assert target.stat().st_ino == before
    assert (target / "Dockerfile").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "Phi_3"], "the name is 'Phi_3'"),
        (["--name", "on"], "no word of YAML's own"),
        (["--name", "3phi"], "begin with a letter"),
        (["--image", "Registry/X y"], "the image is 'Registry/X y'"),
        (["-c", "no_such=1"], "`no_such` is not a setting"),
        (["-c", "engine=openvino"], "the model does not ask for it"),
        (["-c", "kv_budget=1"], "one sequence of 4096 tokens takes"),
        (["-c", 'stop=["a b"]'], "spaces and $ have no place"),
        (["-c", 'stop=["$A"]'], "spaces and $ have no place"),
        (["--memory", "much"], "`memory` is 'much'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_byte(arguments, said, onnx_model, tmp_path):
    more = () if arguments[0] == "--memory" or "kv_budget" in arguments[1] else GIVEN
    result = containerize(onnx_model, tmp_path / "out", *arguments, *more)

    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_transformers_model_answers_one_request_at_a_time(transformers_model, tmp_path):
    for more in (["--parallel", "2"], ["-c", "parallel=2"], ["-c", "kv_budget=1GiB"]):
        result = containerize(transformers_model, tmp_path / "out", *more, *GIVEN)
        assert result.exit_code in (1, 2), more
        assert "one request at a time" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_refused(onnx_model, tmp_path):
    model = shutil.copytree(onnx_model, tmp_path / "model")
    with (model / "artifacts" / "weights" / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")

    result = containerize(model, tmp_path / "out", *GIVEN)

    assert result.exit_code == 1
    assert "is not what was logged: artifacts/weights/model.onnx.data" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("requirements.txt", f"mlflow=={version('mlflow')}", "mlflow==3.1.0", "the model asks for mlflow==3.1.0"),
        ("requirements.txt", "jinja2==", "-e .\njinja2==", "requirements.txt has '-e .'"),
        ("requirements.txt", "jinja2==", "six @ https://example.org/six.whl\njinja2==", "requirements.txt has 'six @"),
        ("python_env.yaml", "python: 3.", "python: 2.", "logged by Python 2."),
        ("python_env.yaml", "python:", "snake:", "own environment cannot be read"),
    ],
)
def test_an_environment_that_does_not_do_is_refused(name, old, new, said, onnx_model, tmp_path):
    model = changed(onnx_model, tmp_path / "model", name, old, new)
    result = containerize(model, tmp_path / "out", *GIVEN)

    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_copied(onnx_model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage(1, 1, MIB))

    result = containerize(onnx_model, tmp_path / "out", *GIVEN)

    assert result.exit_code == 1
    assert "GiB are free there" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_of_this_toolkit_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    result = containerize(tmp_path / "model", tmp_path / "out", *GIVEN)

    assert result.exit_code == 1
    assert "no MLmodel" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded_is_told_with_the_reason(onnx_model, tmp_path):
    result = containerize(onnx_model, tmp_path / "out", "-c", "context_length=100000")

    assert result.exit_code == 1
    assert "the model cannot be loaded to measure its memory: `context_length`" in result.stderr
    assert not list(tmp_path.iterdir())


def test_json_says_what_was_written(onnx_model, tmp_path):
    result = containerize(onnx_model, tmp_path / "out", "--json", "--parallel", "1", *GIVEN)

    told = json.loads(result.stdout)
    assert told["folder"] == str(tmp_path / "out")
    assert told["memory"]["request_mib"] == 500 + told["memory"]["kv_bytes"] // MIB
    # One request at a time is onnxruntime-genai's, which knows no budget.
    assert "kv_budget" not in (tmp_path / "out" / "kubernetes" / "settings.env").read_text()


def test_a_failed_write_leaves_nothing_behind(onnx_model, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi3_mlflow.containers.write.shutil.copyfile", full)
    result = containerize(onnx_model, tmp_path / "out", *GIVEN)

    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert not os.listdir(tmp_path)


def test_settings_are_read_back_as_they_were_given():
    from types import SimpleNamespace

    from phi3_mlflow.verbs import parse_config

    given = {"threads": 4, "stop": ["a"], "self_talk_guard": False, "kv_budget": "1GiB", "on_error": "row", "x": "1"}
    line = settings(SimpleNamespace(parallel=2, settings=given))["PHI3_MLFLOW_SERVE_CONFIG"]

    assert parse_config(tuple(line.split())) == given
