"""How long a model's upload takes against azure-ai-ml's own, in alternation, both to Azurite over TLS on this machine.

Run with: python benchmarks/azure_upload.py [--megabytes 700] [--rounds 3]
It needs pip install "phi3-mlflow[azure]" and npm install --prefix .azurite --no-save azurite@3.37.0.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "azure"))

import azure_models
import blobs
import standin
from azure.ai.ml import MLClient
from azure.ai.ml.entities import Model

from phi3_mlflow.azure import register, workspace
from phi3_mlflow.azure.model import read
from phi3_mlflow.azure.staging import stage


class Identity:
    """A credential that the stand-in trusts."""

    def get_token(self, *_: str, **__: object) -> object:
        """The stand-in's token, for an hour."""
        from azure.core.credentials import AccessToken

        return AccessToken(standin.TOKEN, int(time.time()) + 3600)


def fresh(folder: Path) -> None:
    """Gives the model other bytes, so that neither side finds an earlier upload."""
    with (folder / "artifacts" / "weights.bin").open("r+b") as stream:
        stream.write(secrets.token_bytes(64))


def ours(client: MLClient, place: workspace.Workspace, folder: Path) -> float:
    """Seconds of our register: staging, check, hashing, upload, registration."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        candidate = register.prepare(read(folder), Path(temporary))
        done = register.register(client, place, candidate, f"ours-{secrets.token_hex(4)}")
    assert done.sent > 0
    return time.perf_counter() - start


def theirs(client: MLClient, folder: Path) -> float:
    """Seconds of azure-ai-ml's create_or_update on the same files."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = stage(read(folder), Path(temporary)).folder
        start = time.perf_counter()
        name = f"theirs-{secrets.token_hex(4)}"
        client.models.create_or_update(Model(name=name, path=str(staged), type="mlflow_model"))
        return time.perf_counter() - start


def main() -> None:
    """Runs both in alternation, the first of each round changing, and prints every time and the medians' ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    blobs.resolve_locally()
    times: dict[str, list[float]] = {"phi3-mlflow": [], "azure-ai-ml": []}
    with tempfile.TemporaryDirectory(prefix="phi3-bench-") as temporary:
        root = Path(temporary)
        cert = blobs.certificate(root)
        os.environ |= {"REQUESTS_CA_BUNDLE": str(cert[0]), "AZUREML_CURRENT_CLOUD": "BenchCloud"}
        folder = azure_models.save(root / "model", azure_models.FLAT, azure_models.flat_signature())
        with (folder / "artifacts" / "weights.bin").open("wb") as stream:
            for _ in range(options.megabytes):
                stream.write(secrets.token_bytes(1_000_000))
        azurite = blobs.Azurite(root, cert, standin.ACCOUNT, standin.ACCOUNT_KEY, in_memory=False)
        service = standin.StandIn(cert, azurite.port)
        try:
            service.container().create_container()
            place = workspace.Workspace(standin.SUBSCRIPTION, standin.GROUP, standin.WORKSPACE, "the benchmark")
            names = (place.subscription, place.resource_group, place.name)
            cloud = {"cloud": "BenchCloud", "cloud_metadata": service.metadata()}
            client = MLClient(Identity(), *names, show_progress=False, enable_telemetry=False, **cloud)
            for turn in range(options.rounds):
                sides = ("phi3-mlflow", "azure-ai-ml") if turn % 2 == 0 else ("azure-ai-ml", "phi3-mlflow")
                for side in sides:
                    fresh(folder)
                    taken = ours(client, place, folder) if side == "phi3-mlflow" else theirs(client, folder)
                    times[side].append(taken)
                    print(f"round {turn + 1} {side}: {taken:.1f} s", flush=True)
                    for blob in list(service.container().list_blobs()):
                        service.container().delete_blob(blob.name)
        finally:
            service.close()
            azurite.close()
    medians = {side: statistics.median(values) for side, values in times.items()}
    ratio = medians["phi3-mlflow"] / medians["azure-ai-ml"]
    print(json.dumps({"megabytes": options.megabytes, "seconds": times, "ratio_of_medians": round(ratio, 3)}))


if __name__ == "__main__":
    main()
