"""Registering with the unmodified azure-ai-ml, against the stand-in and Azurite: once, again, cut, refused.

Run with: pytest tests/azure/test_azure_register.py
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow.azure import upload, workspace
from phi3_mlflow.azure.cli import azure as group
from phi3_mlflow.azure.errors import AzureError
from phi3_mlflow.azure.model import read
from phi3_mlflow.azure.register import prepare, register, split_remote
from phi3_mlflow.azure.staging import stage

VERSIONS = r"/models/phi3/versions/\w+$"
pytestmark = pytest.mark.usefixtures("empty_storage")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


def registered(model: Path, *more: str, name: str = "phi3") -> dict:
    result = run("register", str(model), "--name", name, "--json", *more)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refused(result: Result) -> str:
    """The one error line of a run that failed; progress bars may stand before it."""
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def blobs(azure) -> dict[str, bytes]:
    container = azure.container()
    return {blob.name: container.download_blob(blob.name).readall() for blob in container.list_blobs()}


def sha256(data: bytes) -> str:
    """Two large contents are compared by hash: pytest takes minutes to explain a difference of megabytes."""
    return hashlib.sha256(data).hexdigest()


def test_a_model_is_uploaded_and_registered_with_its_provenance(azure, flat_model):
    done = registered(flat_model)
    assert (done["version"], done["created"], done["modes"]) == ("1", True, ["ncd", "container"])
    properties = azure.models["phi3"]["1"]["properties"]
    folder = f"phi3-mlflow/{done['digest']}/model"
    assert properties["modelUri"].endswith(f"/datastores/workspaceblobstore/paths/{folder}")
    assert properties["modelType"] == "mlflow_model"
    tags = properties["tags"]
    assert tags["license"] == "MIT"
    assert tags["weights_sha256"] == "ab" * 32
    assert tags["phi3_digest"] == done["digest"]
    assert (tags["phi3_modes"], tags["phi3_task"]) == ("ncd,container", "flat")
    there = blobs(azure)
    local = {path.relative_to(flat_model).as_posix(): path for path in read(flat_model).files()}
    assert set(there) == {f"{folder}/{name}" for name in local}
    weights = there[f"{folder}/artifacts/weights.bin"]
    assert sha256(weights) == sha256(local["artifacts/weights.bin"].read_bytes())
    assert "azureml-ai-monitoring" in there[f"{folder}/conda.yaml"].decode()
    assert "azureml-ai-monitoring" not in local["conda.yaml"].read_text()


def test_the_result_names_the_asset_and_where_to_see_it(azure, flat_model):
    result = run("register", str(flat_model), "--name", "phi3")
    asset, identifier, url = result.stdout.splitlines()
    assert asset == "azureml:phi3:1"
    assert identifier.endswith("/models/phi3/versions/1")
    assert url.startswith("https://ml.azure.com/model/phi3:1/details?wsid=/subscriptions/")


def test_tags_name_run_and_model_id(azure, flat_model, tmp_path):
    folder = Path(shutil.copytree(flat_model, tmp_path / "logged"))
    data = yaml.safe_load((folder / "MLmodel").read_text())
    (folder / "MLmodel").write_text(yaml.safe_dump(data | {"model_id": "m-1", "run_id": "r-1"}))
    registered(folder)
    tags = azure.models["phi3"]["1"]["properties"]["tags"]
    assert (tags["mlflow_model_id"], tags["mlflow_run_id"]) == ("m-1", "r-1")
    assert str(tmp_path) not in json.dumps(tags)


def test_a_second_run_with_the_same_digest_does_nothing(azure, flat_model):
    first = registered(flat_model)
    azure.calls.clear()
    second = registered(flat_model)
    assert (second["created"], second["sent"], second["id"]) == (False, 0, first["id"])
    assert azure.made("PUT", "") == 0
    assert azure.made("POST", "listSecrets") == 0


def test_a_changed_model_becomes_the_next_version(azure, flat_model, tmp_path):
    registered(flat_model)
    other = Path(shutil.copytree(flat_model, tmp_path / "other"))
    (other / "note.txt").write_text("more")
    assert registered(other)["version"] == "2"


def test_a_version_that_is_another_model_is_refused_before_the_upload(azure, flat_model, chat_model):
    registered(flat_model, "--version", "7")
    azure.calls.clear()
    line = refused(run("register", str(chat_model), "--name", "phi3", "--version", "7"))
    assert "phi3:7 is another model" in line
    assert azure.made("POST", "listSecrets") == 0
    assert registered(flat_model, "--version", "7")["created"] is False


def test_the_same_files_under_another_name_are_not_sent_again(azure, flat_model):
    assert registered(flat_model)["sent"] > 3_000_000
    assert registered(flat_model, name="phi3-again")["sent"] == 0


def test_progress_counts_every_byte_once(azure, flat_model, tmp_path):
    place = workspace.find()
    client = workspace.connect(place)
    seen: dict[str, list[int]] = {}

    def meter(what, size):
        seen[what] = [size]
        return seen[what].append

    candidate = prepare(read(flat_model), tmp_path, meter=meter)
    register(client, place, candidate, "phi3", meter=meter)
    assert set(seen) == {"hash", "upload"}
    for total, *shares in seen.values():
        assert sum(shares) == total == sum(file.size for file in candidate.files)


def test_a_chat_model_is_registered_for_containers_and_refused_for_the_no_code_image(azure, chat_model):
    line = refused(run("register", str(chat_model), "--name", "phi3", "--mode", "ncd"))
    assert "input columns" in line
    assert azure.calls == []
    assert registered(chat_model)["modes"] == ["container"]


def test_an_upload_that_was_cut_goes_on_where_it_was(azure, line, flat_model, monkeypatch):
    monkeypatch.setattr(upload, "BLOCK", 256 << 10)
    line.cut_after(1_500_000)
    assert "connection to Azure failed" in refused(run("register", str(flat_model), "--name", "phi3"))
    line.mend()
    assert azure.models == {}
    assert not any(name.endswith("/MLmodel") for name in blobs(azure))
    done = registered(flat_model)
    assert 0 < done["sent"] < 2_600_000
    there = blobs(azure)
    weights = next(data for name, data in there.items() if name.endswith("weights.bin"))
    assert sha256(weights) == sha256((flat_model / "artifacts/weights.bin").read_bytes())


def test_an_expired_signature_is_renewed_and_the_upload_goes_on(azure, flat_model, monkeypatch):
    monkeypatch.setattr(upload, "BLOCK", 256 << 10)
    azure.sas_minutes = [-5, 60]
    assert registered(flat_model)["created"]
    assert azure.secrets_given == 2


def test_a_signature_that_ends_during_the_upload_is_renewed_once_for_all_threads(azure, flat_model, monkeypatch):
    monkeypatch.setattr(upload, "BLOCK", 256 << 10)
    store = upload.open_datastore(workspace.connect(workspace.find()))
    store.container()
    seen = store.generation
    store.renew(seen)
    store.renew(seen)
    assert store.generation == seen + 1
    assert azure.secrets_given == 2


def test_signatures_that_are_always_expired_end_with_one_line(azure, flat_model):
    azure.sas_minutes = [-5]
    line = refused(run("register", str(flat_model), "--name", "phi3"))
    assert "HTTP 403" in line
    assert "sig=" not in line


def test_a_refused_registration_names_the_missing_role(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 403, "AuthorizationFailed", "does not have authorization")]
    line = refused(run("register", str(flat_model), "--name", "phi3"))
    assert "HTTP 403 AuthorizationFailed" in line
    assert "AzureML Data Scientist" in line
    assert "taken from environment variables" in line


def test_a_conflict_with_someone_who_registered_the_same_model_is_success(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 409, "Conflict", after=True)]
    done = registered(flat_model)
    assert (done["created"], done["version"]) == (False, "1")


def test_a_conflict_with_another_model_takes_the_next_version(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 409, "Conflict")]
    done = registered(flat_model)
    assert done["created"]
    assert azure.made("PUT", VERSIONS) == 2


def test_a_conflict_that_stays_is_told(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 409, "Conflict", times=99)]
    assert "HTTP 409" in refused(run("register", str(flat_model), "--name", "phi3"))


def test_throttling_is_waited_for(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 429, "TooManyRequests", headers={"Retry-After": "0.01"}, times=2)]
    assert registered(flat_model)["created"]
    assert azure.made("PUT", VERSIONS) == 3


def test_throttling_that_stays_is_told(azure, flat_model):
    from standin import Fault

    azure.faults = [Fault("PUT", VERSIONS, 429, "TooManyRequests", headers={"Retry-After": "0.01"}, times=99)]
    line = refused(run("register", str(flat_model), "--name", "phi3"))
    assert "HTTP 429" in line
    assert "wait" in line


def test_what_is_in_the_datastore_is_registered_without_an_upload(azure, flat_model):
    done = registered(flat_model)
    azure.calls.clear()
    path = f"azureml://datastores/workspaceblobstore/paths/phi3-mlflow/{done['digest']}/model"
    before = {blob.name: blob.etag for blob in azure.container().list_blobs()}
    result = run("register", "--remote-path", path, "--name", "phi3-remote", "--json")
    assert result.exit_code == 0, result.output
    remote = json.loads(result.stdout)
    assert (remote["digest"], remote["sent"], remote["modes"]) == (done["digest"], 0, done["modes"])
    assert {blob.name: blob.etag for blob in azure.container().list_blobs()} == before
    tags = azure.models["phi3-remote"]["1"]["properties"]["tags"]
    assert tags == {**azure.models["phi3"]["1"]["properties"]["tags"]}
    assert (
        json.loads(run("register", "--remote-path", path, "--name", "phi3-remote", "--json").stdout)["created"] is False
    )


def test_a_remote_folder_that_another_tool_uploaded_is_checked_too(azure, flat_model):
    container = azure.container()
    for path in read(flat_model).files():
        name = path.relative_to(flat_model).as_posix()
        if name != "conda.yaml":
            container.upload_blob(f"mine/phi3/{name}", path.read_bytes())
    path = "azureml://datastores/workspaceblobstore/paths/mine/phi3/"
    line = refused(run("register", "--remote-path", path, "--name", "phi3"))
    assert "conda.yaml is missing" in line
    container.upload_blob("mine/phi3/conda.yaml", (flat_model / "conda.yaml").read_bytes())
    result = run("register", "--remote-path", path, "--name", "phi3", "--json")
    assert json.loads(result.stdout)["modes"] == ["container"]
    line = refused(run("register", "--remote-path", path, "--name", "phi4", "--mode", "ncd"))
    assert "azureml-ai-monitoring" in line


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("azureml://datastores/workspaceblobstore/paths/nothing/here", "no MLmodel"),
        ("azureml://datastores/elsewhere/paths/a/model", "HTTP 404"),
    ],
)
def test_a_remote_path_without_a_model_is_told(azure, path, problem):
    assert problem in refused(run("register", "--remote-path", path, "--name", "phi3"))
    assert azure.models == {}


@pytest.mark.parametrize(
    "path",
    [
        "https://x.blob.core.windows.net/c/model",
        "azureml://datastores/a/paths/",
        "azureml://datastores/a/paths/b/../c",
        "azureml://datastores/a/paths/phi3.mini",
        "azureml://subscriptions/s/resourcegroups/r/workspaces/other/datastores/a/paths/b",
    ],
)
def test_a_remote_path_of_another_form_is_refused_before_any_call(azure, path):
    assert refused(run("register", "--remote-path", path, "--name", "phi3"))
    assert azure.calls == []


def test_the_long_form_of_a_remote_path_is_understood(azure):
    place = workspace.find()
    long = f"azureml://{place.path.strip('/')}/datastores/a/paths/b/model"
    assert split_remote(long, place) == ("a", "b/model")


@pytest.mark.parametrize(
    "arguments", [("--name", "-phi3"), ("--name", "phi 3"), ("--name", "phi3", "--version", "1/2")]
)
def test_names_that_azure_refuses_are_refused_before_any_call(azure, flat_model, arguments):
    result = run("register", str(flat_model), *arguments)
    assert refused(result)
    assert result.exit_code == 2
    assert azure.calls == []


def test_a_model_and_a_remote_path_together_are_wrong_usage(azure, flat_model):
    path = "azureml://datastores/a/paths/b"
    assert run("register", str(flat_model), "--remote-path", path, "--name", "phi3").exit_code == 2
    assert run("register", "--name", "phi3").exit_code == 2


def test_staging_for_another_tool_makes_no_call(azure, flat_model, tmp_path):
    result = run("register", str(flat_model), "--name", "phi3", "--stage-to", str(tmp_path / "out"))
    assert result.stdout.strip() == str(tmp_path / "out" / "model")
    assert (tmp_path / "out/model/MLmodel").exists()
    assert azure.calls == []


def test_no_secret_is_in_a_log_a_file_or_an_output(azure, line, flat_model, tmp_path, caplog, monkeypatch):
    import standin

    monkeypatch.setattr(upload, "BLOCK", 256 << 10)
    signatures: list[str] = []
    make = standin.generate_container_sas
    monkeypatch.setattr(
        standin, "generate_container_sas", lambda *a, **o: signatures.append(make(*a, **o)) or signatures[-1]
    )
    with caplog.at_level(logging.DEBUG):
        line.cut_after(1_500_000)
        first = run("register", str(flat_model), "--name", "phi3")
        line.mend()
        azure.sas_minutes = [-5, -5, 60]
        second = run("register", str(flat_model), "--name", "phi3")
    assert (first.exit_code, second.exit_code) == (1, 0)
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    everything = caplog.text + first.output + second.output + written
    assert "comp=block" in everything
    values = [part.removeprefix("sig=") for text in signatures for part in text.split("&") if part.startswith("sig=")]
    assert len(values) >= 2
    for secret in (*values, standin.TOKEN, standin.ACCOUNT_KEY, "header-that-is-secret"):
        assert secret not in everything


def test_an_error_carries_no_chain_with_a_signature_in_it(azure, line, flat_model, tmp_path):
    place = workspace.find()
    client = workspace.connect(place)
    candidate = prepare(read(flat_model), tmp_path)
    line.cut_after(0)
    with pytest.raises(AzureError) as caught:
        register(client, place, candidate, "phi3")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_identities_take_the_place_of_signatures_where_the_datastore_uses_them(azure):
    azure.identity_datastore = True
    store = upload.open_datastore(workspace.connect(workspace.find()))
    assert (store.secret, store.renewable) == (None, False)
    assert azure.made("POST", "listSecrets") == 0


def test_azure_ai_ml_alone_drops_ignored_files_and_fails_late_on_a_dot(azure, flat_model, tmp_path):
    from azure.ai.ml.entities import Model
    from azure.ai.ml.exceptions import ValidationException

    client = workspace.connect(workspace.find())
    folder = stage(read(flat_model), tmp_path).folder
    (folder / ".gitignore").write_text("*.bin\n")
    client.models.create_or_update(Model(name="plain", path=str(folder), type="mlflow_model"))
    names = {name.rpartition("/model/")[2] for name in blobs(azure)}
    assert "MLmodel" in names
    assert "artifacts/weights.bin" not in names
    (folder / ".gitignore").unlink()
    dotted = folder.rename(folder.parent / "phi3.mini")
    with pytest.raises(ValidationException, match="cannot register a file"):
        client.models.create_or_update(Model(name="dotted", path=str(dotted), type="mlflow_model"))
    assert any("/phi3.mini/" in name for name in blobs(azure))
