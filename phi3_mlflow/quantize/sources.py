"""Where the weights to quantize come from: a folder, a hub id or a logged model, with a LoRA adapter merged or not."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_mlflow.runtime import manifest, trust
from phi3_mlflow.runtime.errors import WeightsError, shorten
from phi3_mlflow.runtime.trust import files
from phi3_mlflow.weights import resolve

from .process import run

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What of adapter_config.json decides what is added to which matrix (peft 0.21, peft/tuners/lora/config.py) ...
_USED = (
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "lora_bias", "target_parameters", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
# ... and what is of no account once it is trained.
_IDLE = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
# peft searches the names of all matrices with these as regular expressions, of which some come to no end: (a+)+$.
_SEARCHED = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
# Peft makes the matrices of a rank in memory before it looks at the file's; up to this one that is little.
_SMALL_RANK = 256
_REMEDY = "merge it with PEFT's merge_and_unload, save the result and quantize that"


@dataclass(frozen=True)
class Source:
    """Weights in transformers' form.

    Attributes:
        folder: holds config.json, the safetensors and what says where they come from.
        tokenizer: holds tokenizer.json and tokenizer_config.json; often the same folder.
        name: the origin in words that hold on any machine.
    """

    folder: Path
    tokenizer: Path
    name: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; raises WeightsError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing: give a folder with a Hugging Face Phi-3 in it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object: give a folder with a Hugging Face Phi-3 in it")
    return value


@contextmanager
def opened(source: str | Path) -> Iterator[Source]:
    """Finds and checks weights; what had to be downloaded from an MLflow server is deleted when the block ends.

    Args:
        source: a folder, a Hugging Face id (at its pinned revision), or the URI of a logged transformers model.

    Raises:
        WeightsError: there are none, they are damaged, or the model is of another kind.
    """
    text = str(source)
    if not text.startswith(("models:", "runs:")):
        found = resolve(source, "transformers")
        yield Source(found.folder, found.folder, found.source)
        return
    from phi3_mlflow.serve.folders import fetch

    logged = fetch(text)
    try:
        if not (logged.path / "model" / "config.json").is_file():
            raise WeightsError(f"{text} is no transformers model: give one that `phi3-mlflow log transformers` logged")
        if (logged.path / manifest.NAME).is_file():  # MLflow's own flavor has none
            manifest.verify(logged.path, trust.TRANSFORMERS_PARTS, full=False)
        folder, tokenizer = logged.path / "model", logged.path / "components" / "tokenizer"
        trust.transformers_files(folder, tokenizer)
        yield Source(folder, tokenizer, text)
    finally:
        logged.remove()


def check_adapter(adapter: Path) -> dict[str, Any]:
    """The part of an adapter's configuration that merging needs.

    Raises:
        WeightsError: it is no LoRA adapter in safetensors, or its configuration has what is not known here.
    """
    for name in _ADAPTER:
        files.needed(adapter / name)
    tensors = trust.tensors.header(adapter / _ADAPTER[1])
    path = adapter / _ADAPTER[0]
    config = files.plain(path, files.json_object(path))
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{path} has peft_type {shorten(config.get('peft_type'))}; only LORA can be merged")
    for name, value in config.items():
        if value and name not in (*_USED, *_IDLE):
            raise WeightsError(f"{path} has {shorten(name)} with {shorten(value)}, which is not known here: {_REMEDY}")
    _check_searched(path, config)
    _check_ranks(path, config, tensors)
    return {name: config[name] for name in _USED if name in config}


def _check_searched(path: Path, config: Mapping[str, Any]) -> None:
    for name in _SEARCHED:
        value = config.get(name)
        for each in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ():
            if not isinstance(each, str) or not re.fullmatch(r"[\w.^$\\-]{1,200}", each, re.ASCII):
                raise WeightsError(
                    f"{path} has {name} with {shorten(each)}: it must be a name, without repetitions and groups; or "
                    f"{_REMEDY}"
                )


def _check_ranks(path: Path, config: Mapping[str, Any], tensors: Mapping[str, trust.tensors.Tensor]) -> None:
    ranks = [each.shape[0] for name, each in tensors.items() if re.search("lora_(embedding_)?A", name) and each.shape]
    largest = max(ranks, default=0)
    pattern = config.get("rank_pattern")
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if type(rank) is not int or not 1 <= rank <= max(largest, _SMALL_RANK):
            raise WeightsError(
                f"{path} has the rank {shorten(rank)}, and the largest in {_ADAPTER[1]} is {largest}: copy both again"
            )


def merge(source: Path, adapter: Path, destination: Path, what: str) -> None:
    """Writes a model with an adapter added to its matrices, in the type that they have.

    Raises:
        WeightsError: the adapter does not fit the model.
    """
    command = [sys.executable, "-m", "phi3_mlflow.quantize.merge", str(source), str(adapter), str(destination)]
    run(command, what)
