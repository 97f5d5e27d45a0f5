"""Which workspace is used and what a wrong one or a missing credential says.

Run with: pytest tests/azure/test_azure_workspace.py
"""

import json
import logging
import sys

import pytest
from click.testing import CliRunner

from phi3_mlflow.azure import workspace
from phi3_mlflow.azure.cli import azure as group
from phi3_mlflow.azure.errors import AzureError, explain, redact

FLAGS = ("00000000-0000-0000-0000-00000000000f", "from-flags", "ws-flags")
VARIABLES = {
    "AZUREML_ARM_SUBSCRIPTION": "00000000-0000-0000-0000-00000000000e",
    "AZUREML_ARM_RESOURCEGROUP": "from-env",
    "AZUREML_ARM_WORKSPACE_NAME": "ws-env",
}
CONFIG = {
    "subscription_id": "00000000-0000-0000-0000-00000000000c",
    "resource_group": "from-file",
    "workspace_name": "ws-file",
}


def test_flags_come_before_variables_and_those_before_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert workspace.find(FLAGS, VARIABLES, tmp_path).resource_group == "from-flags"
    assert workspace.find((None, None, None), VARIABLES, tmp_path).resource_group == "from-env"
    found = workspace.find((None, None, None), {}, tmp_path)
    assert (found.resource_group, found.source) == ("from-file", str(tmp_path / "config.json"))


@pytest.mark.parametrize("place", ["config.json", ".azureml/config.json", "aml_config/project.json"])
def test_the_file_is_looked_for_upwards_where_azure_ai_ml_looks(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps(CONFIG))
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert workspace.find((None, None, None), {}, below).name == "ws-file"


def test_a_file_with_a_scope_is_read(tmp_path):
    scope = "/subscriptions/{subscription_id}/resourceGroups/{resource_group}/providers/M/workspaces/{workspace_name}"
    (tmp_path / "config.json").write_text(json.dumps({"Scope": scope.format(**CONFIG)}))
    found = workspace.find((None, None, None), {}, tmp_path)
    assert (found.subscription, found.resource_group, found.name) == tuple(CONFIG.values())


@pytest.mark.parametrize(
    ("flags", "variables", "missing"),
    [
        ((FLAGS[0], None, None), VARIABLES, "named by flags, but --resource-group and --workspace is missing"),
        ((None,) * 3, {"AZUREML_ARM_SUBSCRIPTION": "x"}, "AZUREML_ARM_RESOURCEGROUP and AZUREML_ARM_WORKSPACE_NAME"),
        ((None,) * 3, {}, "no workspace is named"),
        (("not-an-id", "group", "name"), {}, "'not-an-id', taken from flags"),
        ((FLAGS[0], "group", "no spaces allowed"), {}, "workspace name 'no spaces allowed'"),
    ],
)
def test_half_a_workspace_is_never_completed_from_elsewhere(tmp_path, flags, variables, missing):
    with pytest.raises(AzureError, match=missing):
        workspace.find(flags, variables, tmp_path)


@pytest.mark.parametrize("text", ["no json", "[]", '{"subscription_id": "x"}'])
def test_a_file_of_another_kind_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AzureError, match=r"config\.json"):
        workspace.find((None, None, None), {}, tmp_path)


def test_a_missing_extra_is_one_line(flat_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke(group, ["register", str(flat_model), "--name", "phi3"])
    assert run.exit_code == 1
    assert 'pip install "phi3-mlflow[azure]"' in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.output


def test_a_missing_credential_is_one_line_with_the_source(azure, flat_model, monkeypatch):
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    run = CliRunner().invoke(group, ["register", str(flat_model), "--name", "phi3"])
    assert run.exit_code == 1
    assert run.stderr.count("\n") == 1
    assert "no credential for Azure" in run.stderr
    assert "taken from environment variables" in run.stderr
    assert azure.made("PUT", "") == 0


@pytest.mark.parametrize(
    ("flags", "source"),
    [([], "taken from environment variables"), (["--subscription", "00000000-1111-2222-3333-444444444444"], "flags")],
)
def test_a_workspace_that_is_not_there_says_where_its_name_came_from(azure, flat_model, monkeypatch, flags, source):
    monkeypatch.setenv("AZUREML_ARM_WORKSPACE_NAME", "ws-elsewhere")
    more = [*flags, "--resource-group", "rg-test", "--workspace", "ws-elsewhere"] if flags else []
    run = CliRunner().invoke(group, ["register", str(flat_model), "--name", "phi3", *more])
    assert run.exit_code == 1
    assert run.stderr.count("\n") == 1
    assert "HTTP 404" in run.stderr
    assert source in run.stderr


def test_a_token_that_azure_refuses_is_told(azure, flat_model, monkeypatch):
    import standin

    monkeypatch.setattr(standin, "TOKEN", "another")
    monkeypatch.setattr(azure, "_fault", lambda method, path: _refusing(standin, path))
    run = CliRunner().invoke(group, ["register", str(flat_model), "--name", "phi3"])
    assert run.exit_code == 1
    assert "HTTP 401" in run.stderr
    assert "another" not in run.stderr


def _refusing(standin, path):
    return None if path.startswith("/msi") else standin.Fault("GET", "", 401, "InvalidAuthenticationToken")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://x.blob.core.windows.net/c/b?sv=2024&sig=abc%2Bdef%3D&se=1", "abc%2Bdef%3D"),
        ("DefaultEndpointsProtocol=https;AccountKey=Zm9vYmFy==;EndpointSuffix=x", "Zm9vYmFy"),
        ("Authorization: Bearer eyJ0eXAi.x-y_z", "eyJ0eXAi"),
        ("grant_type=client_credentials&client_secret=s3cr3t&x=1", "s3cr3t"),
    ],
)
def test_secrets_are_blotted_out(text, secret):
    assert secret not in redact(text)
    assert "[redacted]" in redact(text)


def test_an_error_of_another_kind_is_not_dressed_up():
    from phi3_mlflow.azure.errors import explained

    with pytest.raises(ZeroDivisionError), explained("counting"):
        raise ZeroDivisionError
    assert explain(ConnectionError("gone"), "looking").startswith("Azure refused looking (ConnectionError)")


def test_log_records_of_the_http_libraries_carry_no_signature(caplog):
    workspace.hush()
    workspace.hush()
    logger = logging.getLogger("urllib3.connectionpool")
    assert len([known for known in logger.filters if type(known).__module__ == workspace.__name__]) == 1
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        logger.debug('%s "%s %s"', "host", "PUT", "/c/b?sv=1&sig=secret&comp=block")
    assert "secret" not in caplog.text
    assert "comp=block" in caplog.text


def test_a_broken_plugin_is_warned_of(monkeypatch, flat_model):
    monkeypatch.setattr(workspace, "version", lambda name: "1.60.0")
    run = CliRunner().invoke(group, ["check", str(flat_model)])
    assert "azureml-mlflow 1.60.0" in run.stderr
    monkeypatch.setattr(workspace, "version", lambda name: "1.57.0")
    assert CliRunner().invoke(group, ["check", str(flat_model)]).stderr == ""
