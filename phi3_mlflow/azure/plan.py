"""The YAML of an endpoint and its deployment, as the az CLI and azure-ai-ml read it, and the commands that use it.

It makes no call: `deploy` loads these very files, so that a dry run shows what a run does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phi3_mlflow.azure.calls import request_body
from phi3_mlflow.azure.environment import parse
from phi3_mlflow.azure.errors import AzureError, SettingError
from phi3_mlflow.azure.settings import BASE_IMAGE, Settings
from phi3_mlflow.azure.workspace import Workspace

_SCHEMAS = "https://azuremlschemas.azureedge.net/latest"
_PORT = 8080
_ROUTES = {"liveness_route": "/ping", "readiness_route": "/ping", "scoring_route": "/invocations"}
# Loading 2.7 GB takes 4 to 13 s from a warm disk, and the runtime answers no probe while it loads; a cold start and
# imports come on top. 30 probes in 10 s steps leave five minutes.
_PROBE = {"initial_delay": 20, "period": 10, "timeout": 10, "success_threshold": 1, "failure_threshold": 30}
_TEST_PROMPT, _TEST_TOKENS = "What is the capital of Spain?", 16
_DOCKERFILE = """FROM {base}
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
COPY requirements.txt /tmp/requirements.txt
RUN pip install{index} -r /tmp/requirements.txt
EXPOSE {port}
# Azure mounts the registered model below AZUREML_MODEL_DIR; one server process holds one copy of it.
CMD ["sh", "-c", "exec mlflow models serve --env-manager local --workers 1 --host 0.0.0.0 --port {port} \\
  --model-uri \\"$(dirname \\"$(find \\"$AZUREML_MODEL_DIR\\" -maxdepth 3 -name MLmodel | head -n 1)\\")\\""]
"""
_CPU_TORCH = " --extra-index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Plan:
    """What is going to be deployed, as data.

    Args:
        settings: the values it was made from.
        endpoint: the endpoint's document.
        deployment: the deployment's document.
        request: the test request's body.
        context: files of the image's build context by name; empty where no image is built.
    """

    settings: Settings
    endpoint: dict[str, Any]
    deployment: dict[str, Any]
    request: dict[str, Any]
    context: dict[str, str]


def make(settings: Settings, requirements: list[str] | None = None, python: str = "3.11") -> Plan:
    """The documents for validated settings.

    Args:
        settings: validated.
        requirements: the model's requirement lines, for an image that is to be built.
        python: the model's Python version.

    Raises:
        SettingError: an image has to be built, and the requirements are not given.
    """
    building = settings.mode == "container" and settings.image is None
    if building and not requirements:
        raise SettingError(
            f"the requirements of {settings.model} are not known, so no image can be described: give --model-uri with "
            "the logged model, or --image with a ready one"
        )
    context = _context(settings, requirements or [], python) if building else {}
    return Plan(
        settings,
        {
            "$schema": f"{_SCHEMAS}/managedOnlineEndpoint.schema.json",
            "name": settings.endpoint,
            "auth_mode": "key",
            "tags": {"created_by": "phi3-mlflow"},
        },
        _deployment(settings, bool(context)),
        request_body(settings.mode, settings.task, _TEST_PROMPT, _TEST_TOKENS),
        context,
    )


def write(plan: Plan, folder: Path) -> list[Path]:
    """Writes endpoint.yml, deployment.yml, request.json and, for an image that is built, the folder `image`.

    Raises:
        AzureError: the folder holds such files of something else than an earlier plan, or cannot be written.
    """
    files = {
        "endpoint.yml": yaml.safe_dump(plan.endpoint, sort_keys=False),
        "deployment.yml": yaml.safe_dump(plan.deployment, sort_keys=False),
        "request.json": json.dumps(plan.request, indent=2) + "\n",
        **{f"image/{name}": text for name, text in plan.context.items()},
    }
    paths = []
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    except OSError as error:
        raise AzureError(f"{error.filename} cannot be written: {error.strerror}") from None
    return paths


def commands(plan: Plan, folder: Path, workspace: Workspace | None) -> list[str]:
    """The az commands that do what `deploy` does, in the same order: test first, traffic last."""
    where = workspace.az_flags if workspace else "--resource-group GROUP --workspace-name WORKSPACE"
    settings = plan.settings
    names = f"--name {settings.endpoint} {where}"
    lines = [
        f"az ml online-endpoint create --file {folder / 'endpoint.yml'} {where}",
        f"az ml online-deployment create --file {folder / 'deployment.yml'} {where}",
        f"az ml online-endpoint invoke {names} --deployment-name {settings.deployment} "
        f"--request-file {folder / 'request.json'}",
    ]
    if settings.traffic:
        lines.append(f'az ml online-endpoint update {names} --traffic "{settings.deployment}={settings.traffic}"')
    return lines


def python_version(text: str) -> str:
    """Major and minor version out of a python_env.yaml; "3.11" where it says none."""
    found = re.search(r"^python:\s*['\"]?(\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else "3.11"


def _deployment(settings: Settings, building: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "$schema": f"{_SCHEMAS}/managedOnlineDeployment.schema.json",
        "name": settings.deployment,
        "endpoint_name": settings.endpoint,
        "model": f"azureml:{settings.model}",
        "instance_type": settings.instance_type,
        "instance_count": settings.instance_count,
        "request_settings": {
            "request_timeout_ms": settings.timeout * 1000,
            "max_concurrent_requests_per_instance": settings.concurrency,
        },
        "liveness_probe": dict(_PROBE),
        "readiness_probe": dict(_PROBE),
        "environment_variables": {**_variables(settings), **settings.variables},
        "tags": {"created_by": "phi3-mlflow", "mode": settings.mode, "task": settings.task},
    }
    if settings.mode == "container":
        source: dict[str, Any] = {"build": {"path": "image"}} if building else {"image": settings.image}
        routes = {name: {"path": path, "port": _PORT} for name, path in _ROUTES.items()}
        document["environment"] = {**source, "inference_config": routes}
    return document


def _variables(settings: Settings) -> dict[str, str]:
    common = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    if settings.mode == "ncd":
        # The inference server's: one worker is one copy of the model.
        return {"WORKER_COUNT": "1", "WORKER_TIMEOUT": str(settings.timeout), **common}
    return {
        "MLFLOW_MODELS_WORKERS": "1",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(settings.timeout),
        **common,
    }


def _context(settings: Settings, requirements: list[str], python: str) -> dict[str, str]:
    names = {found.name.lower() for line in requirements if (found := parse(line))}
    base = settings.base_image or BASE_IMAGE.format(python=python)
    return {
        "Dockerfile": _DOCKERFILE.format(base=base, index=_CPU_TORCH if "torch" in names else "", port=_PORT),
        "requirements.txt": "\n".join(requirements) + "\n",
    }
