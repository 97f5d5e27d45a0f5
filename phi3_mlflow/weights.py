"""Where weights come from: the embedded model, a local folder, or a Hugging Face repository at a pinned revision.

It checks that a folder is complete and of the wanted form; it loads nothing and knows nothing of MLflow. How files
get out of the hub is in hub.py.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from phi3_mlflow.runtime.errors import WeightsError, shorten

Form = Literal["transformers", "onnx"]

EMBEDDED = "embedded"
# The int4 CPU model's folder in Microsoft's -onnx repositories.
ONNX_FOLDER = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
# Commits of the main branches, to be seen at https://huggingface.co/<name>/tree/<commit>.
REVISIONS = {
    "microsoft/Phi-3-mini-4k-instruct": "f39ac1d28e925b323eae81227eaba4464caced4e",
    "microsoft/Phi-3-mini-4k-instruct-onnx": "5f5f794c1c23c9d5ee142af85df02a6cc52d6945",
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
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
# ONNX graphs that keep their weights in a file of their own are smaller than this, in bytes.
_GRAPH_LIMIT = 64 * 2**20

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


def resolve(weights: str | Path, form: Form, *, revision: str | None = None) -> Weights:
    """Finds weights, downloading them if they are named by a hub id and not yet in the hub's cache.

    Args:
        weights: `embedded`; or a local folder (it wins over a hub repository of the same name); or a Hugging Face id
            `organization/name`, or `organization/name/sub/folder` for one folder of a repository. For the ONNX form
            `organization/name` means its folder `cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4`, or the
            repository's top where that does not exist.
        form: `transformers` (config.json, safetensors, tokenizer) or `onnx` (genai_config.json, ONNX, tokenizer).
        revision: a branch, tag or commit of the hub repository; omitted, the pinned commit in `REVISIONS`, or the
            head of `main` for other names. With a commit that is in the cache, no network call is made.

    Returns:
        The checked folder with its source, commit and licence.

    Raises:
        WeightsError: nothing is found under that name, the download fails, or the files are not of the wanted form.
    """
    text = os.fspath(weights)
    if text != EMBEDDED and not Path(text).expanduser().exists():
        if isinstance(weights, str) and _is_hub_id(text):
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
        return Weights(folder, "phi3_mlflow embedded model", None, "mit")
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise WeightsError(f"{folder} is a file: give the folder that holds it")
    check(folder, form)
    return Weights(folder, f"local folder {folder.name}", None, _license(folder) or "unknown")


def check(folder: Path, form: Form) -> None:
    """Checks by names, sizes and configuration that a folder holds a complete Phi-3 model of the wanted form.

    Raises:
        WeightsError: a file is missing, empty or of the wrong kind; the message names it and what to do.
    """
    files = _check_transformers(folder) if form == "transformers" else _check_onnx(folder)
    for file in files:
        try:
            with file.open("rb") as stream:
                start = stream.read(40)
        except OSError as error:
            raise WeightsError(f"{file} cannot be read: {error.strerror}") from error
        if not start:
            raise WeightsError(f"{file} is empty: copy or download it again")
        if start.startswith(b"version https://git-lfs"):
            raise WeightsError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its clone")


def onnx_files(folder: Path) -> list[Path]:
    """The files of an ONNX folder that a model needs, and those that say where it comes from; nothing else of it.

    Raises:
        WeightsError: as for `check`.
    """
    optional = (file for pattern in (*_ONNX_FILES, *_CARD_PATTERNS) for file in folder.glob(pattern) if file.is_file())
    return sorted({*_check_onnx(folder), *optional})


def _check_transformers(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file() or (folder / "genai_config.json").is_file():
        if (folder / "genai_config.json").is_file():
            raise WeightsError(
                f"{folder} holds an ONNX model (genai_config.json) where a transformers model is needed: use it with "
                "`phi3-mlflow log onnx`, or give the folder or hub id of the safetensors"
            )
        if (folder / "adapter_config.json").is_file():
            raise WeightsError(
                f"{folder / 'config.json'} is missing, and adapter_config.json shows an adapter without its base "
                "model: merge it with PEFT's merge_and_unload and save the result"
            )
    config = _read_json(folder / "config.json")
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type != "phi3":
        if "auto_map" in config:
            raise WeightsError(
                f"{folder / 'config.json'} needs Python code of its own (`auto_map`), which is never run here: give a "
                "model of model_type phi3"
            )
        raise WeightsError(f"{folder / 'config.json'} has model_type {shorten(model_type)}: it must be phi3")
    if architectures and "Phi3ForCausalLM" not in architectures:
        raise WeightsError(f"{folder / 'config.json'} has architectures {shorten(architectures)}: not Phi3ForCausalLM")
    index = folder / "model.safetensors.index.json"
    shards = [folder / "model.safetensors"]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f"{index} has no `weight_map`: copy or download it again")
        shards = [_inside(index, name) for name in sorted(set(map(str, weight_map.values())))]
    elif not shards[0].is_file() and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise WeightsError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded, and is refused: save the model with "
            "save_pretrained, which writes safetensors"
        )
    return _present([*shards, folder / "tokenizer.json", folder / "tokenizer_config.json"])


def _check_onnx(folder: Path) -> list[Path]:
    path = folder / "genai_config.json"
    if not path.is_file() and list(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} holds a transformers model where an ONNX model is needed: run `phi3-mlflow quantize {folder}` "
            "first and give the folder that it writes"
        )
    model = _read_json(path).get("model")
    if not isinstance(model, dict) or model.get("type") != "phi3":
        kind = model.get("type") if isinstance(model, dict) else None
        raise WeightsError(f"{path} has model.type {shorten(kind)}: it must be phi3")
    decoder = model.get("decoder")
    filename = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(filename, str):
        raise WeightsError(f"{path} names no model.decoder.filename: copy or download it again")
    graph = _inside(path, filename)
    _present([graph])
    return _present([graph, *_external_data(graph), folder / "tokenizer.json"])


def _external_data(graph: Path) -> list[Path]:
    """The files beside an ONNX graph that hold its weights, found without a protobuf parser.

    The key `location` and its value are neighbours in the encoding of TensorProto.external_data
    (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, StringStringEntryProto).
    """
    if graph.stat().st_size > _GRAPH_LIMIT:
        return []
    content = graph.read_bytes()
    values = re.finditer(rb"\n\x08location\x12([\x01-\x7f])", content)  # one byte is the value's length
    names = {content[value.end() : value.end() + value[1][0]].decode(errors="replace") for value in values}
    return [_inside(graph, name) for name in sorted(names)]


def _present(files: list[Path]) -> list[Path]:
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} is missing: the model is incomplete; copy or download it again")
    return files


def _inside(owner: Path, name: str) -> Path:
    if PurePosixPath(name).name != name or "\\" in name:
        raise WeightsError(f"{owner} names {shorten(name)}, which is not a file beside it: do not use this copy")
    return owner.parent / name


def _read_json(path: Path) -> dict[str, Any]:
    _present([path])
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: copy or download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object: copy or download it again")
    return content


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


def _is_hub_id(text: str) -> bool:
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(f"{part}(?:/{part})+", text, re.ASCII) is not None and ".." not in text and "--" not in text


def _from_hub(text: str, form: Form, revision: str | None) -> Weights:
    from phi3_mlflow import hub  # imports huggingface_hub, which takes a while

    repo, spelled = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
    revision = revision or REVISIONS.get(repo, "main")
    folders = (spelled,) if spelled or form == "transformers" else (ONNX_FOLDER, "")
    if hub.is_commit(revision) and (weights := _cached(repo, folders, form, revision)):
        return weights
    try:
        listing = hub.listing(repo, revision)
    except hub.HubUnreachableError:
        # The head of a branch cannot be asked for: the last one that was seen is the next best.
        if hub.is_commit(revision) or (weights := _cached(repo, folders, form, revision)) is None:
            raise
        _log.warning("The hub cannot be reached: using commit %s of %s from its cache", weights.revision, repo)
        return weights
    folder = _folder_in_repo(repo, folders, form, listing.names())
    root = hub.download(listing, _patterns(folder, form))
    check(root / folder, form)
    return _hub_weights(repo, folder, root)


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
    return Weights(root / folder, f"{repo}/{folder}".rstrip("/"), root.name, stated)


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
        remedy = "use the -onnx repository of that model if there is one, or run `phi3-mlflow quantize` first"
    else:
        remedy = "use the repository with the safetensors (the name without -onnx)"
    place = " or ".join(folder or "its top folder" for folder in folders)
    raise WeightsError(f"{repo} has no {marker} in {place}: {remedy}")
