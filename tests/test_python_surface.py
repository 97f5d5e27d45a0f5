"""What Python's own tools show and say: types, help, copies, pickles, settings in the wrong place.

Run: pytest tests/test_python_surface.py
"""

import copy
import inspect
import pickle
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Never

import mlflow
import pytest
import yaml

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.runtime.errors import FormatError, InvalidRequest

BUILDERS = {"transformers": transformers, "onnx": onnx}
ROOT = Path(__file__).resolve().parent.parent
SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
builders = pytest.mark.parametrize("builder", BUILDERS)


@builders
@pytest.mark.parametrize("function", ["save_model", "log_model"])
def test_help_shows_every_argument_with_its_type_and_what_it_means(builder, function):
    function = getattr(BUILDERS[builder], function)
    parameters = inspect.signature(function).parameters

    assert {"weights", "revision", "task", "model_config", "target", "metadata"} <= parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"\n        {name}: " in function.__doc__
        # The rest of MLflow's arguments: no type checker lets any of them pass.
        assert (parameter.kind is inspect.Parameter.VAR_KEYWORD) == (parameter.annotation is Never)


@builders
def test_a_loaded_model_cannot_be_copied_or_pickled_and_says_so(loaded, builder):
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled: load it again$"):
            attempt(loaded[builder])


@builders
def test_a_model_without_its_signature_says_so_when_it_is_loaded(saved, builder, tmp_path):
    copied = shutil.copytree(saved[builder], tmp_path / "copy")
    described = yaml.safe_load((copied / "MLmodel").read_text("utf-8"))
    del described["signature"]
    (copied / "MLmodel").write_text(yaml.safe_dump(described), "utf-8")

    with pytest.raises(FormatError, match="is a model without its signature; put the logged one back"):
        mlflow.pyfunc.load_model(str(copied))


@builders
def test_a_model_whose_signature_is_taken_away_in_memory_says_so(saved, builder):
    model = mlflow.pyfunc.load_model(str(saved[builder]))
    model.metadata.signature = None

    with pytest.raises(mlflow.MlflowException, match="`data` is a dict, which only comes from a model without its sig"):
        model.predict(SPAIN)


@builders
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"warmth": 1}, "`warmth` is not a setting of the model; the settings are "),
        ({"task": "flat"}, "`task` has no place in model_config; choose it with the argument `task`"),
        ({"template": False}, "`template` has no place in model_config; choose it with the argument `template`"),
        ({"name": "mine"}, "`name` has no place in model_config"),
        ({1: 2}, "`1` is a key of model_config; keys must be text"),
    ],
)
def test_a_key_that_has_no_place_in_model_config_is_refused_by_name(builder, config, message, tmp_path):
    with pytest.raises(InvalidRequest, match=message) as refused:
        BUILDERS[builder].save_model(tmp_path / "model", model_config=config)

    assert "\n" not in str(refused.value)


def test_an_object_that_stands_in_many_places_is_refused_at_once(saved):
    """Written out, it would have 2 ** 30 copies of the innermost."""
    schema = {"type": "string"}
    for _ in range(30):
        schema = {"anyOf": [schema, schema]}
    model = mlflow.pyfunc.load_model(str(saved["onnx"]))
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    with pytest.raises(mlflow.MlflowException, match=r"schema` has [0-9]{11} characters; at most 1000000 are allowed"):
        model.predict(SPAIN, params={"response_format": response_format})
    with pytest.raises(mlflow.MlflowException, match=r"`custom_inputs\.other` is not known"):
        model.predict(SPAIN | {"custom_inputs": {"other": schema}})
    with pytest.raises(mlflow.MlflowException, match=r"`logit_bias\[5\]` is \{'anyOf': \[.*; it must be"):
        model.predict(SPAIN | {"custom_inputs": {"logit_bias": {"5": schema}}})


def test_the_package_says_that_it_is_typed():
    assert files("phi3_mlflow").joinpath("py.typed").is_file()


USER = """
from typing import Any

import mlflow.pyfunc

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.builders.common import BuildError
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error
from phi3_mlflow.serving import served


def logged(weights: str, config: dict[str, Any]) -> str:
    try:
        info = onnx.log_model(weights, registered_model_name="phi3", alias="champion", model_config=config)
    except (BuildError, InvalidRequest) as error:
        raise Phi3Error(f"not logged: {error}") from error
    return str(info.model_uri)


transformers.save_model("here", task="flat", template=False, metadata={"team": "red"})
uri = logged("embedded", {"max_tokens": 256})
answers: list[dict[str, Any]] = mlflow.pyfunc.load_model(uri).predict({"messages": []})
with served(uri) as address:
    print(address.upper(), answers)
"""
WRONG = {
    'onnx.log_model(task="chat")': "arg-type",
    "onnx.log_model(signature=None)": "arg-type",
    "onnx.log_model(alias=1)": "arg-type",
    "onnx.save_model()": "call-arg",
    "transformers.log_model(metadata=[])": "arg-type",
}
# Checking others' packages as well would take minutes, and is their own tests' work.
OTHERS = """
[mypy]
strict = True
[mypy-mlflow.*,torch.*,transformers.*,numpy.*,pandas.*,sqlalchemy.*,onnxruntime.*,huggingface_hub.*,httpx.*,jinja2.*]
follow_imports = skip
"""


def test_mypy_in_strict_mode_likes_a_users_program_and_finds_what_is_wrong_in_it(tmp_path):
    (tmp_path / "mypy.ini").write_text(OTHERS, "utf-8")
    (tmp_path / "good.py").write_text(USER, "utf-8")
    (tmp_path / "wrong.py").write_text(USER + "\n".join(WRONG) + "\n", "utf-8")

    command = [sys.executable, "-m", "mypy", "good.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    first = USER.count("\n") + 1
    found = [[*line.split(":")[:2], line.rpartition("[")[2].rstrip("]")] for line in done.stdout.splitlines()[:-1]]
    assert found == [["wrong.py", str(first + at), code] for at, code in enumerate(WRONG.values())], done.stdout
