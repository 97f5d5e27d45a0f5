"""What both builders write alike: requirements, the runtime's code, settings and metadata.

Knows nothing of where a model goes.
"""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from mlflow.models import Model

import phi3_mlflow
from phi3_mlflow import runtime
from phi3_mlflow.bars import bar
from phi3_mlflow.copying import linked, move, put
from phi3_mlflow.runtime import settings, trust
from phi3_mlflow.runtime.chat import TASKS, Task
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error, WeightsError, shorten
from phi3_mlflow.runtime.options import NAMES
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.targets import AZURE_TASK, adapted, parse, same
from phi3_mlflow.weights import Source, Weights

# What the runtime imports, whichever decoder it drives.
_BASE_REQUIREMENTS = ("mlflow", "jinja2", "llguidance", "numpy", "pandas", "tokenizers", "tqdm")


# What the builders write into the metadata.
_METADATA = ("task", "format", "toolkit", "weights")
# Keys of the logged model_config that are no settings, and what they come from.
_ARGUMENTS = {
    "task": "choose it with the argument `task`",
    "template": "choose it with the argument `template`",
    "name": "it follows from the weights",
    "format": "it is the runtime's own",
}

# Bytes of a file from which it is worth a step of its own.
_LARGE = 2**20

Target = Literal["mlflow", "azure"]


class BuildError(Phi3Error):
    """A model that cannot be built as asked."""


def requirements(*packages: str) -> list[str]:
    """`name==version` for the base and the given packages, as they are installed here.

    Raises:
        BuildError: one of them is not installed.
    """
    try:
        # A local version such as 2.13.0+cpu names a build that no index may offer.
        return [f"{name}=={version(name).partition('+')[0]}" for name in (*_BASE_REQUIREMENTS, *packages)]
    except PackageNotFoundError as error:
        raise BuildError(f"the package {error.name} is needed for this model and is not installed") from error


def for_target(
    target: Target, task: Task | None, needed: list[str], extra: Sequence[str] | None
) -> tuple[Task, list[str]]:
    """The task and the requirements of a model that is meant for a certain place.

    Args:
        target: the place.
        task: what the user chose, or None.
        needed: the builder's requirements.
        extra: the user's further ones.

    Raises:
        BuildError: an unknown target, a task that cannot be loaded there, or a further requirement that is none or
            names a package of the builder's.
    """
    needed = [*needed, *_checked(extra, needed)]
    if target == "mlflow":
        return task or "llm/v1/chat", needed
    if target != "azure":
        raise BuildError(f"the target is {target!r}; it must be mlflow or azure")
    if task not in (None, AZURE_TASK):
        raise BuildError(f"Azure ML's no-code image cannot load the task {task}; leave the task out, or take `flat`")
    return "flat", adapted(needed)


def _checked(extra: Sequence[str] | None, needed: list[str]) -> list[str]:
    if isinstance(extra, str):
        raise BuildError(
            f"extra_pip_requirements is {shorten(extra)}; it must be a list of lines such as ['six==1.17']"
        )
    pinned = {parse(line).name for line in needed}  # type: ignore[union-attr]
    for line in extra or ():
        found = parse(line) if isinstance(line, str) else None
        if found is None:
            raise BuildError(f"extra_pip_requirements has {shorten(line)}; it must be a line such as 'six==1.17'")
        if taken := [name for name in pinned if same(name, found.name)]:
            raise BuildError(
                f"extra_pip_requirements has {line!r}, and the builder pins {taken[0]} itself; leave it out"
            )
    return list(extra or ())


def check_config(task: Task, template: bool, chat_template: str | None, model_config: Mapping[str, Any] | None) -> None:
    """Checks the task, what goes with it, and what a user wrote into model_config.

    Raises:
        InvalidRequest: an unknown setting, or a value that is not allowed.
        BuildError: an unknown task, a chat without its template, or no dict.
    """
    if task not in TASKS:
        raise BuildError(f"the task is {task!r}; it must be one of {', '.join(TASKS)}")
    if not isinstance(template, bool):
        raise BuildError(f"template is {shorten(template)}; it must be True or False")
    if not template and task == "llm/v1/chat":
        raise BuildError("template is False, and a chat has its template; choose another task, or leave it out")
    if chat_template is not None and not (isinstance(chat_template, str) and chat_template and template):
        problem = "it must be a Jinja template's text" if template else "leave it out where `template` is False"
        raise BuildError(f"chat_template is {shorten(chat_template)}; {problem}")
    config = {} if model_config is None else model_config
    if not isinstance(config, Mapping):
        raise BuildError(f"model_config is {shorten(config)}; it must be a dict of settings and options")
    for name in config:
        if not isinstance(name, str):
            raise InvalidRequest(shorten(name), "is a key of model_config; keys must be text")
        if name in _ARGUMENTS:
            raise InvalidRequest(name, f"has no place in model_config; {_ARGUMENTS[name]}")
    settings.check_config(task, config)


def check_tokenizer(folder: Path, template: bool, chat_template: str | None) -> None:
    """Looks whether a tokenizer is one that is known here, and whether its chat template can be used.

    Args:
        folder: the tokenizer's.
        template: whether prompts are to be put into the chat template.
        chat_template: the user's own, or None for that of the weights.

    Raises:
        WeightsError: it is not, or cannot; it says why and what to do.
    """
    trust.check_tokenizer(folder)
    tokens = Tokens.from_folder(folder, template=False, chat_template=chat_template)
    remedy = "or take prompts as they are: the task llm/v1/completions or flat with `template=False` (--raw)"
    if template and tokens.problem:
        raise WeightsError(f"{tokens.problem}; give another one as `chat_template` (--chat-template), {remedy}")
    if template and chat_template is None and not tokens.marked:
        raise WeightsError(
            "the tokenizer's chat template marks who speaks with text alone, which a user's text can imitate; give "
            f"that template as `chat_template` (--chat-template) if that may be, {remedy}"
        )


def full_config(task: Task, source: str, model_config: Mapping[str, Any] | None, template: bool) -> dict[str, Any]:
    """The model_config that is logged: what the user wrote, and all else."""
    # MLflow lets only settings that are logged be changed when the model is loaded or served: all are, as not set.
    every: dict[str, Any] = dict.fromkeys((*settings.SETTINGS, *NAMES))
    own = {"task": task, "name": identifier(source), "template": template, "format": runtime.FORMAT}
    return {**every, **(model_config or {}), **own}


def identifier(source: str) -> str:
    """What responses name as the model: the weights' source in characters that clients expect in an identifier."""
    return re.sub(r"[^\w./-]+", "-", source)


def own_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A user's part of the model's metadata, checked.

    Raises:
        BuildError: it cannot be written down, or has a key that the builders write.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        raise BuildError(f"metadata is {shorten(metadata)}; it must be a dict")
    given = dict(metadata or {})
    if taken := [key for key in given if key in _METADATA]:
        raise BuildError(f"metadata has the key {taken[0]!r}, which the builders write themselves; choose another one")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BuildError(f"metadata cannot be written as JSON: {error}") from error
    if odd := [key for key in given if not isinstance(key, str)]:
        raise BuildError(f"metadata has the key {shorten(odd[0])}; keys must be text")
    return given


def check_reference(reference: bool, source: Source, chat_template: str | None) -> None:
    """Looks whether a model can refer to its weights in place of holding them.

    Raises:
        BuildError: they are not on the hub, or the template would have to stand in their place.
    """
    if not isinstance(reference, bool):
        raise BuildError(f"reference is {shorten(reference)}; it must be True or False")
    if reference and not source.on_hub:
        raise BuildError(
            f"no other machine finds {source.name}, so that no model can refer to it: give a Hugging Face id, or leave "
            "the reference out"
        )
    if reference and chat_template is not None:
        raise BuildError("reference is True, and a chat_template of your own is a part of the weights: leave one out")


def metadata(
    task: Task, weights: Weights, digest: str, own: Mapping[str, Any], *, reference: bool = False
) -> dict[str, Any]:
    """What the MLmodel file says about the model: the task, the format, where the weights come from, and the user's."""
    return {
        "task": task,
        "format": runtime.FORMAT,
        "toolkit": f"phi3_mlflow {phi3_mlflow.__version__}",
        "weights": {
            "source": weights.source,
            "revision": weights.revision,
            "license": weights.license,
            "sha256": digest,
            **({"reference": True} if reference else {}),
        },
        **own,
    }


@contextmanager
def staged_code() -> Iterator[str]:
    """A folder `phi3_mlflow` that holds the runtime floor alone, to be logged as the model's code."""
    source = Path(phi3_mlflow.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "phi3_mlflow"
        package.mkdir()
        shutil.copy(source / "__init__.py", package)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(runtime.__file__).parent, package / "runtime", ignore=ignore)
        yield str(package)


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Hides MLflow's advice about things that the builders settle themselves."""
    loggers = [logging.getLogger(name) for name in ("mlflow.transformers", "mlflow.pyfunc", "mlflow.models.model")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Room:
    """Where a model is written.

    Attributes:
        folder: for everything; MLflow copies it into the store, or uploads it.
        weights: the folder that files of weights are put in: the same, or the store's own for this model.
        links: whether they can be hard links, because MLflow uploads the folder and deletes it.
    """

    folder: Path
    weights: Path
    links: bool = False


def copy_weights(files: Sequence[Path], destination: Path, *, link: bool) -> dict[str, str]:
    """Puts weight files into one folder, links followed.

    Args:
        files: what to copy.
        destination: the folder to make.
        link: make hard links where the file system can: for a folder that is uploaded and deleted.

    Returns:
        The sha256 of those that were read, by their names.
    """
    destination.mkdir(parents=True)
    hashes = {}
    size = sum(file.stat().st_size for file in files)
    with bar("Copying weights", size) as progress:
        for file in files:
            target = destination / file.name
            if not (link and linked(file, target)):
                hashes[file.name] = put(file, target, progress)
    return hashes


def hand_over(room: Room) -> None:
    """Moves large files into the store where it is on the disk that they were written on: MLflow would copy them."""
    if room.weights == room.folder:
        return
    for file in sorted(room.folder.rglob("*")):
        if file.is_file() and file.stat().st_size >= _LARGE:
            move(file, room.weights / file.relative_to(room.folder))


def finish(model: Model, room: Room) -> None:
    """Writes the MLmodel file anew, without the path of the store that MLflow notes in it, and with the final size."""
    model.artifact_path = model.model_id
    model.model_size_bytes = sum(
        file.stat().st_size for place in {room.folder, room.weights} for file in place.rglob("*") if file.is_file()
    )
    model.save(str(room.folder / "MLmodel"))
