"""Models that go to stores behind a network: MLflow's own server, S3, and S3 behind that server.

Run with: python -m pytest tests/test_uploads.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import boto3
import mlflow
import pytest
from moto.server import ThreadedMotoServer
from stores import server

from phi3_mlflow.builders import onnx, transformers, uploads

BUCKET = "models"
MiB = 2**20


@pytest.fixture(scope="module")
def s3() -> Iterator:
    """S3's interface on 127.0.0.1, with a bucket: the client."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        yield client
        running.stop()


@pytest.fixture(scope="module")
def tracked(s3, tracking, tmp_path_factory) -> Iterator[dict[str, str]]:
    """Tracking stores by the place of their artifacts: S3, and servers that keep them in a folder and in S3."""
    local, proxied = tmp_path_factory.mktemp("local"), tmp_path_factory.mktemp("proxied")
    databases = [f"sqlite:///{folder / 'mlflow.db'}" for folder in (local, proxied)]
    mlflow.create_experiment("s3", artifact_location=f"s3://{BUCKET}/direct")
    with (
        server(local, databases[0]) as (first, _),
        server(proxied, databases[1], f"s3://{BUCKET}/proxied") as (second, _),
    ):
        yield {"s3": tracking, "server": first, "server with s3": second}
    mlflow.set_tracking_uri(tracking)
    mlflow.set_experiment("tests")


@pytest.fixture(params=["s3", "server", "server with s3"])
def place(request, tracked) -> str:
    mlflow.set_tracking_uri(tracked[request.param])
    mlflow.set_experiment("s3" if request.param == "s3" else "there")
    return request.param


@pytest.fixture
def bars(monkeypatch) -> list[list[int]]:
    """For each bar of an upload its total, and what came."""
    made = []

    @contextmanager
    def bar(what: str, size: int) -> Iterator:
        steps = [size]
        made.append(steps)
        yield steps.append

    monkeypatch.setattr(uploads, "bar", bar)
    return made


def objects(s3, model_id: str) -> dict[str, dict]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    found = [each for page in pages for each in page.get("Contents", []) if model_id in each["Key"]]
    return {each["Key"].rpartition("/")[2]: each for each in found}


def answer(uri: str) -> str:
    (found,) = mlflow.pyfunc.load_model(uri).predict(
        {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    )
    return found["choices"][0]["message"]["content"]


def test_large_files_go_in_parts_where_the_store_can_with_a_bar_in_bytes(s3, place, bars, monkeypatch):
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(8 * MiB))  # else 500 MB
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 * MiB))
    info = transformers.log_model()

    (counted,) = bars
    assert sum(counted[1:]) == counted[0]
    if place == "server with s3":  # the large one has MLflow's own bar
        assert counted[0] < 2 * MiB
    else:
        assert counted[0] > 8 * MiB
    if place != "server":
        tag = objects(s3, info.model_id)["model.safetensors"]["ETag"]
        assert int(tag.strip('"').partition("-")[2]) > 1  # S3's mark of an object that came in parts
    assert "Madrid" in answer(info.model_uri)
    assert "open" not in vars(uploads.http_artifact_repo)


def test_the_onnx_models_weights_arrive_too_though_they_are_links_until_then(s3, place, bars):
    info = onnx.log_model()
    (counted,) = bars
    assert sum(counted[1:]) == counted[0] > MiB
    assert "Madrid" in answer(info.model_uri)


def test_an_upload_that_fails_leaves_nothing_of_the_bar_behind(s3, tracked, bars):
    mlflow.set_tracking_uri(tracked["s3"])
    name = "nowhere"
    if mlflow.get_experiment_by_name(name) is None:
        mlflow.create_experiment(name, artifact_location="s3://no-such-bucket/x")
    mlflow.set_experiment(name)
    with pytest.raises(Exception, match="NoSuchBucket"):
        onnx.log_model()
    repository = uploads.get_artifact_repository("s3://no-such-bucket/x")
    assert "upload_file" not in vars(repository._get_s3_client())
    assert urlsplit(mlflow.get_tracking_uri()).scheme == "sqlite"
