"""The verbs `azure check`, `azure register` and `azure deploy`: flags to functions, results to stdout.

It holds no rule of its own; each verb's work is in the module of its name.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from phi3_mlflow.azure import check as checks
from phi3_mlflow.azure import deploy as deploying
from phi3_mlflow.azure import instances, plan, register, staging, workspace
from phi3_mlflow.azure.calls import KEY_VARIABLE, render
from phi3_mlflow.azure.errors import SettingError
from phi3_mlflow.azure.model import opened
from phi3_mlflow.azure.settings import MOST_SECONDS, Settings, default_deployment, validate
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.verbs import Number, emit

F = TypeVar("F", bound=Callable[..., Any])
_MODE = click.Choice(checks.MODES)


class _OneLine(click.Group):
    """A group whose commands end with one line and exit status 1 (2 for a refused value) on an error for people."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingError as error:
            raise click.UsageError(str(error), ctx) from None
        except Phi3Error as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_OneLine)
def azure() -> None:
    """Take a logged model to an Azure ML workspace: check, register, deploy.

    The workspace comes from --subscription, --resource-group and --workspace, else from AZUREML_ARM_SUBSCRIPTION,
    AZUREML_ARM_RESOURCEGROUP and AZUREML_ARM_WORKSPACE_NAME, else from config.json. The credential is whatever
    DefaultAzureCredential finds, for example from `az login`.
    """
    broken = workspace.broken_plugin()
    if broken:
        _say(f"warning: azureml-mlflow {broken} breaks MLflow 3 and is not needed here: pip uninstall azureml-mlflow")


def workspace_flags(command: F) -> F:
    """The three flags that name a workspace."""
    for flag in (
        click.option("--workspace", "workspace_name", metavar="NAME", help="The workspace's name."),
        click.option("--resource-group", metavar="NAME", help="The workspace's resource group."),
        click.option("--subscription", metavar="ID", help="The workspace's subscription id."),
    ):
        command = flag(command)
    return command


@azure.command("check")
@click.argument("model_uri")
@click.option("--mode", type=_MODE, help="Fail unless this way of deployment is open; without it either will do.")
@click.option(
    "--uplink",
    type=Number(min=0, min_open=True),
    default=checks.DEFAULT_UPLINK,
    show_default=True,
    help="Speed of the line, in Mbit/s.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check_command(model_uri: str, mode: checks.Mode | None, uplink: float, as_json: bool) -> None:
    """Say whether MODEL_URI will load in Azure ML, rule by rule, without any call.

    Example: phi3-mlflow azure check models:/phi3/1
    """
    with opened(model_uri) as model:
        findings = checks.check(model, uplink)
    now, staged = checks.passing(findings), checks.passing_staged(findings)
    if as_json:
        data = {"modes": now, "modes_after_register": staged, "findings": [finding.as_dict() for finding in findings]}
        emit(json.dumps(data, indent=2))
    else:
        emit("\n".join(_report(findings, now, staged)))
    if not staged or (mode and mode not in staged):
        raise click.exceptions.Exit(1)


def _report(findings: Sequence[checks.Finding], now: Sequence[str], staged: Sequence[str]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.status:<8} {finding.rule}: {finding.found}"
        if finding.fix:
            yield f"{'':<8} -> {finding.fix}"
    for way in checks.MODES:
        verdict = "will load" if way in now else "will load as `azure register` uploads it" if way in staged else "no"
        yield f"{checks.MODE_NAMES[way]} (--mode {way}): {verdict}"


@azure.command("register")
@click.argument("model_uri", required=False)
@click.option("--name", required=True, help="The model's name in the workspace.")
@click.option("--version", help="Its version there; the next one by default.")
@click.option(
    "--remote-path", metavar="URI", help="Register azureml://datastores/NAME/paths/FOLDER, without an upload."
)
@click.option("--datastore", help="The blob datastore to upload to; the workspace's default one by default.")
@click.option("--mode", type=_MODE, help="Refuse the model unless this way of deployment is open.")
@click.option(
    "--stage-to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Only write what would be uploaded below this folder, for azcopy; no call.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the registration as JSON.")
@workspace_flags
def register_command(
    model_uri: str | None,
    name: str,
    version: str | None,
    remote_path: str | None,
    datastore: str | None,
    mode: checks.Mode | None,
    stage_to: Path | None,
    as_json: bool,
    subscription: str | None,
    resource_group: str | None,
    workspace_name: str | None,
) -> None:
    """Upload MODEL_URI and register it; a model that is registered already is left alone.

    Example: phi3-mlflow azure register models:/phi3@champion --name phi3
    """
    if (model_uri is None) == (remote_path is None):
        raise click.UsageError("give either MODEL_URI or --remote-path")
    if remote_path and (stage_to or datastore):
        raise click.UsageError("--remote-path goes with neither --stage-to nor --datastore")
    register.check_names(name, version)
    flags = (subscription, resource_group, workspace_name)
    with tempfile.TemporaryDirectory(prefix="phi3-azure-") as temporary:
        if remote_path:
            place = workspace.find(flags)
            register.split_remote(remote_path, place)
            done = register.register_remote(
                workspace.connect(place), place, remote_path, name, Path(temporary), version, mode
            )
        else:
            target = None if stage_to else workspace.find(flags)
            with opened(str(model_uri)) as model, _Meters() as meters:
                candidate = register.prepare(model, stage_to or Path(temporary), mode, meters)
                if target is None:
                    emit(str(candidate.model.folder))
                    return
                client = workspace.connect(target)
                done = register.register(client, target, candidate, name, version, datastore, meters)
    if as_json:
        emit(json.dumps(done.as_dict(), indent=2))
        return
    _say("registered" if done.created else "registered already, nothing was done")
    emit(f"azureml:{done.name}:{done.version}\n{done.id}\n{done.url}")


@azure.command("deploy")
@click.argument("model", metavar="NAME:VERSION")
@click.option("--mode", type=_MODE, required=True, help="Azure's no-code image, or MLflow's server in a container.")
@click.option("--endpoint", required=True, help="The endpoint's name; it is created where it does not exist.")
@click.option("--deployment", help="The deployment's name; made from mode and version by default.")
@click.option("--instance-type", default=instances.DEFAULT, show_default=True)
@click.option("--instance-count", type=int, default=1, show_default=True)
@click.option("--timeout", type=int, default=MOST_SECONDS, show_default=True, help="Seconds for one request.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Requests at once on one machine.")
@click.option("--traffic", type=int, default=100, show_default=True, help="Per cent of the traffic after the test.")
@click.option("--image", help="A ready image that serves the model on port 8080 (container only).")
@click.option("--base-image", help="What the built image starts from (container only).")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="An environment variable; repeatable.")
@click.option("--model-uri", help="The logged model, to know its task, memory and requirements without a call.")
@click.option("--dry-run", is_flag=True, help="Write the YAML for the az CLI and print the commands; no call.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the YAML; azure-ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@workspace_flags
def deploy_command(
    model: str,
    mode: checks.Mode,
    endpoint: str,
    deployment: str | None,
    instance_type: str,
    instance_count: int,
    timeout: int,
    concurrency: int,
    traffic: int,
    image: str | None,
    base_image: str | None,
    variables: tuple[str, ...],
    model_uri: str | None,
    dry_run: bool,
    out: Path | None,
    as_json: bool,
    subscription: str | None,
    resource_group: str | None,
    workspace_name: str | None,
) -> None:
    """Deploy the registered model NAME:VERSION; traffic moves once a test request was answered.

    Example: phi3-mlflow azure deploy phi3:1 --mode ncd --endpoint phi3-demo
    """
    settings = Settings(
        model=model,
        mode=mode,
        endpoint=endpoint,
        deployment=deployment or default_deployment(model, mode),
        instance_type=instance_type,
        instance_count=instance_count,
        timeout=timeout,
        concurrency=concurrency,
        traffic=traffic,
        image=image,
        base_image=base_image,
        variables=_variables(variables),
    )
    requirements, python = None, "3.11"
    if model_uri:
        settings, requirements, python = _from_model(settings, model_uri)
    notes = validate(settings)
    flags = (subscription, resource_group, workspace_name)
    folder = out or Path(f"azure-{endpoint}")
    if dry_run:
        made = plan.make(settings, requirements, python)
        place = workspace.find(flags) if any(flags) else None
        _dry(made, folder, place, notes, as_json)
        return
    place = workspace.find(flags)
    client = workspace.connect(place)
    asset = deploying.read_asset(client, place, settings)
    settings = deploying.completed(settings, asset)
    for note in validate(settings):
        _say(f"note: {note}")
    if mode == "container" and image is None and requirements is None:
        requirements, python = deploying.read_requirements(client, place, asset)
    made = plan.make(settings, requirements, python)
    with tempfile.TemporaryDirectory(prefix="phi3-azure-") as temporary:
        written = out or Path(temporary)
        plan.write(made, written)
        done = deploying.deploy(client, place, made, written, _say)
    calls = render(done.uri, made.request, timeout)
    if as_json:
        emit(json.dumps({**done.as_dict(), "calls": calls}, indent=2))
        return
    _say(f"it answered after {done.seconds:.1f} s: {done.answer}")
    key = f"# The key: export {KEY_VARIABLE}=$(az ml online-endpoint get-credentials --name {done.endpoint} \\"
    key += f"\n#   {place.az_flags} --query primaryKey --output tsv)"
    emit("\n\n".join([done.uri, key, *(f"# {language}\n{call}" for language, call in calls.items())]))


def _dry(made: plan.Plan, folder: Path, place: workspace.Workspace | None, notes: list[str], as_json: bool) -> None:
    for note in notes:
        _say(f"note: {note}")
    files, commands = plan.write(made, folder), plan.commands(made, folder, place)
    if as_json:
        emit(json.dumps({"files": [str(path) for path in files], "commands": commands}, indent=2))
    else:
        emit("\n".join([*map(str, files), *commands]))


def _from_model(settings: Settings, model_uri: str) -> tuple[Settings, list[str], str]:
    with opened(model_uri) as model, tempfile.TemporaryDirectory(prefix="phi3-azure-") as temporary:
        staged = staging.stage(model, Path(temporary))
        findings = checks.check(staged)
        if settings.mode not in checks.passing(findings):
            reasons = "; ".join(finding.found for finding in checks.failures(findings, settings.mode))
            raise SettingError(f"{model_uri} will not load in Azure's {checks.MODE_NAMES[settings.mode]}: {reasons}")
        lines = (staged.folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
        python = (staged.folder / "python_env.yaml").read_text(encoding="utf-8")
        settings = replace(settings, task=staged.task, memory=staged.memory)
    return settings, [line for line in lines if line.strip()], plan.python_version(python)


def _variables(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (name, equals, _) in zip(given, pairs, strict=True):
        if not equals or not name:
            raise SettingError(f"--env {text!r} is not of the form NAME=VALUE")
    return {name: value for name, _, value in pairs}


class _Meters:
    """Progress bars in bytes on stderr, closed together."""

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def __enter__(self) -> "_Meters":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()

    def __call__(self, what: str, size: int) -> Callable[[int], None]:
        for bar in self._bars:
            bar.close()
        bar = tqdm(total=size, desc=what, unit="B", unit_scale=True, unit_divisor=1000, delay=0.5)
        self._bars.append(bar)

        def advance(done: int) -> None:
            bar.update(done)

        return advance


def _say(text: str) -> None:
    click.echo(text, err=True)
