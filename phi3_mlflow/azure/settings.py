"""The values of a deployment, and which of them Azure would refuse.

It makes no call; limits come with their source.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from phi3_mlflow.azure import instances
from phi3_mlflow.azure.check import MODE_NAMES, MODES, Mode
from phi3_mlflow.azure.errors import SettingError
from phi3_mlflow.azure.register import check_names
from phi3_mlflow.runtime.errors import shorten

# https://learn.microsoft.com/azure/machine-learning/how-to-manage-quotas, limits of managed online endpoints.
MOST_SECONDS = 180
MOST_INSTANCES = 50
# https://learn.microsoft.com/azure/azure-resource-manager/management/tag-resources
_MOST_TAGS, _LONGEST_TAG = 50, 256
# azure.ai.ml.constants._endpoint.EndpointConfigurations; deployments follow the same rule.
_NAME = re.compile(r"[A-Za-z]([-A-Za-z0-9]*[A-Za-z0-9])?")
_SHORTEST, _LONGEST = 3, 32
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/-]*(:[0-9]+)?[a-z0-9._/-]*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?")
_RESERVED = frozenset({"AZUREML_MODEL_DIR", "AZUREML_ENTRY_SCRIPT", "AZUREML_APP_ROOT", "PORT"})
BASE_IMAGE = "python:{python}-slim"
TASKS = ("flat", "llm/v1/chat", "llm/v1/completions")


@dataclass(frozen=True)
class Settings:
    """How a registered model is to be deployed.

    Args:
        model: the registered model as NAME:VERSION.
        mode: "ncd" for the no-code image, "container" for MLflow's own server in a container.
        endpoint: the endpoint's name, 3 to 32 characters.
        deployment: the deployment's name, 3 to 32 characters.
        task: what a request looks like: "flat", "llm/v1/chat" or "llm/v1/completions".
        instance_type: the machine's type.
        instance_count: how many machines, 1 to 50.
        timeout: seconds until Azure gives up on a request, 1 to 180.
        concurrency: requests that one machine gets at once, at least 1.
        traffic: per cent of the endpoint's traffic after the test request answered, 0 to 100.
        memory: bytes that one copy of the model takes, or None where it is not known.
        image: a container image that serves the model on port 8080; with None one is built.
        base_image: what a built image starts from; with None a Python image of the model's Python version.
        variables: further environment variables of the deployment.
    """

    model: str
    mode: Mode
    endpoint: str
    deployment: str
    task: str = "flat"
    instance_type: str = instances.DEFAULT
    instance_count: int = 1
    timeout: int = MOST_SECONDS
    concurrency: int = 1
    traffic: int = 100
    memory: int | None = None
    image: str | None = None
    base_image: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return self.model.rpartition(":")[0]

    @property
    def model_version(self) -> str:
        """The registered model's version."""
        return self.model.rpartition(":")[2]


def default_deployment(model: str, mode: Mode) -> str:
    """A deployment name made from the mode and the model's version, so that a new version never replaces a live one."""
    version = re.sub(r"[^A-Za-z0-9]+", "-", model.rpartition(":")[2]).strip("-")
    return f"{mode}-{version}"[:_LONGEST].strip("-")


def validate(settings: Settings) -> list[str]:
    """Refuses what Azure would refuse; returns notes about what could not be checked.

    Raises:
        SettingError: every value at fault, with what is allowed, in one line.
    """
    problems = [
        *_names(settings),
        *_numbers(settings),
        *_machine(settings),
        *_image(settings),
        *_variables(settings.variables),
    ]
    if problems:
        raise SettingError("; ".join(problems))
    if instances.memory(settings.instance_type) is None:
        return [f"{settings.instance_type} is not in the table of instance types: its memory was not checked"]
    if settings.memory is None:
        return ["the model's memory is not known: the instance type was not checked against it"]
    return []


def _names(settings: Settings) -> list[str]:
    problems = []
    name, colon, version = settings.model.rpartition(":")
    if not colon or not name or not version:
        problems.append(f"the model {shorten(settings.model)} is not of the form NAME:VERSION")
    else:
        try:
            check_names(name, version)
        except SettingError as error:
            problems.append(str(error))
    for what, value in (("endpoint", settings.endpoint), ("deployment", settings.deployment)):
        if not _SHORTEST <= len(value) <= _LONGEST or not _NAME.fullmatch(value):
            problems.append(
                f"the {what} name {shorten(value)} has to have {_SHORTEST} to {_LONGEST} letters, digits and dashes, "
                "beginning with a letter and not ending with a dash"
            )
    if settings.mode not in MODES:
        problems.append(f"the mode {shorten(settings.mode)} is neither of {', '.join(MODES)}")
    if settings.task not in TASKS:
        problems.append(f"the task {shorten(settings.task)} is none of {', '.join(TASKS)}")
    elif settings.mode == "ncd" and settings.task != "flat":
        problems.append(
            f"a model of task {settings.task} crashes the {MODE_NAMES['ncd']}: deploy it with --mode container, or log "
            "it with `phi3-mlflow log ... --target azure`"
        )
    return problems


def _numbers(settings: Settings) -> list[str]:
    limits = (
        ("instance count", settings.instance_count, 1, MOST_INSTANCES),
        ("timeout", settings.timeout, 1, MOST_SECONDS),
        ("concurrency", settings.concurrency, 1, 1000),
        ("traffic", settings.traffic, 0, 100),
    )
    return [
        f"the {what} {value} is not between {low} and {high}"
        for what, value, low, high in limits
        if not low <= value <= high
    ]


def _machine(settings: Settings) -> list[str]:
    if not re.fullmatch(r"Standard_[A-Za-z0-9_]+", settings.instance_type, re.IGNORECASE):
        return [f"the instance type {shorten(settings.instance_type)} is none: they look like {instances.DEFAULT}"]
    gib = instances.memory(settings.instance_type)
    if gib is None or settings.memory is None or settings.memory <= gib * (1 << 30):
        return []
    needed = settings.memory / (1 << 30)
    better = instances.smallest(needed)
    advice = f"take {better}" if better else "take a larger one"
    return [f"{settings.instance_type} has {gib:g} GiB, the model takes {needed:.1f} GiB: {advice}"]


def _image(settings: Settings) -> list[str]:
    problems = []
    for what, value in (("image", settings.image), ("base image", settings.base_image)):
        if value is not None and settings.mode == "ncd":
            problems.append(f"the {what} {shorten(value)} cannot be given to the no-code image: use --mode container")
        elif value is not None and not _IMAGE.fullmatch(value):
            problems.append(
                f"the {what} {shorten(value)} is no image reference, for example registry.azurecr.io/phi3:1"
            )
    return problems


def _variables(variables: Mapping[str, str]) -> list[str]:
    problems = [f"the variable name {shorten(name)} is none" for name in variables if not _VARIABLE.fullmatch(name)]
    problems += [f"the variable {name} belongs to Azure" for name in variables if name in _RESERVED]
    return problems
