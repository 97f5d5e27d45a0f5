"""Where a model goes: names, stores, the run and disk space, checked before anything is written there.

Knows MLflow's rules and the disks of this machine; a store behind a network is left to say for itself what is wrong.
"""

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import PromptVersion
from mlflow.environment_variables import MLFLOW_RUN_ID
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _get_experiment_id, _last_logged_model_id
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from mlflow.utils.validation import (
    _validate_logged_model_name,
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)

from phi3_mlflow.disks import check_writable, existing
from phi3_mlflow.runtime.surrogates import half
from phi3_mlflow.tracking import check, create_database, database_of
from phi3_mlflow.weights import Source

from .common import BuildError

# What a model has beside its weights is far smaller.
_BESIDE = 4 * 2**20
# For another process that writes at the same moment.
_LOCK_SECONDS = 10
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_names(name: str, registered: str | None, alias: str | None) -> None:
    """Asks MLflow's own rules, which it applies when a model is already logged.

    Raises:
        BuildError: a name or alias is not allowed, or there is an alias without a registered model.
    """
    for each in (name, registered or ""):
        if half(each) is not None:
            raise BuildError(f"the name {each!r} is not allowed: it is not valid UTF-8")
        if not each.isprintable():
            raise BuildError(
                f"the name {each!r} is not allowed: it has a line break or another character that does not print"
            )
    with _as_build_error(f"the name {name!r} of the logged model is not allowed"):
        _validate_logged_model_name(name)
    if registered is not None:
        with _as_build_error(f"the name {registered!r} of the registered model is not allowed"):
            _validate_model_name(registered)
    if alias is None:
        return
    if registered is None:
        raise BuildError(f"the alias {alias!r} needs a registered model; give its name too")
    with _as_build_error(f"the alias {alias!r} is not allowed"):
        _validate_model_alias_name(alias)
        _validate_model_alias_name_reserved(alias)


def check_stores(*, registry: bool) -> None:
    """Looks whether the tracking store, and on request the registry, can be written; elsewhere, whether it answers.

    Raises:
        Phi3Error: so it is not; MLflow itself would try for minutes.
    """
    uris = [("tracking", mlflow.get_tracking_uri()), ("registry", mlflow.get_registry_uri())]
    for kind, uri in uris if registry else uris[:1]:
        with _as_build_error(f"the {kind} store {uri} cannot be written"):
            if uri.startswith("sqlite:"):
                if path := database_of(uri):
                    _check_database(path)
            elif is_local_uri(uri):
                check_writable(Path(local_file_uri_to_path(uri)))
            elif kind == "tracking":
                check()


def find_run(run_id: str | None) -> str | None:
    """The run that a model belongs to: the given one, the active one, or the one whose process this is.

    Raises:
        BuildError: there is no such run in the tracking store.
    """
    active = mlflow.active_run()
    # `mlflow run` tells its child so; MLflow itself reads it only where a run is started.
    found = run_id or (active.info.run_id if active else None) or MLFLOW_RUN_ID.get()
    if found is not None and not (active and active.info.run_id == found):
        with _as_build_error(f"the run {found!r} cannot be used"):
            mlflow.MlflowClient().get_run(found)
    return found


def check_prompts(prompts: Sequence[str | PromptVersion]) -> None:
    """Looks whether the prompts that a model is linked with exist.

    Raises:
        BuildError: one does not.
    """
    for prompt in prompts:
        uri = prompt.uri if isinstance(prompt, PromptVersion) else prompt
        with _as_build_error(f"the prompt {uri!r} cannot be used"):
            mlflow.MlflowClient().load_prompt(uri)


def artifact_folder(run_id: str | None) -> Path | None:
    """The folder of this machine below which the files of a new model are put; None where they go elsewhere.

    Raises:
        BuildError: it cannot be written, or the experiment does not exist.
    """
    with _as_build_error("the experiment cannot be used"):
        experiment = _get_experiment_id()
        if experiment is None and run_id is not None:
            experiment = mlflow.MlflowClient().get_run(run_id).info.experiment_id
        location = mlflow.MlflowClient().get_experiment(str(experiment)).artifact_location
    folder = local_folder(location)
    if folder is None:
        return None
    with _as_build_error(f"the artifact store {folder} cannot be written"):
        check_writable(folder)
    return folder


def check_folder(path: Path) -> None:
    """Checks a folder that a model is to be saved in: it is empty, or can be made.

    Raises:
        BuildError: it holds something, or cannot be written.
    """
    with _as_build_error(f"a model cannot be saved in {path}"):
        if path.is_dir() and any(path.iterdir()):
            raise BuildError("it is not empty; give a folder that is new or empty")
        check_writable(path)


def temporary_size(source: Source, *, links: bool) -> int:
    """Bytes that MLflow's temporary copy of a model takes; hard links take none.

    Args:
        source: the weights.
        links: whether their files go into the model as they are.
    """
    linked = links and _device(Path(tempfile.gettempdir())) == _device(source.folder)
    return 0 if linked else source.size


def check_space(sources: Sequence[Source], folders: Sequence[Path | None], *, temporary: int) -> None:
    """Compares free disk space with what downloads, the temporary folder and the models take together.

    Args:
        sources: the weights of each model.
        folders: where each model goes; None where that is not a disk of this machine.
        temporary: bytes of a copy in the temporary folder.

    Raises:
        BuildError: a disk has too little space left.
    """
    takes = [(Path(tempfile.gettempdir()), temporary)]
    for source, folder in zip(sources, folders, strict=True):
        if source.missing:
            takes.append((source.folder, source.missing))
        if folder is not None:
            takes.append((folder, source.size))
    for place, _ in takes:
        disk = _device(place)
        needed = _BESIDE + sum(size for other, size in takes if _device(other) == disk)
        free = shutil.disk_usage(existing(place)).free
        if needed > free:
            raise BuildError(
                f"the disk with {place} has {free / 1e9:.2f} GB left, and {needed / 1e9:.2f} GB are needed: free some "
                "space, or set TMPDIR, HF_HOME or the store to a larger disk"
            )


def given_up(before: str | None) -> Path | None:
    """The folder with the files of a model that could not be logged, where that is on this machine.

    MLflow marks such a model as failed where an exception ended it, and leaves it pending after Ctrl-C; here it is
    marked then too. A model that is whole keeps its files.

    Args:
        before: the id of the last model that was begun by this thread before that one, see `last_begun`.
    """
    model_id = last_begun()
    if model_id in (None, before):
        return None
    client = mlflow.MlflowClient()
    logged = client.get_logged_model(str(model_id))
    if logged.status == LoggedModelStatus.READY:
        return None
    if logged.status == LoggedModelStatus.PENDING:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
    return local_folder(logged.artifact_location)


def last_begun() -> str | None:
    """The id of the last model that this thread began to log."""
    model_id: str | None = _last_logged_model_id.get()
    return model_id


def local_folder(location: str) -> Path | None:
    """The folder of this machine that an artifact location means; None where it means another place."""
    local = is_local_uri(location, is_tracking_or_registry_uri=False)
    return Path(local_file_uri_to_path(location)) if local else None


@contextmanager
def removed_on_failure(folder: Callable[[], Path | None]) -> Iterator[None]:
    """Removes a half-written folder when the block fails, and says in one line when a disk was full.

    Args:
        folder: gives the folder; asked only after a failure.

    Raises:
        BuildError: there was no space left.
    """
    try:
        yield
    except BaseException as error:
        with suppress(Exception):
            if place := folder():
                shutil.rmtree(place, ignore_errors=True)
        if _means_full(error):
            raise BuildError(
                "the disk is full, and the model was not written: free some space, or set TMPDIR or the store to a "
                "larger disk"
            ) from error
        raise


def _means_full(error: BaseException | None) -> bool:
    """Whether an error comes from a full disk; safetensors and shutil hand the system's error on as text."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL) or "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_database(path: Path) -> None:
    """Takes the lock for writing of an SQLite file and gives it back; or makes the file where it is not there yet."""
    if not path.exists():
        check_writable(path.parent)
        if path.parent.is_dir():
            create_database(path.absolute())
        return
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=_LOCK_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute(f"PRAGMA user_version = {version}")  # makes the journal, for which the folder has to be open
        database.execute("ROLLBACK")


def _device(path: Path) -> int:
    return existing(path).stat().st_dev


@contextmanager
def _as_build_error(what: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise BuildError(f"{what}: {error.message.splitlines()[0]}") from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise BuildError(f"{what}: {place}{error.strerror or error}") from error
    except (sqlite3.Error, BuildError) as error:
        raise BuildError(f"{what}: {error}") from error
