"""Turns a Hugging Face Phi-3 folder into the folder that onnxruntime-genai loads, int4 or fp32, on the CPU.

The work is done by onnxruntime-genai's model builder in a process of its own, see `pieces`.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3_mlflow.room import room
from phi3_mlflow.runtime import pretrained, trust
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError
from phi3_mlflow.runtime.trust import rules

from . import evidence, memory
from .check import Check
from .choices import Choices, Method, Precision
from .process import run
from .sources import Source, check_adapter, merge, opened, read_json

_PACKAGES = ("onnx", "onnx_ir", "torch", "transformers", "onnxruntime_genai")
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_COPIED = ("config.json", "generation_config.json", "tokenizer.json", *_LICENCES)


def export(
    source: str | Path,
    destination: Path,
    *,
    adapter: Path | None = None,
    precision: Precision = "int4",
    method: Method = "rtn",
    block_size: int = 32,
    accuracy_level: int = 4,
    symmetric: bool | None = None,
    output_bits: int | None = None,
    check: Check | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Writes the onnxruntime-genai form of a Hugging Face Phi-3.

    The folder holds model.onnx, model.onnx.data, genai_config.json, tokenizer.json, tokenizer_config.json with the
    chat template in it, config.json, quantization.json and, where the source has them, generation_config.json and its
    license. It appears under its name only when it is complete. The sliding window is written into every attention
    layer, so that the result equals transformers beyond the window too.

    Args:
        source: a folder with config.json, safetensors weights, tokenizer.json and tokenizer_config.json; or a Hugging
            Face id, or the URI of a logged transformers model.
        destination: the folder to make; it must not exist.
        adapter: a folder with a LoRA adapter (adapter_config.json, adapter_model.safetensors) to merge into them.
        precision: see `Choices`, like the five that follow.
        method: see `Choices`.
        block_size: see `Choices`.
        accuracy_level: see `Choices`.
        symmetric: see `Choices`.
        output_bits: see `Choices`.
        check: what the result is compared with transformers on; None not to. Its result is in quantization.json.
        report: called with a line for each step.

    Returns:
        The destination, also where the result is beyond the check's bound.

    Raises:
        WeightsError: the source or the adapter is not one, lacks a file or does not fit, or the model builder fails.
        Phi3Error: an argument is out of range, the destination exists, memory is short, or a package of the extra
            `quantize` is not installed.
    """
    destination = Path(destination)
    choices = Choices(precision, method, block_size, accuracy_level, symmetric, output_bits)
    if destination.exists() or destination.is_symlink():
        raise Phi3Error(f"{destination} exists already: remove it, or give another destination")
    lora = None if adapter is None else check_adapter(Path(adapter))
    with opened(source) as found:
        config = read_json(found.folder / "config.json")
        # Transformers has a number of its own where none is stated; the other sizes were asked for with the weights.
        rules.require(found.folder / "config.json", config, ["max_position_embeddings"])
        choices.check(config)
        tokenizer_config = _tokenizer_config(found.tokenizer)
        _check_packages(*([] if adapter is None else ["peft"]))
        pretrained.check(found.folder)
        # What may be wrong with the text is told before hours of work.
        passages = {} if check is None else check.texts(found.tokenizer, config)
        tokens = max(map(len, passages.values()), default=0)
        memory.check(memory.needed(found.folder, config, choices, merged=adapter is not None, tokens=tokens))
        try:
            with room(destination) as place:
                stand_in, built, finished = (place / name for name in ("source", "built", "finished"))
                _stand_in(found, config, stand_in)
                if adapter is not None and lora is not None:
                    _merge(stand_in, Path(adapter), lora, place, report)
                _build(found, config, stand_in, built, place / "cache", choices, report)
                _collect(stand_in, found, built, finished, tokenizer_config)
                written = evidence.Evidence(
                    choices.to_dict(), found.name, None if adapter is None else Path(adapter).name
                )
                if check is not None:
                    written = replace(written, check=check.run(stand_in, finished, report))
                evidence.write(finished, written)
                # A folder that appeared meanwhile is not overwritten: rename refuses unless it is empty.
                finished.rename(destination)
        except OSError as error:
            raise Phi3Error(f"cannot write {error.filename or destination}: {error.strerror}") from error
    return destination


def _check_packages(*more: str) -> None:
    missing = [name for name in (*_PACKAGES, *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise Phi3Error(
            f"exporting to ONNX needs {', '.join(name.replace('_', '-') for name in missing)}: "
            "pip install 'phi3-mlflow[quantize]'"
        )


def _tokenizer_config(source: Path) -> dict[str, Any]:
    """tokenizer_config.json with the chat template in it, which newer releases keep in a file beside it."""
    config = read_json(source / "tokenizer_config.json")
    template = source / "chat_template.jinja"
    if "chat_template" not in config and template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _stand_in(source: Source, config: dict[str, Any], folder: Path) -> None:
    """The source with a config that states the attention of each layer; what else is read of it is linked.

    Phi3Config has no `layer_types`, and without it the builder writes no sliding window into the attention.
    """
    folder.mkdir()
    licences = [source.folder / name for name in _LICENCES if (source.folder / name).is_file()]
    # Nothing beside these was checked; transformers would take an adapter, or weights beside the tokenizer.
    for path in (*trust.read_transformers(source.folder, source.tokenizer), *map(trust.files.needed, licences)):
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    stated = dict(config)
    if config["model_type"] == "phi3":
        window = config.get("sliding_window")
        slides = window is not None and window < config["max_position_embeddings"]
        stated["layer_types"] = ["sliding_attention" if slides else "full_attention"] * config["num_hidden_layers"]
    stated.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")


def _merge(
    stand_in: Path, adapter: Path, lora: dict[str, Any], place: Path, report: Callable[[str], None] | None
) -> None:
    """Puts merged weights in the place of the linked ones."""
    if report:
        report("Merging the adapter")
    clean, merged = place / "adapter", place / "merged"
    clean.mkdir()
    (clean / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    (clean / "adapter_model.safetensors").symlink_to((adapter / "adapter_model.safetensors").resolve())
    merge(stand_in, clean, merged, f"merging {adapter}")
    for path in (*stand_in.glob("*.safetensors"), *stand_in.glob("*.safetensors.index.json")):
        path.unlink()
    for path in (*merged.glob("*.safetensors"), *merged.glob("*.safetensors.index.json")):
        path.rename(stand_in / path.name)


def _build(
    source: Source,
    config: dict[str, Any],
    stand_in: Path,
    built: Path,
    cache: Path,
    choices: Choices,
    report: Callable[[str], None] | None,
) -> None:
    command = [sys.executable, "-m", "phi3_mlflow.quantize.pieces"]
    command += ["-i", str(stand_in), "-o", str(built), "-p", choices.precision, "-e", "cpu", "-c", str(cache)]
    command += ["--extra_options", "windowed_kv_cache=false"]
    command += choices.options(bool(config.get("tie_word_embeddings")))
    run(command, f"the model builder on {source.name}", report)
    if not (built / "genai_config.json").is_file():
        raise WeightsError(f"the model builder on {source.name} wrote no genai_config.json")


def _collect(stand_in: Path, source: Source, built: Path, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """The finished folder: the builder's model and configuration, the source's tokenizer as it is."""
    folder.mkdir()
    for path in built.glob("*.onnx*"):
        path.rename(folder / path.name)
    for name in _COPIED:
        place = source.folder if name == "config.json" else stand_in
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
    text = json.dumps(tokenizer_config, indent=1, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    genai = read_json(built / "genai_config.json")
    # With top_k 1 every temperature gives the greedy answer.
    if genai["search"]["top_k"] == 1:
        genai["search"]["top_k"] = 50
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=4) + "\n", encoding="utf-8")
