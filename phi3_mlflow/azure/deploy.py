"""A registered model becomes an answering endpoint: endpoint, deployment, test request, and only then traffic.

What is deployed is decided in `settings` and `plan`; it loads the files that a dry run would write.
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.azure import plan as plans
from phi3_mlflow.azure import register, upload
from phi3_mlflow.azure.calls import answer_text
from phi3_mlflow.azure.errors import AzureError, SettingError, explained, redact
from phi3_mlflow.azure.settings import TASKS, Settings
from phi3_mlflow.azure.workspace import Workspace

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

Say = Callable[[str], None]
# A fresh deployment may be unreachable for some seconds after Azure calls it ready.
_RETRIED = frozenset({408, 424, 429, 502, 503, 504})
TRIES, WAIT_SECONDS = 5, 5.0
_LOG_LINES = 50


@dataclass(frozen=True)
class Deployed:
    """A deployment that answered.

    Args:
        endpoint: the endpoint's name.
        deployment: the deployment's name.
        uri: the scoring address.
        answer: the text of the test request's answer.
        seconds: what the test request took.
        traffic: the endpoint's traffic in per cent by deployment.
        created: False where a deployment of this name was updated.
    """

    endpoint: str
    deployment: str
    uri: str
    answer: str
    seconds: float
    traffic: dict[str, int]
    created: bool

    def as_dict(self) -> dict[str, Any]:
        """The deployment as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Asset:
    """What a registered model's entry tells: tags by name, and its address in a datastore."""

    tags: dict[str, str]
    path: str


def read_asset(client: "MLClient", workspace: Workspace, settings: Settings) -> Asset:
    """The registered model that is to be deployed.

    Raises:
        AzureError: it is not registered, is no MLflow model, or its check spoke against the mode.
    """
    with explained(f"reading model {settings.model}", str(workspace)):
        found = client.models.get(settings.model_name, settings.model_version)
    if str(found.type) != "mlflow_model":
        raise AzureError(f"{settings.model} is of type {found.type}: register it with `phi3-mlflow azure register`")
    tags = {str(key): str(value) for key, value in (found.tags or {}).items()}
    modes = tags.get(register.MODES_TAG)
    if modes is not None and settings.mode not in modes.split(","):
        raise SettingError(
            f"{settings.model} was checked for {modes} only: give --mode {modes.split(',')[0]}, or log it with "
            "`phi3-mlflow log ... --target azure`"
        )
    return Asset(tags, str(found.path))


def completed(settings: Settings, asset: Asset) -> Settings:
    """The settings with the task and the memory that the registration noted."""
    task, memory = asset.tags.get(register.TASK_TAG), asset.tags.get(register.MEMORY_TAG, "")
    return replace(
        settings,
        task=task if task in TASKS else settings.task,
        memory=int(memory) << 20 if memory.isdigit() else settings.memory,
    )


def read_requirements(client: "MLClient", workspace: Workspace, asset: Asset) -> tuple[list[str], str]:
    """Requirement lines and Python version of a registered model, read from its datastore.

    Raises:
        AzureError: the files are not there, or cannot be read.
    """
    datastore, prefix = register.split_remote(asset.path, workspace)
    with explained(f"reading the requirements in {asset.path}", str(workspace)):
        store = upload.open_datastore(client, datastore)
        container = store.container()
        lines = upload.fetch(store, container, f"{prefix}/requirements.txt").decode().splitlines()
        python = upload.fetch(store, container, f"{prefix}/python_env.yaml").decode()
    return [line for line in lines if line.strip()], plans.python_version(python)


def deploy(client: "MLClient", workspace: Workspace, plan: plans.Plan, folder: Path, say: Say) -> Deployed:
    """Creates or updates what the plan says, asks one question, and moves the traffic if it was answered.

    Args:
        client: from `workspace.connect`.
        workspace: the workspace that the client speaks to.
        plan: what to deploy.
        folder: where `plan.write` wrote it.
        say: told each step in a line.

    Raises:
        AzureError: Azure refuses a step, the deployment fails (its last log lines are told), or the test request is
            not answered; the traffic is then as it was.
    """
    settings = plan.settings
    endpoint = _endpoint(client, workspace, settings, folder, say)
    before = {name: int(share) for name, share in (endpoint.traffic or {}).items()}
    created = settings.deployment not in before
    if before.get(settings.deployment):
        say(
            f"warning: deployment {settings.deployment} gets {before[settings.deployment]} % of the traffic while it "
            "is replaced; another --deployment name would leave that undisturbed"
        )
    say(f"{'creating' if created else 'updating'} deployment {settings.deployment}; this takes some minutes")
    _deployment(client, workspace, settings, folder)
    say("asking it a question")
    answer, seconds = _ask(client, workspace, endpoint.scoring_uri, plan)
    traffic = shifted(before, settings.deployment, settings.traffic)
    if traffic != {name: share for name, share in before.items() if share}:
        say("moving the traffic: " + ", ".join(f"{name} {share} %" for name, share in traffic.items()))
        with explained("moving the traffic", str(workspace)), _quiet():
            changed = client.online_endpoints.get(settings.endpoint)
            changed.traffic = traffic
            client.online_endpoints.begin_create_or_update(changed).result()
    return Deployed(settings.endpoint, settings.deployment, endpoint.scoring_uri, answer, seconds, traffic, created)


def shifted(before: dict[str, int], deployment: str, share: int) -> dict[str, int]:
    """The traffic after one deployment gets a share and the others keep their proportions.

    Args:
        before: per cent by deployment.
        deployment: the one that gets `share`.
        share: per cent, 0 to 100; 0 leaves everything as it was.

    Returns:
        Shares above zero that add up to 100. Where no other deployment has traffic, all of it goes to this one:
        Azure takes a sum of 0 or 100 only.
    """
    others = {name: part for name, part in before.items() if part and name != deployment}
    if share == 0:
        return {name: part for name, part in before.items() if part}
    if share == 100 or not others:
        return {deployment: 100}
    rest, total = 100 - share, sum(others.values())
    exact = {name: part * rest / total for name, part in others.items()}
    result = {name: int(part) for name, part in exact.items()}
    for name in sorted(exact, key=lambda name: result[name] - exact[name])[: rest - sum(result.values())]:
        result[name] += 1
    return {deployment: share} | {name: part for name, part in result.items() if part}


def _endpoint(client: "MLClient", workspace: Workspace, settings: Settings, folder: Path, say: Say) -> Any:
    from azure.ai.ml import load_online_endpoint
    from azure.core.exceptions import ResourceNotFoundError

    with explained(f"opening endpoint {settings.endpoint}", str(workspace)), _quiet():
        try:
            found = client.online_endpoints.get(settings.endpoint)
        except ResourceNotFoundError:
            say(f"creating endpoint {settings.endpoint}")
            client.online_endpoints.begin_create_or_update(load_online_endpoint(folder / "endpoint.yml")).result()
            found = client.online_endpoints.get(settings.endpoint)
    state = str(getattr(found.provisioning_state, "value", found.provisioning_state))
    if state.lower() != "succeeded":
        raise AzureError(
            f"endpoint {settings.endpoint} is in state {state}: wait until it is done, or delete it with `az ml "
            f"online-endpoint delete --name {settings.endpoint} {workspace.az_flags}`; {workspace}"
        )
    return found


def _deployment(client: "MLClient", workspace: Workspace, settings: Settings, folder: Path) -> None:
    from azure.ai.ml import load_online_deployment

    try:
        with explained(f"deploying {settings.model} as {settings.deployment}", str(workspace)), _quiet():
            document = load_online_deployment(folder / "deployment.yml")
            client.online_deployments.begin_create_or_update(document).result()
    except AzureError as error:
        raise AzureError(f"{error}; the traffic is as it was{_last_log(client, settings)}") from None


def _last_log(client: "MLClient", settings: Settings) -> str:
    """The last line of the deployment's own log that says something, as the end of an error line."""
    from azure.core.exceptions import AzureError as ServiceError

    try:
        text = client.online_deployments.get_logs(settings.deployment, settings.endpoint, _LOG_LINES)
    except ServiceError as error:
        return f"; its log cannot be read ({type(error).__name__})"
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    last = (errors or lines)[-1:]
    command = f"az ml online-deployment get-logs --name {settings.deployment} --endpoint-name {settings.endpoint}"
    return redact(f"; its log ends: {last[0][:300]}" if last else "; its log is empty") + f" (all of it: `{command}`)"


def _ask(client: "MLClient", workspace: Workspace, uri: str, plan: plans.Plan) -> tuple[str, float]:
    import requests

    settings = plan.settings
    with explained(f"reading the key of endpoint {settings.endpoint}", str(workspace)):
        keys = client.online_endpoints.get_keys(settings.endpoint)
    key = getattr(keys, "primary_key", None) or getattr(keys, "access_token", None)
    headers = {"Authorization": f"Bearer {key}", "azureml-model-deployment": settings.deployment}
    problem = ""
    for turn in range(TRIES):
        if turn:
            time.sleep(WAIT_SECONDS)
        start = time.monotonic()
        try:
            response = requests.post(uri, json=plan.request, headers=headers, timeout=(20, settings.timeout + 20))
        except requests.RequestException as error:
            problem = f"{type(error).__name__}"
            continue
        if response.ok:
            return _answer(response.text, settings), time.monotonic() - start
        problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"
        if response.status_code not in _RETRIED:
            break
    raise AzureError(
        redact(
            f"deployment {settings.deployment} did not answer the test request ({problem}); the traffic is as it was"
        )
        + _last_log(client, settings)
    )


def _answer(text: str, settings: Settings) -> str:
    try:
        found = answer_text(json.loads(text))
    except ValueError:
        found = ""
    if not found.strip():
        raise AzureError(
            f"deployment {settings.deployment} answered the test request without a text ({text[:200]!r}); the traffic "
            "is as it was"
        )
    return found


class _Dots(io.TextIOBase):
    def __init__(self) -> None:
        self.used = False

    def write(self, text: str) -> int:
        self.used = True
        sys.stderr.write(text)
        sys.stderr.flush()
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polling in azure-ai-ml prints dots on stdout, where only results belong: they go to stderr, in a line."""
    dots = _Dots()
    try:
        with contextlib.redirect_stdout(dots):
            yield
    finally:
        if dots.used:
            print(file=sys.stderr)  # noqa: T201
