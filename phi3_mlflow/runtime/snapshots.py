"""Where the weights of a logged model are: in its folder, or, for a reference, at a commit in the hub's cache.

It finds files; what they hold is not looked at here. Nothing is downloaded unless the user's environment says so.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Literal

from . import manifest, trust
from .errors import WeightsError, shorten

# The user's word that what is not in the cache may be downloaded while a model is loaded.
DOWNLOAD = "PHI3_MLFLOW_DOWNLOAD"
# Where a logged model has the weights of the ONNX form, and the manifest of those that it only refers to.
WEIGHTS = "artifacts/weights"

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"


@dataclass(frozen=True)
class Reference:
    """A folder of a hub repository at one commit.

    Attributes:
        source: `organization/name`, and the folder in it where there is one: `organization/name/sub/folder`.
        commit: 40 hexadecimal digits.
        form: `transformers` or `onnx`.
    """

    source: str
    commit: str
    form: Literal["transformers", "onnx"]

    @property
    def command(self) -> str:
        """What brings the files into the cache."""
        return f"phi3-mlflow pull {self.source} --revision {self.commit} --form {self.form}"

    def find(self, names: list[str]) -> Path:
        """The folder in the cache that has these files; they are downloaded first where the environment allows it.

        Raises:
            WeightsError: a file is not there, with the command that brings it; or the download fails, or the folder is
                a link that leaves the cache.
        """
        from huggingface_hub import constants  # takes a while

        organization, name, *folders = self.source.split("/")
        cache = Path(constants.HF_HUB_CACHE)
        folder = Path(cache, f"models--{organization}--{name}", "snapshots", self.commit, *folders)
        missing = [name for name in names if not (folder / name).exists()]
        if missing and os.environ.get(DOWNLOAD, "").lower() in ("1", "true"):
            self._download(missing)
            missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise WeightsError(
                f"the model refers to {self.source} at commit {self.commit}, and {folder / missing[0]} is not there: "
                f"run `{self.command}`, or set {DOWNLOAD}=1 to have it downloaded when the model is loaded"
            )
        if not folder.resolve().is_relative_to(cache.resolve()):
            raise WeightsError(f"{folder} is a link to {folder.resolve()}, outside the cache: delete it")
        return folder

    def _download(self, names: list[str]) -> None:
        from huggingface_hub import constants, snapshot_download

        constants.HF_HUB_DISABLE_TELEMETRY = True  # read at every request
        organization, name, *folders = self.source.split("/")
        patterns = [escape("/".join((*folders, name))) for name in names]
        try:
            snapshot_download(f"{organization}/{name}", revision=self.commit, allow_patterns=patterns)
        except Exception as error:
            # The original is left out of the chain: its text can hold signed URLs and request headers.
            raise WeightsError(
                f"the download of {self.source} failed ({type(error).__name__}): `{self.command}` tries again and says "
                "more"
            ) from None


@dataclass(frozen=True)
class Place:
    """Where the weights of one logged model are.

    Attributes:
        listed: the folder with their manifest.
        parts: its subfolders that the manifest lists, as for `manifest.write`.
        form: `transformers` or `onnx`.
        reference: what has the files; None where they are in `listed`.
    """

    listed: Path
    parts: tuple[str, ...]
    form: Literal["transformers", "onnx"]
    reference: Reference | None

    def names(self) -> list[str]:
        """The files that the manifest lists, as paths below their folder.

        Raises:
            WeightsError: the manifest is missing or makes no sense.
        """
        return list(manifest.sizes(self.listed))

    def find(self) -> Path:
        """The folder that has the files; see `Reference.find`."""
        return self.listed if self.reference is None else self.reference.find(self.names())

    def check(self, folder: Path) -> None:
        """Checks what the files could do; see `trust`.

        Args:
            folder: from `find`.

        Raises:
            WeightsError: one is not to be trusted.
        """
        names = None if self.reference is None else self.names()
        if self.form == "onnx":
            trust.check(folder, names)
        elif self.parts == trust.TRANSFORMERS_PARTS:
            trust.check_transformers(folder)
        else:
            trust.check_flat_transformers(folder, names)

    def configuration(self, folder: Path) -> Path:
        """The folder with config.json or genai_config.json, given the one from `find`."""
        return folder / "model" if self.parts == trust.TRANSFORMERS_PARTS else folder

    def tokenizer(self, folder: Path) -> Path:
        """The folder with the tokenizer, given the one from `find`."""
        return folder / "components" / "tokenizer" if self.parts == trust.TRANSFORMERS_PARTS else folder


def place(folder: Path, flavors: Mapping[str, Any], metadata: Mapping[str, Any]) -> Place:
    """What a model's MLmodel file says of its weights.

    Args:
        folder: the model's.
        flavors: of MLmodel.
        metadata: of MLmodel.

    Raises:
        WeightsError: it refers to something that is no folder of a hub repository at a commit.
    """
    form: Literal["transformers", "onnx"] = "transformers" if "transformers" in flavors else "onnx"
    noted = metadata.get("weights") or {}
    reference = None
    if noted.get("reference"):
        source, commit = noted.get("source"), noted.get("revision")
        if not (isinstance(source, str) and is_hub_id(source) and isinstance(commit, str) and is_commit(commit)):
            raise WeightsError(
                f"{folder} refers to the weights {shorten(source)} at {shorten(commit)}: it must be a Hugging Face id "
                "and a commit of 40 digits; do not use this copy"
            )
        reference = Reference(source, commit, form)
    if form == "transformers" and reference is None and not (folder / WEIGHTS / manifest.NAME).is_file():
        return Place(folder, trust.TRANSFORMERS_PARTS, form, None)
    return Place(folder / WEIGHTS, ("",), form, reference)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hugging Face id: `organization/name`, or a folder below it."""
    return re.fullmatch(f"{_PART}(?:/{_PART})+", text, re.ASCII) is not None and ".." not in text and "--" not in text


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit, which can never mean another one tomorrow."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None
