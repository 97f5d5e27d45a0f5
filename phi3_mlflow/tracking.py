"""The tracking store that MLflow is set to: whether it answers, and whether it knows a model."""

import mlflow
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException

from phi3_mlflow.runtime.errors import Phi3Error

_PATIENCE = 20  # seconds for the first answer


def check() -> None:
    """Finds out whether the store answers, before hours of work depend on it.

    Raises:
        Phi3Error: it does not. MLflow itself would try for minutes.
    """
    before = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get_raw(), MLFLOW_HTTP_REQUEST_TIMEOUT.get_raw()
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(_PATIENCE)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise Phi3Error(f"the tracking store {mlflow.get_tracking_uri()} does not answer: {reason}") from error
    finally:
        for variable, value in zip((MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT), before, strict=True):
            variable.unset() if value is None else variable.set(value)


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
