"""One logged model in memory: loaded with the server's settings, tried, and closed so that its memory returns.

All of it blocks. Knows no event loop, no other models, and not who uses it.
"""

import ctypes
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from starlette.types import ASGIApp

from phi3_mlflow.runtime import mlmodel
from phi3_mlflow.runtime import model as runtime
from phi3_mlflow.runtime.chat import TASKS
from phi3_mlflow.runtime.errors import Phi3Error, Unavailable
from phi3_mlflow.runtime.model import Predictor
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.settings import check_config
from phi3_mlflow.runtime.signatures import input_example

from .folders import Folder, fetch, registered

# How many requests an ONNX model answers at once where nobody says; what does so releases Python's lock meanwhile.
PARALLEL = 4


@dataclass(frozen=True)
class Spec:
    """A model that the server was started with.

    Attributes:
        name: what requests call it.
        uri: models:/NAME/3, models:/NAME@champion, models:/m-..., runs:/RUN/NAME, or a folder.
    """

    name: str
    uri: str

    @property
    def names(self) -> set[str]:
        """All that requests may call it, where no other model is called the same."""
        parts = registered(self.uri)
        return {self.name, self.uri, *((parts[0], "".join(parts)) if parts else ())}

    @property
    def root(self) -> str:
        """What anybody may know of where it comes from: where it lies on this machine or another is nobody's affair."""
        return self.uri if self.uri.startswith(("models:/", "runs:/")) else self.name

    @property
    def follows_alias(self) -> bool:
        """Whether the registry may come to mean another version by the URI."""
        parts = registered(self.uri)
        return parts is not None and parts[1] == "@"


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    Attributes:
        name, uri: as the server was told.
        model_id: of the LoggedModel; None where the folder names none.
        version: of the registered model; None where the URI names none.
        folder: its files.
        predictor: answers MLflow's calls.
        service: answers all others.
        scoring: MLflow's scoring app over it.
        example: a request of its own, or the toolkit's where it has none.
        leases: how many requests use it now.
        used: when it was last taken or given back, on time.monotonic()'s clock.
        final: whether it is not to be loaded again, so that `close` deletes what was downloaded for it.
    """

    name: str
    uri: str
    model_id: str | None
    version: str | None
    folder: Folder
    predictor: Predictor
    scoring: ASGIApp
    example: Mapping[str, Any]
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    final: bool = False

    @property
    def root(self) -> str:
        """See Spec."""
        return Spec(self.name, self.uri).root

    @property
    def service(self) -> Service:
        """The public seam."""
        return self.predictor.service

    def ask(self, seconds: float) -> None:
        """Has it answer its example.

        Args:
            seconds: that the answer may take.

        Raises:
            Phi3Error: there was no answer in time, or none with text in it.
            Exception: what the model raised.
        """
        end = time.monotonic() + seconds
        answer = self.service.start(self.example, deadline=end).wait()
        if time.monotonic() >= end:
            raise Phi3Error(f"its input example was not answered within {seconds:g} seconds")
        if not answer.choices[0].text:
            raise Phi3Error("its answer to its input example is empty")

    def close(self) -> None:
        """Ends what is under way and returns the memory to the system. Harmless the second time."""
        self.service.close()
        if self.final:
            self.folder.remove()
        _return_memory()


def load(
    spec: Spec, *, parallel: int | None = None, settings: Mapping[str, Any] | None = None, kept: Folder | None = None
) -> Loaded:
    """Loads a model by the installed toolkit's runtime; none of the model's own code is run.

    Args:
        spec: which one.
        parallel: how many requests an ONNX model answers at once; None for what the model says, else PARALLEL.
        settings: changes of its model_config.
        kept: where it was loaded from before.

    Raises:
        Phi3Error: it cannot be loaded; the message says why.
        MlflowException: there is no such model, or the store does not answer.
    """
    folder = fetch(spec.uri, kept)
    try:
        loaded = _load(spec, folder, parallel, settings or {})
    except BaseException:
        folder.remove()
        raise
    if kept is not None and kept.source != folder.source:
        kept.remove()
    return loaded


def _load(spec: Spec, folder: Folder, parallel: int | None, settings: Mapping[str, Any]) -> Loaded:
    logged = mlmodel.load(folder.path)
    predictor = runtime.load(folder.path, _config(logged, parallel, settings))
    try:
        model = PyFuncModel(
            model_meta=logged,
            model_impl=_Implementation(predictor),
            predict_stream_fn="predict_stream",
            model_id=logged.model_id,
        )
        return Loaded(
            name=spec.name,
            uri=spec.uri,
            model_id=logged.model_id,
            version=folder.version,
            folder=folder,
            predictor=predictor,
            scoring=scoring_server.init(model),
            example=_example(logged, folder, predictor.service),
        )
    except BaseException:
        predictor.close()
        raise


def _config(logged: Model, parallel: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model_config that was logged, changed as the server was told."""
    flavor = logged.flavors.get("python_function", {})
    config = dict(flavor.get("config") or {})
    check_config(config.get("task", TASKS[0]), settings)
    config |= settings
    if "artifacts" in flavor and settings.get("parallel") is None:  # the ONNX builder's
        config["parallel"] = parallel or config.get("parallel") or PARALLEL
    return config


def _example(logged: Model, folder: Folder, service: Service) -> dict[str, Any]:
    example: Any = logged.load_input_example(str(folder.path))
    if example is None:
        example = input_example(service.task)
    if isinstance(example, pd.DataFrame):
        example = example.to_dict(orient="records")[0]
    # What a row of a table lacks is NaN, which does not equal itself.
    return {str(name): value for name, value in example.items() if value is not None and value == value}


class _Implementation:
    """What MLflow's scoring app calls.

    FastAPI keeps every route that was ever made in caches of the process, so the app must not be what holds the model.
    """

    def __init__(self, predictor: Predictor):
        self._predictor = weakref.ref(predictor)

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[Any]:
        return self._now().predict(data, params)

    def predict_stream(self, data: Any, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        return self._now().predict_stream(data, params)

    def _now(self) -> Predictor:
        predictor = self._predictor()
        if predictor is None:
            raise runtime.clean(Unavailable("the model was closed: send the request again"))
        return predictor


def _return_memory() -> None:
    """Has glibc return what was freed.

    By itself it returns blocks above a limit that rises up to 32 MiB as such blocks are freed (mallopt(3)), and the
    most part of a model's weights and of its key-value cache is smaller.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
