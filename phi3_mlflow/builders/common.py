"""What both builders do alike: requirements, the runtime's code, metadata, logging and registering."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import mlflow
from mlflow.models import Model
from mlflow.models.model import ModelInfo

import phi3_mlflow
from phi3_mlflow import runtime
from phi3_mlflow.runtime.chat import TASKS, Task
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.options import NAMES
from phi3_mlflow.runtime.settings import SETTINGS, check_config
from phi3_mlflow.targets import AZURE_TASK, adapted
from phi3_mlflow.weights import Weights

# What the runtime imports, whichever decoder it drives.
_BASE_REQUIREMENTS = ("mlflow", "jinja2", "llguidance", "numpy", "pandas", "tokenizers", "tqdm")


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


def for_target(target: Target, task: Task | None, needed: list[str]) -> tuple[Task, list[str]]:
    """The task and the requirements of a model that is meant for a certain place.

    Raises:
        BuildError: an unknown target, or a task that cannot be loaded there.
    """
    if target == "mlflow":
        return task or "llm/v1/chat", needed
    if target != "azure":
        raise BuildError(f"the target is {target!r}; it must be mlflow or azure")
    if task not in (None, AZURE_TASK):
        raise BuildError(f"Azure ML's no-code image cannot load the task {task}; leave the task out, or take `flat`")
    return "flat", adapted(needed)


def full_config(task: Task, source: str, model_config: Mapping[str, Any] | None, template: bool) -> dict[str, Any]:
    """The model_config that is logged.

    Raises:
        InvalidRequest: an unknown setting, or a value that is not allowed.
        BuildError: an unknown task.
    """
    if task not in TASKS:
        raise BuildError(f"the task is {task!r}; it must be one of {', '.join(TASKS)}")
    config = dict(model_config or {})
    check_config(task, config)
    # MLflow lets only settings that are logged be changed when the model is loaded or served: all are, as not set.
    every = dict.fromkeys((*SETTINGS, *NAMES))
    return {**every, **config, "task": task, "name": identifier(source), "template": template, "format": runtime.FORMAT}


def identifier(source: str) -> str:
    """What responses name as the model: the weights' source in characters that clients expect in an identifier."""
    return re.sub(r"[^\w./-]+", "-", source)


def metadata(task: Task, weights: Weights, digest: str) -> dict[str, Any]:
    """What the MLmodel file says about the model: the task, the format, and where the weights come from."""
    return {
        "task": task,
        "format": runtime.FORMAT,
        "toolkit": f"phi3_mlflow {phi3_mlflow.__version__}",
        "weights": {
            "source": weights.source,
            "revision": weights.revision,
            "license": weights.license,
            "sha256": digest,
        },
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


def log(
    flavor: ModuleType,
    *,
    name: str,
    registered_model_name: str | None,
    alias: str | None,
    **save_arguments: Any,
) -> ModelInfo:
    """Logs a model with a builder's save_model, and registers it where a name is given.

    Args:
        flavor: the builder's module.
        name: the logged model's name.
        registered_model_name: registers a new version under this name.
        alias: an alias for that version.
        save_arguments: of the builder's save_model.

    Raises:
        BuildError: an alias without a registered name.
    """
    if alias is not None and registered_model_name is None:
        raise BuildError(f"the alias {alias!r} needs a registered model; give its name too")
    with quiet_mlflow():
        info = Model.log(
            artifact_path=None,
            name=name,
            flavor=flavor,
            registered_model_name=registered_model_name,
            validate_serving_input=False,
            **save_arguments,
        )
    if registered_model_name is not None and alias is not None:
        client = mlflow.MlflowClient()
        client.set_registered_model_alias(registered_model_name, alias, info.registered_model_version)
    return info


def copy_weights(files: Sequence[Path], destination: Path, *, link: bool) -> None:
    """Copies weight files into one folder, links followed.

    Args:
        files: what to copy.
        destination: the folder to make.
        link: make hard links where the file system can: for a folder that MLflow copies once more and deletes.
    """
    destination.mkdir(parents=True)
    for file in files:
        try:
            if not link:
                raise OSError
            os.link(file.resolve(), destination / file.name)
        except OSError:
            shutil.copy(file, destination / file.name)


def finish(model: Model, path: Path) -> None:
    """Writes the MLmodel file anew, without the path of the store that MLflow notes in it, and with the final size."""
    model.artifact_path = model.model_id
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))
