"""Models that refer to their weights: a commit on the hub and a hash of each file, found in the hub's cache at load.

Run with: python -m pytest tests/test_reference.py
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from click.testing import CliRunner
from hub import Hub, pointed_at

from phi3_mlflow import verify
from phi3_mlflow.azure import staging
from phi3_mlflow.azure.check import check, passing
from phi3_mlflow.azure.model import read
from phi3_mlflow.azure.register import prepare
from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.builders.common import BuildError
from phi3_mlflow.cli import cli
from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.snapshots import DOWNLOAD
from phi3_mlflow.weights import ONNX_FOLDER

ROOT = Path(__file__).resolve().parent.parent
BUILDERS = {"transformers": transformers, "onnx": onnx}
REPOS = {"transformers": "me/phi3", "onnx": "me/phi3-onnx"}
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
builders = pytest.mark.parametrize("builder", BUILDERS)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def hub(patch, tmp_path_factory) -> Iterator[Hub]:
    """A hub with both forms, and a cache that all tests share unless they take one of their own."""
    cache = tmp_path_factory.mktemp("hub") / "cache"
    patch.delenv(DOWNLOAD, raising=False)
    with pointed_at(patch, cache) as server:
        card = {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT License\n"}
        files = {path.name: path.read_bytes() for path in (ROOT / "artifacts" / "transformers").iterdir()}
        server.add(REPOS["transformers"], files | card | {"modeling_phi3.py": b"raise SystemExit"})
        files = {f"{ONNX_FOLDER}/{path.name}": path.read_bytes() for path in (ROOT / "artifacts" / "onnx").iterdir()}
        server.add(REPOS["onnx"], files | card)
        yield server


@pytest.fixture(scope="module")
def references(hub, tmp_path_factory) -> dict[str, Path]:
    """The saved model of each builder, which refers to weights on that hub."""
    folder = tmp_path_factory.mktemp("references")
    for name, builder in BUILDERS.items():
        builder.save_model(folder / name, REPOS[name], reference=True)
    hub.take()
    return {name: folder / name for name in BUILDERS}


@pytest.fixture
def cache(hub, monkeypatch, tmp_path) -> Path:
    """An empty cache in place of the shared one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "own"))
    monkeypatch.delenv(DOWNLOAD, raising=False)
    hub.take()
    return tmp_path / "own"


def answer(model: Path | str, **config) -> str:
    loaded = mlflow.pyfunc.load_model(str(model), suppress_warnings=True, model_config=config)
    (found,) = loaded.predict(QUESTION)
    return found["choices"][0]["message"]["content"]


def snapshot(builder: str, hub: Hub, cache: Path) -> Path:
    organization, name = REPOS[builder].split("/")
    folder = cache / f"models--{organization}--{name}" / "snapshots" / hub.branches[REPOS[builder]]["main"]
    return folder / ONNX_FOLDER if builder == "onnx" else folder


def pull(builder: str) -> None:
    result = CliRunner().invoke(cli, ["pull", REPOS[builder], "--form", builder])
    assert result.exit_code == 0, result.output


@builders
def test_it_holds_the_commit_and_the_manifest_and_no_weights(hub, references, builder):
    model = references[builder]
    names = {path.name for path in model.rglob("*")}
    assert not names & {"model.safetensors", "model.onnx", "model.onnx.data", "tokenizer.json", "config.json"}
    noted = yaml.safe_load((model / "MLmodel").read_text())["metadata"]["weights"]
    assert noted["reference"] is True
    assert noted["revision"] == hub.branches[REPOS[builder]]["main"]
    assert noted["source"] == (f"{REPOS['onnx']}/{ONNX_FOLDER}" if builder == "onnx" else REPOS["transformers"])
    assert noted["sha256"] == manifest.digest(model / "artifacts" / "weights")
    listed = manifest.sizes(model / "artifacts" / "weights")
    assert listed["tokenizer.json"] == (ROOT / "artifacts" / builder / "tokenizer.json").stat().st_size
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 2**20


@builders
def test_it_answers_as_the_model_that_holds_them_without_a_request(hub, references, saved, builder):
    hub.take()
    assert answer(references[builder]) == answer(saved[builder])
    assert hub.take() == []


@pytest.mark.parametrize("engine", ["genai", "onnxruntime", "openvino"])
def test_every_engine_reads_the_caches_links(references, engine, caplog):
    if importlib.util.find_spec(engine) is None and engine == "openvino":
        pytest.skip("needs the extra openvino")
    assert "Madrid" in answer(references["onnx"], engine=engine, parallel=1 if engine == "genai" else 2)
    assert "cannot run this folder" not in caplog.text


def test_mlflows_own_loader_gives_the_native_pipeline_back(references):
    pipeline = mlflow.transformers.load_model(str(references["transformers"]))
    assert type(pipeline.model).__name__ == "Phi3ForCausalLM"


@builders
def test_without_the_files_the_error_has_the_command_that_brings_them(hub, references, cache, builder):
    with pytest.raises(WeightsError) as refused:
        answer(references[builder])

    assert hub.take() == []
    assert not cache.exists()
    command = str(refused.value).split("`")[1].split()
    assert command[0] == "phi3-mlflow"
    assert DOWNLOAD in str(refused.value)
    result = CliRunner().invoke(cli, command[1:])
    assert result.exit_code == 0, result.output
    assert answer(references[builder])


@builders
def test_they_are_downloaded_where_the_user_allowed_it(hub, references, cache, monkeypatch, builder):
    monkeypatch.setenv(DOWNLOAD, "1")
    assert answer(references[builder])
    fetched = {request.path.rpartition("/")[2] for request in hub.take() if "/api/" not in request.path}
    assert fetched == set(manifest.sizes(references[builder] / "artifacts" / "weights"))


def test_a_download_that_fails_is_one_line_with_the_command(hub, references, cache, monkeypatch):
    monkeypatch.setenv(DOWNLOAD, "1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(WeightsError, match=r"^the download of me/phi3-onnx/\S+ failed .*phi3-mlflow pull"):
        answer(references["onnx"])


@builders
def test_a_file_that_changed_in_the_cache_is_refused_by_name(hub, references, cache, builder):
    pull(builder)
    folder = snapshot(builder, hub, cache)
    for name in ("tokenizer.json", "model.safetensors" if builder == "transformers" else "model.onnx.data"):
        blob = (folder / name).resolve()
        before = blob.read_bytes()
        blob.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(WeightsError, match=rf"{name} is damaged or was changed"):
            answer(references[builder])
        blob.write_bytes(before[:-1])
        with pytest.raises(WeightsError, match=rf"{name} has \d+ bytes where"):
            answer(references[builder])
        blob.write_bytes(before)
    assert answer(references[builder])


@builders
def test_a_file_that_would_be_read_and_was_not_logged_is_refused(hub, references, cache, builder):
    pull(builder)
    folder = snapshot(builder, hub, cache)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"added_tokens\.json is read with the weights"):
        answer(references[builder])


@builders
def test_other_files_of_the_repository_do_not_matter(hub, references, cache, builder):
    pull(builder)
    folder = snapshot(builder, hub, cache)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (folder / "modeling_phi3.py").write_text("raise SystemExit")
    assert answer(references[builder])


@builders
def test_a_link_that_leaves_the_cache_is_refused(hub, references, cache, tmp_path, builder):
    pull(builder)
    folder = snapshot(builder, hub, cache)
    link = folder / "tokenizer.json"
    shutil.copy(link, tmp_path / "outside")
    target = link.readlink()
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(WeightsError, match=r"tokenizer.json is a link to .*outside its folder"):
        answer(references[builder])
    link.unlink()
    link.symlink_to(target)
    assert answer(references[builder])

    shutil.copytree(folder, tmp_path / "moved")  # the files themselves
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(WeightsError, match="outside the cache"):
        answer(references[builder])


def test_a_file_that_could_run_code_is_refused_though_the_manifest_lists_it(hub, cache, tmp_path):
    """Logged by somebody whose cache holds it: every hash is right."""
    onnx.save_model(tmp_path / "model", REPOS["onnx"], reference=True)
    folder = snapshot("onnx", hub, cache)
    blob = (folder / "tokenizer_config.json").resolve()
    blob.write_bytes(b"\x7fELF" + bytes(100))
    place = tmp_path / "model" / "artifacts" / "weights"
    manifest.write(place, elsewhere=[folder / name for name in manifest.sizes(place)])
    text = (tmp_path / "model" / "MLmodel").read_text()
    data = yaml.safe_load(text)
    data["metadata"]["weights"]["sha256"] = manifest.digest(place)
    (tmp_path / "model" / "MLmodel").write_text(yaml.safe_dump(data))
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json is a native library"):
        answer(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", "../../etc/phi3"),
        ("source", "me/phi3/../../other"),
        ("source", "/etc/phi3"),
        ("source", "phi3"),
        ("source", None),
        ("revision", "main"),
        ("revision", "../" * 13 + "a"),
        ("revision", None),
    ],
)
def test_what_is_no_hub_id_or_no_commit_is_refused(references, tmp_path, key, value):
    shutil.copytree(references["onnx"], tmp_path / "model")
    data = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())
    data["metadata"]["weights"][key] = value
    (tmp_path / "model" / "MLmodel").write_text(yaml.safe_dump(data))
    with pytest.raises(WeightsError, match="it must be a Hugging Face id and a commit of 40 digits"):
        answer(tmp_path / "model")


@builders
def test_what_cannot_be_referred_to_is_refused_with_the_reason(hub, tmp_path, builder):
    folder = ROOT / "artifacts" / builder
    for arguments, message in (
        ({}, "no other machine finds phi3_mlflow embedded model, so that"),
        ({"weights": folder}, f"no other machine finds local folder {builder}, so that no model"),
        ({"weights": REPOS[builder], "chat_template": "{{ messages }}"}, "a chat_template of your own is a part"),
        ({"weights": REPOS[builder], "reference": "yes"}, "reference is 'yes'; it must be True or False"),
    ):
        with pytest.raises(BuildError, match=message):
            BUILDERS[builder].save_model(tmp_path / "model", **{"reference": True, **arguments})
        assert not (tmp_path / "model").exists()


@builders
def test_the_command_logs_and_registers_a_reference_with_what_it_is(hub, references, builder):
    arguments = ["log", builder, "--weights", REPOS[builder], "--reference", "--register", f"ref-{builder}", "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    noted = yaml.safe_load((references[builder] / "MLmodel").read_text())["metadata"]["weights"]
    assert made["pull"] == f"phi3-mlflow pull {noted['source']} --revision {noted['revision']} --form {builder}"
    logged = mlflow.MlflowClient().get_logged_model(made["model_uri"].removeprefix("models:/"))
    assert logged.params["weights_held"] == "by reference"
    assert logged.params["context_tokens"] == "4096"
    version = mlflow.MlflowClient().get_model_version(f"ref-{builder}", made["registered"].rpartition("/")[2])
    assert "weights in the hub's cache" in version.description
    assert "Madrid" in answer(made["registered"])


@builders
def test_verify_checks_the_model_and_what_it_refers_to(hub, references, cache, builder):
    def checked():
        result = CliRunner().invoke(cli, ["verify", str(references[builder])])
        return result.exit_code, result.stdout

    code, out = checked()
    assert code == 1
    assert "phi3-mlflow pull" in out
    pull(builder)
    code, out = checked()
    assert code == 0, out
    assert f"{REPOS[builder]}/" in out
    blob = (snapshot(builder, hub, cache) / "tokenizer_config.json").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    code, out = checked()
    assert code == 1
    assert "tokenizer_config.json has" in out


@builders
def test_what_azure_gets_holds_the_weights(hub, references, cache, tmp_path, builder):
    with pytest.raises(WeightsError, match="phi3-mlflow pull"):
        staging.stage(read(references[builder]), tmp_path / "first")
    pull(builder)
    result = CliRunner().invoke(cli, ["azure", "check", str(references[builder]), "--mode", "container"])
    assert result.exit_code == 0, result.output
    assert "failed   weights: the model refers to" in result.stdout
    assert "(--mode container): will load as `azure register` uploads it" in result.stdout

    candidate = prepare(read(references[builder]), tmp_path, "container")

    assert candidate.model.place.reference is None
    assert candidate.model.size > 2**21
    shutil.copytree(candidate.model.folder, tmp_path / "there")  # the staged weights are links into the cache
    shutil.rmtree(cache)
    assert all(check.status != "failed" for check in verify.run(str(tmp_path / "there")))
    assert answer(tmp_path / "there")


def test_a_reference_in_a_datastore_cannot_be_registered_as_it_is(references):
    """What `--remote-path` would register without an upload."""
    assert passing(check(read(references["onnx"]))) == ()


@builders
def test_a_container_holds_the_weights(hub, references, cache, tmp_path, builder):
    arguments = ["containerize", str(references[builder]), str(tmp_path / "made"), "--memory", "500MiB"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "phi3-mlflow pull" in result.output
    assert not (tmp_path / "made").exists()
    pull(builder)

    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == 0, result.output
    assert 'COPY ["model/artifacts", "/model/artifacts"]' in (tmp_path / "made" / "Dockerfile").read_text()
    shutil.rmtree(cache)
    assert all(check.status != "failed" for check in verify.run(str(tmp_path / "made" / "model")))
    assert answer(tmp_path / "made" / "model")


def test_a_reference_needs_no_toolkit_to_load(hub, references, tmp_path):
    """The model's own code finds the weights: a process that has no phi3_mlflow but that."""
    code = f"""
import sys, mlflow
sys.path[:] = [place for place in sys.path if place != {str(ROOT)!r}]
model = mlflow.pyfunc.load_model({str(references["onnx"])!r})
import phi3_mlflow
assert phi3_mlflow.__file__.startswith({str(references["onnx"])!r}), phi3_mlflow.__file__
print(model.predict({QUESTION!r})[0]["choices"][0]["message"]["content"])
"""
    from huggingface_hub import constants

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Madrid" in done.stdout
