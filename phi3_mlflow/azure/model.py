"""A logged MLflow model as Azure will see it: its folder, signature, flavors, provenance, size and memory.

It reads MLmodel as plain data and asks MLflow only where a URI has to be turned into a folder.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from phi3_mlflow import uris
from phi3_mlflow.azure.errors import AzureError
from phi3_mlflow.runtime import manifest, mlmodel, snapshots
from phi3_mlflow.runtime.errors import FormatError, shorten, without_passwords

# Written by MLflow beside a registered model when it is loaded; no part of the model.
NOT_MODEL = frozenset({"registered_model_meta"})
_TASKS = ("llm/v1/chat", "llm/v1/completions", "flat")
# Weights once more for buffers that a runtime packs them into, then Python, MLflow and the operating system.
_WEIGHTS_FACTOR, _BASE_BYTES = 1.15, 1 << 30
# A key-value cache is sized for at most this many tokens, whatever the config's context length says.
_MOST_CONTEXT = 4096


@dataclass(frozen=True)
class LoggedModel:
    """A model folder and what its MLmodel file says.

    Args:
        folder: the folder that holds MLmodel.
        uri: how the caller named the model.
        version: the version in MLflow's own registry, or None.
        data: MLmodel's content.
    """

    folder: Path
    uri: str
    version: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def flavors(self) -> dict[str, dict[str, Any]]:
        """MLmodel's flavors by name."""
        return dict(self.data.get("flavors") or {})

    @property
    def metadata(self) -> dict[str, Any]:
        """What the builder noted: task, format, weights."""
        return dict(self.data.get("metadata") or {})

    @property
    def weights(self) -> dict[str, Any]:
        """Source, revision, licence and digest of the weights."""
        return dict(self.metadata.get("weights") or {})

    def columns(self, side: str) -> list[dict[str, Any]] | None:
        """The columns of one side of the signature ("inputs", "outputs" or "params"), None where it has none."""
        text = (self.data.get("signature") or {}).get(side)
        return None if text is None else list(json.loads(text))

    @property
    def task(self) -> str:
        """The task that decides the shape of a request: as noted, else guessed from the input columns."""
        noted = self.metadata.get("task")
        if noted in _TASKS:
            return str(noted)
        columns = {str(column.get("name")): column.get("type") for column in self.columns("inputs") or []}
        return "llm/v1/chat" if columns.get("messages") == "array" else "flat"

    def files(self) -> list[Path]:
        """All files below the folder, links followed, sorted; without what is no part of the model."""
        found: list[Path] = []
        entered: set[Path] = set()
        for root, folders, names in os.walk(self.folder, followlinks=True):
            # A link that leads back up would be walked for ever.
            entered.add(Path(root).resolve())
            below = [name for name in folders if name != "__pycache__"]
            folders[:] = [name for name in below if Path(root, name).resolve() not in entered]
            found += [Path(root, name) for name in names if name not in NOT_MODEL]
        return sorted(path for path in found if path.is_file())

    @property
    def place(self) -> snapshots.Place:
        """Where the weights are.

        Raises:
            WeightsError: the model refers to something that is no commit on the hub.
        """
        return snapshots.place(self.folder, self.flavors, self.metadata)

    @property
    def size(self) -> int:
        """Bytes of all files, those that the model only refers to included."""
        place = self.place
        listed = place.reference is not None and (place.listed / manifest.NAME).is_file()
        referred = sum(manifest.sizes(place.listed).values()) if listed else 0
        return referred + sum(path.stat().st_size for path in self.files())

    @property
    def memory(self) -> int:
        """Bytes of memory that serving one copy of the model takes at most, estimated.

        The files with a share for packed weights, the key-value cache in fp32 for the whole context (2 x layers x
        key-value heads x head size x 4 bytes a token), and 1 GiB for Python, MLflow and the system.

        Raises:
            WeightsError: the model refers to weights that are not in the hub's cache.
        """
        configs = list(self.place.find().iterdir()) if self.place.reference else self.files()
        return int(self.size * _WEIGHTS_FACTOR) + max(map(_cache, configs), default=0) + _BASE_BYTES


def read(folder: Path, uri: str = "", version: str | None = None) -> LoggedModel:
    """Reads the model in a folder.

    Raises:
        AzureError: the folder holds no MLmodel, or one that makes no sense.
    """
    try:
        data = mlmodel.read(folder)
    except FormatError as error:
        raise AzureError(str(error)) from None
    return LoggedModel(folder, uri or str(folder), version, data)


@contextmanager
def opened(uri: str) -> Iterator[LoggedModel]:
    """The model behind a URI: `models:/NAME/1`, `models:/NAME@alias`, `models:/m-...`, `runs:/...` or a folder.

    A model in a local store is read in place; one in a remote store is downloaded to a temporary folder that is gone
    when the block ends.

    Raises:
        Phi3Error: there is no such folder, MLflow does not know the URI, or what it leads to is no model.
    """
    uris.check(uri)
    with tempfile.TemporaryDirectory(prefix="phi3-azure-") as temporary:
        yield read(*_resolve(uri, temporary))


def _resolve(uri: str, temporary: str) -> tuple[Path, str, str | None]:
    if Path(uri).is_dir() or not urlparse(uri).scheme:
        return Path(uri), uri, None
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from phi3_mlflow import tracking

    if uri.startswith(("models:", "runs:")):
        tracking.refuse_unwritable()
    try:
        with tracking.impatient():
            version, local = _version(uri), _local(_place(uri))
        return local or Path(download_artifacts(artifact_uri=uri, dst_path=temporary)), uri, version
    except MlflowException as error:
        reason = without_passwords(error.message.splitlines()[0])
        raise AzureError(f"MLflow does not find {shorten(uri)}: {reason} ({tracking.searched()})") from None


def _place(uri: str) -> str:
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

    # A registered version leads to a logged model or a run, and that to a place.
    while uri.startswith(("models:", "runs:")):
        kind = ModelsArtifactRepository if uri.startswith("models:") else RunsArtifactRepository
        uri = str(kind.get_underlying_uri(uri))
    return uri


def _local(place: str) -> Path | None:
    parsed = urlparse(place)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(place) if not parsed.scheme and Path(place).is_dir() else None


def _version(uri: str) -> str | None:
    if not uri.startswith("models:/"):
        return None
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        import mlflow

        return str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    version = name.partition("/")[2]
    return version if version.isdigit() else None


def _cache(path: Path) -> int:
    """Bytes of key-value cache that a config.json or genai_config.json asks for; 0 for any other file."""
    if path.name not in ("config.json", "genai_config.json"):
        return 0
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "genai_config.json":
            decoder, context = config["model"]["decoder"], config["model"]["context_length"]
            token = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        else:
            heads, context = config["num_attention_heads"], config["max_position_embeddings"]
            head_size = config.get("head_dim") or config["hidden_size"] // heads
            token = config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_size
        return int(2 * 4 * token * min(context, _MOST_CONTEXT))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).info("%s says nothing about its key-value cache: %r", path, error)
        return 0
