"""How files of a Hugging Face repository get into the hub's own cache: complete, resumable and checked.

It uses the hub's client and its cache layout; it knows nothing of what the files are.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.file_download import hf_hub_url, http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects

from phi3_mlflow.runtime.errors import WeightsError, shorten
from phi3_mlflow.runtime.hashes import hash_file
from phi3_mlflow.runtime.snapshots import is_commit

# The client reads this at every request, so it also holds where it was imported before.
constants.HF_HUB_DISABLE_TELEMETRY = True

_TIMEOUT = 10.0  # seconds for the answer to the first request


class HubUnreachableError(WeightsError):
    """The hub gives no answer, or none that tells anything about the repository."""


@dataclass(frozen=True)
class Listing:
    """What the hub says of a repository at a revision.

    Attributes:
        repo: `organization/name`.
        revision: what was asked for: a branch, tag or commit.
        commit: the commit that it stands for, 40 hexadecimal digits.
        files: the files with their sizes and hashes.
    """

    repo: str
    revision: str
    commit: str
    files: list[RepoSibling]

    def names(self) -> set[str]:
        """The files' paths in the repository."""
        return {file.rfilename for file in self.files}


def cached(repo: str, revision: str, patterns: tuple[list[str], list[str]]) -> Path | None:
    """The snapshot folder of a revision in the cache, without any network call.

    Args:
        repo: `organization/name`.
        revision: a commit, or a branch or tag that was downloaded before.
        patterns: what to take and what of that to leave, in the hub client's glob syntax.

    Returns:
        The folder, or None if it is not there or files are known to be missing from it.
    """
    allow, ignore = patterns
    with _explained(repo, revision):
        try:
            return Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore, local_files_only=True
                )
            )
        except errors.LocalEntryNotFoundError:
            return None


def listing(repo: str, revision: str) -> Listing:
    """Asks the hub what a revision holds, in one request.

    Raises:
        HubUnreachableError: there is no network, the hub is offline or busy, or HF_HUB_OFFLINE is set.
        WeightsError: the repository or revision does not exist or is not open to the user.
    """
    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        return Listing(repo, revision, str(info.sha), list(info.siblings or []))


def download(listing: Listing, patterns: tuple[list[str], list[str]]) -> Path:
    """Downloads what is missing in the cache, with the hub client's progress bars.

    Every new file is compared with the hub's hash of it. A large file that was cut off is continued, by a later
    process too.

    Args:
        listing: what `listing` returned.
        patterns: what to take and what of that to leave, in the hub client's glob syntax.

    Returns:
        The snapshot folder; its name is the commit.

    Raises:
        WeightsError: the transfer failed, a file arrived damaged, or the disk is full.
    """
    allow, ignore = patterns
    storage, root = _places(listing)
    large: list[RepoSibling] = []
    small: list[RepoSibling] = []
    for file in _wanted(listing, patterns):
        if not (root / file.rfilename).exists():
            (large if _is_large(file) else small).append(file)
    with _explained(listing.repo, listing.revision):
        _check_space(storage / "blobs", large)
        for file in large:
            _fetch(listing, file, storage)
        snapshot_download(listing.repo, revision=listing.commit, allow_patterns=allow, ignore_patterns=ignore)
        for file in small:
            _check_small(root / file.rfilename, file.blob_id)
            _sweep(storage, file.blob_id)
        if not is_commit(listing.revision):  # what the client reads when it is offline
            ref = storage / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit)
    return root


def cache() -> Path:
    """The folder that downloads go to."""
    return Path(constants.HF_HUB_CACHE)


def sizes(listing: Listing, patterns: tuple[list[str], list[str]]) -> tuple[int, int]:
    """What a download comes to, without any network call.

    Args:
        listing: what `listing` returned.
        patterns: as for `download`.

    Returns:
        Bytes of all wanted files, and of those what is still to come.
    """
    storage, root = _places(listing)
    files = _wanted(listing, patterns)
    missing = [file for file in files if not (root / file.rfilename).exists()]
    return sum(file.size or 0 for file in files), sum(_to_come(storage / "blobs", file) for file in missing)


def _places(listing: Listing) -> tuple[Path, Path]:
    """The repository's folder in the cache, and the snapshot's in it."""
    storage = cache() / repo_folder_name(repo_id=listing.repo, repo_type="model")
    return storage, storage / "snapshots" / listing.commit


def _wanted(listing: Listing, patterns: tuple[list[str], list[str]]) -> list[RepoSibling]:
    allow, ignore = patterns
    return list(
        filter_repo_objects(
            listing.files, allow_patterns=allow, ignore_patterns=ignore, key=lambda file: file.rfilename
        )
    )


def _is_large(file: RepoSibling) -> bool:
    return file.lfs is not None and re.fullmatch("[0-9a-f]{64}", file.lfs.sha256) is not None


def _to_come(blobs: Path, file: RepoSibling) -> int:
    """Bytes of a file that are in no blob yet, not even in a part of one."""
    if file.lfs is None or not _is_large(file):
        return file.size or 0
    blob = blobs / file.lfs.sha256
    if blob.exists():
        return 0
    part = _part(blob)
    return max(0, file.lfs.size - (part.stat().st_size if part.exists() else 0))


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.partial")


def _check_space(blobs: Path, files: list[RepoSibling]) -> None:
    blobs.mkdir(parents=True, exist_ok=True)
    wanted = sum(_to_come(blobs, file) for file in files)
    free = shutil.disk_usage(blobs).free
    if wanted > free:
        raise WeightsError(
            f"the download needs {wanted / 1e9:.1f} GB and {blobs} has {free / 1e9:.1f} GB left: free some space, or "
            "set HF_HOME to a folder on a larger disk"
        )


def _fetch(listing: Listing, file: RepoSibling, storage: Path) -> None:
    """Downloads one large file into the cache.

    The client by itself takes up a broken connection again, but deletes its part when the process ends.
    """
    assert file.lfs is not None
    name, blob = file.rfilename, storage / "blobs" / file.lfs.sha256
    partial = _part(blob)
    with _locked(storage, blob.name):
        if blob.exists():
            return
        if partial.exists() and partial.stat().st_size > file.lfs.size:
            partial.unlink()
        with partial.open("ab") as stream:
            http_get(
                hf_hub_url(listing.repo, name, revision=listing.commit),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=file.lfs.size,
                displayed_filename=PurePosixPath(name).name,
            )
        if hash_file(partial) != blob.name:
            partial.unlink()
            raise WeightsError(f"{name} of {listing.repo} arrived damaged (its sha256 is not the hub's): run it again")
        partial.replace(blob)


def _check_small(path: Path, blob_id: str | None) -> None:
    """Checks a file that is kept in git by its git hash, and deletes it from the cache if it differs."""
    content = path.read_bytes()
    if blob_id is not None and hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise WeightsError(f"{path.name} arrived damaged (its git hash is not the hub's): run it again")


def _sweep(storage: Path, blob_id: str | None) -> None:
    """Deletes what downloads of a small file left when they were killed; the client gives each a name of its own."""
    if blob_id is not None:
        with _locked(storage, blob_id):
            for part in (storage / "blobs").glob(f"{blob_id}.*.incomplete"):
                part.unlink(missing_ok=True)


@contextmanager
def _locked(storage: Path, blob: str) -> Iterator[None]:
    """The client's own lock of a file in its cache."""
    lock = storage.parent / ".locks" / storage.name / f"{blob}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        yield


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        # The original is left out of the chain: its text can hold signed URLs and request headers.
        raise _explain(cause or error, repo, revision) from None


def _explain(error: BaseException, repo: str, revision: str) -> WeightsError:
    """One line for a failed request: what happened and what to do. Nothing of it comes from the server."""
    hub = urlsplit(constants.ENDPOINT).hostname
    not_local = f"there is no local folder {repo} here either"
    match error:
        case errors.OfflineModeIsEnabled():
            return HubUnreachableError(
                f"{repo} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it to "
                "download the files, or give a local folder"
            )
        case errors.GatedRepoError():
            return WeightsError(
                f"{repo} asks you to accept its terms: do so at https://{hub}/{repo}, then run `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return WeightsError(
                f"{hub} has no repository {repo} that is open to you, and {not_local}: check the spelling; for a "
                "private repository run `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return WeightsError(
                f"{repo} has no revision {shorten(revision)}: give a branch, a tag or a commit of 40 digits"
            )
        case errors.HFValidationError():
            return WeightsError(f"{repo} is not a name that {hub} allows, and {not_local}: check the spelling")
        case UnicodeError():
            return WeightsError("the token in HF_TOKEN or of `hf auth login` is no token: set it again")
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, hub, repo)
        case OSError(errno=errno.ENOSPC):
            return WeightsError(
                f"the disk with {constants.HF_HUB_CACHE} is full: free some space, or set HF_HOME to a larger disk"
            )
        case OSError(filename=str(name), strerror=str(reason)):
            return WeightsError(f"{name} cannot be used: {reason}; set HF_HOME to a folder of your own")
    return HubUnreachableError(
        f"the download of {repo} from {hub} failed ({type(error).__name__}), and {not_local}: check the network and "
        "HTTPS_PROXY and run it again, it goes on where it stopped; or give a local folder"
    )


def _explain_status(status: int, hub: str | None, repo: str) -> WeightsError:
    if status in (401, 403):
        return WeightsError(f"{hub} refused access to {repo} ({status}): check your token with `hf auth whoami`")
    if status == 429:
        return HubUnreachableError(
            f"{hub} allows no more requests for now (429): wait some minutes, or run `hf auth login` for a higher limit"
        )
    return HubUnreachableError(f"{hub} answered {status} for {repo}: try again later, what has arrived is kept")
