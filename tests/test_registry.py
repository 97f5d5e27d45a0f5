"""What MLflow's pages show of a logged model, on its local store, on PostgreSQL, and through its server.

Run: pytest tests/test_registry.py
"""

import json
from collections.abc import Iterator

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.models import Model
from stores import postgresql, server

from phi3_mlflow import cards
from phi3_mlflow.builders import common, onnx
from phi3_mlflow.cli import cli
from phi3_mlflow.compare import questions
from phi3_mlflow.tracking import known

BENCH = ["--prompt-tokens", "16", "--tokens", "2", "--concurrency", "1", "--rounds", "1", "--prefix", "16", "--log"]


@pytest.fixture(scope="module")
def uris(tracking, tmp_path_factory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("server")
    with postgresql() as database, server(folder, database) as (address, _):
        yield {"sqlite": tracking, "postgresql": database, "server": address}


@pytest.fixture(params=["sqlite", "postgresql", "server"])
def store(request, uris, tracking, tmp_path_factory, monkeypatch) -> Iterator[str]:
    """The kind of the store that is set while the test runs."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = uris[request.param]
    mlflow.set_tracking_uri(uri)
    if request.param == "postgresql" and mlflow.get_experiment_by_name("here") is None:
        mlflow.create_experiment("here", artifact_location=tmp_path_factory.mktemp("artifacts").as_uri())
    mlflow.set_experiment({"sqlite": "tests", "postgresql": "here", "server": "there"}[request.param])
    yield request.param
    mlflow.set_tracking_uri(tracking)
    mlflow.set_experiment("tests")


def test_a_logged_model_shows_its_facts_its_version_a_card_and_a_measurement_its_numbers_on_both(store):
    name = f"shown-{store}"
    info = onnx.log_model(
        registered_model_name=name, alias="champion", model_config={"context_length": 512}, tags={"team": "red"}
    )

    client = mlflow.MlflowClient()
    logged = client.get_logged_model(info.model_id)
    assert logged.params == {
        "builder": "onnx",
        "task": "llm/v1/chat",
        "quantization": "int4, block 32, accuracy level 4",
        "context_tokens": "512",
        "weights_source": "phi3_mlflow embedded model",
        "weights_license": "mit",
        "weights_sha256": info.metadata["weights"]["sha256"],
        "toolkit": info.metadata["toolkit"],
        **{key: text for key, text in logged.params.items() if key.startswith("version ")},
    }
    assert {"version onnxruntime", "version onnxruntime-genai", "version mlflow"} <= logged.params.keys()
    found = mlflow.search_logged_models(filter_string="tags.phi3_quantization LIKE 'int4%'", output_format="list")
    assert info.model_id in [each.model_id for each in found]
    (version,) = client.search_model_versions(f"name = '{name}'")
    own = {"phi3_builder": "onnx", "phi3_task": "llm/v1/chat", "phi3_weights_source": "phi3_mlflow embedded model"}
    assert {"team": "red", **own}.items() <= version.tags.items()
    size = Model.load(mlflow.artifacts.download_artifacts(info.model_uri)).model_size_bytes
    assert version.description == cards.card(logged.params, size)
    for text in ("int4, block 32", "512 tokens", "mit", logged.params["weights_sha256"], "onnxruntime-genai 0"):
        assert text in version.description
    assert "tokens/s" not in version.description

    client.update_model_version(name, "1", "Ours. " + version.description)
    result = CliRunner().invoke(cli, ["bench", f"models:/{name}@champion", *BENCH])

    assert result.exit_code == 0, result.output
    metrics = {metric.key: metric for metric in client.get_logged_model(info.model_id).metrics}
    assert {"tokens_per_second", "first_token_ms", "memory_peak_bytes"} <= metrics.keys()
    assert metrics["tokens_per_second"].run_id == result.stdout.splitlines()[-1].removeprefix("run ")
    measured = client.get_model_version(name, "1").description
    assert measured.startswith("Ours. **phi3_mlflow embedded model**")
    assert measured.endswith(result.stdout.rpartition("\n\nrun ")[0])


def test_a_comparison_is_logged_and_its_gate_moves_the_alias(store, tmp_path):
    name = f"gated-{store}"
    ids = [onnx.log_model(registered_model_name=name, alias=alias).model_id for alias in ("champion", None)]
    rows = questions.EMBEDDED.read_text("utf-8").splitlines(keepends=True)[:3]
    (tmp_path / "three.jsonl").write_text("".join(rows), "utf-8")
    asked = ["--questions", str(tmp_path / "three.jsonl"), "--gate", "champion", "--margin", "0.5"]

    result = CliRunner().invoke(cli, ["compare", f"models:/{name}@champion", f"models:/{name}/2", *asked])

    assert result.exit_code == 0, result.output
    client = mlflow.MlflowClient()
    assert str(client.get_model_version_by_alias(name, "champion").version) == "2"
    run = client.get_run(result.stdout.splitlines()[-1].removeprefix("run "))
    assert {each.model_id for each in run.inputs.model_inputs} == set(ids)
    assert "drift" in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/compare.md")
    for model_id in ids:
        metrics = {metric.key: metric.value for metric in client.get_logged_model(model_id).metrics}
        assert metrics["right"] == metrics["contained/mean"] == 1


def test_params_of_the_run_do_not_get_in_the_way_and_own_ones_may_not(store):
    with mlflow.start_run():
        mlflow.log_param("task", "mine")
        info = onnx.log_model(params={"lora": 16})

    params = mlflow.get_logged_model(info.model_id).params
    assert (params["task"], params["lora"], params["builder"]) == ("mine", "16", "onnx")
    with pytest.raises(common.BuildError, match="params has 'builder', which the builders write themselves"):
        onnx.log_model(params={"builder": "mine"})


def test_a_description_of_somebody_else_is_left_alone(store):
    name = f"theirs-{store}"
    info = onnx.log_model(registered_model_name=name)
    client = mlflow.MlflowClient()
    mlflow.register_model(info.model_uri, name)
    client.update_model_version(name, "1", "Do not touch.")

    assert cards.note(info.model_id, "fast") == []
    assert client.get_model_version(name, "1").description == "Do not touch."
    assert not client.get_model_version(name, "2").description
    listed = json.loads(client.get_logged_model(info.model_id).tags["mlflow.modelVersions"])
    assert {int(each["version"]) for each in listed} == {1, 2}


def test_a_model_that_the_store_does_not_have_is_not_known(store):
    assert not known("m-" + "0" * 32)
    assert not known(None)
