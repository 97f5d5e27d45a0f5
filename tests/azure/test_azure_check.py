"""The check: each rule on a model that breaks it, and its verdict against the imitated no-code image.

Run with: pytest tests/azure/test_azure_check.py
"""

import json
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from azure_models import FLAT, flat_signature, save
from click.testing import CliRunner
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Map, Object, ParamSpec, Property, Schema
from no_code import LoadFailed, NoCodeImage

from phi3_mlflow import targets
from phi3_mlflow.azure import check, environment
from phi3_mlflow.azure.cli import azure as group
from phi3_mlflow.azure.errors import AzureError
from phi3_mlflow.azure.model import opened, read
from phi3_mlflow.azure.staging import digest, inventory, stage

ARRAY = ColSpec(Array(DataType.string), "stop", required=False)
OBJECT = ColSpec(Object([Property("role", DataType.string)]), "message", required=False)
RULES = {
    "array column": {"signature": flat_signature((ARRAY,))},
    "object column": {"signature": flat_signature((OBJECT,))},
    "map column": {"signature": flat_signature((ColSpec(Map(AnyType()), "custom", required=False),))},
    "array output": {
        "signature": ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec(Array("string"))]))
    },
    "dict example": {"signature": flat_signature(), "input_example": {"prompt": "hello"}},
    "flat": {"signature": flat_signature()},
    "optional number": {"signature": flat_signature((ColSpec("double", "weight", required=False),))},
    "DataFrame example": {"signature": flat_signature(), "input_example": pd.DataFrame({"prompt": ["a"]})},
}


def by_rule(folder: Path, uplink: float = check.DEFAULT_UPLINK) -> dict[str, check.Finding]:
    return {finding.rule: finding for finding in check.check(read(folder), uplink)}


def copied(folder: Path, tmp_path: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(folder, tmp_path / name))


@pytest.mark.parametrize("rule", RULES)
def test_the_verdict_on_the_staged_copy_is_what_the_no_code_image_does_with_it(rule, tmp_path):
    folder = save(tmp_path / "variant", FLAT, **RULES[rule])
    staged = stage(read(folder), tmp_path)
    if "ncd" in check.passing(check.check(staged)):
        assert NoCodeImage(staged.folder).score({"input_data": {"columns": ["prompt"], "index": [0], "data": [["a"]]}})
    else:
        # The environment of a model that cannot be loaded anyway is left alone, so give the image what it imports.
        environment.adapt(staged.folder)
        with pytest.raises((LoadFailed, AttributeError)):
            NoCodeImage(staged.folder)


def test_a_chat_model_is_for_containers_only(chat_model):
    findings = check.check(read(chat_model))
    assert check.passing(findings) == ("container",)
    assert check.passing_staged(findings) == ("container",)
    failed = {finding.rule for finding in check.failures(findings, "ncd") if not finding.mended}
    assert failed == {"input columns", "output columns", "input example"}
    assert "messages: array" in by_rule(chat_model)["input columns"].found


def test_a_flat_model_passes_for_both_once_it_is_staged(flat_model, tmp_path):
    findings = check.check(read(flat_model))
    assert check.passing(findings) == ("container",)
    assert {f.rule for f in check.failures(findings, "ncd")} == {"azureml-ai-monitoring", "pandas below 3"}
    assert check.passing_staged(findings) == ("ncd", "container")
    assert check.passing(check.check(stage(read(flat_model), tmp_path))) == ("ncd", "container")


def test_the_requirements_for_azure_make_a_model_that_passes(tmp_path):
    lines = targets.adapted(["mlflow==3.17.2", "pandas==3.1.1"])
    assert lines == ["mlflow==3.17.2", "pandas<3", "azureml-ai-monitoring"]
    assert targets.NO_CODE_REQUIREMENTS == ("azureml-ai-monitoring", "pandas<3")
    folder = save(tmp_path / "model", FLAT, flat_signature(), pip_requirements=lines)
    assert check.passing(check.check(read(folder))) == ("ncd", "container")
    assert NoCodeImage(folder)


def test_a_model_without_pyfunc_loads_nowhere(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path)
    data = yaml.safe_load((folder / "MLmodel").read_text())
    data["flavors"] = {"transformers": {}}
    (folder / "MLmodel").write_text(yaml.safe_dump(data))
    assert check.passing(check.check(read(folder))) == ()


def test_a_parameter_that_is_no_single_value_fails(tmp_path):
    listed = ParamSpec("stop", "string", ["a"], shape=(-1,))
    folder = save(tmp_path / "model", FLAT, flat_signature(params=(listed,)))
    assert by_rule(folder)["parameters"].status == "failed"
    assert "stop" in by_rule(folder)["parameters"].found


def test_a_model_without_a_signature_fails_for_the_no_code_image(tmp_path):
    folder = save(tmp_path / "model", FLAT, None)
    assert by_rule(folder)["input columns"].status == "failed"


@pytest.mark.parametrize("line", ["./wheels/x.whl", "-e .", "phi3 @ file:///home/me/phi3", "/home/me/x.tar.gz"])
def test_a_requirement_of_the_logging_machine_fails(flat_model, tmp_path, line):
    folder = copied(flat_model, tmp_path)
    data = yaml.safe_load((folder / "conda.yaml").read_text())
    data["dependencies"][-1]["pip"].append(line)
    (folder / "conda.yaml").write_text(yaml.safe_dump(data))
    finding = by_rule(folder)["environment files"]
    assert finding.status == "failed"
    assert line in finding.found


def test_missing_environment_files_fail(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path)
    (folder / "requirements.txt").unlink()
    assert check.failures(check.check(read(folder)), "container")
    (folder / "conda.yaml").unlink()
    assert by_rule(folder)["environment files"].modes == check.MODES


def test_an_ignore_file_and_a_dot_in_the_folder_name_are_told_and_mended(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path, "phi3.mini")
    (folder / ".gitignore").write_text("*.bin\n")
    rules = by_rule(folder)
    assert (rules["ignore files"].status, rules["folder name"].status) == ("warning", "warning")
    staged = stage(read(folder), tmp_path)
    assert not (staged.folder / ".gitignore").exists()
    assert (staged.folder / "artifacts" / "weights.bin").exists()
    assert {f.status for f in check.check(staged)} == {"ok"}


@pytest.mark.parametrize(
    "name", ["dot.", "back\\slash", "bell\x07", "x" * 250 + "/" + "y" * 250 + "/" + "z" * 250 + "/" + "w" * 250]
)
def test_a_name_that_blob_storage_does_not_take_fails(flat_model, tmp_path, name):
    folder = copied(flat_model, tmp_path)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert by_rule(folder)["file names"].status == "failed"


def test_a_broken_link_fails(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path)
    (folder / "gone.bin").symlink_to(tmp_path / "nowhere")
    assert by_rule(folder)["links"].status == "failed"


def test_a_link_to_a_folder_is_walked_and_a_circle_ends(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path)
    (folder / "more").symlink_to(flat_model / "artifacts", target_is_directory=True)
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    names = {path.relative_to(folder).as_posix() for path in read(folder).files()}
    assert "more/weights.bin" in names
    assert not any(name.startswith("circle/") for name in names)


def test_an_upload_of_more_than_an_hour_is_told(flat_model):
    assert by_rule(flat_model, uplink=20)["size"].status == "ok"
    slow = by_rule(flat_model, uplink=0.005)["size"]
    assert slow.status == "warning"
    assert "--remote-path" in slow.fix
    assert check.upload_seconds(2_720_000_000, 20) == pytest.approx(1088)


def test_memory_counts_the_key_value_cache_of_the_whole_context(flat_model, tmp_path):
    folder = copied(flat_model, tmp_path)
    before = read(folder).memory
    decoder = {"num_hidden_layers": 32, "num_key_value_heads": 32, "head_size": 96}
    config = {"model": {"context_length": 4096, "decoder": decoder}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    cache = read(folder).memory - before - int((folder / "genai_config.json").stat().st_size * 1.15)
    assert cache == pytest.approx(786_432 * 4096, abs=2)


def test_the_command_prints_each_rule_with_its_fix_and_exits_by_the_verdict(flat_model, chat_model):
    run = CliRunner().invoke(group, ["check", str(flat_model)])
    assert run.exit_code == 0
    assert "no-code image (--mode ncd): will load as `azure register` uploads it" in run.stdout
    assert CliRunner().invoke(group, ["check", str(chat_model)]).exit_code == 0
    assert CliRunner().invoke(group, ["check", str(chat_model), "--mode", "ncd"]).exit_code == 1
    data = json.loads(CliRunner().invoke(group, ["check", str(chat_model), "--json"]).stdout)
    assert data["modes"] == ["container"]
    assert {"rule", "status", "modes", "found", "fix", "mended"} == set(data["findings"][0])


def test_a_folder_without_a_model_ends_with_one_line(tmp_path):
    run = CliRunner().invoke(group, ["check", str(tmp_path)])
    assert (run.exit_code, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    assert "no MLmodel" in run.stderr


def test_mlflow_uris_lead_to_the_folder_in_place(flat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("phi3", f"file://{tmp_path}/artifacts")
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(flat_model), "model")
        client.create_registered_model("phi3")
        version = client.create_model_version("phi3", f"runs:/{run.info.run_id}/model", run.info.run_id).version
        client.set_registered_model_alias("phi3", "champion", version)
        folders = set()
        for uri, known in (
            (f"runs:/{run.info.run_id}/model", None),
            (f"models:/phi3/{version}", "1"),
            ("models:/phi3@champion", "1"),
        ):
            with opened(uri) as model:
                assert model.version == known
                folders.add(model.folder.resolve())
        assert len(folders) == 1
        assert str(tmp_path) in str(folders.pop())
        with pytest.raises(AzureError, match="models:/phi4/1"), opened("models:/phi4/1"):
            pass
    finally:
        mlflow.set_tracking_uri(before)


def test_staging_links_weights_and_leaves_the_model_alone(flat_model, tmp_path):
    before = {file.name: file.sha256 for file in inventory(read(flat_model))}
    staged = stage(read(flat_model), tmp_path)
    assert (staged.folder / "artifacts/weights.bin").samefile(flat_model / "artifacts/weights.bin")
    assert "azureml-ai-monitoring" in (staged.folder / "conda.yaml").read_text()
    assert "pandas<3" in (staged.folder / "requirements.txt").read_text().splitlines()
    assert {file.name: file.sha256 for file in inventory(read(flat_model))} == before


def test_staging_into_a_folder_that_has_a_model_is_refused(flat_model, tmp_path):
    stage(read(flat_model), tmp_path)
    with pytest.raises(AzureError, match="exists already"):
        stage(read(flat_model), tmp_path)


def test_the_digest_changes_with_a_byte_and_with_a_name_and_puts_mlmodel_last(flat_model, tmp_path):
    def digest_of(folder):
        return digest({file.name: file.sha256 for file in inventory(read(folder))})

    files = inventory(read(flat_model))
    assert files[-1].name == "MLmodel"
    one = digest_of(flat_model)
    assert digest_of(copied(flat_model, tmp_path, "same")) == one
    other = copied(flat_model, tmp_path, "byte")
    (other / "artifacts/weights.bin").write_bytes(b"x" + (other / "artifacts/weights.bin").read_bytes()[1:])
    assert digest_of(other) != one
    (other / "artifacts/weights.bin").write_bytes((flat_model / "artifacts/weights.bin").read_bytes())
    assert digest_of(other) == one
    (other / "artifacts/weights.bin").rename(other / "artifacts/weights2.bin")
    assert digest_of(other) != one


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["pandas==3.1.1"], ["pandas<3", "azureml-ai-monitoring"]),
        (["pandas>=2.2,<4"], ["pandas>=2.2,<3", "azureml-ai-monitoring"]),
        (["pandas"], ["pandas<3", "azureml-ai-monitoring"]),
        (["Pandas==2.2.3"], ["Pandas==2.2.3", "azureml-ai-monitoring"]),
        (["pandas==2.*"], ["pandas==2.*", "azureml-ai-monitoring"]),
        (["mlflow==3.17.2"], ["mlflow==3.17.2", "pandas<3", "azureml-ai-monitoring"]),
        (["azureml_ai_monitoring==1.0.0", "pandas<3"], ["azureml_ai_monitoring==1.0.0", "pandas<3"]),
        (
            ["--extra-index-url https://x", "pandas~=3.1"],
            ["--extra-index-url https://x", "pandas<3", "azureml-ai-monitoring"],
        ),
    ],
)
def test_requirements_are_adapted_once(given, expected):
    assert targets.adapted(given) == expected
    assert targets.adapted(expected) == expected


def test_served_payloads_of_the_no_code_image(flat_model, tmp_path):
    image = NoCodeImage(stage(read(flat_model), tmp_path).folder)
    split = {"columns": ["prompt"], "index": [0, 1], "data": [["1234"], ['ü\n"quoted"']]}
    assert image.score({"input_data": split}) == ["echo None: 1234", 'echo None: ü\n"quoted"']
    assert image.score({"input_data": split, "params": {"max_tokens": 3}})[0] == "echo 3: 1234"
    both = {"columns": ["prompt", "messages"], "index": [0], "data": [["a", None]]}
    assert image.score({"input_data": both}) == ["echo None: a"]
    with pytest.raises(TypeError):
        image.score({"input_data": split, "max_tokens": 3})
