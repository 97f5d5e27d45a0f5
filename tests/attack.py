"""A native library that leaves a mark when it is loaded, and ONNX folders that try to have it loaded."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def folder(path: Path, files: dict[str, Path], change: Callable[[dict[str, Any]], Any] = lambda config: None) -> Path:
    """A copy of the embedded ONNX model with further files, a changed genai_config.json, and a graph that names them.

    Args:
        path: the folder to make.
        files: what to add, by name. The graph gets an initializer in each, which no node uses.
        change: changes the configuration in place, or returns the text to write in place of it.
    """
    import onnx

    shutil.copytree(EMBEDDED, path)
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    for name, source in files.items():
        shutil.copy(source, path / name)
        tensor = graph.graph.initializer.add(name=f"unused {name}", data_type=onnx.TensorProto.UINT8, dims=[16])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
    onnx.save(graph, path / "model.onnx")
    config = json.loads((path / "genai_config.json").read_text("utf-8"))
    text = change(config)
    (path / "genai_config.json").write_text(text if isinstance(text, str) else json.dumps(config), "utf-8")
    return path
