"""Registered versions of the embedded model, whole, damaged and slow ones, for the tests of serving several models."""

import asyncio
import fcntl
import functools
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.tracking import MlflowClient

from phi3_mlflow.builders import onnx
from phi3_mlflow.serve.models import Models
from phi3_mlflow.serve.served import Loaded

SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
MADRID = "The capital of Spain is Madrid."


@functools.cache
def logged() -> str:
    """The URI of the embedded model, logged once for all tests."""
    return onnx.log_model(name="served").model_uri


def register(name: str, uri: str | None = None, alias: str | None = None) -> str:
    """Registers one more version, which is the embedded model where no other is given; returns its number."""
    number = mlflow.register_model(uri or logged(), name, await_registration_for=0).version
    if alias:
        point(name, alias, number)
    return str(number)


def point(name: str, alias: str, number: str | int) -> None:
    """Lets an alias mean a version."""
    MlflowClient().set_registered_model_alias(name, alias, str(number))


def damaged() -> str:
    """The URI of a logged model whose weights were changed afterwards."""
    info = onnx.log_model(name="damaged")
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    file = folder / "artifacts" / "weights" / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return info.model_uri


class Slow:
    """A copy of a model's folder that cannot be loaded before `finish` is called: a lease holds its manifest.

    Whoever opens a file with a lease (fcntl(2)) waits for its end, at most for /proc/sys/fs/lease-break-time (45 s).

    Args:
        model: a saved model of the ONNX builder.
        folder: to make.
    """

    def __init__(self, model: Path, folder: Path):
        self.folder = shutil.copytree(model, folder)
        self._held = (self.folder / "artifacts" / "weights" / "manifest.json").open("rb")
        fcntl.fcntl(self._held, fcntl.F_SETSIG, signal.SIGURG)  # says that somebody waits; nobody listens
        fcntl.fcntl(self._held, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def finish(self) -> None:
        """Lets the load that waits go on, and later ones too. Harmless the second time."""
        self._held.close()


async def ask(models: Models, name: str | None = None, body: dict[str, Any] | None = None) -> str:
    """One answer of a served model."""
    async with models.lease(name) as loaded:
        return await answer(loaded, body)


async def answer(loaded: Loaded, body: dict[str, Any] | None = None) -> str:
    run = loaded.service.start(body or SPAIN)
    async for _ in run:
        pass
    return run.answer.choices[0].text


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)
