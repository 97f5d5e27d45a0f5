"""Files into the blob container of a datastore: by blocks, several at once, resumable, with a token that is renewed.

It knows nothing of models or of what the files hold.
"""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from phi3_mlflow.azure.errors import AzureError
from phi3_mlflow.azure.staging import Progress, StagedFile

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.storage.blob import ContainerClient

BLOCK = 8 << 20
THREADS = 8
# Seconds before the second try and base of the exponential growth after it; tries in all are one more than "total".
RETRIES = {"total": 4, "first": 1, "base": 2}
# Codes of a 403 that a fresh signature can cure; any other 403 is about rights.
_STALE = frozenset({"AuthenticationFailed", "AuthorizationFailure", "InvalidAuthenticationInfo"})
_HASH = "sha256"

T = TypeVar("T")


@dataclass
class Datastore:
    """A datastore's blob container.

    Args:
        client: the workspace's client.
        name: the datastore's name.
        url: https address of the storage account.
        container_name: the container.
        secret: a signature or key of the datastore, or None where identities are used.
        renewable: whether asking again gives a fresh signature.
    """

    client: "MLClient"
    name: str
    url: str
    container_name: str
    secret: str | None = field(repr=False)
    renewable: bool
    generation: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _signature: Any = field(default=None, repr=False)

    def container(self) -> "ContainerClient":
        """A client for the container, whose signature `renew` replaces in place."""
        from azure.core.credentials import AzureSasCredential
        from azure.storage.blob import BlobServiceClient, ExponentialRetry

        credential: Any = self.client._credential
        if self.renewable:
            credential = self._signature = AzureSasCredential(str(self.secret))
        elif self.secret:
            account = self.url.removeprefix("https://").split(".")[0]
            credential = {"account_name": account, "account_key": self.secret}
        retry = ExponentialRetry(
            initial_backoff=RETRIES["first"], increment_base=RETRIES["base"], retry_total=RETRIES["total"]
        )
        service = BlobServiceClient(
            self.url, credential=credential, retry_policy=retry, connection_timeout=20, read_timeout=120
        )
        return service.get_container_client(self.container_name)

    def renew(self, seen: int) -> None:
        """Fetches a fresh signature, once for all threads that saw the same stale one."""
        with self._lock:
            if self.generation == seen:
                self._signature.update(str(_secret(self.client, self.name)[0]))
                self.generation += 1

    def attempt(self, call: Callable[[], T]) -> T:
        """Runs a storage call; a stale signature is renewed once and the call run again."""
        from azure.core.exceptions import HttpResponseError

        seen = self.generation
        try:
            return call()
        except HttpResponseError as error:
            code = str(getattr(error.error_code, "value", error.error_code) if hasattr(error, "error_code") else "")
            if not self.renewable or error.status_code not in (401, 403) or code not in _STALE:
                raise
        self.renew(seen)
        return call()


def open_datastore(client: "MLClient", name: str | None = None) -> Datastore:
    """The blob datastore of a name, or the workspace's default one.

    Raises:
        AzureError: the datastore is no blob container, or would be spoken to without TLS.
    """
    found = client.datastores.get(name) if name else client.datastores.get_default()
    kind = str(getattr(found.type, "value", found.type))
    if kind.lower().replace("_", "") != "azureblob":
        raise AzureError(f"datastore {found.name} is of type {kind}: give a blob datastore with --datastore")
    protocol, endpoint = getattr(found, "protocol", None) or "https", getattr(found, "endpoint", None)
    if protocol != "https":
        raise AzureError(f"datastore {found.name} speaks {protocol}: its credentials only travel over https")
    secret, renewable = None, False
    if type(found.credentials).__name__ not in ("NoneCredentialConfiguration", "AadCredentialConfiguration"):
        secret, renewable = _secret(client, str(found.name))
    url = f"https://{found.account_name}.blob.{endpoint or 'core.windows.net'}"
    return Datastore(client, str(found.name), url, str(found.container_name), secret, renewable)


def listing(datastore: Datastore, container: "ContainerClient", prefix: str) -> dict[str, Any]:
    """The blobs below a prefix by their name relative to it, with their metadata."""
    blobs = datastore.attempt(
        lambda: list(container.list_blobs(name_starts_with=prefix.rstrip("/") + "/", include=["metadata"]))
    )
    return {blob.name.removeprefix(prefix.rstrip("/") + "/"): blob for blob in blobs}


def fetch(datastore: Datastore, container: "ContainerClient", name: str) -> bytes:
    """A small blob's content."""
    return datastore.attempt(lambda: bytes(container.download_blob(name).readall()))


def known_hash(blob: Any) -> str | None:
    """The sha256 that an upload noted on a blob, or None."""
    return dict(blob.metadata or {}).get(_HASH)


def upload(datastore: Datastore, files: list[StagedFile], prefix: str, progress: Progress = lambda _: None) -> int:
    """Uploads files below a prefix; what an earlier, cut upload has left there is not sent again.

    Whole files are known by size and hash, blocks of a large file by their place, which is safe as long as the prefix
    is made from the content's digest.

    Args:
        datastore: where to.
        files: what, in order; the last one is sent when all others have arrived.
        prefix: the folder in the container.
        progress: called with a number of bytes whenever that many more are in Azure, from several threads.

    Returns:
        The number of bytes sent by this call.
    """
    container = datastore.container()
    there = listing(datastore, container, prefix)
    sent: list[int] = []

    def count(size: int) -> None:
        sent.append(size)
        progress(size)

    with ThreadPoolExecutor(THREADS) as pool:
        for group in (files[:-1], files[-1:]):
            todo = [file for file in group if not _arrived(there.get(file.name), file)]
            progress(sum(file.size for file in group) - sum(file.size for file in todo))
            _all(
                [pool.submit(_small, datastore, container, prefix, file, count) for file in todo if file.size <= BLOCK]
            )
            for file in todo:
                if file.size > BLOCK:
                    _large(pool, datastore, container, prefix, file, count, progress)
    return sum(sent)


def _arrived(blob: Any, file: StagedFile) -> bool:
    return blob is not None and blob.size == file.size and known_hash(blob) == file.sha256


def _small(datastore: Datastore, container: "ContainerClient", prefix: str, file: StagedFile, count: Progress) -> None:
    data = file.path.read_bytes()
    blob = container.get_blob_client(f"{prefix}/{file.name}")
    datastore.attempt(
        lambda: blob.upload_blob(data, overwrite=True, metadata={_HASH: file.sha256}, validate_content=bool(data))
    )
    count(len(data))


def _large(
    pool: ThreadPoolExecutor,
    datastore: Datastore,
    container: "ContainerClient",
    prefix: str,
    file: StagedFile,
    count: Progress,
    progress: Progress,
) -> None:
    from azure.core.exceptions import ResourceNotFoundError
    from azure.storage.blob import BlobBlock

    blob = container.get_blob_client(f"{prefix}/{file.name}")
    try:
        waiting = datastore.attempt(lambda: blob.get_block_list("uncommitted"))[1]
    except ResourceNotFoundError:
        waiting = []
    there = {block.id: block.size for block in waiting}
    places = [(_block_id(start), start, min(BLOCK, file.size - start)) for start in range(0, file.size, BLOCK)]

    def send(name: str, start: int, size: int) -> None:
        with file.path.open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        datastore.attempt(lambda: blob.stage_block(name, data, length=size, validate_content=True))
        count(size)

    missing = [place for place in places if there.get(place[0]) != place[2]]
    progress(file.size - sum(size for _, _, size in missing))
    _all([pool.submit(send, *place) for place in missing])
    blocks = [BlobBlock(block_id=name) for name, _, _ in places]
    datastore.attempt(lambda: blob.commit_block_list(blocks, metadata={_HASH: file.sha256}))


def _block_id(start: int) -> str:
    # All ids of a blob must have the same length. The block size is part of it, so that another one never matches.
    return f"{BLOCK:010d}-{start:016d}"


def _all(futures: list[Future[None]]) -> None:
    """Waits for all; the first failure drops what has not begun yet, and is raised."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        failed = next((future for future in done if future.exception()), None)
        if failed:
            for future in waiting:
                future.cancel()
            wait(waiting)
            failed.result()


def _secret(client: "MLClient", name: str) -> tuple[str | None, bool]:
    """A datastore's signature or key and whether it is a signature; (None, False) where the service gives none.

    The public `get(include_secrets=True)` loses the signature of a datastore that is kept with an account key.
    """
    from azure.core.exceptions import HttpResponseError

    try:
        secrets = client.datastores._list_secrets(name, expirable_secret=True)
    except HttpResponseError as error:
        if error.status_code != 403:
            raise
        return None, False
    signature = getattr(secrets, "sas_token", None)
    return (signature, True) if signature else (getattr(secrets, "key", None), False)
