"""A column of answers in Spark. The Python workers of a node share one process with one copy of the weights.

`column` runs on the driver, `worker` and `node` in Python workers, `process` is the process with the model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .column import udf

__all__ = ["udf"]


def __getattr__(name: str) -> Any:
    """Keeps MLflow out of the Python workers, of which there may be many."""
    if name == "udf":
        from .column import udf

        return udf
    raise AttributeError(name)
