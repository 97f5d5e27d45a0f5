"""The tracking store that MLflow is set to: whether it answers, and whether it knows a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url

from phi3_mlflow.disks import check_writable
from phi3_mlflow.room import room
from phi3_mlflow.runtime.errors import Phi3Error, without_passwords

_PATIENCE = 20  # seconds for an answer


def check() -> None:
    """Finds out whether the store answers, before hours of work depend on it.

    Raises:
        Phi3Error: it does not. MLflow itself would try for minutes.
    """
    refuse_unwritable()
    try:
        with impatient(retries=0):
            mlflow.MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise Phi3Error(f"the tracking store {mlflow.get_tracking_uri()} does not answer: {reason}") from error


def refuse_unwritable() -> None:
    """Refuses a local store that is a folder, or not there and cannot be made.

    Raises:
        Phi3Error: so it is. MLflow itself would try for minutes.
    """
    path = database_of(mlflow.get_tracking_uri())
    if path is not None and path.is_dir():
        raise Phi3Error(f"the tracking store {path.absolute()} is a folder, and an SQLite store is a file")
    if path is None or path.exists():
        return
    try:
        check_writable(path.parent)
    except OSError as error:
        raise Phi3Error(
            f"there is no tracking store {path.absolute()}, and its folder cannot be written to make one"
        ) from error


def searched() -> str:
    """Where a model that is not found was looked for, and how to name another store; without passwords."""
    stores = " and ".join(dict.fromkeys([mlflow.get_tracking_uri(), mlflow.get_registry_uri()]))
    return f"looked for in {without_passwords(stores)}; MLFLOW_TRACKING_URI names another store"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for a store of another kind, or in memory."""
    name = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(name) if name and name != ":memory:" and not name.startswith("file:") else None


def create_database(path: Path) -> None:
    """Makes the SQLite database of a local store in one step, where it is not there yet; its folder is.

    MLflow makes table after table in place, and when it is killed cannot read what is left of that.
    """
    with room(path, wait=True) as place:
        if not path.exists():
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{place / path.name}").search_experiments(max_results=1)
            (place / path.name).replace(path)


@contextmanager
def impatient(retries: int = 1) -> Iterator[None]:
    """For the length of a block, calls of a store that is gone fail within seconds; MLflow would try each for minutes.

    Args:
        retries: after a call that failed.
    """
    values = {MLFLOW_HTTP_REQUEST_MAX_RETRIES: retries, MLFLOW_HTTP_REQUEST_TIMEOUT: _PATIENCE}
    before = {variable: variable.get_raw() for variable in values}
    for variable, value in values.items():
        variable.set(value)
    try:
        yield
    finally:
        for variable, raw in before.items():
            variable.unset() if raw is None else variable.set(raw)


def known(model_id: str | None) -> bool:
    """Whether the store has a logged model of this id, so that metrics can be linked with it."""
    if model_id is None:
        return False
    try:
        mlflow.MlflowClient().get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
