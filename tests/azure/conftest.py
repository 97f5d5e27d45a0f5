"""Fixtures: small models, Azurite, the stand-in, and the environment in which unmodified clients find them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
from azure_models import CHAT, FLAT, flat_signature, save
from mlflow.models import ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA


@pytest.fixture(scope="session")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the flat task, with pandas 3 among its requirements."""
    folder = tmp_path_factory.mktemp("flat") / "flat-model"
    return save(folder, FLAT, flat_signature(), input_example=pd.DataFrame({"prompt": ["hello"]}))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with MLflow's chat signature."""
    folder = tmp_path_factory.mktemp("chat") / "chat-model"
    signature = ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA)
    return save(folder, CHAT, signature, input_example={"messages": [{"role": "user", "content": "hello"}]})


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("azure.ai.ml", reason='needs pip install "phi3-mlflow[azure]"')
    import blobs

    blobs.resolve_locally()
    return blobs.certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="session")
def line(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The line to Azurite."""
    import blobs
    import standin

    if not blobs.EXECUTABLE.exists():
        pytest.fail("needs npm install --prefix .azurite --no-save azurite@3.37.0, which `make setup` does")
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
        trust(patch, certificate)
        service.container().create_container()
        # A cloud can be added once in a process; with it no client asks for the metadata again.
        MLClient(
            object(),
            standin.SUBSCRIPTION,
            standin.GROUP,
            standin.WORKSPACE,
            cloud="StubCloud",
            cloud_metadata=service.metadata(),
            enable_telemetry=False,
        )
    yield service
    service.close()


def trust(patch: pytest.MonkeyPatch, certificate: tuple[Path, Path]) -> None:
    """Makes clients take the stand-in for Azure, and trust nobody else."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"):
        patch.setenv(name, str(certificate[0]))
    patch.setenv("AZUREML_CURRENT_CLOUD", "StubCloud")


@pytest.fixture(autouse=True)
def trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests of the stand-in alone: whatever runs after them needs the machine's own certificates."""
    if "cloud" in request.fixturenames:
        trust(monkeypatch, request.getfixturevalue("certificate"))


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
