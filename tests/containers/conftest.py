"""The embedded model of each builder, containerized once."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import Result

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / name) for name in ("tests/serve", "scripts", "benchmarks"))]

from command import containerize  # noqa: E402


@pytest.fixture(scope="session")
def written(onnx_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the command says of the ONNX model, which it loaded and measured; by a user whose files are private."""
    folder = tmp_path_factory.mktemp("containers") / "onnx"
    before = os.umask(0o077)
    try:
        result = containerize(
            onnx_model, folder, "--cpus", "2", "--parallel", "2", "--image", "registry.example/phi3:1"
        )
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="session")
def folder(written: Result) -> Path:
    """The ONNX model's folder."""
    return Path(written.stdout.strip())


@pytest.fixture(scope="session")
def torch_folder(transformers_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformers model's folder; its memory is given."""
    path = tmp_path_factory.mktemp("containers") / "transformers"
    result = containerize(transformers_model, path, "--memory", "1GiB")
    assert result.exit_code == 0, result.output
    return path
