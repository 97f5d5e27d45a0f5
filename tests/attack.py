"""A native library that leaves a mark when it is loaded, and ONNX folders that try to have it loaded."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from phi3_mlflow.runtime import manifest

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "artifacts" / "onnx"
NAME = "extra.onnx.data"  # what the hub's patterns would download

# The constructor runs when the library is opened, before any function of it is looked for.
_SOURCE = """
#include <stdio.h>
__attribute__((constructor)) static void begin(void) {
    FILE *mark = fopen(MARK, "w");
    if (mark) fclose(mark);
}
void *RegisterCustomOps(void *options, const void *api) { return 0; }
"""


def library(path: Path, mark: Path) -> Path:
    """Compiles a shared object whose constructor makes the file `mark`."""
    source = path.with_suffix(".c")
    source.write_text(_SOURCE, "utf-8")
    command = ["gcc", "-shared", "-fPIC", f'-DMARK="{mark}"', "-o", str(path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def folder(
    path: Path,
    files: Mapping[str, Path],
    config: Callable[[dict[str, Any]], str | None] = lambda config: None,
    graph: Callable[[Any], None] = lambda model: None,
) -> Path:
    """A copy of the embedded ONNX model with further files, which its graph names, and other changes.

    Args:
        path: the folder to make.
        files: what to add, by name. The graph gets an initializer in each, which no node uses.
        config: changes genai_config.json in place, or returns the text to write in its place.
        graph: changes the ONNX model in place.
    """
    import onnx

    shutil.copytree(EMBEDDED, path)
    model = onnx.load(path / "model.onnx", load_external_data=False)
    for name, source in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, path / name)
        external(model, f"unused {name}", name)
    graph(model)
    onnx.save(model, path / "model.onnx")
    content = json.loads((path / "genai_config.json").read_text("utf-8"))
    text = config(content)
    (path / "genai_config.json").write_text(json.dumps(content) if text is None else text, "utf-8")
    return path


def external(model: Any, name: str, location: str) -> None:
    """Adds an initializer of 16 bytes that are in another file."""
    import onnx

    tensor = model.graph.initializer.add(name=name, data_type=onnx.TensorProto.UINT8, dims=[16])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)


def model(path: Path, good: Path, weights: Path) -> Path:
    """A logged model with other weights, by somebody who can write every file of it but the code."""
    shutil.copytree(good, path, ignore=shutil.ignore_patterns("weights"))
    folder = path / "artifacts" / "weights"
    shutil.copytree(weights, folder, symlinks=True)
    manifest.write(folder)
    content = yaml.safe_load((path / "MLmodel").read_text("utf-8"))
    content["metadata"]["weights"]["sha256"] = manifest.digest(folder)
    (path / "MLmodel").write_text(yaml.safe_dump(content), "utf-8")
    return path
