"""The error of this package."""

from phi3_mlflow.runtime.errors import Phi3Error


class ContainerError(Phi3Error):
    """A container that cannot be described as asked. Nothing was written."""
