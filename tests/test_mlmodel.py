"""The MLmodel file of a logged model. Run: pytest tests/test_mlmodel.py."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from phi3_mlflow.cli import cli
from phi3_mlflow.runtime import mlmodel
from phi3_mlflow.runtime.errors import FormatError
from phi3_mlflow.runtime.model import load

GOOD = {
    "flavors": {"python_function": {"loader_module": "mlflow.pyfunc.model", "config": {"task": "llm/v1/chat"}}},
    "metadata": {"task": "llm/v1/chat", "format": 3, "weights": {"sha256": "0" * 64}},
    "model_id": None,
    "signature": {"inputs": '[{"name": "messages", "type": "string"}]', "outputs": "[]", "params": None},
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
ODD = {
    "nothing": ("", "holds None and not a mapping"),
    "a text": ("hello", "holds 'hello' and not a mapping"),
    "a list": ("- a\n- b\n", r"holds \['a', 'b'\] and not a mapping"),
    "an anchor's alias": ("metadata: &m {}\nflavors: *m\n", "has YAML aliases"),
    "an anchors' bomb": (BOMB, "has YAML aliases"),
    "a bomb that is a list": ("- &a [x, x]\n- &b [*a, *a]\n", "has YAML aliases"),
    "tabs": ("flavors:\n\tpython_function: {}\n", "is no YAML: .* cannot start any token"),
    "a bracket": ("flavors: {", "is no YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "is no YAML: expected a single document"),
    "a Python object": ("a: !!python/object/apply:os.getpid []\n", "is no YAML: could not determine a constructor"),
    "bytes": (b"\xff\xfe\xfd", "is no YAML"),
    "a control character": ("a: \x01", "is no YAML"),
    "a date that is none": ("a: 2020-99-99\n", "is no YAML"),
    "a depth": ("[" * 8000, "has lists and mappings more than 32 deep"),  # it took 11 s
    "a depth of mappings": ("{a: " * 8000, "has lists and mappings more than 32 deep"),
    "a depth of lines": ("- " * 8000, "has lists and mappings more than 32 deep"),
    "a length": ("[" + "1," * 500_000 + "]", "has more than 20000 values"),
    "a number of base 60": ("a: 1" + ":1" * 400_000, "has a number of more than 100 characters"),
    "a number of base 60 with a tag": ("a: !!int '1" + ":1" * 400_000 + "'", "has a number of more than 100"),
    "a character that is none": ('a: "\\UFFFFFFFF"\n', "is no YAML"),
    "a list as a key": ("? [a]\n: b\n", "is no YAML"),
    "a number without digits": ("a: !!int ''\n", "is no YAML"),
    "a truth that is none": ("a: !!bool x\n", "is no YAML"),
    "a time that is none": ("a: !!timestamp foo\n", "is no YAML"),
    "too much": ("a: " + "x" * 2**20, "has more than 1048576 bytes"),
    "flavors that are a list": (json.dumps(GOOD | {"flavors": []}), r"has flavors \[\]: it must be a mapping"),
    "a flavor that is a text": (
        json.dumps(GOOD | {"flavors": {"python_function": "x"}}),
        "has flavors.python_function 'x': it must be a mapping",
    ),
    "a config that is a number": (
        json.dumps(GOOD | {"flavors": {"python_function": {"config": 5}}}),
        "has flavors.python_function.config 5: it must be a mapping",
    ),
    "artifacts that are a list": (
        json.dumps(GOOD | {"flavors": {"python_function": {"artifacts": {"weights": []}}}}),
        r"has flavors.python_function.artifacts.weights \[\]: it must be a mapping",
    ),
    "metadata that are a text": (json.dumps(GOOD | {"metadata": "x"}), "has metadata 'x': it must be a mapping"),
    "a digest that is a number": (
        json.dumps(GOOD | {"metadata": {"weights": {"sha256": 7}}}),
        "has metadata.weights.sha256 7: it must be a text",
    ),
    "a signature that is a list": (json.dumps(GOOD | {"signature": []}), r"has signature \[\]: it must be a mapping"),
    "columns that are no JSON": (
        json.dumps(GOOD | {"signature": {"inputs": "["}}),
        r"has signature.inputs '\[': it must be a JSON list",
    ),
    "columns that are numbers": (
        json.dumps(GOOD | {"signature": {"inputs": "[1]"}}),
        r"has signature.inputs '\[1\]': it must be a JSON list",
    ),
}


def write(folder, content):
    (folder / "MLmodel").write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_refused_with_its_name_and_what_is_odd(tmp_path, name):
    content, reason = ODD[name]
    write(tmp_path, content)
    start = time.process_time()
    with pytest.raises(FormatError, match=f"MLmodel {reason}") as caught:
        mlmodel.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.process_time() - start < 10


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FormatError, match="is not a logged model: it has no MLmodel file that can be read"):
        mlmodel.read(tmp_path)
    (tmp_path / "MLmodel").mkdir()
    with pytest.raises(FormatError, match="it has no MLmodel file that can be read"):
        mlmodel.read(tmp_path)
    (tmp_path / "MLmodel").rmdir()
    os.mkfifo(tmp_path / "MLmodel")
    with pytest.raises(FormatError, match="it has no MLmodel file that can be read"):
        mlmodel.read(tmp_path)


@pytest.mark.parametrize("column", [{"name": "a"}, {"type": "nothing"}, {"type": 5, "name": []}])
def test_what_only_mlflow_understands_is_told_too(tmp_path, column):
    write(tmp_path, yaml.safe_dump(GOOD | {"signature": {"inputs": json.dumps([column])}}))
    with pytest.raises(FormatError, match="MLmodel is not as MLflow writes it"):
        mlmodel.load(tmp_path)


def test_what_mlflows_transformers_flavor_cannot_take_is_told_when_the_model_is_loaded(saved, tmp_path):
    folder = Path(shutil.copytree(saved["transformers"], tmp_path / "model"))
    content = yaml.safe_load((folder / "MLmodel").read_text("utf-8"))
    content["flavors"]["transformers"]["components"] = 5
    (folder / "MLmodel").write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(FormatError, match=r"MLflow cannot load .*model \('int' object is not iterable\): copy"):
        load(folder)


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_what_mlflow_writes_is_read(saved, builder):
    described = mlmodel.read(saved[builder])
    assert described["metadata"]["task"] == "llm/v1/chat"
    assert mlmodel.load(saved[builder]).metadata == described["metadata"]


@pytest.mark.parametrize("verb", ["verify", "chat -p hello", "bench", "azure check", "serve -p 0"])
def test_every_verb_says_so_in_one_line(tmp_path, verb):
    for name in ("a text", "an anchors' bomb", "tabs", "metadata that are a text", "columns that are no JSON"):
        write(tmp_path, ODD[name][0])
        result = CliRunner().invoke(cli, [*verb.split(), str(tmp_path)])
        assert result.exit_code == 1, (name, result.output)
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("Error: ")
        assert "MLmodel" in line
