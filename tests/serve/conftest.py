"""A server with the embedded model of both builders, started once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from process import Serving, serving


@pytest.fixture(scope="session")
def server(saved: dict[str, Path]) -> Iterator[Serving]:
    """`phi3-mlflow serve` over the models `onnx` and `transformers`, both in memory."""
    names = [f"--name={builder}={path}" for builder, path in sorted(saved.items())]
    with serving(*names, "--preload", "--access-log", "none") as running:
        yield running
