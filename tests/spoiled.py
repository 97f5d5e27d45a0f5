"""The embedded ONNX weights with some of their scales multiplied: a model that is slightly wrong everywhere."""

import shutil
from pathlib import Path

import numpy as np

from phi3_mlflow.runtime.decoders import onnx_file

WEIGHTS = Path(__file__).resolve().parent.parent / "artifacts" / "onnx"


def spoil(folder: Path, part: str, factor: float = 1.05) -> Path:
    """A copy of the weights in a new folder, with the scales whose names have a part in them times a factor."""
    shutil.copytree(WEIGHTS, folder)
    graph = onnx_file.read(WEIGHTS / "model.onnx")
    data = bytearray((WEIGHTS / "model.onnx.data").read_bytes())
    names = [name for node in graph.nodes if node.op == "MatMulNBits" and part in (name := node.inputs[2])]
    assert names
    for name in names:
        scales = graph.tensors[name]
        start = data.find(scales.tobytes())
        assert start >= 0
        data[start : start + scales.nbytes] = (scales * np.float32(factor)).astype(scales.dtype).tobytes()
    (folder / "model.onnx.data").write_bytes(data)
    return folder
