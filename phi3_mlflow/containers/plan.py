"""What a container will be, all of it checked: model, settings, requirements, memory. Writes nothing."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import metadata, requires, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from phi3_mlflow import verify
from phi3_mlflow.azure.model import LoggedModel
from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.settings import check_batching, check_config, refuse_batching, settings_of
from phi3_mlflow.serve.served import PARALLEL
from phi3_mlflow.targets import parse, same

from .errors import ContainerError
from .memory import Memory, kv_budget, measure, shape

# What `serve` imports beside what a model's own requirements bring, pinned to what is installed here.
SERVE_PACKAGES = ("click", "h11", "packaging", "prometheus-client", "pyyaml", "starlette", "uvicorn")
_DISTRIBUTION = "phi3-mlflow"
# The names of Kubernetes' services (RFC 1035), and room for the suffixes of pods.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
# A reference of an image: host, path, tag, digest (distribution/reference).
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/-]*(:[0-9]+/[a-z0-9._/-]+)?(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
# What the folder has beside the model, generously.
_BESIDE = 16 * 2**20


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        model: the logged model.
        name: of the served model, and of everything in the cluster.
        image: the image's reference.
        python: the base image's version of Python, such as 3.11.
        requirements: lines for pip, without torch.
        torch: the line of torch; None for a model that needs none.
        weights: the model's folders that hold its weights.
        parallel: answers computed at once; None for a transformers model.
        settings: changes of the model_config.
        cpus: cores.
        memory: of one copy.
    """

    model: LoggedModel
    name: str
    image: str
    python: str
    requirements: list[str]
    torch: str | None
    weights: tuple[str, ...]
    parallel: int | None
    settings: Mapping[str, Any]
    cpus: int
    memory: Memory


def plan(
    model: LoggedModel,
    folder: Path,
    *,
    name: str,
    image: str,
    cpus: int,
    parallel: int | None = None,
    settings: Mapping[str, Any] | None = None,
    loaded: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Plan:
    """Checks everything that can be known before the first byte is written.

    Args:
        model: the logged model.
        folder: to write; it must not exist, or be empty.
        name: of the served model and of the cluster's resources.
        image: the image's reference.
        cpus: cores that the container is given.
        parallel: answers computed at once; None for what the model says, else 4. ONNX models only.
        settings: changes of the model_config; `threads` and `kv_budget` are set where they are left out.
        loaded: bytes that the loaded model holds; None to load it in a process of its own and look.
        say: is told what takes long.
        progress: show a bar on stderr where hashing takes long.

    Raises:
        ContainerError: the name, the image, the folder, the requirements or the disk's space do not do.
        InvalidRequest: a setting is not allowed.
        Phi3Error: the model is damaged, or none of this toolkit's.
    """
    _check_names(name, image)
    check_folder(folder)
    onnx = "transformers" not in model.flavors
    config = dict((model.flavors.get("python_function") or {}).get("config") or {})
    given = dict(settings or {})
    check_config(config.get("task", "llm/v1/chat"), given)
    wished = parallel or given.pop("parallel", None)
    if wished not in (None, 1) and not onnx:
        raise ContainerError(f"parallel is {wished}, and a transformers model answers one request at a time")
    at_once = int(wished or config.get("parallel") or PARALLEL) if onnx else None
    _check_model(model, progress=progress)
    place = model.place
    weights = trust.TRANSFORMERS_PARTS if place.parts == trust.TRANSFORMERS_PARTS else ("artifacts",)
    python, lines, torch = _requirements(model)
    chosen, kv = _settings(place.configuration(place.find()), config, given, at_once, cpus)
    if at_once and at_once > 1 and not any(same(found.name, "openvino") for found in filter(None, map(parse, lines))):
        if chosen.setdefault("engine", "onnxruntime") == "openvino":
            problem = "engine is 'openvino', and the model does not ask for it"
            raise ContainerError(f"{problem}: log it with -c engine=openvino")
        chosen["engine"] = {"auto": "onnxruntime"}.get(chosen["engine"], chosen["engine"])  # also where it is measured
    _check_space(folder, model.size)
    peak, measured = loaded or 0, loaded is None
    if loaded is None:
        say("loading the model to measure its memory ...")
        loaded, peak = measure(model.folder, at_once, chosen)
    return Plan(
        model=model,
        name=name,
        image=image,
        python=python,
        requirements=lines,
        torch=torch,
        weights=weights,
        parallel=at_once,
        settings=chosen,
        cpus=cpus,
        memory=Memory(loaded, peak, kv, measured),
    )


def check_folder(folder: Path) -> None:
    """Looks whether the folder may be written.

    Raises:
        ContainerError: there is something in it, it is none, or it cannot be made there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ContainerError(f"{folder} is no folder: give another one")
    if folder.is_dir() and any(folder.iterdir()):
        raise ContainerError(f"{folder} is not empty, and nothing in it is overwritten: empty it, or give another one")
    parent = _existing(folder.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ContainerError(f"{folder} cannot be written: {parent} is no folder that may be written")


def _check_names(name: str, image: str) -> None:
    # What YAML reads as something else (on, 1:30) would need quotes everywhere.
    if not _NAME.fullmatch(name) or yaml.safe_load(name) != name:
        problem = "it must be at most 40 small letters, digits and -, begin with a letter, and be no word of YAML's own"
        raise ContainerError(f"the name is {name!r}; {problem}")
    if not _IMAGE.fullmatch(image) or yaml.safe_load(image) != image:
        raise ContainerError(f"the image is {image!r}; it must be a reference such as registry.example/phi3:1")


def _check_model(model: LoggedModel, *, progress: bool) -> None:
    failed = [check for check in verify.run(str(model.folder), progress=progress) if check.status == "failed"]
    if failed:
        raise ContainerError(f"{model.uri} is not what was logged: {failed[0].name} {failed[0].detail}")


def _settings(
    weights: Path, config: Mapping[str, Any], given: Mapping[str, Any], parallel: int | None, cpus: int
) -> tuple[dict[str, Any], int]:
    """The changed settings, and bytes for the KV cache."""
    found = shape(weights)
    chosen = {name: value for name, value in given.items() if value is not None}
    # Else as many as the machine has, and the container has fewer.
    chosen.setdefault("threads", config.get("threads") or cpus)
    whole = {**config, **chosen, "parallel": parallel}
    context = whole.get("context_length")
    kv = kv_budget(found, context, parallel or 1)
    if parallel and parallel > 1 and whole.get("engine") != "genai":
        # Else a quarter of the container's memory, which is asked for by this number.
        chosen.setdefault("kv_budget", config.get("kv_budget") or kv)
        whole["kv_budget"] = chosen["kv_budget"]
    (check_batching if parallel else refuse_batching)(whole)
    checked = settings_of(whole)
    for name, value in chosen.items():
        if re.search(r"[\s$]", str(value)):
            raise ContainerError(f"{name} is {value!r}, and spaces and $ have no place in a file of variables")
    return chosen, checked.get("kv_budget", kv)


def _requirements(model: LoggedModel) -> tuple[str, list[str], str | None]:
    """The version of Python, the lines for pip, and torch's."""
    try:
        lines = (model.folder / "requirements.txt").read_text("utf-8").splitlines()
        python = str(yaml.safe_load((model.folder / "python_env.yaml").read_text("utf-8"))["python"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ContainerError(f"the model's own environment cannot be read: {str(error).splitlines()[0]}") from error
    pinned: dict[str, str] = {}
    for line in filter(None, (line.split(" #")[0].strip() for line in lines)):
        if line.startswith("#"):
            continue
        found = parse(line)
        if found is None or found.url:
            raise ContainerError(f"requirements.txt has {line!r}; a container needs a line such as 'six==1.17'")
        pinned[canonicalize_name(found.name)] = line
    wanted = SpecifierSet(metadata(_DISTRIBUTION)["Requires-Python"] or "")
    if not wanted.contains(python, prereleases=True):
        raise ContainerError(f"the model was logged by Python {python}, and this toolkit needs {wanted}: log it again")
    for own in map(Requirement, requires(_DISTRIBUTION) or ()):
        line = pinned.get(canonicalize_name(own.name), "")
        if own.marker is not None and not own.marker.evaluate({"extra": "serve"}):
            continue
        exact = [each.version for each in (Requirement(line).specifier if line else ()) if each.operator == "=="]
        if any("*" not in each and not own.specifier.contains(each, prereleases=True) for each in exact):
            raise ContainerError(f"the model asks for {line}, and this toolkit needs {own}: log the model again")
    torch = pinned.pop("torch", None)
    here = [f"{name}=={version(name).partition('+')[0]}" for name in SERVE_PACKAGES if name not in pinned]
    return ".".join(python.split(".")[:2]), [*pinned.values(), *here], torch


def _check_space(folder: Path, size: int) -> None:
    free, needed = shutil.disk_usage(_existing(folder.absolute())).free, size + _BESIDE
    if free < needed:
        raise ContainerError(f"{folder} needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
