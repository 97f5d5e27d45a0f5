"""Weights that lack what the model needs: transformers would make it up, and here nothing is written.

Run: pytest tests/test_pretrained.py
"""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from families import SMALL
from shards import file, header

from phi3_mlflow.builders import transformers
from phi3_mlflow.cli import cli
from phi3_mlflow.runtime import manifest, model, pretrained, trust
from phi3_mlflow.runtime.errors import WeightsError

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"
NORM = "model.norm.weight"


@pytest.fixture
def weights(tmp_path):
    return Path(shutil.copytree(EMBEDDED, tmp_path / "weights"))


def change(folder, *without, **changes):
    """Writes the safetensors anew: without some tensors, and with functions of others."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    for name, function in changes.items():
        tensors |= function(tensors.pop(name))
    path.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def refused(folder):
    with pytest.raises(WeightsError) as error:
        pretrained.check(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SMALL)
def test_what_transformers_writes_passes(tmp_path, name):
    pretrained.check(SMALL[name].write(tmp_path / "weights"))


def test_embeddings_that_are_shared_may_be_under_either_name_and_not_under_none(tmp_path):
    folder = SMALL["Phi-4-mini"].write(tmp_path / "weights")
    assert "lm_head.weight" not in trust.tensors.header(folder / "model.safetensors")
    change(folder, **{"model.embed_tokens.weight": lambda tensor: {"lm_head.weight": tensor}})
    pretrained.check(folder)
    change(folder, "lm_head.weight")
    assert "has no tensor " in refused(folder)


def test_a_missing_tensor_is_named_with_its_file(weights):
    change(weights, NORM)
    message = refused(weights)
    assert message.startswith(f"{weights / 'model.safetensors'} has no tensor {NORM}, which the model of config.json")


def test_another_name_is_told(weights):
    change(weights, **{NORM: lambda tensor: {"transformer.norm.weight": tensor}})
    assert f"{NORM}, which the model of config.json needs; it has transformer.norm.weight" in refused(weights)


def test_another_shape_and_another_type_are_told(weights):
    change(weights, **{NORM: lambda tensor: {NORM: tensor[:-1]}})
    size = json.loads((weights / "config.json").read_text("utf-8"))["hidden_size"]
    assert f"has the tensor {NORM} as F32 in the shape [{size - 1}], and the model" in refused(weights)
    change(weights, **{NORM: lambda tensor: {NORM: tensor.new_zeros(size).char()}})
    assert f"has the tensor {NORM} as I8 in the shape [{size}]" in refused(weights)


def test_a_tensor_that_no_such_model_has_is_told_but_for_what_older_files_have(weights):
    change(weights, **{NORM: lambda tensor: {NORM: tensor, "model.layers.0.self_attn.rotary_emb.inv_freq": tensor[:4]}})
    pretrained.check(weights)
    change(weights, **{NORM: lambda tensor: {NORM: tensor, "model.layers.0.lora_A": tensor}})
    assert "has the tensor model.layers.0.lora_A, which the model of config.json has not" in refused(weights)


def test_a_configuration_that_transformers_refuses_is_one_line(weights):
    config = json.loads((weights / "config.json").read_text("utf-8"))
    (weights / "config.json").write_text(json.dumps(config | {"hidden_act": "nothing"}), "utf-8")
    assert refused(weights).startswith(f"transformers cannot load {weights}: ")


DAMAGE = {
    "a header beyond the file": lambda path: path.write_bytes(b"\xff" * 100),
    "overlapping tensors": lambda path: path.write_bytes(
        file({name: header({NORM: ("F32", [8])})[NORM] for name in (NORM, "lm_head.weight")}, bytes(32))
    ),
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "other tensors": lambda path: path.write_bytes(file(header({"w": ("F32", [2**20])}), bytes(2**22))),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("verb", ["log", "quantize"])
def test_the_command_line_refuses_in_one_line_and_writes_nothing(tracking, weights, tmp_path, verb, what):
    DAMAGE[what](weights / "model.safetensors")
    before = len(mlflow.MlflowClient().search_logged_models(["1"]))
    asked = {"log": ["log", "transformers", "--weights", str(weights)], "quantize": ["quantize", str(weights)]}[verb]
    result = CliRunner().invoke(cli, [*asked, *([str(tmp_path / "onnx")] if verb == "quantize" else [])])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {weights / 'model.safetensors'} ")
    assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert len(mlflow.MlflowClient().search_logged_models(["1"])) == before


def test_a_logged_model_whose_weights_were_exchanged_does_not_load(tmp_path, saved):
    import yaml

    folder = Path(shutil.copytree(saved["transformers"], tmp_path / "model"))
    change(folder / "model", NORM)
    manifest.write(folder, trust.TRANSFORMERS_PARTS)
    content = yaml.safe_load((folder / "MLmodel").read_text("utf-8"))
    content["metadata"]["weights"]["sha256"] = manifest.digest(folder)
    (folder / "MLmodel").write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(WeightsError, match=rf"model\.safetensors has no tensor {NORM}"):
        model.load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight"])
def test_numbers_that_are_none_are_refused_when_a_model_is_logged(weights, tmp_path, name, number):
    def spoil(tensor):
        tensor.view(-1)[-1] = number
        return {name: tensor}

    change(weights, **{name: spoil})
    with pytest.raises(WeightsError, match=f"local folder weights has NaN or infinite numbers in the tensor {name}:"):
        transformers.save_model(tmp_path / "model", weights)
    assert not (tmp_path / "model").exists()


def test_numbers_whose_sum_is_infinite_are_fine():
    import torch

    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), 3e38))

    pretrained.check_numbers(Large(), "x")
