"""The models that are compared: found, loaded together, and how much memory and disk they take."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from phi3_mlflow import cards, tracking
from phi3_mlflow.azure.model import opened
from phi3_mlflow.machine import resident
from phi3_mlflow.runtime import model as runtime_model
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.service import Service

# A model that works while another one is measured would slow it down, and one whose answers depend on what was asked
# before could not be compared.
_OVERRIDES = {"idle_prefill": False, "prefix_reuse": "exact", "queue_timeout": None}


@dataclass(frozen=True)
class Name:
    """A model URI, with its alias followed.

    Attributes:
        given: as the user wrote it.
        uri: what is loaded; a version's number in place of an alias.
        registered: name and version in the registry; None for other URIs.
    """

    given: str
    uri: str
    registered: tuple[str, str] | None


@dataclass(frozen=True)
class Subject:
    """A loaded model.

    Attributes:
        name: where it comes from.
        label: what tables and plots call it.
        service: what answers.
        model_id: of its page in the tracking store; None where that has none.
        facts: see `cards.facts`.
        size: bytes of its files.
        memory: bytes that the process holds more since it was loaded; None where the system does not tell.
    """

    name: Name
    label: str
    service: Service
    model_id: str | None
    facts: dict[str, str]
    size: int
    memory: int | None


def resolve(uri: str) -> Name:
    """Follows an alias, so that all that comes speaks of one version.

    Raises:
        MlflowException: there is no such alias.
    """
    path = uri.removeprefix("models:/")
    if path == uri:
        return Name(uri, uri, None)
    name, at, alias = path.partition("@")
    if at:
        version = str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
        return Name(uri, f"models:/{name}/{version}", (name, version))
    name, slash, version = path.partition("/")
    return Name(uri, uri, (name, version) if slash and version.isdigit() else None)


@contextmanager
def loaded(names: Sequence[Name], say: Callable[[str], Any] = lambda _: None) -> Iterator[list[Subject]]:
    """All models at once, for as long as the block lasts.

    Args:
        names: of the models.
        say: is told of each before it is loaded.

    Raises:
        Phi3Error: one of them cannot be loaded; names it.
    """
    labels = _labels(names)
    with ExitStack() as stack:
        subjects = []
        for name, label in zip(names, labels, strict=True):
            say(f"loading {label}")
            try:
                subjects.append(_load(name, label, stack))
            except (Phi3Error, MlflowException, OSError) as error:
                raise Phi3Error(f"{name.given} cannot be loaded: {str(error).splitlines()[0]}") from error
        yield subjects


def _load(name: Name, label: str, stack: ExitStack) -> Subject:
    found = stack.enter_context(opened(name.uri))
    if "format" not in found.metadata:
        raise Phi3Error("it was not logged by phi3_mlflow")
    model_id = found.data.get("model_id")
    config: dict[str, Any] = found.flavors["python_function"].get("config") or {}
    gc.collect()
    before = resident()
    predictor = runtime_model.load(found.folder, {**config, **_OVERRIDES})
    stack.callback(predictor.close)
    service = predictor.service
    # Memory that is only touched by work.
    service.start({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}, task="llm/v1/chat").wait()
    after = resident()
    return Subject(
        name=name,
        label=label,
        service=service,
        model_id=model_id if tracking.known(model_id) else None,
        facts=cards.facts(found.folder),
        size=found.size,
        memory=None if before is None or after is None else max(0, after - before),
    )


def _labels(names: Sequence[Name]) -> list[str]:
    labels: list[str] = []
    for name in names:
        path = name.given.removeprefix("models:/")
        label = path if path != name.given else Path(name.given).name or name.given
        taken = sum(other == label or other.startswith(f"{label} (") for other in labels)
        labels.append(f"{label} ({taken + 1})" if taken else label)
    return labels
