"""Which files of a local folder become part of an ONNX model.

Run: pytest tests/test_weight_files.py
"""

import shutil
from pathlib import Path

from phi3_mlflow.builders import onnx

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_but_the_weights_is_taken_from_a_folder(tmp_path):
    folder = shutil.copytree(ROOT / "artifacts" / "onnx", tmp_path / "weights")
    for name in ("secrets.env", "training_args.bin", "notes.json", "run.py", ".netrc"):
        (folder / name).write_text("not for others", "utf-8")

    onnx.save_model(tmp_path / "model", folder)

    taken = {path.name for path in (tmp_path / "model" / "artifacts" / "weights").iterdir()}
    assert taken == {path.name for path in (ROOT / "artifacts" / "onnx").iterdir()} | {"manifest.json"}
