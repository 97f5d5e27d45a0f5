"""A logged model becomes a model asset of an Azure ML workspace: staged, checked, uploaded, registered, once.

It knows nothing of endpoints. The pieces it puts together: staging, check, upload.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from phi3_mlflow.azure import staging, upload
from phi3_mlflow.azure.check import MODE_NAMES, Finding, Mode, check, failures, passing
from phi3_mlflow.azure.errors import AzureError, SettingError, explained
from phi3_mlflow.azure.model import LoggedModel, read
from phi3_mlflow.azure.workspace import Workspace
from phi3_mlflow.runtime.errors import shorten

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

PREFIX = "phi3-mlflow"
DIGEST_TAG, MODES_TAG, TASK_TAG, MEMORY_TAG = "phi3_digest", "phi3_modes", "phi3_task", "phi3_memory_mb"
_CONFLICTS = 3
# Files of a remote model that the check and the tags have to read, and how large they may be.
_READ = re.compile(r"(.*/)?(MLmodel|conda\.yaml|requirements\.txt|config\.json|genai_config\.json)")
_READ_LIMIT = 4 << 20
_LONG = re.compile(
    r"azureml://subscriptions/([^/]+)/resource[gG]roups/([^/]+)/(?:.*/)?workspaces/([^/]+)/(datastores/.+)"
)

# Called with what begins ("hash" or "upload") and its size in bytes; the result is then called with every share done.
Meter = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Registration:
    """A registered model.

    Args:
        id: the asset's resource id.
        name: its name.
        version: its version in the workspace.
        digest: sha256 over the model's files.
        modes: the ways of deployment that the check found open.
        created: False where a version with this digest was there already.
        sent: bytes that were uploaded by this call.
        url: the asset's page in the studio.
    """

    id: str
    name: str
    version: str
    digest: str
    modes: tuple[Mode, ...]
    created: bool
    sent: int
    url: str

    def as_dict(self) -> dict[str, Any]:
        """The registration as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A checked model, ready to be registered.

    Args:
        model: the staged model, or the local picture of a remote one.
        modes: the ways of deployment that the check found open.
        digest: sha256 over its files.
        files: what has to be uploaded; empty for a remote model.
    """

    model: LoggedModel
    modes: tuple[Mode, ...]
    digest: str
    files: tuple[staging.StagedFile, ...] = ()


def check_names(name: str, version: str | None) -> None:
    """Refuses a model name or version that Azure ML would refuse.

    Raises:
        SettingError: with the value and what is allowed.
    """
    # https://learn.microsoft.com/azure/machine-learning/reference-yaml-model; the pattern is that of its schema.
    for what, value in (("name", name), ("version", version)):
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", value):
            raise SettingError(
                f"the {what} {shorten(value)} cannot be one in Azure ML: it begins with a letter or digit and has at "
                "most 255 letters, digits, dots, dashes and underscores"
            )


def prepare(model: LoggedModel, parent: Path, mode: Mode | None = None, meter: Meter | None = None) -> Candidate:
    """Stages a model below `parent`, checks the staged copy and hashes it; no call to Azure.

    Args:
        model: the logged model.
        parent: an existing folder for the staged copy.
        mode: the way of deployment that has to be open; with None either will do.
        meter: for progress bars.

    Raises:
        AzureError: the check speaks against the mode, or against both.
    """
    staged = staging.stage(model, parent)
    modes = _open_modes(check(staged), mode)
    files = staging.inventory(staged, meter("hash", staged.size) if meter else lambda _: None)
    return Candidate(staged, modes, staging.digest({file.name: file.sha256 for file in files}), tuple(files))


def register(
    client: "MLClient",
    workspace: Workspace,
    candidate: Candidate,
    name: str,
    version: str | None = None,
    datastore: str | None = None,
    meter: Meter | None = None,
) -> Registration:
    """Uploads a prepared model and registers it; nothing happens where its digest is registered already.

    Args:
        client: from `workspace.connect`.
        workspace: the workspace that the client speaks to.
        candidate: from `prepare`.
        name: the asset's name.
        version: its version; with None the workspace's next one.
        datastore: the blob datastore to upload to; with None the workspace's default one.
        meter: for progress bars.

    Raises:
        AzureError: Azure refuses a step, or the version is taken by another model.
    """
    check_names(name, version)
    known = _known(client, workspace, name, version, candidate.digest)
    if known is not None:
        return _registration(workspace, known, candidate, created=False)
    prefix = str(PurePosixPath(PREFIX, candidate.digest, staging.FOLDER))
    with explained("uploading the model", str(workspace)):
        store = upload.open_datastore(client, datastore)
        progress = meter("upload", sum(file.size for file in candidate.files)) if meter else lambda _: None
        sent = upload.upload(store, list(candidate.files), prefix, progress)
    path = f"azureml://datastores/{store.name}/paths/{prefix}"
    return _create(client, workspace, candidate, name, version, path, sent)


def register_remote(
    client: "MLClient",
    workspace: Workspace,
    remote_path: str,
    name: str,
    temporary: Path,
    version: str | None = None,
    mode: Mode | None = None,
) -> Registration:
    """Registers a model folder that is in a datastore already; its small files are read for the check and the tags.

    Args:
        client: from `workspace.connect`.
        workspace: the workspace that the client speaks to.
        remote_path: `azureml://datastores/NAME/paths/FOLDER`, or the long form with this workspace in it.
        name: the asset's name.
        temporary: an empty folder for the local picture of the model.
        version: its version; with None the workspace's next one.
        mode: the way of deployment that has to be open; with None either will do.

    Raises:
        AzureError: there is no model at the path, the check speaks against it, or Azure refuses a step.
    """
    check_names(name, version)
    datastore, prefix = split_remote(remote_path, workspace)
    with explained(f"reading {remote_path}", str(workspace)):
        store = upload.open_datastore(client, datastore)
        candidate = _picture(store, prefix, temporary, mode, remote_path)
    known = _known(client, workspace, name, version, candidate.digest)
    if known is not None:
        return _registration(workspace, known, candidate, created=False)
    path = f"azureml://datastores/{datastore}/paths/{prefix}"
    return _create(client, workspace, candidate, name, version, path, 0)


def split_remote(remote_path: str, workspace: Workspace) -> tuple[str, str]:
    """Datastore and folder of a remote path.

    Raises:
        SettingError: the path is of another form, names another workspace, or ends in a part with a dot.
    """
    short = remote_path.rstrip("/")
    if long := _LONG.fullmatch(short):
        if (long[1], long[2], long[3]) != (workspace.subscription, workspace.resource_group, workspace.name):
            raise SettingError(f"{shorten(remote_path, 200)} is in another workspace than the one in use: {workspace}")
        short = f"azureml://{long[4]}"
    found = re.fullmatch(r"azureml://datastores/([A-Za-z0-9_-]+)/paths/([^?*]+)", short)
    if not found or ".." in found[2].split("/") or "" in found[2].split("/"):
        raise SettingError(
            f"{shorten(remote_path, 200)} is no remote path: give azureml://datastores/NAME/paths/FOLDER"
        )
    if "." in found[2].split("/")[-1]:
        raise SettingError(
            f"{shorten(remote_path, 200)} ends in a name with a dot, which Azure takes for a file: move the folder"
        )
    return found[1], found[2]


def tags(candidate: Candidate) -> dict[str, str]:
    """The asset's tags: where the model comes from, what it is, and what `azure deploy` needs to know of it."""
    model = candidate.model
    found = {
        "mlflow_model_id": model.data.get("model_id"),
        "mlflow_run_id": model.data.get("run_id"),
        "mlflow_model_version": model.version,
        "mlflow_uri": model.uri if model.uri.startswith(("models:/", "runs:/")) else None,
        "license": model.weights.get("license"),
        "weights_source": model.weights.get("source"),
        "weights_revision": model.weights.get("revision"),
        "weights_sha256": model.weights.get("sha256"),
        DIGEST_TAG: candidate.digest,
        MODES_TAG: ",".join(candidate.modes),
        TASK_TAG: model.task,
        MEMORY_TAG: str(-(-model.memory // (1 << 20))),
    }
    return {key: str(value) for key, value in found.items() if value}


def _open_modes(findings: list[Finding], mode: Mode | None) -> tuple[Mode, ...]:
    modes = passing(findings)
    if modes and (mode is None or mode in modes):
        return modes
    wanted: Mode = mode or "container"
    reasons = "; ".join(f"{finding.rule}: {finding.found} ({finding.fix})" for finding in failures(findings, wanted))
    raise AzureError(f"the model will not load in Azure's {MODE_NAMES[wanted]}: {reasons}")


def _known(client: "MLClient", workspace: Workspace, name: str, version: str | None, digest: str) -> Any | None:
    """The registered version with this digest; an explicit version that holds another model is refused."""
    from azure.core.exceptions import ResourceNotFoundError

    with explained(f"listing the versions of model {name}", str(workspace)):
        try:
            versions = list(client.models.list(name=name))
        except ResourceNotFoundError:
            versions = []
    same = [found for found in versions if (found.tags or {}).get(DIGEST_TAG) == digest]
    if version is None:
        return same[0] if same else None
    taken = next((found for found in versions if str(found.version) == version), None)
    if taken is not None and taken not in same:
        raise AzureError(f"model {name}:{version} is another model (its digest differs): give another --version")
    return taken


def _create(
    client: "MLClient",
    workspace: Workspace,
    candidate: Candidate,
    name: str,
    version: str | None,
    path: str,
    sent: int,
) -> Registration:
    from azure.ai.ml.entities import Model
    from azure.core.exceptions import HttpResponseError

    with explained(f"registering model {name}", str(workspace)):
        for turn in range(_CONFLICTS):
            asset = Model(name=name, version=version, path=path, type="mlflow_model", tags=tags(candidate))
            try:
                found = client.models.create_or_update(asset)
                return _registration(workspace, found, candidate, created=True, sent=sent)
            except HttpResponseError as error:
                if error.status_code != 409:
                    raise
                # Someone else registered at the same time: perhaps this very model, perhaps under our next number.
                known = _known(client, workspace, name, version, candidate.digest)
                if known is not None:
                    return _registration(workspace, known, candidate, created=False, sent=sent)
                if version is not None or turn == _CONFLICTS - 1:
                    raise
    raise AssertionError("the loop returns or raises")


def _registration(workspace: Workspace, asset: Any, candidate: Candidate, created: bool, sent: int = 0) -> Registration:
    return Registration(
        id=str(asset.id),
        name=str(asset.name),
        version=str(asset.version),
        digest=candidate.digest,
        modes=candidate.modes,
        created=created,
        sent=sent,
        url=workspace.studio(f"model/{asset.name}:{asset.version}/details"),
    )


def _picture(store: upload.Datastore, prefix: str, temporary: Path, mode: Mode | None, remote_path: str) -> Candidate:
    """The remote folder as a local one: the small files that matter read, the others empty files of their size."""
    container = store.container()
    blobs = upload.listing(store, container, prefix)
    if "MLmodel" not in blobs:
        raise AzureError(f"{remote_path} holds no MLmodel file: give the folder of a logged model")
    folder = temporary / staging.FOLDER
    for name, blob in blobs.items():
        path = folder / name
        if ".." in PurePosixPath(name).parts or not path.resolve().is_relative_to(folder.resolve()):
            raise AzureError(f"{remote_path} holds a file {shorten(name)}, which leads out of its folder: remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            if _READ.fullmatch(name) and blob.size <= _READ_LIMIT:
                stream.write(upload.fetch(store, container, blob.name))
            else:
                stream.truncate(blob.size)
    model = read(folder, remote_path)
    modes = _open_modes(check(model), mode)
    hashes = {name: upload.known_hash(blob) or f"etag {blob.etag}" for name, blob in blobs.items()}
    return Candidate(model, modes, staging.digest(hashes))
