"""What MLflow's pages show of a model: facts as params and tags, and a card as the description of a registered version.

It reads the folder of a written model, and loads nothing of it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from phi3_mlflow.quantize import evidence
from phi3_mlflow.runtime import snapshots
from phi3_mlflow.runtime.decoders import onnx_file
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.targets import parse

# Packages that run the weights; the versions are those of the model's requirements.
_RUNTIMES = ("onnxruntime", "onnxruntime-genai", "openvino", "torch", "transformers", "tokenizers", "mlflow")
_ORIGIN = ("source", "revision", "license", "sha256")
# The facts' names.
NAMES = (
    "builder",
    "task",
    "quantization",
    *evidence.PARAMS,
    "context_tokens",
    *(f"weights_{name}" for name in _ORIGIN),
    "weights_held",
    "toolkit",
    *(f"version {name}" for name in _RUNTIMES),
)
# Facts that models and versions can be searched by.
_TAGS = ("builder", "task", "quantization", "weights_source")
# What stands below this line in a description is written anew with each measurement; nothing else of it is touched.
_MEASURED = "<!-- phi3-mlflow: measured -->"
_ONNX_TYPES = {"float32": "fp32", "float16": "fp16"}


def facts(folder: Path, held: Path | None = None) -> dict[str, str]:
    """What a written model says of itself, as the params of its page.

    Args:
        folder: the model's, with its MLmodel file.
        held: the folder with the manifest and the weights below it, where that is another one.

    Returns:
        Texts by NAMES; `weights_revision` only where the weights have a commit, `weights_held` where the model refers
        to them, and `version PACKAGE` for what the model requires.

    Raises:
        OSError, KeyError, ValueError: it is no whole model of the builders'.
    """
    logged = yaml.safe_load((folder / "MLmodel").read_text("utf-8"))
    metadata, flavors = logged["metadata"], logged["flavors"]
    place = snapshots.place(held or folder, flavors, metadata)
    weights = place.configuration(place.find())
    quantization, own = _onnx(weights) if place.form == "onnx" else _pipeline(weights / "config.json")
    context = min(flavors["python_function"]["config"].get("context_length") or own, own)
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    pinned = {found.name: str(found.specifier).removeprefix("==") for line in lines if (found := parse(line))}
    origin = {f"weights_{name}": str(metadata["weights"][name]) for name in _ORIGIN if metadata["weights"][name]}
    return {
        "builder": place.form,
        "task": metadata["task"],
        "quantization": quantization,
        **(evidence.params(rounded) if (rounded := measured(folder, held)) else {}),
        "context_tokens": str(context),
        **origin,
        **({"weights_held": "by reference"} if place.reference else {}),
        "toolkit": metadata["toolkit"],
        **{f"version {name}": pinned[name] for name in _RUNTIMES if name in pinned},
    }


def measured(folder: Path, held: Path | None = None) -> evidence.Evidence | None:
    """How the weights of a written model were quantized, where `phi3-mlflow quantize` did it; see `facts`.

    Raises:
        WeightsError: the file that says it is not one.
    """
    logged = yaml.safe_load((folder / "MLmodel").read_text("utf-8"))
    place = snapshots.place(held or folder, logged["flavors"], logged["metadata"])
    return evidence.read(place.configuration(place.find())) if place.form == "onnx" else None


def tags(found: Mapping[str, str]) -> dict[str, str]:
    """The facts that a model and its versions can be searched by."""
    return {f"phi3_{name}": found[name] for name in _TAGS}


def card(found: Mapping[str, str], size: int) -> str:
    """A short description in Markdown.

    Args:
        found: the facts.
        size: bytes of the model.
    """
    revision = f" at commit `{found['weights_revision']}`" if "weights_revision" in found else ""
    held = ", weights in the hub's cache (`phi3-mlflow pull`)" if "weights_held" in found else ""
    versions = [f"{name} {found[f'version {name}']}" for name in _RUNTIMES if f"version {name}" in found]
    return "\n".join(
        [
            f"**{found['weights_source']}**{revision}, {found['quantization']}, by {found['toolkit']}",
            "",
            f"- answers `{found['task']}` requests, {found['builder']} builder",
            f"- context of {int(found['context_tokens']):,} tokens, {size / 2**20:,.1f} MiB{held}",
            *([f"- quantized by {checked}"] if (checked := _quantized(found)) else []),
            f"- licence of the weights: {found['weights_license']}",
            f"- manifest's sha256: `{found['weights_sha256']}`; `phi3-mlflow verify` checks the files against it",
            f"- logged with {', '.join(versions)}",
            "",
            _MEASURED,
        ]
    )


def _quantized(found: Mapping[str, str]) -> str:
    parts = [found[name] for name in evidence.PARAMS if name in found]
    return "; ".join(parts)


def note(model_id: str, numbers: str) -> list[ModelVersion]:
    """Writes measured numbers into the description of each registered version of a logged model.

    Only a description with the builders' line for them is changed, and only below that line.

    Args:
        model_id: of the logged model.
        numbers: Markdown.

    Returns:
        The versions that were changed.
    """
    client = mlflow.MlflowClient()
    listed = json.loads(client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
    changed = []
    for name, number in sorted({(each["name"], str(each["version"])) for each in listed}):  # a server lists some twice
        with suppress(MlflowException):  # deleted meanwhile
            version = client.get_model_version(name, number)
            head, line, _ = (version.description or "").partition(_MEASURED)
            if line:
                text = f"{head}{line}\n{numbers}"
                changed.append(client.update_model_version(version.name, str(version.version), text))
    return changed


def _onnx(weights: Path) -> tuple[str, int]:
    model = json.loads((weights / "genai_config.json").read_text("utf-8"))["model"]
    own = int(model["context_length"])
    try:
        graph = onnx_file.read(weights / model["decoder"]["filename"])
    except (WeightsError, OSError):
        return "unknown", own
    products = [node.attributes for node in graph.nodes if node.op == "MatMulNBits"]
    if not products:
        types = {tensor.dtype.name for tensor in graph.tensors.values() if tensor.ndim == 2}
        return next((name for type_, name in _ONNX_TYPES.items() if type_ in types), "unknown"), own
    kinds = {
        f"int{each.get('bits', 4)}, block {each['block_size']}, accuracy level {each.get('accuracy_level', 0)}"
        for each in products
    }
    return "; ".join(sorted(kinds)), own


def _pipeline(path: Path) -> tuple[str, int]:
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    kind = method or config.get("dtype") or config.get("torch_dtype") or "unknown"
    return str(kind), int(config["max_position_embeddings"])
