"""Why something failed: as a client may know it, and as the log tells it. One line each, where it can be."""

import re
import traceback

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from phi3_mlflow.runtime.errors import Phi3Error, without_passwords

# What stands before a file's own name in an absolute path. Addresses such as models:/phi3/1 are none.
_FOLDERS = re.compile(r"(?<![\w:/.@~-])/(?:[^\s/:;,'\"]+/)+")


def told(error: BaseException) -> str:
    """For a client: neither addresses, nor folders of this machine, nor the inner life of libraries."""
    missing = isinstance(error, MlflowException) and error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)
    if isinstance(error, Phi3Error) or missing:
        return _FOLDERS.sub("", _line(error))
    return f"{type(error).__name__}; the server's log says why"


def logged(error: BaseException) -> str:
    """For the log: of what nobody foresaw the end of the traceback too."""
    if isinstance(error, Phi3Error | MlflowException):
        return _line(error)
    return without_passwords("".join(traceback.format_exception(error, limit=-3)).rstrip())


def _line(error: BaseException) -> str:
    return without_passwords(" ".join(str(error).split()))
