"""A model from what was asked for to what is written or logged: all that can be refused comes before the first byte.

Knows the order of the steps; what a builder writes is in its own module, where it goes in `destination`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.entities.model_registry import PromptVersion
from mlflow.models import Model
from mlflow.models.model import ModelInfo

from phi3_mlflow import cards
from phi3_mlflow.quantize import evidence
from phi3_mlflow.runtime.errors import shorten
from phi3_mlflow.weights import Source, Weights

from . import destination, uploads
from .common import BuildError, Room, hand_over, quiet_mlflow

# Writes a model: where to, and the description to fill in. Returns which of the room's folders has the weights.
Write = Callable[[Room, Model], Path]


@dataclass(frozen=True)
class Plan:
    """A model whose arguments were checked and whose weights were found. Nothing is downloaded or written yet.

    Attributes:
        source: the weights.
        prepare: checks the downloaded weights and returns what writes the model. May raise what it likes.
        links: whether weight files are taken as they are, and so can be hard links in a temporary folder.
        reference: whether the model holds none of them.
        model_config: the user's own, which MLflow notes as params of the run.
    """

    source: Source
    prepare: Callable[[Weights], Write]
    links: bool
    reference: bool = False
    model_config: Mapping[str, Any] | None = None

    @property
    def held(self) -> Source:
        """The weights with the size that they have in the model."""
        return replace(self.source, size=0) if self.reference else self.source


@dataclass(frozen=True)
class Entry:
    """How a model is logged: names, and what MLflow keeps beside it. The builders' log_model describes the fields."""

    name: str
    registered_model_name: str | None = None
    alias: str | None = None
    params: Mapping[str, Any] | None = None
    tags: Mapping[str, Any] | None = None
    model_type: str | None = None
    step: int = 0
    run_id: str | None = None
    prompts: Sequence[str | PromptVersion] | None = None
    await_registration_for: int | None = 300


def save(plan: Plan, path: str | Path) -> None:
    """Writes a model into a folder. When that fails the folder is removed again.

    Raises:
        BuildError: the folder is not empty, or the disk is full or cannot be written.
        Exception: what the builder refuses.
    """
    path = Path(path)
    destination.check_folder(path)
    destination.check_space([plan.held], [path], temporary=0)
    write = plan.prepare(plan.source.fetch())
    with destination.removed_on_failure(lambda: path):
        write(Room(path, path), Model())


def check(*models: tuple[Plan, Entry]) -> None:
    """Checks where models are to be logged: names, stores, the run, prompts, space. Nothing of them is written.

    Raises:
        BuildError: something is not allowed or not there; the message names it.
    """
    for _, entry in models:
        _check_types(entry)
        destination.check_names(entry.name, entry.registered_model_name, entry.alias)
        if taken := [name for name in entry.params or () if name in cards.NAMES]:
            raise BuildError(f"params has {taken[0]!r}, which the builders write themselves; choose another name")
    destination.check_stores(registry=any(entry.registered_model_name for _, entry in models))
    folders = []
    for _, entry in models:
        destination.check_prompts(entry.prompts or ())
        folders.append(destination.artifact_folder(destination.find_run(entry.run_id)))
    temporary = max(
        0 if plan.links and folder else destination.temporary_size(plan.held, links=plan.links)
        for (plan, _), folder in zip(models, folders, strict=True)
    )
    destination.check_space([plan.held for plan, _ in models], folders, temporary=temporary)


# Arguments of log_model with their types; each but the name and the step may be None.
_TYPES: Mapping[str, tuple[Any, str]] = {
    "name": (str, "text"),
    "registered_model_name": (str, "text"),
    "alias": (str, "text"),
    "params": (Mapping, "a dict"),
    "tags": (Mapping, "a dict"),
    "model_type": (str, "text"),
    "step": (int, "a whole number"),
    "run_id": (str, "text"),
    "prompts": (list | tuple, "a list"),
    "await_registration_for": (int, "a whole number of seconds"),
}


def _check_types(entry: Entry) -> None:
    for name, (kind, words) in _TYPES.items():
        value = getattr(entry, name)
        missing = value is None and name not in ("name", "step")
        if not missing and (not isinstance(value, kind) or (isinstance(value, bool) and kind is int)):
            raise BuildError(f"the argument {name} is {shorten(value)}; it must be {words}")
    for prompt in entry.prompts or ():
        if not isinstance(prompt, str | PromptVersion):
            raise BuildError(f"the argument prompts has {shorten(prompt)}; each must be an MLflow prompt or its URI")


@dataclass(frozen=True)
class Logged:
    """A model that is whole in the tracking store, and not registered yet.

    Attributes:
        info: MLflow's description.
        facts: those of its page, see `cards.facts`.
        size: bytes.
    """

    info: ModelInfo
    facts: Mapping[str, str]
    size: int


def log(plan: Plan, entry: Entry) -> ModelInfo:
    """Logs a model, and registers it where the entry has a name for that.

    Returns:
        MLflow's description.

    Raises:
        BuildError: as for `check`, or the disk is full. No model is left that counts as whole.
        Exception: what the builder refuses.
    """
    check((plan, entry))
    return register(store(plan, entry), entry)


def store(plan: Plan, entry: Entry) -> Logged:
    """Logs a model that was checked, and does not register it. Its page gets its facts as params and tags.

    Raises:
        BuildError: the disk is full. No model is left that counts as whole, and none that is pending.
        Exception: what the builder refuses.
    """
    write = plan.prepare(plan.source.fetch())
    made: list[Model] = []
    facts: dict[str, str] = {}
    numbers: dict[str, float] = {}
    client = mlflow.MlflowClient()

    def save_model(path: str, mlflow_model: Model, **_: Any) -> None:
        made.append(mlflow_model)
        model_id = str(mlflow_model.model_id)
        logged = client.get_logged_model(model_id)
        store = destination.local_folder(logged.artifact_location)
        room = Room(Path(path), store or Path(path), links=store is None)
        held = write(room, mlflow_model)
        facts.update(cards.facts(Path(path), held))
        if found := cards.measured(Path(path), held):
            numbers.update(evidence.metrics(found))
        hand_over(room)
        if store is None:
            upload.enter_context(uploads.shown(logged.artifact_location, room.folder))
        # MLflow has copied the params of the run there already.
        new = {name: text for name, text in facts.items() if name not in logged.params}
        client.log_model_params(model_id, new)
        client.set_logged_model_tags(model_id, cards.tags(facts))

    removed = destination.removed_on_failure(partial(destination.given_up, destination.last_begun()))
    with quiet_mlflow(), removed, ExitStack() as upload:
        info = Model.log(
            artifact_path=None,
            name=entry.name,
            flavor=SimpleNamespace(save_model=save_model),
            run_id=destination.find_run(entry.run_id),
            prompts=list(entry.prompts) if entry.prompts else None,
            model_type=entry.model_type,
            params=dict(entry.params or {}),
            tags=dict(entry.tags) if entry.tags else None,
            step=entry.step,
            # These two MLflow reads itself, and hands them on.
            model_config=dict(plan.model_config or {}),
            validate_serving_input=False,
        )
    if numbers:
        _log_metrics(client, str(info.model_id), destination.find_run(entry.run_id), numbers)
    return Logged(info, facts, int(made[0].model_size_bytes or 0))


def register(logged: Logged, entry: Entry) -> ModelInfo:
    """Registers a logged model where the entry has a name for that: a version with a card as its description.

    The alias is set last. When something fails, or Ctrl-C is pressed, the version is deleted again.

    Returns:
        MLflow's description, with the version in it.
    """
    info, name = logged.info, entry.registered_model_name
    if name is None:
        return info
    client = mlflow.MlflowClient()
    try:
        tags = {**(entry.tags or {}), **cards.tags(logged.facts)}
        wait = entry.await_registration_for
        made = mlflow.register_model(info.model_uri, name, await_registration_for=wait, tags=tags)
        version = str(made.version)
        client.update_model_version(name, version, cards.card(logged.facts, logged.size))
        if entry.alias is not None:
            client.set_registered_model_alias(name, entry.alias, version)
    except BaseException:
        with suppress(Exception):  # a registry that is gone keeps what it has
            for found in client.search_model_versions(f"name = '{name}'"):
                if found.source == info.model_uri:
                    client.delete_model_version(name, str(found.version))
        raise
    info.registered_model_version = made.version
    return info


def _log_metrics(client: mlflow.MlflowClient, model_id: str, run_id: str | None, numbers: Mapping[str, float]) -> None:
    """Links numbers with a logged model; MLflow keeps them in a run, which is made where there is none."""
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0, model_id=model_id) for name, value in numbers.items()]
    if run_id is not None:
        client.log_batch(run_id, metrics)
        return
    run = client.create_run(client.get_logged_model(model_id).experiment_id, run_name="quantization check")
    status = "FAILED"
    try:
        client.log_batch(run.info.run_id, metrics)
        status = "FINISHED"
    finally:
        client.set_terminated(run.info.run_id, status)


# Arguments of MLflow's own log_model functions that mean nothing here, and what to use in their place.
_OTHERS = {
    "artifact_path": "use `name`",
    "artifacts": "the weights are the only ones",
    "auth_policy": "the model calls no service",
    "code_path": "the runtime's code is added by itself",
    "code_paths": "the runtime's code is added by itself",
    "conda_env": "the builder writes the environment; use `extra_pip_requirements` to add to it",
    "input_example": "it follows from the task",
    "loader_module": "the builder sets it",
    "model_card": "the weights bring their own",
    "model_id": "every call makes a model of its own",
    "onnx_model": "use `weights`, with a folder",
    "pip_requirements": "the builder pins them; use `extra_pip_requirements` to add to them",
    "prompt_template": "use `chat_template`",
    "python_model": "use `weights`",
    "resources": "the model calls no service",
    "signature": "it follows from the task",
    "streamable": "every model is",
    "torch_dtype": "the weights say it",
    "transformers_model": "use `weights`, which takes a pipeline too",
}


def refuse(others: Mapping[str, Any]) -> None:
    """Refuses arguments that the builders do not have.

    Raises:
        BuildError: for one of MLflow's own, with what to use in its place.
        TypeError: for any other name, as Python does.
    """
    for name in others:
        if name in _OTHERS:
            raise BuildError(f"the argument {name} of MLflow's log_model is not taken: {_OTHERS[name]}")
        raise TypeError(f"unexpected argument {name!r}; help() of the function lists what it takes")
