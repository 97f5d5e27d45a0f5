"""Which Azure ML workspace is meant, with which credential, and the client for it.

It knows nothing of models.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.azure.errors import INSTALL, AzureError, explained, redact
from phi3_mlflow.runtime.errors import shorten

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

_FLAGS = ("--subscription", "--resource-group", "--workspace")
_VARIABLES = ("AZUREML_ARM_SUBSCRIPTION", "AZUREML_ARM_RESOURCEGROUP", "AZUREML_ARM_WORKSPACE_NAME")
_KEYS = ("subscription_id", "resource_group", "workspace_name")
# Folders, files and depth as azure.ai.ml.MLClient.from_config looks for them.
_FOLDERS, _FILES, _LEVELS = (".azureml", "aml_config", ""), ("config.json", "project.json"), 20
_STUDIOS = {"AzureUSGovernment": "https://ml.azure.us", "AzureChinaCloud": "https://studio.ml.azure.cn"}
_LOUD = ("urllib3.connectionpool", "azure.core.pipeline.policies.http_logging_policy", "azure.identity", "msal")


@dataclass(frozen=True)
class Workspace:
    """A workspace and where its name came from.

    Args:
        subscription: the subscription's id.
        resource_group: its resource group.
        name: its name.
        source: "flags", "environment variables" or the path of a config.json.
    """

    subscription: str
    resource_group: str
    name: str
    source: str

    def __str__(self) -> str:
        """The workspace and its source as the end of an error line."""
        return f"workspace {self.name} in {self.resource_group}, taken from {self.source}"

    @property
    def path(self) -> str:
        """The workspace's resource id."""
        return (
            f"/subscriptions/{self.subscription}/resourceGroups/{self.resource_group}"
            f"/providers/Microsoft.MachineLearningServices/workspaces/{self.name}"
        )

    def studio(self, page: str) -> str:
        """The address of a page of the studio, for example `model/phi3:1/details`."""
        site = _STUDIOS.get(os.environ.get("AZUREML_CURRENT_CLOUD", ""), "https://ml.azure.com")
        short = f"/subscriptions/{self.subscription}/resourcegroups/{self.resource_group}/workspaces/{self.name}"
        return f"{site}/{page}?wsid={short}"

    @property
    def az_flags(self) -> str:
        """The az CLI's flags for this workspace."""
        return f"--subscription {self.subscription} --resource-group {self.resource_group} --workspace-name {self.name}"


def find(
    flags: tuple[str | None, str | None, str | None] = (None, None, None),
    variables: Mapping[str, str] | None = None,
    start: Path | None = None,
) -> Workspace:
    """The workspace from flags, then from the AZUREML_ARM_* variables, then from config.json.

    One source gives all three parts; they are never mixed.

    Args:
        flags: subscription id, resource group and workspace name as given on the command line.
        variables: the environment; the process's own by default.
        start: the folder from where config.json is looked for, upwards; the current one by default.

    Raises:
        AzureError: no source names a workspace, or the first that names anything does not name all of it.
    """
    variables = os.environ if variables is None else variables
    named = tuple(variables.get(name) or None for name in _VARIABLES)
    for parts, names, source in ((flags, _FLAGS, "flags"), (named, _VARIABLES, "environment variables")):
        if any(parts):
            missing = [name for name, part in zip(names, parts, strict=True) if not part]
            if missing:
                raise AzureError(f"the workspace is named by {source}, but {' and '.join(missing)} is missing: give it")
            return _checked(Workspace(str(parts[0]), str(parts[1]), str(parts[2]), source))
    path = _config(start or Path.cwd())
    if path is None:
        raise AzureError(
            f"no workspace is named: give {', '.join(_FLAGS)}, or set {', '.join(_VARIABLES)}, or download config.json "
            "from the workspace's page"
        )
    return _from_file(path)


def connect(workspace: Workspace, credential: Any = None) -> "MLClient":
    """A client for the workspace that has answered once.

    Telemetry is off. The credential is DefaultAzureCredential unless one is given.

    Raises:
        AzureError: the `azure` extra is missing, no credential works, or the workspace does not answer.
    """
    try:
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise AzureError(f"the Azure packages are missing ({error.name}): run {INSTALL}") from None
    hush()
    with explained("opening the workspace", str(workspace)):
        client = MLClient(
            credential or DefaultAzureCredential(),
            workspace.subscription,
            workspace.resource_group,
            workspace.name,
            enable_telemetry=False,
            show_progress=False,
        )
        client.workspaces.get(workspace.name)
    return client


def hush() -> None:
    """Keeps signatures and tokens out of every log record that the HTTP libraries write, at any level."""
    for name in _LOUD:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Redactor) for known in logger.filters):
            logger.addFilter(_Redactor())


def broken_plugin() -> str | None:
    """The version of azureml-mlflow where an installed one breaks MLflow 3, else None."""
    try:
        found = version("azureml-mlflow")
    except PackageNotFoundError:
        return None
    return found if found.startswith("1.60.") else None


class _Redactor(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, ()
        return True


def _config(start: Path) -> Path | None:
    above = [start.resolve(), *start.resolve().parents][: _LEVELS + 1]
    for folder, name in product(_FOLDERS, _FILES):
        for parent in above:
            if (parent / folder / name).is_file():
                return parent / folder / name
    return None


def _from_file(path: Path) -> Workspace:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AzureError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise AzureError(f"{path} holds no mapping: download config.json from the workspace's page again")
    if isinstance(data.get("Scope"), str):
        pieces = data["Scope"].split("/")
        if len(pieces) > 8:
            return _checked(Workspace(pieces[2], pieces[4], pieces[8], str(path)))
    missing = [key for key in _KEYS if not data.get(key)]
    if missing:
        raise AzureError(f"{path} lacks {' and '.join(missing)}: download config.json from the workspace's page again")
    subscription, resource_group, name = (str(data[key]) for key in _KEYS)
    return _checked(Workspace(subscription, resource_group, name, str(path)))


def _checked(workspace: Workspace) -> Workspace:
    # https://learn.microsoft.com/azure/azure-resource-manager/management/resource-name-rules
    hexadecimal = "[0-9a-fA-F]"
    identifier = rf"{hexadecimal}{{8}}(-{hexadecimal}{{4}}){{3}}-{hexadecimal}{{12}}"
    rules = (
        ("subscription id", workspace.subscription, identifier, "8-4-4-4-12 hex digits"),
        ("resource group", workspace.resource_group, r"[\w.()-]{0,89}[\w()-]", "1 to 90 letters, digits and -_.()"),
        ("workspace name", workspace.name, r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}", "3 to 33 letters, digits, - and _"),
    )
    for what, value, pattern, allowed in rules:
        if not re.fullmatch(pattern, value):
            raise AzureError(
                f"the {what} {shorten(value)}, taken from {workspace.source}, cannot be one: it has {allowed}"
            )
    return workspace
