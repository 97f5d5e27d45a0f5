"""The copy of a model folder that goes to Azure: linked weights, adapted environment files, one digest over all.

It knows nothing of where the files go.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from phi3_mlflow.azure import environment
from phi3_mlflow.azure.check import check, passing_staged
from phi3_mlflow.azure.errors import AzureError
from phi3_mlflow.azure.model import LoggedModel, read
from phi3_mlflow.embedding import embed

# A name without a dot: azure-ai-ml and the service take a last part with a dot for a file.
FOLDER = "model"
_LEFT_OUT = (".amlignore", ".gitignore")
# Files below this size are copied, so that editing the staged copy never changes the model.
_COPIED_BELOW = 1 << 20
_THREADS = 2

Progress = Callable[[int], None]


@dataclass(frozen=True)
class StagedFile:
    """One file on its way to Azure.

    Args:
        name: its path below the model folder, with forward slashes.
        path: where its bytes are.
        size: in bytes.
        sha256: of its content, hexadecimal.
    """

    name: str
    path: Path
    size: int
    sha256: str


def stage(model: LoggedModel, parent: Path) -> LoggedModel:
    """Builds `parent/model`: the model's files without copying its weights, and environment files that Azure can use.

    Large files become hard links, or symbolic links where the file system refuses those; small ones are copied. Ignore
    files at the top are left out. Weights that the model only refers to are put in. The environment files are adapted
    where the signature suits the no-code image.

    Args:
        model: the logged model.
        parent: an existing folder without an entry called `model`.

    Returns:
        The staged model, with the original's URI and version.

    Raises:
        AzureError: `parent/model` exists, or a file cannot be linked or copied.
        WeightsError: the model refers to weights that are not in the hub's cache, or not what was logged.
    """
    target = parent / FOLDER
    try:
        target.mkdir(parents=True)
        for source in model.files():
            name = source.relative_to(model.folder)
            if str(name) not in _LEFT_OUT:
                _place(source, target / name)
        embed(model.place, target, _place)
        if "ncd" in passing_staged(check(model)):
            environment.adapt(target)
    except FileExistsError:
        raise AzureError(f"{target} exists already: give another folder, or delete it") from None
    except OSError as error:
        raise AzureError(f"{error.filename or target} cannot be staged: {error.strerror}") from None
    return replace(read(target, model.uri), version=model.version)


def inventory(model: LoggedModel, progress: Progress = lambda _: None) -> list[StagedFile]:
    """The model's files with their hashes, MLmodel last.

    MLmodel goes last so that an upload which was cut never looks like a whole model.

    Args:
        model: a staged model.
        progress: called with a number of bytes whenever that many more are hashed, from several threads.
    """
    files = model.files()
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(lambda path: _sha256(path, progress), files))
    staged = [
        StagedFile(path.relative_to(model.folder).as_posix(), path, path.stat().st_size, sha256)
        for path, sha256 in zip(files, hashes, strict=True)
    ]
    return sorted(staged, key=lambda file: (file.name == "MLmodel", file.name))


def digest(hashes: dict[str, str]) -> str:
    """One sha256 over a folder: over the lines "sha256  name" sorted by name, as `sha256sum` prints them."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    if real.stat().st_size < _COPIED_BELOW:
        shutil.copyfile(real, target)
        return
    try:
        os.link(real, target)
    except OSError:
        target.symlink_to(real)


def _sha256(path: Path, progress: Progress) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(4 << 20):
            found.update(chunk)
            progress(len(chunk))
    return found.hexdigest()
