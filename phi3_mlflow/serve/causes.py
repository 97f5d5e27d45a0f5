"""Why something failed: as a client may know it, and as the log tells it. One line each, where it can be."""

import re
import traceback

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from phi3_mlflow.runtime.errors import Phi3Error


def told(error: BaseException) -> str:
    """For a client: neither addresses nor the inner life of libraries."""
    missing = isinstance(error, MlflowException) and error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)
    if isinstance(error, Phi3Error) or missing:
        return _line(error)
    return f"{type(error).__name__}; the server's log says why"


def logged(error: BaseException) -> str:
    """For the log: of what nobody foresaw the end of the traceback too."""
    if isinstance(error, Phi3Error | MlflowException):
        return _line(error)
    return _without_passwords("".join(traceback.format_exception(error, limit=-3)).rstrip())


def _line(error: BaseException) -> str:
    return _without_passwords(" ".join(str(error).split()))


def _without_passwords(text: str) -> str:
    """The text without what stands before the host in addresses."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
