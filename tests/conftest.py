"""Fixtures on the embedded model: saved, exported to fp32, and served. Built once for a test run."""

import os
import sys

# Read when the libraries are first imported: no test may reach a network by accident.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

from collections.abc import Iterator
from pathlib import Path

import pytest

# A process of pytest-xdist has no main file; pyspark takes that for a run of its own doctests, and exits.
if not hasattr(sys.modules["__main__"], "__file__"):
    sys.modules["__main__"].__file__ = pytest.__file__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking store of its own, so that a test run leaves nothing behind in the checkout."""
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("tests")
    yield uri
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def transformers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from phi3_mlflow.builders import transformers

    path = tmp_path_factory.mktemp("models") / "transformers"
    transformers.save_model(path)
    return path


@pytest.fixture(scope="session")
def onnx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from phi3_mlflow.builders import onnx

    path = tmp_path_factory.mktemp("models") / "onnx"
    onnx.save_model(path)
    return path


@pytest.fixture(scope="session")
def saved(transformers_model: Path, onnx_model: Path) -> dict[str, Path]:
    """The saved chat model of each builder."""
    return {"transformers": transformers_model, "onnx": onnx_model}


@pytest.fixture(scope="session")
def loaded(saved: dict[str, Path]) -> dict:
    """The saved chat models, loaded with mlflow.pyfunc."""
    import mlflow.pyfunc

    return {builder: mlflow.pyfunc.load_model(str(path)) for builder, path in saved.items()}


@pytest.fixture(scope="session")
def fp32_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's fp32 ONNX export, which has to equal the transformers form token for token."""
    from phi3_mlflow.quantize import export

    return export(ROOT / "artifacts" / "transformers", tmp_path_factory.mktemp("fp32") / "onnx", precision="fp32")


@pytest.fixture(scope="session")
def servers(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The address of `mlflow models serve` for each builder's chat model."""
    from contextlib import ExitStack

    from phi3_mlflow.serving import served

    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("servers")
        yield {builder: stack.enter_context(served(str(path), cwd=folder)) for builder, path in saved.items()}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything is installed (.ci/run sets CI and PHI3_TOKENIZER), a skipped test is a missing piece."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and exitstatus == 0 and os.environ.get("CI") and os.environ.get("PHI3_TOKENIZER"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for report in skipped:
            reporter.write_line(f"skipped where nothing may be: {report.nodeid}", red=True)
