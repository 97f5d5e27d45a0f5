"""Logged models by their URI, with the embedded one where there is none."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow.pyfunc
from mlflow.pyfunc import PyFuncModel

from phi3_mlflow import uris
from phi3_mlflow.runtime import mlmodel
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.serve import folders


@contextmanager
def given_or_embedded(model_uri: str | None) -> Iterator[str]:
    """The URI itself, or where there is none that of the embedded ONNX model, saved for as long as the block lasts."""
    if model_uri is not None:
        uris.check(model_uri)
        yield model_uri
        return
    from phi3_mlflow.builders import onnx

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        onnx.save_model(path)
        yield str(path)


@contextmanager
def load(model_uri: str) -> Iterator[PyFuncModel]:
    """A logged model that answers chats; what was downloaded for it is gone behind the block.

    Raises:
        Phi3Error: it is none.
    """
    folder = folders.fetch(model_uri)
    try:
        task = (mlmodel.load(folder.path).metadata or {}).get("task")
        if task is None:
            raise Phi3Error(f"{model_uri} was not logged by phi3_mlflow")
        if task != "llm/v1/chat":
            raise Phi3Error(f"{model_uri} is a model for the task {task}; a conversation needs one for llm/v1/chat")
        yield mlflow.pyfunc.load_model(str(folder.path), suppress_warnings=True)
    finally:
        folder.remove()
