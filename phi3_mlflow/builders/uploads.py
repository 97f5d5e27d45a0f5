"""A bar in bytes for what MLflow uploads. How it uploads is MLflow's: in parts, several at once, where the store can.

An S3 bucket gets files above 8 MB in parts by ten threads. A tracking server that keeps artifacts in one signs the
parts of files above 500 MB (MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE), for which MLflow has a bar of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.store.artifact import http_artifact_repo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from tqdm.utils import CallbackIOWrapper

from phi3_mlflow.bars import bar


@contextmanager
def shown(location: str, folder: Path) -> Iterator[None]:
    """Shows how much of a folder has been uploaded for as long as the block lasts, where the store has no bar itself.

    Args:
        location: the artifact location that MLflow uploads to.
        folder: what it uploads.
    """
    repository = get_artifact_repository(location)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if isinstance(repository, HttpArtifactRepository):
        files = [path for path in files if not repository._should_multipart_upload(path)]
        count: Callable[..., Any] = _counted_open
    elif isinstance(repository, S3ArtifactRepository):
        count = partial(_counted_s3, repository._get_s3_client())
    else:
        yield
        return
    with bar("Uploading", sum(path.stat().st_size for path in files)) as progress, count(progress):
        yield


@contextmanager
def _counted_open(progress: Callable[[int], None]) -> Iterator[None]:
    """Counts what MLflow's HTTP store reads of the files that it sends: it opens them in that module."""

    @contextmanager
    def opened(*arguments: Any, **named: Any) -> Iterator[Any]:
        with open(*arguments, **named) as file:
            yield CallbackIOWrapper(progress, file, "read")

    http_artifact_repo.open = opened  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vars(http_artifact_repo).pop("open", None)


@contextmanager
def _counted_s3(client: Any, progress: Callable[[int], None]) -> Iterator[None]:
    """Has boto3 report what it sends, from its threads; MLflow keeps one client for all calls."""
    client.upload_file = partial(client.upload_file, Callback=progress)
    try:
        yield
    finally:
        vars(client).pop("upload_file", None)
