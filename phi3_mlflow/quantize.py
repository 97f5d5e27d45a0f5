"""Turns a Hugging Face Phi-3 folder into the folder that onnxruntime-genai loads, int4 or fp32, on the CPU.

The work is done by onnxruntime-genai's model builder in a process of its own; nothing here knows of MLflow.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError, shorten

Precision = Literal["int4", "fp32"]

PRECISIONS = ("int4", "fp32")
# The sizes and levels that the builder and onnxruntime's MatMulNBits take.
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
_PACKAGES = ("onnx", "onnx_ir", "torch", "transformers", "onnxruntime_genai")
_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def export(
    source: Path,
    destination: Path,
    *,
    precision: Precision = "int4",
    block_size: int = 32,
    accuracy_level: int = 4,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Writes the onnxruntime-genai form of a Hugging Face Phi-3.

    The folder holds model.onnx, model.onnx.data, genai_config.json, tokenizer.json, tokenizer_config.json with the
    chat template in it, config.json and, where the source has them, generation_config.json and its license. It
    appears under its name only when it is complete. The sliding window is written into every attention layer, so
    that the result equals transformers beyond the window too.

    A Phi-3-mini takes about 4 minutes and 19 GiB of memory on two cores.

    Args:
        source: folder with config.json (model type `phi3`), safetensors weights, tokenizer.json and
            tokenizer_config.json.
        destination: the folder to make; it must not exist.
        precision: `int4` rounds the matrices to 4 bits, symmetric, without calibration; `fp32` keeps them.
        block_size: for int4, how many weights share a scale: 16, 32, 64, 128 or 256.
        accuracy_level: for int4, 0 to 4. 4 also rounds the activations to 8 bits, which is the fastest on a CPU;
            0 and 1 compute in fp32.
        report: called with each line that the model builder prints.

    Returns:
        The destination.

    Raises:
        WeightsError: the source is not a Phi-3 folder or lacks a file, or the model builder fails on it.
        Phi3Error: an argument is out of range, the destination exists, or a package of the extra `quantize` is
            not installed.
    """
    source, destination = Path(source), Path(destination)
    _check_arguments(destination, precision, block_size, accuracy_level)
    config = _read_config(source)
    tokenizer_config = _tokenizer_config(source)
    trust.transformers_files(source, source)
    _check_packages()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as room:
            stand_in, built, finished = (Path(room, name) for name in ("source", "built", "finished"))
            _stand_in(source, config, stand_in)
            options = ["windowed_kv_cache=false"]
            if precision == "int4":
                options += [f"block_size={block_size}", f"accuracy_level={accuracy_level}"]
            _build(source, stand_in, built, Path(room, "cache"), precision, options, report)
            _collect(source, built, finished, tokenizer_config)
            # A folder that appeared meanwhile is not overwritten: rename refuses unless it is empty.
            finished.rename(destination)
    except OSError as error:
        raise Phi3Error(f"cannot write {error.filename or destination}: {error.strerror}") from error
    return destination


def _check_arguments(destination: Path, precision: str, block_size: int, accuracy_level: int) -> None:
    for name, value, allowed in (
        ("precision", precision, PRECISIONS),
        ("block_size", block_size, BLOCK_SIZES),
        ("accuracy_level", accuracy_level, ACCURACY_LEVELS),
    ):
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise Phi3Error(f"`{name}` is {shorten(value)}; it must be one of {choices}")
    if destination.exists() or destination.is_symlink():
        raise Phi3Error(f"{destination} exists already: remove it, or give another destination")


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Phi3Error(
            f"exporting to ONNX needs {', '.join(name.replace('_', '-') for name in missing)}: "
            "pip install 'phi3-mlflow[quantize]'"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing: give a folder with a Hugging Face Phi-3 in it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object: give a folder with a Hugging Face Phi-3 in it")
    return value


def _read_config(source: Path) -> dict[str, Any]:
    config = _read_json(source / "config.json")
    if config.get("model_type") not in trust.MODELS:
        raise WeightsError(
            f"{source / 'config.json'} has model_type {shorten(config.get('model_type'))}; only "
            f"{', '.join(trust.MODELS)} can be exported"
        )
    if not any(source.glob("*.safetensors")):
        raise WeightsError(f"{source} holds no .safetensors file: download the weights completely")
    if not (source / "tokenizer.json").is_file():
        raise WeightsError(f"{source / 'tokenizer.json'} is missing: download the tokenizer with the weights")
    return config


def _tokenizer_config(source: Path) -> dict[str, Any]:
    """tokenizer_config.json with the chat template in it, which newer releases keep in a file beside it."""
    config = _read_json(source / "tokenizer_config.json")
    template = source / "chat_template.jinja"
    if "chat_template" not in config and template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _stand_in(source: Path, config: dict[str, Any], folder: Path) -> None:
    """The source with a config that states the attention of each layer; everything else is linked.

    Phi3Config has no `layer_types`, and without it the builder writes no sliding window into the attention.
    """
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and path.suffix != ".py":
            (folder / path.name).symlink_to(path.resolve())
    stated = dict(config)
    if config["model_type"] == "phi3":
        window = config.get("sliding_window")
        slides = window is not None and window < config["max_position_embeddings"]
        stated["layer_types"] = ["sliding_attention" if slides else "full_attention"] * config["num_hidden_layers"]
    stated.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")


def _build(
    source: Path,
    stand_in: Path,
    built: Path,
    cache: Path,
    precision: str,
    options: list[str],
    report: Callable[[str], None] | None,
) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(stand_in), "-o", str(built), "-p", precision, "-e", "cpu", "-c", str(cache)]
    command += ["--extra_options", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    last.append(line.strip())
                    if report:
                        report(line.rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode == -9:
        raise WeightsError(f"the model builder was killed on {source}: a Phi-3-mini needs about 19 GiB of free memory")
    if process.returncode != 0 or not (built / "genai_config.json").is_file():
        reason = last[0] if last else "it printed nothing"
        raise WeightsError(f"the model builder failed on {source} with exit code {process.returncode}: {reason}")


def _collect(source: Path, built: Path, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """The finished folder: the builder's model and configuration, the source's tokenizer as it is."""
    folder.mkdir()
    for path in built.glob("*.onnx*"):
        path.rename(folder / path.name)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    text = json.dumps(tokenizer_config, indent=1, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    genai = _read_json(built / "genai_config.json")
    # With top_k 1 every temperature gives the greedy answer.
    if genai["search"]["top_k"] == 1:
        genai["search"]["top_k"] = 50
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=4) + "\n", encoding="utf-8")
