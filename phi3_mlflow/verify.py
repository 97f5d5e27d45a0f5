"""Whether a logged model is what was logged: its files, what they could do, and who signed it.

It loads no model and runs nothing of it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from phi3_mlflow.azure.model import NOT_MODEL, LoggedModel, opened
from phi3_mlflow.runtime import manifest, snapshots
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError

_MAX_REASON = 300  # characters; it lists every file
Status = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: a file's path in the model, or `MLmodel`, `contents` (what the weights could do) or `signature`.
        status: `not checked` where there is nothing to check, or no key to check it with.
        detail: what was found, in one line.
    """

    name: str
    status: Status
    detail: str


def run(
    uri: str,
    *,
    public_key: Path | None = None,
    certificates: Sequence[Path] = (),
    signature: Path | None = None,
    progress: bool = False,
) -> list[Check]:
    """Checks a logged model.

    Args:
        uri: any model URI of MLflow, or a folder.
        public_key: a PEM file with the elliptic curve key that the model was signed with.
        certificates: in its place, PEM files with the certificates that vouch for the signer's.
        signature: the signature's file; None for `model.sig` in the model's folder.
        progress: show a bar on stderr where hashing takes long.

    Returns:
        What was checked: files in the manifest's order, then `MLmodel`, `contents`, `signature`.

    Raises:
        Phi3Error: there is no model of this toolkit under that URI, or both a key and certificates were given.
    """
    if public_key is not None and certificates:
        raise Phi3Error("a signature is checked with a public key or with certificates, not with both: leave one out")
    with opened(uri) as model:
        place = model.place
        if not (place.listed / manifest.NAME).is_file() and not model.weights:
            raise Phi3Error(f"{uri} was not logged by phi3_mlflow: it has no {manifest.NAME} of its weights")
        checks = [
            *_files(model.folder, place, progress=progress),
            _checked("MLmodel", lambda: manifest.check_stated(place.listed), "states the digest of these weights"),
            _checked("contents", lambda: place.check(place.find()), "the weights hold nothing that could run code"),
            _signature(model, signature or model.folder / manifest.SIGNATURE, public_key, certificates),
        ]
        # A registered model is read from wherever the store has it, or from a folder that is gone afterwards.
        folder = os.path.abspath(model.folder)
        return [replace(check, detail=check.detail.replace(folder, uri.rstrip("/"))) for check in checks]


def table(checks: Sequence[Check]) -> str:
    """The checks as lines of text, one for each."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.status:11}  {check.name:{width}}  {check.detail}" for check in checks)


def _files(model: Path, place: snapshots.Place, *, progress: bool) -> Iterator[Check]:
    """The files that the manifest lists; of a reference those in the hub's cache, under the hub's name for them."""
    prefix = "" if place.listed == model else f"{place.listed.relative_to(model).as_posix()}/"
    held = f"{place.reference.source}/" if place.reference else prefix
    try:
        sizes = manifest.sizes(place.listed)
        files = place.find()
        with tqdm(
            total=sum(sizes.values()), unit="B", unit_scale=True, delay=2, leave=False, disable=not progress
        ) as bar:
            found = manifest.compare(place.listed, place.parts, bar.update, files=files if place.reference else None)
            for name, problem in found:
                if problem is None:
                    yield Check(held + name, "ok", f"{sizes[name]:,} bytes")
                else:
                    yield Check(held + name, "failed", problem)
    except WeightsError as error:
        yield Check(prefix + manifest.NAME, "failed", str(error))


def _checked(name: str, check: Callable[[], None], good: str) -> Check:
    try:
        check()
    except WeightsError as error:
        return Check(name, "failed", str(error))
    return Check(name, "ok", good)


def _signature(model: LoggedModel, path: Path, public_key: Path | None, certificates: Sequence[Path]) -> Check:
    wanted = public_key is not None or bool(certificates)
    if not path.is_file():
        detail = f"there is no signature ({path})"
        return Check("signature", "failed" if wanted else "not checked", detail)
    if not wanted:
        detail = f"there is a signature ({path}) and no key to check it with: give --public-key or --certificate"
        return Check("signature", "not checked", detail)
    try:
        from model_signing import hashing, verifying
    except ModuleNotFoundError as error:
        raise Phi3Error(f"a signature needs {error.name}: pip install 'phi3-mlflow[signing]'") from error
    ignored = [Path(name) for name in NOT_MODEL]
    if path.resolve().is_relative_to(model.folder.resolve()):
        ignored.append(path.resolve().relative_to(model.folder.resolve()))
    try:
        config = verifying.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=ignored))
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config.use_certificate_verifier(certificate_chain=certificates)
        with redirect_stdout(sys.stderr):  # it prints a warning about old signatures
            config.verify(model.folder, path)
    except Exception as error:  # model_signing raises whatever its parsers and its cryptography raise
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        if "__pycache__" in reason:
            reason = f"Python left __pycache__ folders there; delete them and verify again ({reason})"
        return Check("signature", "failed", f"{path} does not fit this model and this key: {reason}")
    return Check("signature", "ok", f"{path} signs every file of the model, its code included")
