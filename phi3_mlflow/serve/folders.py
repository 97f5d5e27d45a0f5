"""Where a logged model lies on this machine: a model URI in, a folder out. Knows MLflow's stores; loads nothing."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from phi3_mlflow import tracking, uris
from phi3_mlflow.runtime.errors import Phi3Error


@dataclass(frozen=True)
class Folder:
    """A logged model's files.

    Attributes:
        path: holds the MLmodel file.
        source: where the files come from, once aliases and versions are resolved.
        version: of the registered model; None where the URI names none.
        downloaded: the temporary folder that was made for them; None where the store is on this machine.
    """

    path: Path
    source: str
    version: str | None = None
    downloaded: Path | None = None

    def remove(self) -> None:
        """Deletes what was downloaded. Harmless the second time, and where the files are the store's own."""
        if self.downloaded is not None:
            shutil.rmtree(self.downloaded, ignore_errors=True)


def registered(uri: str) -> tuple[str, str, str] | None:
    """The parts of a registered model's URI.

    Returns:
        The name, `:` and a version (or `@` and an alias); None for any other URI, `models:/m-...` too.
    """
    if not uri.startswith("models:/"):
        return None
    name, _, version = uri.removeprefix("models:").strip("/").partition("/")
    if version:
        return name, ":", version
    name, _, alias = name.rpartition("@")
    return (name, "@", alias) if name else None


def version(uri: str) -> str:
    """Asks the registry which version a registered model's URI means now.

    Raises:
        Phi3Error: there is no such alias.
        MlflowException: there is no such model or version, or the registry does not answer.
    """
    return str(_meant(mlflow.MlflowClient(), uri)[1])


def fetch(uri: str, kept: Folder | None = None) -> Folder:
    """Finds a model's folder, and downloads it where the store is on another machine.

    Args:
        uri: models:/NAME/VERSION, models:/NAME@ALIAS, models:/m-..., runs:/RUN/NAME, a folder, or any other address
            that MLflow can download from.
        kept: what was found before; used again where it is the same still.

    Raises:
        Phi3Error: there is no such alias, or neither a version nor an alias in the URI.
        MlflowException: there is no such model, or the store does not answer.
    """
    source, number = locate(uri)
    if is_local_uri(source):
        return Folder(Path(local_file_uri_to_path(source)), source, number)
    if kept is not None and kept.source == source and kept.path.is_dir():
        return replace(kept, version=number)
    room = Path(tempfile.mkdtemp(prefix="phi3-mlflow-"))
    try:
        path = mlflow.artifacts.download_artifacts(source, dst_path=str(room))
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    return Folder(Path(path), source, number, room)


def locate(uri: str) -> tuple[str, str | None]:
    """The address of a model's files, and the registered version; raises as `fetch` does.

    Not left to `mlflow.artifacts.download_artifacts`, which writes into a local store and copies what a run names.
    """
    if not uri.startswith(("models:/", "runs:/")):
        return uri, None  # no store is asked, nor made
    uris.check(uri)
    tracking.refuse_unwritable()
    with tracking.impatient():
        return _locate(mlflow.MlflowClient(), uri)


def _locate(client: mlflow.MlflowClient, uri: str) -> tuple[str, str | None]:
    if uri.startswith("models:/"):
        found = _meant(client, uri)
        if len(found) == 1:
            return client.get_logged_model(found[0]).artifact_location, None
        name, number = found
        return client.get_model_version_download_uri(name, str(number)), str(number)
    run_id, _, name = uri.removeprefix("runs:").strip("/").partition("/")
    run = client.get_run(run_id)
    token = None
    while True:
        page = client.search_logged_models([run.info.experiment_id], page_token=token)
        for model in page:
            if model.source_run_id == run_id and model.name == name:
                return model.artifact_location, None
        if not (token := page.token):
            return f"{run.info.artifact_uri}/{name}", None


def _meant(client: mlflow.MlflowClient, uri: str) -> tuple[Any, ...]:
    """The id of a logged model, or the name and the version of a registered one, that a URI means now."""
    try:
        return get_model_name_and_version(client, uri)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":  # of an alias, whose error names no model
            raise Phi3Error(f"{uri} means no version: {error.message}") from error
        raise
