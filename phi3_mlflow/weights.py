"""Where weights come from: the embedded model, a local folder, or a Hugging Face repository at a pinned revision.

It loads nothing and knows nothing of MLflow. How files get out of the hub is in hub.py, what a folder may hold in
runtime/trust.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import WeightsError, shorten
from phi3_mlflow.runtime.snapshots import is_commit, is_hub_id

Form = Literal["transformers", "onnx"]

EMBEDDED = "embedded"
# The int4 CPU model's folder in Microsoft's -onnx repositories.
ONNX_FOLDER = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
# Commits of the main branches, to be seen at https://huggingface.co/<name>/tree/<commit>.
REVISIONS = {
    "microsoft/Phi-3-mini-4k-instruct": "f39ac1d28e925b323eae81227eaba4464caced4e",
    "microsoft/Phi-3-mini-4k-instruct-onnx": "5f5f794c1c23c9d5ee142af85df02a6cc52d6945",
    "microsoft/Phi-3.5-mini-instruct": "2fe192450127e6a83f7441aef6e3ca586c338b77",
    "microsoft/Phi-4-mini-instruct": "cfbefacb99257ffa30c83adab238a50856ac3083",
    "microsoft/phi-2": "ef382358ec9e382308935a992d908de099b64c23",
}

_PATTERNS = {
    "transformers": ("*.safetensors", "*.json", "*.jinja", "tokenizer.model"),
    "onnx": ("*.onnx", "*.onnx.data", "*.onnx_data", "*.json", "*.jinja", "tokenizer.model"),
}
_CARD_PATTERNS = ("LICENSE*", "NOTICE*", "README.md")
_ONNX_FILES = (
    "genai_config.json",
    "config.json",
    "generation_config.json",
    "quantization.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A checked folder of weights and what is known of its origin.

    Attributes:
        folder: the folder that holds the files; for the hub, inside its cache: read it, never write to it.
        source: the origin in words that hold on any machine: a hub id, the embedded model, or a folder's last name.
        revision: the commit (40 hexadecimal digits) of a hub repository, else None.
        license: the licence's identifier in lower case (`mit`), or `unknown`.
    """

    folder: Path
    source: str
    revision: str | None
    license: str


@dataclass(frozen=True)
class Source:
    """Weights that were found, here or on the hub; nothing of them has been downloaded.

    Attributes:
        name: the origin in words, as in Weights.
        folder: where the files are, or on which disk they will be.
        size: bytes of the files that a model takes.
        missing: bytes of them that are still to be downloaded.
        fetch: downloads what is missing and gives the checked folder; raises WeightsError.
        on_hub: whether they are a hub repository's, in the cache or not.
    """

    name: str
    folder: Path
    size: int
    missing: int
    fetch: Callable[[], Weights]
    on_hub: bool = False


def resolve(weights: str | Path, form: Form, *, revision: str | None = None) -> Weights:
    """Finds weights as `find` does, and downloads what is not yet in the hub's cache.

    Returns:
        The checked folder with its source, commit and licence.

    Raises:
        WeightsError: as for `find`, or the download fails, or the files are not of the wanted form.
    """
    return find(weights, form, revision=revision).fetch()


def find(weights: str | Path, form: Form, *, revision: str | None = None) -> Source:
    """Finds weights and checks what can be known of them without a download.

    Args:
        weights: `embedded`; or a local folder (it wins over a hub repository of the same name); or a Hugging Face id
            `organization/name`, or `organization/name/sub/folder` for one folder of a repository. For the ONNX form
            `organization/name` means its folder `cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4`, or the
            repository's top where that does not exist.
        form: `transformers` (config.json, safetensors, tokenizer) or `onnx` (genai_config.json, ONNX, tokenizer).
        revision: a branch, tag or commit of the hub repository; omitted, the pinned commit in `REVISIONS`, or the
            head of `main` for other names. With a commit that is in the cache, no network call is made.

    Returns:
        What was found.

    Raises:
        WeightsError: nothing is found under that name, or the files that are here are not of the wanted form.
    """
    if not isinstance(weights, str | Path):
        raise WeightsError(f"weights is {shorten(weights)}; it must be `embedded`, a folder or a Hugging Face id")
    if revision is not None and not isinstance(revision, str):
        raise WeightsError(f"revision is {shorten(revision)}; it must be a branch, tag or commit as text")
    text = os.fspath(weights)
    if text != EMBEDDED and not Path(text).expanduser().exists():
        if isinstance(weights, str) and is_hub_id(text):
            return _from_hub(text, form, revision)
        raise WeightsError(
            f"{shorten(text)} is neither a folder that exists (looked for {Path(text).expanduser().absolute()}) nor a "
            f"Hugging Face id such as microsoft/Phi-3-mini-4k-instruct: check the spelling, or use `{EMBEDDED}`"
        )
    if revision is not None:
        raise WeightsError(f"a revision ({shorten(revision)}) goes with a Hugging Face id, not with {shorten(text)}")
    if text == EMBEDDED:
        folder = _embedded_folder(form)
        check(folder, form)
        return _here(Weights(folder, "phi3_mlflow embedded model", None, "mit"), form)
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise WeightsError(f"{folder} is a file: give the folder that holds it")
    check(folder, form)
    return _here(Weights(folder, f"local folder {folder.name}", None, _license(folder) or "unknown"), form)


def check(folder: Path, form: Form) -> None:
    """Checks that a folder holds a complete Phi-3 model of the wanted form, and nothing that could run code.

    Raises:
        WeightsError: a file is missing, empty, of the wrong kind or not to be trusted; the message names it and what
            to do.
    """
    if form == "transformers":
        _transformers_files(folder)
    else:
        onnx_files(folder)


def onnx_files(folder: Path) -> list[Path]:
    """The files of an ONNX folder that a model needs, and those that say where it comes from; nothing else of it.

    Raises:
        WeightsError: as for `check`.
    """
    if not (folder / "genai_config.json").is_file() and list(folder.glob("*.safetensors")):
        command = shlex.join(["phi3-mlflow", "quantize", str(folder), f"{folder}-int4"])
        raise WeightsError(
            f"{folder} holds a transformers model where an ONNX model is needed: run `{command}` first and give the "
            "folder that it writes"
        )
    return sorted({*trust.onnx_files(folder), *_there(folder, *_ONNX_FILES, *_CARD_PATTERNS)})


def _there(folder: Path, *patterns: str) -> list[Path]:
    """The files of these names, none of which is a link that leaves the folder: a model gets a copy."""
    return [trust.files.needed(file) for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _transformers_files(folder: Path) -> list[Path]:
    if (folder / "genai_config.json").is_file():
        command = shlex.join(["phi3-mlflow", "log", "onnx", "--weights", str(folder)])
        raise WeightsError(
            f"{folder} holds an ONNX model (genai_config.json) where a transformers model is needed: use it with "
            f"`{command}`, or give the folder or hub id of the safetensors"
        )
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder / 'config.json'} is missing, and adapter_config.json shows an adapter without its base "
            "model: merge it with PEFT's merge_and_unload and save the result"
        )
    return [*trust.transformers_files(folder, folder), *_there(folder, *_CARD_PATTERNS)]


def _embedded_folder(form: Form) -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "artifacts" / form, package.parent / "artifacts" / form):
        if folder.is_dir():
            return folder
    raise WeightsError(
        f"the embedded model's {form} folder is not in this installation (looked in {package / 'artifacts'} and "
        f"{package.parent / 'artifacts'}): install the toolkit again"
    )


def _license(*folders: Path) -> str | None:
    """The licence that the first folder with a model card or a licence file states, in lower case."""
    for folder in folders:
        card = re.match(r"---\s*\n(.*?)\n---", _read_text(folder / "README.md"), re.DOTALL)
        stated = dict(re.findall(r"^(license(?:_name)?):\s*[\"']?([\w.+-]+)", card[1] if card else "", re.MULTILINE))
        name = stated.get("license")
        if name == "other":
            name = stated.get("license_name", name)
        if name is not None:
            return str(name).lower()
        for path in sorted(folder.glob("LICENSE*")):
            if re.search(r"^\W*(the )?mit license", _read_text(path)[:400], re.IGNORECASE | re.MULTILINE):
                return "mit"
    return None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _here(weights: Weights, form: Form) -> Source:
    patterns = (*_PATTERNS[form], *_CARD_PATTERNS)
    files = [file for file in weights.folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns)]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return Source(weights.source, weights.folder, size, 0, lambda: weights, weights.revision is not None)


def _from_hub(text: str, form: Form, revision: str | None) -> Source:
    from phi3_mlflow import hub  # imports huggingface_hub, which takes a while

    repo, spelled = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
    revision = revision or REVISIONS.get(repo, "main")
    folders = (spelled,) if spelled or form == "transformers" else (ONNX_FOLDER, "")
    if is_commit(revision) and (weights := _cached(repo, folders, form, revision)):
        return _here(weights, form)
    try:
        listing = hub.listing(repo, revision)
    except hub.HubUnreachableError:
        # The head of a branch cannot be asked for: the last one that was seen is the next best.
        if is_commit(revision) or (weights := _cached(repo, folders, form, revision)) is None:
            raise
        _log.warning("The hub cannot be reached: using commit %s of %s from its cache", weights.revision, repo)
        return _here(weights, form)
    folder = _folder_in_repo(repo, folders, form, listing.names())

    @cache
    def fetch() -> Weights:
        root = hub.download(listing, _patterns(folder, form))
        check(root / folder, form)
        return _hub_weights(repo, folder, root)

    size, missing = hub.sizes(listing, _patterns(folder, form))
    return Source(_hub_name(repo, folder), hub.cache(), size, missing, fetch, on_hub=True)


def _cached(repo: str, folders: tuple[str, ...], form: Form, revision: str) -> Weights | None:
    """The weights from the hub's cache, without a network call; None if they are not complete there."""
    from phi3_mlflow import hub

    for folder in folders:
        root = hub.cached(repo, revision, _patterns(folder, form))
        if root is None:
            continue
        try:
            check(root / folder, form)
        except WeightsError as error:
            _log.debug("Not used from the cache: %s", error)
            continue
        return _hub_weights(repo, folder, root)
    return None


def _hub_weights(repo: str, folder: str, root: Path) -> Weights:
    stated = _license(root / folder, root) or ("mit" if repo.startswith("microsoft/Phi-3") else "unknown")
    return Weights(root / folder, _hub_name(repo, folder), root.name, stated)


def _hub_name(repo: str, folder: str) -> str:
    return f"{repo}/{folder}".rstrip("/")


def _patterns(folder: str, form: Form) -> tuple[list[str], list[str]]:
    """What to take from a repository, and what of that to leave: `*` matches slashes too, so deeper folders go."""
    top = f"{folder}/" if folder else ""
    return [*(top + pattern for pattern in _PATTERNS[form]), *_CARD_PATTERNS], [f"{top}*/*"]


def _folder_in_repo(repo: str, folders: tuple[str, ...], form: Form, names: set[str]) -> str:
    marker = "config.json" if form == "transformers" else "genai_config.json"
    for folder in folders:
        if f"{folder}/{marker}".lstrip("/") in names:
            return folder
    others = sorted(str(PurePosixPath(repo, name).parent) for name in names if PurePosixPath(name).name == marker)
    if others:
        remedy = f"name one of its folders: {', '.join(others)}"
    elif form == "onnx":
        remedy = (
            f"use the -onnx repository of that model if there is one, or run `phi3-mlflow quantize {repo} FOLDER` "
            "first and give that folder"
        )
    else:
        remedy = "use the repository with the safetensors (the name without -onnx)"
    place = " or ".join(folder or "its top folder" for folder in folders)
    raise WeightsError(f"{repo} has no {marker} in {place}: {remedy}")
