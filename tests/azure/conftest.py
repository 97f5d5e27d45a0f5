"""Fixtures: small models, Azurite, the stand-in, and the environment in which unmodified clients find them."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

WEIGHTS = {"source": "embedded", "revision": "main", "license": "MIT", "sha256": "ab" * 32}
_FLAT = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.greeting = "echo"

    def predict(self, context, model_input, params=None):
        tokens = (params or {}).get("max_tokens")
        return [f"{self.greeting} {tokens}: {text}" for text in model_input["prompt"]]

mlflow.models.set_model(Echo())
"""
_CHAT = """
import mlflow

class Chat(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        text = model_input["messages"].iloc[0][-1]["content"]
        message = {"role": "assistant", "content": "echo " + text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return [{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}]

mlflow.models.set_model(Chat())
"""


def flat_signature(columns: tuple[ColSpec, ...] = (), params: tuple[ParamSpec, ...] = ()) -> ModelSignature:
    inputs = [ColSpec("string", "prompt"), ColSpec("string", "messages", required=False), *columns]
    options = [ParamSpec("max_tokens", "long", None), ParamSpec("temperature", "double", None), *params]
    return ModelSignature(Schema(inputs), Schema([ColSpec("string")]), ParamSchema(options))


def save(folder: Path, code: str, signature: ModelSignature | None, **options: object) -> Path:
    """Saves a small model with a weight file of 3 MB in it."""
    work = folder.parent / f"{folder.name}-source"
    work.mkdir(parents=True)
    (work / "code.py").write_text(code)
    (work / "weights.bin").write_bytes(bytes(range(256)) * 12_000)
    task = "llm/v1/chat" if code is _CHAT else "flat"
    settings = {
        "pip_requirements": ["mlflow==3.17.2", "pandas==3.1.1"],
        "metadata": {"task": task, "format": 1, "weights": WEIGHTS},
        "artifacts": {"weights": str(work / "weights.bin")},
        **options,
    }
    mlflow.pyfunc.save_model(str(folder), python_model=str(work / "code.py"), signature=signature, **settings)
    return folder


@pytest.fixture(scope="session")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the flat task, with pandas 3 among its requirements."""
    folder = tmp_path_factory.mktemp("flat") / "flat-model"
    return save(folder, _FLAT, flat_signature(), input_example=pd.DataFrame({"prompt": ["hello"]}))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with MLflow's chat signature."""
    folder = tmp_path_factory.mktemp("chat") / "chat-model"
    signature = ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA)
    return save(folder, _CHAT, signature, input_example={"messages": [{"role": "user", "content": "hello"}]})


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the names below localhost on this machine, whatever the resolver makes of them."""
    resolve = socket.getaddrinfo

    def resolved(host: object, *args: object, **options: object) -> object:
        return resolve("127.0.0.1" if str(host).endswith(".localhost") else host, *args, **options)

    socket.getaddrinfo = resolved


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("azure.ai.ml", reason='needs pip install "phi3-mlflow[azure]"')
    import blobs

    return blobs.certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="session")
def line(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The line to Azurite."""
    import blobs
    import standin

    if not blobs.EXECUTABLE.exists():
        pytest.skip("needs npm install --prefix .azurite --no-save azurite@3.37.0")
    azurite = blobs.Azurite(tmp_path_factory.mktemp("azurite"), certificate, standin.ACCOUNT, standin.ACCOUNT_KEY)
    carried = blobs.Line(azurite.port)
    yield carried
    carried.close()
    azurite.close()


@pytest.fixture(scope="session")
def cloud(certificate: tuple[Path, Path], line: object) -> Iterator[object]:
    """The running stand-in, with unmodified clients pointed at it."""
    import standin
    from azure.ai.ml import MLClient

    service = standin.StandIn(certificate, line.port)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"):
            patch.setenv(name, str(certificate[0]))
        patch.setenv("AZUREML_CURRENT_CLOUD", "StubCloud")
        service.container().create_container()
        # A cloud can be added once in a process; with it no client asks for the metadata again.
        MLClient(
            object(),
            standin.SUBSCRIPTION,
            standin.GROUP,
            standin.WORKSPACE,
            cloud="StubCloud",
            cloud_metadata=service.endpoints(),
            enable_telemetry=False,
        )
        yield service
    service.close()


@pytest.fixture
def empty_storage(cloud: object, line: object) -> None:
    """Takes every blob out of the datastore's container."""
    line.mend()
    container = cloud.container()
    for blob in list(container.list_blobs()):
        container.delete_blob(blob.name)


@pytest.fixture
def azure(cloud: object, line: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """A stand-in that remembers nothing but blobs, an identity that it trusts, a workspace, an empty folder."""
    import standin

    from phi3_mlflow.azure import upload

    cloud.reset()
    line.mend()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AZUREML_ARM_SUBSCRIPTION", standin.SUBSCRIPTION)
    monkeypatch.setenv("AZUREML_ARM_RESOURCEGROUP", standin.GROUP)
    monkeypatch.setenv("AZUREML_ARM_WORKSPACE_NAME", standin.WORKSPACE)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{cloud.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "header-that-is-secret")
    monkeypatch.setattr(upload, "RETRIES", {"total": 1, "first": 0, "base": 0})
    yield cloud
    cloud.reset()
