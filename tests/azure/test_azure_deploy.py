"""Deploying with the unmodified azure-ai-ml against the stand-in: create, update, traffic, failures, a dry run.

Run with: pytest tests/azure/test_azure_deploy.py
"""

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow.azure import calls, deploy, instances, plan
from phi3_mlflow.azure.cli import azure as group
from phi3_mlflow.azure.errors import SettingError
from phi3_mlflow.azure.model import read
from phi3_mlflow.azure.settings import Settings, default_deployment, validate

DEPLOYMENT = r"/deployments/[\w-]+$"
ENDPOINT = r"/onlineEndpoints/[\w-]+$"
ASKED = "What is the capital of Spain?"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


_REGISTERED: dict[Path, dict] = {}


def register(azure, model: Path) -> None:
    """Registers a model for real once, and then from memory: its blobs stay."""
    if model not in _REGISTERED:
        assert run("register", str(model), "--name", "phi3").exit_code == 0
        _REGISTERED[model] = copy.deepcopy(azure.models["phi3"]["1"])
    azure.models["phi3"] = {"1": copy.deepcopy(_REGISTERED[model])}


def second_version(azure, **properties: str) -> None:
    """A second version of the registered model, with other properties."""
    asset = copy.deepcopy(azure.models["phi3"]["1"])
    asset["properties"] |= properties
    azure.models["phi3"]["2"] = {**asset, "id": asset["id"][:-1] + "2", "name": "2"}


def deployed(*arguments: str, model: str = "phi3:1", mode: str = "ncd") -> dict:
    result = run("deploy", model, "--mode", mode, "--endpoint", "phi3-demo", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refused(*arguments: str, model: str = "phi3:1", mode: str = "ncd", endpoint: str = "phi3-demo") -> str:
    """The one error line of a deployment that failed."""
    result = run("deploy", model, "--mode", mode, "--endpoint", endpoint, *arguments)
    assert result.exit_code in (1, 2), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    return lines[0]


def traffic(azure) -> dict[str, int]:
    return dict(azure.endpoints["phi3-demo"]["properties"]["traffic"])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(deploy, "WAIT_SECONDS", 0.0)


def test_a_flat_model_answers_from_the_no_code_image(azure, flat_model):
    register(azure, flat_model)
    done = deployed()
    assert (done["endpoint"], done["deployment"], done["created"]) == ("phi3-demo", "ncd-1", True)
    assert done["answer"] == f"echo 16: {ASKED}"
    assert traffic(azure) == done["traffic"] == {"ncd-1": 100}
    properties = azure.deployments["phi3-demo"]["ncd-1"]["properties"]
    assert properties["requestSettings"]["requestTimeout"] == "PT3M"
    assert properties["requestSettings"]["maxConcurrentRequestsPerInstance"] == 1
    assert properties["environmentVariables"]["WORKER_COUNT"] == "1"
    assert properties["livenessProbe"]["timeout"] == properties["readinessProbe"]["timeout"] == "PT10S"
    assert properties["instanceType"] == "Standard_DS3_v2"
    assert not properties.get("environmentId")


def test_traffic_moves_after_the_test_request_only(azure, flat_model):
    register(azure, flat_model)
    azure.calls.clear()
    deployed()
    paths = [path for method, path in azure.calls if method in ("PUT", "POST")]
    asked = next(number for number, path in enumerate(paths) if path.startswith("/score/"))
    puts = [number for number, path in enumerate(paths) if re.search(ENDPOINT, path)]
    made = next(number for number, path in enumerate(paths) if re.search(DEPLOYMENT, path))
    assert puts[0] < made < asked < puts[1]
    assert len(puts) == 2


def test_a_chat_model_keeps_its_signature_in_a_container_that_azure_builds(azure, chat_model):
    register(azure, chat_model)
    done = deployed(mode="container")
    assert done["answer"] == f"echo {ASKED}"
    environment = next(iter(azure.environments.values()))
    properties = next(iter(environment.values()))["properties"]
    assert properties["inferenceConfig"]["scoringRoute"] == {"path": "/invocations", "port": 8080}
    assert properties["inferenceConfig"]["livenessRoute"] == {"path": "/ping", "port": 8080}
    container = azure.container()
    texts = {
        blob.name.rpartition("/")[2]: container.download_blob(blob.name).readall().decode()
        for blob in container.list_blobs(name_starts_with="LocalUpload")
    }
    assert texts["Dockerfile"].startswith("FROM python:3.11-slim\n")
    assert "mlflow==3.17.2" in texts["requirements.txt"].splitlines()
    variables = azure.deployments["phi3-demo"]["container-1"]["properties"]["environmentVariables"]
    assert variables["MLFLOW_MODELS_WORKERS"] == "1"
    assert variables["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] == "180"


def test_a_ready_image_is_used_as_it_is(azure, flat_model):
    register(azure, flat_model)
    done = deployed("--image", "registry.azurecr.io/phi3:1", mode="container")
    assert done["answer"] == f"echo 16: {ASKED}"
    environment = next(iter(next(iter(azure.environments.values())).values()))
    assert environment["properties"]["image"] == "registry.azurecr.io/phi3:1"


def test_a_new_version_takes_a_share_and_the_old_one_keeps_the_rest(azure, flat_model):
    register(azure, flat_model)
    deployed()
    second_version(azure)
    done = deployed("--traffic", "30", model="phi3:2")
    assert (done["deployment"], done["created"]) == ("ncd-2", True)
    assert traffic(azure) == {"ncd-1": 70, "ncd-2": 30}
    deployed("--traffic", "0", "--deployment", "shadow", model="phi3:2")
    assert traffic(azure) == {"ncd-1": 70, "ncd-2": 30}


def test_a_deployment_that_exists_is_updated_with_a_warning_about_its_traffic(azure, flat_model):
    register(azure, flat_model)
    deployed()
    result = run("deploy", "phi3:1", "--mode", "ncd", "--endpoint", "phi3-demo", "--instance-count", "2", "--json")
    assert json.loads(result.stdout)["created"] is False
    assert "warning: deployment ncd-1 gets 100 % of the traffic" in result.stderr
    assert azure.deployments["phi3-demo"]["ncd-1"]["sku"]["capacity"] == 2
    assert traffic(azure) == {"ncd-1": 100}


def test_a_failed_deployment_tells_its_log_and_leaves_the_traffic(azure, flat_model):
    register(azure, flat_model)
    deployed()
    for path in read(flat_model).files():
        name = f"broken/model/{path.relative_to(flat_model).as_posix()}"
        azure.container().upload_blob(name, path.read_bytes(), overwrite=True)
    second_version(azure, modelUri="azureml://datastores/workspaceblobstore/paths/broken/model")
    line = refused(model="phi3:2")
    assert "User container has crashed" in line
    assert "No module named 'azureml'" in line
    assert "the traffic is as it was" in line
    assert "az ml online-deployment get-logs --name ncd-2" in line
    assert traffic(azure) == {"ncd-1": 100}


def test_a_test_request_that_fails_leaves_the_traffic(azure, flat_model):
    from standin import Fault

    register(azure, flat_model)
    azure.faults = [Fault("POST", "/score/", 400, "BadRequest", "model crashed")]
    line = refused()
    assert "did not answer the test request (HTTP 400" in line
    assert traffic(azure) == {}
    assert azure.made("POST", "/score/") == 1


def test_a_deployment_that_is_not_reachable_yet_is_asked_again(azure, flat_model):
    from standin import Fault

    register(azure, flat_model)
    azure.faults = [Fault("POST", "/score/", 503, "NotReady", times=2)]
    assert deployed()["answer"]
    assert azure.made("POST", "/score/") == 3


def test_an_answer_without_a_text_leaves_the_traffic(azure, flat_model, monkeypatch):
    register(azure, flat_model)
    monkeypatch.setattr(azure, "_score", lambda *_: (200, [""], {}))
    assert "without a text" in refused()
    assert traffic(azure) == {}


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "told"),
    [
        ("GET", r"/models/phi3/versions/1$", 403, "AuthorizationFailed", "AzureML Data Scientist"),
        ("GET", r"/models/phi3/versions/1$", 404, "UserError", "HTTP 404"),
        ("PUT", ENDPOINT, 403, "AuthorizationFailed", "HTTP 403"),
        ("PUT", ENDPOINT, 409, "Conflict", "something else changes"),
        ("PUT", DEPLOYMENT, 409, "Conflict", "something else changes"),
        ("PUT", DEPLOYMENT, 400, "OutOfQuota", "OutOfQuota"),
        ("POST", "/listKeys", 403, "AuthorizationFailed", "reading the key"),
    ],
)
def test_a_refused_step_is_one_line(azure, flat_model, method, path, status, code, told):
    from standin import Fault

    register(azure, flat_model)
    azure.faults = [Fault(method, path, status, code, "not now")]
    line = refused()
    assert told in line
    assert "taken from environment variables" in line


def test_throttling_is_waited_for(azure, flat_model):
    from standin import Fault

    register(azure, flat_model)
    throttled = {"status": 429, "code": "TooManyRequests", "headers": {"Retry-After": "0.01"}}
    azure.faults = [Fault("PUT", ENDPOINT, **throttled), Fault("PUT", DEPLOYMENT, **throttled, times=2)]
    assert deployed()["traffic"] == {"ncd-1": 100}


def test_an_endpoint_in_a_bad_state_is_told(azure, flat_model):
    register(azure, flat_model)
    deployed()
    azure.endpoints["phi3-demo"]["properties"]["provisioningState"] = "Failed"
    assert "is in state Failed" in refused()


def test_the_mode_has_to_be_one_that_the_model_was_checked_for(azure, chat_model):
    register(azure, chat_model)
    assert "was checked for container only" in refused()
    assert azure.made("PUT", "onlineEndpoints") == 0


def test_a_machine_that_is_too_small_for_the_registered_model_is_refused(azure, flat_model):
    register(azure, flat_model)
    azure.models["phi3"]["1"]["properties"]["tags"]["phi3_memory_mb"] = str(15 << 10)
    line = refused("--instance-type", "Standard_DS3_v2")
    assert "Standard_DS3_v2 has 14 GiB, the model takes 15.0 GiB: take Standard_E4s_v3" in line
    assert azure.made("PUT", "onlineEndpoints") == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--timeout", "181"), "timeout 181 is not between 1 and 180"),
        (("--timeout", "0"), "timeout 0"),
        (("--traffic", "101"), "traffic 101"),
        (("--instance-count", "0"), "instance count 0"),
        (("--concurrency", "0"), "concurrency 0"),
        (("--instance-type", "big"), "instance type 'big'"),
        (("--deployment", "v1"), "deployment name 'v1'"),
        (("--deployment", "x" * 33), "3 to 32"),
        (("--deployment", "1abc"), "beginning with a letter"),
        (("--image", "registry.azurecr.io/phi3:1"), "use --mode container"),
        (("--env", "novalue"), "NAME=VALUE"),
        (("--env", "1X=2"), "variable name '1X'"),
        (("--env", "AZUREML_MODEL_DIR=/x"), "belongs to Azure"),
    ],
)
def test_a_value_that_azure_refuses_is_refused_before_any_call(azure, arguments, told):
    result = run("deploy", "phi3:1", "--mode", "ncd", "--endpoint", "phi3-demo", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert azure.calls == []


@pytest.mark.parametrize(
    ("model", "endpoint"), [("phi3", "phi3-demo"), ("phi3:1", "p"), ("phi3:1", "phi3_demo"), ("phi3:1", "phi3-")]
)
def test_names_that_azure_refuses_are_refused_before_any_call(azure, model, endpoint):
    refused(model=model, endpoint=endpoint)
    assert azure.calls == []


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(SettingError, match=r"endpoint name 'x'.*timeout 999.*instance type 'y'"):
        validate(Settings("phi3:1", "ncd", "x", "ncd-1", timeout=999, instance_type="y"))


def test_what_could_not_be_checked_is_noted():
    assert "was not checked" in validate(Settings("phi3:1", "ncd", "phi3-demo", "ncd-1"))[0]
    known = Settings("phi3:1", "ncd", "phi3-demo", "ncd-1", memory=1 << 30)
    assert validate(known) == []
    other = Settings("phi3:1", "ncd", "phi3-demo", "ncd-1", memory=1 << 30, instance_type="Standard_M64")
    assert "Standard_M64 is not in the table" in validate(other)[0]


def test_the_smallest_machine_that_holds_a_model():
    assert instances.smallest(6) == "Standard_DS2_v2"
    assert instances.smallest(14) == "Standard_DS3_v2"
    assert instances.smallest(14.1) == "Standard_E4s_v3"
    assert instances.smallest(4000) is None
    assert instances.memory("standard_ds3_V2") == 14


@pytest.mark.parametrize(
    ("before", "share", "after"),
    [
        ({}, 30, {"new": 100}),
        ({"old": 100}, 100, {"new": 100}),
        ({"old": 100}, 30, {"new": 30, "old": 70}),
        ({"a": 50, "b": 50}, 1, {"new": 1, "a": 50, "b": 49}),
        ({"a": 33, "b": 33, "c": 34}, 50, {"new": 50, "a": 16, "b": 17, "c": 17}),
        ({"new": 100}, 10, {"new": 100}),
        ({"new": 20, "old": 80}, 60, {"new": 60, "old": 40}),
        ({"old": 100, "new": 0}, 0, {"old": 100}),
        ({"a": 1, "b": 99}, 99, {"new": 99, "b": 1}),
    ],
)
def test_traffic_is_shared_out_in_whole_per_cents_that_add_up(before, share, after):
    found = deploy.shifted(before, "new", share)
    assert sum(found.values()) == 100
    if "c" in before:
        assert sorted(found.values()) == sorted(after.values())
    elif before == {"a": 50, "b": 50}:
        assert sorted(found.values()) == [1, 49, 50]
    else:
        assert found == after


def test_default_deployment_names_follow_the_version():
    assert default_deployment("phi3:1", "ncd") == "ncd-1"
    assert default_deployment("phi3:2024.05", "container") == "container-2024-05"
    assert len(default_deployment("phi3:" + "9" * 60, "container")) == 32


def test_a_dry_run_makes_no_call_and_its_files_are_what_azure_ai_ml_reads(azure, flat_model, chat_model, tmp_path):
    from azure.ai.ml import load_online_deployment, load_online_endpoint

    for mode, model, more in (
        ("ncd", None, []),
        ("ncd", flat_model, []),
        ("container", chat_model, []),
        ("container", flat_model, ["--base-image", "mcr.microsoft.com/x/python:3.11"]),
        ("container", None, ["--image", "registry.azurecr.io/phi3:1", "--env", "A=b"]),
    ):
        out = tmp_path / f"{mode}-{model and model.name}"
        given = [*more, *(["--model-uri", str(model)] if model else []), "--out", str(out), "--dry-run"]
        result = run("deploy", "phi3:1", "--mode", mode, "--endpoint", "phi3-demo", *given)
        assert result.exit_code == 0, result.output
        endpoint, document = load_online_endpoint(out / "endpoint.yml"), load_online_deployment(out / "deployment.yml")
        assert (endpoint.name, endpoint.auth_mode) == ("phi3-demo", "key")
        rest = document._to_rest_object(location="westeurope")
        assert rest.properties.request_settings.request_timeout.total_seconds() == 180
        assert document.liveness_probe.timeout == 10
        assert (document.environment is None) == (mode == "ncd")
        body = json.loads((out / "request.json").read_text())
        assert ("input_data" in body) == (mode == "ncd")
        commands = [line for line in result.stdout.splitlines() if line.startswith("az ")]
        assert [command.split()[3] for command in commands] == ["create", "create", "invoke", "update"]
    assert azure.calls == []


def test_a_dry_run_and_a_run_send_the_same_deployment(azure, flat_model, tmp_path):
    run("deploy", "phi3:1", "--mode", "ncd", "--endpoint", "phi3-demo", "--dry-run", "--out", str(tmp_path / "dry"))
    register(azure, flat_model)
    deployed("--out", str(tmp_path / "wet"))
    for name in ("endpoint.yml", "deployment.yml", "request.json"):
        assert (tmp_path / "dry" / name).read_text() == (tmp_path / "wet" / name).read_text()


def test_a_dry_run_of_a_container_needs_to_know_the_requirements(azure):
    assert "give --model-uri" in refused("--dry-run", mode="container")


def test_a_model_that_will_not_load_is_refused_in_a_dry_run(azure, chat_model):
    assert "will not load" in refused("--dry-run", "--model-uri", str(chat_model))


def test_torch_comes_from_the_cpu_index_only_where_it_is_asked_for():
    settings = Settings("phi3:1", "container", "phi3-demo", "container-1", task="llm/v1/chat")
    with_torch = plan.make(settings, ["mlflow==3.17.2", "torch==2.13.0"]).context["Dockerfile"]
    assert "https://download.pytorch.org/whl/cpu" in with_torch
    assert "pytorch.org" not in plan.make(settings, ["mlflow==3.17.2"]).context["Dockerfile"]
    assert plan.python_version("python: 3.12.1\n") == "3.12"
    assert plan.python_version("") == "3.11"


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_a_printed_call_works_as_it_stands(azure, flat_model, language, tmp_path):
    import standin

    register(azure, flat_model)
    done = deployed()
    text = done["calls"][language]
    if language == "JavaScript" and shutil.which("node") is None:
        pytest.skip("needs node")
    names = {"curl": "call.sh", "Python": "call.py", "JavaScript": "call.mjs"}
    programs = {"curl": ["sh"], "Python": [sys.executable], "JavaScript": ["node"]}
    path = tmp_path / names[language]
    path.write_text(text)
    variables = {**os.environ, calls.KEY_VARIABLE: standin.KEY}
    found = subprocess.run([*programs[language], str(path)], capture_output=True, text=True, env=variables, timeout=60)
    assert f"echo 16: {ASKED}" in found.stdout, found.stderr


def test_calls_survive_quotes_and_other_alphabets():
    body = calls.request_body("container", "llm/v1/chat", 'It\'s "größer" )" than $HOME', 5)
    rendered = calls.render("https://x.inference.ml.azure.com/score", body, 180)
    assert tuple(rendered) == calls.LANGUAGES
    for language, text in rendered.items():
        assert calls.KEY_VARIABLE in text, language
        assert "180" in text, language
    raw = re.search(r'r"---\((.*)\)---"', rendered["R"])
    assert raw
    assert json.loads(raw[1]) == body
    literal = rendered["C#"].partition('"""\n')[2].partition('\n"""')[0]
    assert json.loads(literal) == body
    compile(rendered["Python"], "call", "exec")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (["Madrid"], "Madrid"),
        ({"predictions": ["Madrid"]}, "Madrid"),
        ({"predictions": [{"0": "Madrid"}]}, "Madrid"),
        ([{"choices": [{"message": {"content": "Madrid"}}]}], "Madrid"),
        ({"choices": [{"text": "Madrid"}]}, "Madrid"),
        ({"choices": []}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_the_text_of_an_answer_is_found_however_it_is_served(body, text):
    assert calls.answer_text(body) == text


def test_no_secret_is_in_a_log_a_file_or_an_output(azure, flat_model, tmp_path, caplog):
    import standin

    with caplog.at_level(logging.DEBUG):
        register(azure, flat_model)
        result = run("deploy", "phi3:1", "--mode", "ncd", "--endpoint", "phi3-demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0
    files = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for secret in (standin.KEY, standin.TOKEN, standin.ACCOUNT_KEY):
        assert secret not in caplog.text + result.output + files
    assert yaml.safe_load((tmp_path / "out" / "endpoint.yml").read_text())["auth_mode"] == "key"


def test_results_are_on_stdout_and_the_way_there_on_stderr(azure, flat_model):
    register(azure, flat_model)
    result = run("deploy", "phi3:1", "--mode", "ncd", "--endpoint", "phi3-demo")
    assert result.stdout.startswith("https://localhost:")
    assert all(f"\n# {language}\n" in result.stdout for language in calls.LANGUAGES)
    assert "get-credentials --name phi3-demo" in result.stdout
    assert "creating endpoint phi3-demo" in result.stderr
