"""Where models go: whatever can be refused is refused before a byte is written or downloaded, and nothing half stays.

Run: pytest tests/test_destination.py
"""

import errno
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import shards
from click.testing import CliRunner
from hub import Hub
from huggingface_hub import constants
from mlflow.entities import LoggedModelStatus

from phi3_mlflow import cards, tracking
from phi3_mlflow.builders import destination, onnx, transformers
from phi3_mlflow.builders.common import BuildError
from phi3_mlflow.cli import cli
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError

BUILDERS = {"transformers": transformers, "onnx": onnx}
ROOT = Path(__file__).resolve().parent.parent
builders = pytest.mark.parametrize("builder", BUILDERS)


@pytest.fixture(scope="module")
def own_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tracking store and registry of its own."""
    before, experiment = mlflow.get_tracking_uri(), mlflow.get_experiment_by_name("tests")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('own') / 'mlflow.db'}")
    yield
    mlflow.set_tracking_uri(before)
    assert experiment is not None
    mlflow.set_experiment(experiment_id=experiment.experiment_id)


@pytest.fixture
def store(own_database: None, tmp_path: Path) -> Path:
    """The folder of an empty experiment, which is set."""
    mlflow.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(tmp_path.name)
    return tmp_path


def models(store: Path) -> list[mlflow.entities.LoggedModel]:
    """The logged models of the experiment, also failed ones."""
    experiment = mlflow.get_experiment_by_name(store.name)
    assert experiment is not None
    return list(mlflow.MlflowClient().search_logged_models(experiment_ids=[experiment.experiment_id]))


@builders
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a.b"}, "the name 'a.b' of the logged model is not allowed: "),
        ({"name": ""}, "the name '' of the logged model is not allowed: "),
        ({"name": 5}, "the argument name is 5; it must be text"),
        ({"name": None}, "the argument name is None; it must be text"),
        ({"registered_model_name": 5}, "the argument registered_model_name is 5; it must be text"),
        ({"registered_model_name": "phi3", "alias": 5}, "the argument alias is 5; it must be text"),
        ({"run_id": 5}, "the argument run_id is 5; it must be text"),
        ({"step": "1"}, "the argument step is '1'; it must be a whole number"),
        ({"step": True}, "the argument step is True; it must be a whole number"),
        ({"tags": "a=b"}, "the argument tags is 'a=b'; it must be a dict"),
        ({"params": [1]}, r"the argument params is \[1\]; it must be a dict"),
        ({"model_type": 5}, "the argument model_type is 5; it must be text"),
        ({"prompts": "prompts:/a/1"}, "the argument prompts is 'prompts:/a/1'; it must be a list"),
        ({"prompts": [5]}, "the argument prompts has 5; each must be an MLflow prompt or its URI"),
        ({"await_registration_for": "1"}, "the argument await_registration_for is '1'; it must be a whole number"),
        ({"metadata": 5}, "metadata is 5; it must be a dict"),
        ({"target": "nowhere"}, "target is 'nowhere'"),
        ({"task": 5}, "task is 5"),
        ({"template": "no"}, "template is 'no'"),
        ({"registered_model_name": "team/phi3"}, "the name 'team/phi3' of the registered model is not allowed: "),
        (
            {"name": "a\tb"},
            r"the name 'a\\tb' is not allowed: it has a line break or another character that does not print",
        ),
        ({"registered_model_name": "a\nb"}, r"the name 'a\\nb' is not allowed: it has a line break"),
        ({"registered_model_name": "phi3:1"}, "the name 'phi3:1' of the registered model is not allowed: "),
        ({"registered_model_name": "phi3", "alias": "v1"}, "the alias 'v1' is not allowed: "),
        ({"registered_model_name": "phi3", "alias": "latest"}, "the alias 'latest' is not allowed: "),
        ({"registered_model_name": "phi3", "alias": "a b"}, "the alias 'a b' is not allowed: "),
        ({"alias": "champion"}, "the alias 'champion' needs a registered model"),
        ({"run_id": "nosuchrun"}, "the run 'nosuchrun' cannot be used: "),
        ({"prompts": ["prompts:/nothing/1"]}, "the prompt 'prompts:/nothing/1' cannot be used: "),
        ({"metadata": {"task": "mine"}}, "metadata has the key 'task', which the builders write themselves"),
        ({"metadata": {"when": object()}}, "metadata cannot be written as JSON"),
        ({"metadata": {1: "one"}}, "metadata has the key 1; keys must be text"),
        ({"extra_pip_requirements": ["pandas<3"]}, "'pandas<3', and the builder pins pandas itself"),
        ({"extra_pip_requirements": ["./mine"]}, "'./mine'"),
        ({"extra_pip_requirements": "six"}, "'six'; it must be a list"),
        ({"model_config": "config.yaml"}, "model_config is 'config.yaml'; it must be a dict"),
        ({"template": False}, "template is False, and a chat has its template"),
        ({"signature": None}, "the argument signature of MLflow's log_model is not taken: it follows from the task"),
        ({"pip_requirements": []}, "the argument pip_requirements .* use `extra_pip_requirements`"),
        ({"artifact_path": "model"}, "the argument artifact_path .* use `name`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_logged_is_refused_in_one_line_and_leaves_nothing_behind(store, builder, arguments, message):
    with pytest.raises(BuildError, match=message) as refused:
        BUILDERS[builder].log_model(**arguments)

    assert "\n" not in str(refused.value)
    assert models(store) == []
    assert not (store / "artifacts").exists()
    assert mlflow.MlflowClient().search_registered_models() == []


@builders
def test_an_argument_that_nobody_knows_is_a_type_error(builder):
    with pytest.raises(TypeError, match="unexpected argument 'wieghts'"):
        BUILDERS[builder].log_model(wieghts="embedded")


@builders
def test_metadata_tags_params_and_further_requirements_are_kept(store, builder):
    with mlflow.start_run() as run:
        info = BUILDERS[builder].log_model(
            metadata={"owner": {"team": "red"}},
            tags={"stage": "trial"},
            params={"lora": 16},
            extra_pip_requirements=["six==1.17"],
            model_type="chat",
            step=3,
        )

    (logged,) = models(store)
    assert logged.status == LoggedModelStatus.READY
    assert (logged.tags["stage"], logged.params["lora"], logged.model_type) == ("trial", "16", "chat")
    assert logged.source_run_id == run.info.run_id
    (output,) = mlflow.get_run(run.info.run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (logged.model_id, 3)
    assert info.metadata["owner"] == {"team": "red"}
    assert info.metadata["task"] == "llm/v1/chat"
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    assert "six==1.17" in (folder / "requirements.txt").read_text("utf-8").split()


def test_a_model_belongs_to_the_run_whose_process_logs_it(store, monkeypatch):
    run = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name(store.name).experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)  # how `mlflow run` tells its child

    info = onnx.log_model()

    (logged,) = models(store)
    assert logged.source_run_id == run.info.run_id
    (output,) = mlflow.get_run(run.info.run_id).outputs.model_outputs
    assert output.model_id == info.model_id


def test_of_two_models_both_are_checked_before_the_first_is_logged(store):
    result = CliRunner().invoke(cli, ["log", "both", "--onnx-weights", "./nowhere", "--register", "phi3"])

    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert models(store) == []
    assert mlflow.MlflowClient().search_registered_models() == []


@pytest.mark.parametrize(
    ("at", "left", "told"),
    [
        (1, ["FAILED"], "nothing was logged or registered"),
        (2, ["FAILED", "READY"], r"models:/m-\w+ \(transformers, logged and not registered\)"),
    ],
)
def test_ctrl_c_leaves_no_model_that_is_pending_and_registers_none(store, monkeypatch, at, left, told):
    facts, calls = cards.facts, []

    def interrupted(*arguments: Path) -> dict[str, str]:
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return facts(*arguments)

    monkeypatch.setattr(cards, "facts", interrupted)
    result = CliRunner().invoke(cli, ["log", "both", "--register", "phi3"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"What stands: {told}\nAborted!\n", result.stderr)
    assert sorted(model.status.value for model in models(store)) == left
    assert len(list(store.rglob("MLmodel"))) == at - 1
    assert mlflow.MlflowClient().search_registered_models() == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a transformers model, and a client that points to it with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.add("me/phi3", ROOT / "artifacts" / "transformers")
        yield server


@pytest.mark.parametrize(
    "wrong",
    [
        ["--onnx-weights", "./nowhere"],
        ["--onnx-weights", "me/other"],
        ["--onnx-weights", "me/phi3"],
        ["--register", "a/b"],
        ["-c", "heat=1"],
    ],
    ids=" ".join,
)
def test_nothing_is_downloaded_for_a_model_that_cannot_be_logged(store, hub, wrong):
    result = CliRunner().invoke(cli, ["log", "both", "--transformers-weights", "me/phi3", *wrong])

    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    assert not [request for request in hub.take() if "/resolve/" in request.path]
    assert not (store / "cache").exists()
    assert models(store) == []


def test_weights_that_can_be_logged_are_downloaded_once(store, hub):
    result = CliRunner().invoke(cli, ["log", "transformers", "--weights", "me/phi3"])

    assert result.exit_code == 0, result.stderr
    fetched = [request.path for request in hub.take() if request.method == "GET" and "/resolve/" in request.path]
    assert len([path for path in fetched if path.endswith("model.safetensors")]) == 1


def unusable(folder: Path) -> dict[str, str]:
    """Stores that cannot be written, by what is wrong with them."""
    (folder / "text").write_text("no database, and long enough to be taken for one\n" * 50)
    (folder / "folder").mkdir()
    return {
        "a file that is no database": f"sqlite:///{folder / 'text'}",
        "a folder in the place of the database": f"sqlite:///{folder / 'folder'}",
        "a file in the place of the folder": f"sqlite:///{folder / 'text' / 'mlflow.db'}",
    }


@pytest.mark.parametrize("what", ["a file that is no database", "a folder in the place of the database"])
@pytest.mark.parametrize("kind", ["tracking", "registry"])
def test_a_store_that_cannot_be_written_is_one_line_at_once(tmp_path, what, kind):
    uri = unusable(tmp_path)[what]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'good.db'}"}
    environment |= {f"MLFLOW_{kind.upper()}_URI": uri}
    command = [sys.executable, "-m", "phi3_mlflow", "log", "onnx", "--register", "phi3"]

    # SQLAlchemy by itself tries again for 100 s.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"Error: the {kind} store {uri} cannot be written: ")


def test_stores_are_looked_at_and_not_changed(tmp_path, monkeypatch):
    stores = unusable(tmp_path)
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = database.read_bytes()

    def check(uri: str) -> None:
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
        destination.check_stores(registry=False)

    check(f"sqlite:///{database}")
    check(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")
    check(str(tmp_path / "new" / "mlruns"))
    check("https://example.invalid")
    assert database.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mlflow.db", "text"]
    for uri in [*stores.values(), str(tmp_path / "text")]:
        with pytest.raises(BuildError, match="cannot be written"):
            check(uri)
    locked = sqlite3.connect(database, isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(destination, "_LOCK_SECONDS", 0.1)
    with pytest.raises(BuildError, match="locked"):
        check(f"sqlite:///{database}")
    locked.close()


def test_a_store_that_is_only_read_has_to_be_there_or_makeable(tmp_path, monkeypatch):
    def look(uri: str) -> None:
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
        tracking.refuse_unwritable()

    for good in ("sqlite:///:memory:", "https://example.invalid", f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"):
        look(good)
    with pytest.raises(Phi3Error, match=r"there is no tracking store .*, and its folder cannot be written"):
        look(unusable(tmp_path)["a file in the place of the folder"])
    with pytest.raises(Phi3Error, match="is a folder, and an SQLite store is a file"):
        look(f"sqlite:///{tmp_path}")


def huge(builder: str, folder: Path) -> Path:
    """Weights with a file that is larger than the disk's free space, and takes none."""
    weights = shutil.copytree(ROOT / "artifacts" / builder, folder / "huge")
    file = weights / {"onnx": "model.onnx.data", "transformers": "model.safetensors"}[builder]
    size = shutil.disk_usage(folder).free + 2**30
    if builder == "transformers":
        content = shards.file(shards.header({"huge": ("U8", [size // 2**20, 2**20])}), b"")
        file.write_bytes(content)
        size = len(content) + size // 2**20 * 2**20
    os.truncate(file, size)
    return weights


@builders
def test_weights_that_do_not_fit_on_the_disk_are_refused_before_anything_is_written(store, builder):
    weights = huge(builder, store)

    with pytest.raises(BuildError, match=r"GB left, and [0-9.]+ GB are needed"):
        BUILDERS[builder].log_model(weights)
    with pytest.raises(BuildError, match=r"GB left, and [0-9.]+ GB are needed"):
        BUILDERS[builder].save_model(store / "model", weights)

    assert models(store) == []
    assert not (store / "artifacts").exists()
    assert not (store / "model").exists()


LIMITED = """
import resource, runpy, sys
# Every file that grows above this fails, as on a full disk; what the check saw of the disk holds no more.
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
sys.argv = ["phi3-mlflow", *sys.argv[1:]]
runpy.run_module("phi3_mlflow", run_name="__main__")
"""


@builders
def test_a_disk_that_runs_full_all_the_same_is_one_line_and_no_model_counts_as_whole(store, builder):
    temporary = store / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_EXPERIMENT_NAME": store.name,
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, "-c", LIMITED, "log", builder, "--register", "phi3"]

    done = subprocess.run(command, cwd=store, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 1
    assert done.stderr.startswith("Error: the disk is full, and the model was not written: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert [model.status for model in models(store)] == [LoggedModelStatus.FAILED]
    assert not list(store.rglob("MLmodel"))
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("matplotlib")] == []
    assert mlflow.MlflowClient().search_registered_models() == []


@builders
def test_a_model_that_cannot_be_saved_leaves_no_folder(tmp_path, builder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("phi3_mlflow.builders.common.finish", full)

    with pytest.raises(BuildError, match="the disk is full"):
        BUILDERS[builder].save_model(tmp_path / "model")

    assert not (tmp_path / "model").exists()


@builders
def test_a_folder_that_holds_something_is_left_alone(tmp_path, builder):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")

    with pytest.raises(BuildError, match="it is not empty"):
        BUILDERS[builder].save_model(tmp_path / "model")

    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


@builders
def test_damaged_weights_are_refused_before_a_model_is_made(store, builder):
    weights = shutil.copytree(ROOT / "artifacts" / builder, store / "damaged")
    (weights / "tokenizer.json").write_text('{"version": "1.0"}', "utf-8")

    with pytest.raises((WeightsError, Exception)):
        BUILDERS[builder].log_model(weights)

    assert models(store) == []
