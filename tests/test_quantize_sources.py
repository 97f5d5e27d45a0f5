"""Where the weights to quantize come from: a LoRA adapter merged on the way, and a logged transformers model.

Run with: python -m pytest tests/test_quantize_sources.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx as onnx_format
import pytest
from families import SMALL

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.quantize import export
from phi3_mlflow.quantize.exporter import _stand_in
from phi3_mlflow.quantize.sources import Source, opened, read_json
from phi3_mlflow.runtime import loading
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.errors import WeightsError

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"
IDS = list(range(5, 21))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A small model's folder, an adapter's, and the logits of both together as peft computes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    room = tmp_path_factory.mktemp("adapted")
    source = SMALL["Phi-3-medium"].write(room / "source")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).eval()
    model.save_pretrained(room / "adapter")
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0, -1].numpy()
        with model.disable_adapter():
            assert not np.allclose(model(torch.tensor([IDS])).logits[0, -1].numpy(), logits, atol=0.1)
    return source, room / "adapter", logits


def test_an_adapter_is_merged_on_the_way_and_neither_it_nor_the_weights_are_touched(adapted, tmp_path):
    source, adapter, expected = adapted
    before = {path: path.read_bytes() for folder in (source, adapter) for path in folder.iterdir()}
    folder = export(source, tmp_path / "onnx", adapter=adapter, precision="fp32")
    decoder = loading.onnx_decoder(folder, {"context_length": 64})
    found = decoder.step({0: Part(IDS, 1)})[0][-1]
    decoder.close()
    assert np.abs(found - expected).max() < 3e-3 * expected.std()
    assert read_json(folder / "quantization.json")["adapter"] == "adapter"
    assert {path: path.read_bytes() for folder in (source, adapter) for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", None, r"adapter_model\.safetensors is missing"),
        ("adapter_model.safetensors", b"\x80\x02}q\x00.", r"adapter_model\.safetensors is a pickle"),
        ("adapter_model.safetensors", b"\x05" + bytes(7) + b"{}", "begins with a header of 5 bytes"),
        ("adapter_config.json", {"peft_type": "IA3"}, "has peft_type 'IA3'; only LORA can be merged"),
        (
            "adapter_config.json",
            {"megatron_config": {"a": 1}},
            "has 'megatron_config' with .*, which is not known here",
        ),
        (
            "adapter_config.json",
            {"layer_replication": [[0, 2]] * 9},
            "has 'layer_replication' with .*, which is not known",
        ),
        (
            "adapter_config.json",
            {"target_modules": "((.*)*)*!"},
            r"has target_modules with '\(\(\.\*\)\*\)\*!': it must be",
        ),
        ("adapter_config.json", {"exclude_modules": "(.+)+!"}, "has exclude_modules with"),
        ("adapter_config.json", {"modules_to_save": ["(.+)+!"]}, "has modules_to_save with"),
        ("adapter_config.json", {"layers_pattern": ["(.+)+!"]}, "has layers_pattern with"),
        ("adapter_config.json", {"rank_pattern": {"(.+)+!": 4}}, "has rank_pattern with"),
        ("adapter_config.json", {"alpha_pattern": {"(.+)+!": 4}}, "has alpha_pattern with"),
        ("adapter_config.json", {"r": 10**9}, r"has the rank 1000000000, and the largest in .* is 4"),
        ("adapter_config.json", {"rank_pattern": {"qkv_proj": 10**9}}, "has the rank 1000000000"),
        ("adapter_config.json", {"r": "4"}, "has the rank '4'"),
        (
            "adapter_config.json",
            {"target_modules": ["nowhere"]},
            r"merging .*adapter failed with exit code 1: .*nowhere",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_and_leaves_nothing(adapted, tmp_path, name, content, message):
    source, adapter, _ = adapted
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    if isinstance(content, dict):
        content = json.dumps(read_json(adapter / name) | content).encode()
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        export(source, tmp_path / "onnx", adapter=adapter, precision="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_logged_transformers_model_is_quantized_as_its_folder_is(tracking, tmp_path, fp32_onnx):
    info = transformers.log_model(registered_model_name="to-quantize", alias="champion")
    folder = export("models:/to-quantize@champion", tmp_path / "onnx", precision="fp32")
    ours, theirs = ({each.name: each.raw_data for each in onnx_format.load(place / "model.onnx").graph.initializer}
                    for place in (folder, fp32_onnx))  # fmt: skip
    assert ours == theirs
    assert (folder / "tokenizer.json").read_bytes() == (EMBEDDED / "tokenizer.json").read_bytes()
    assert "chat_template" in read_json(folder / "tokenizer_config.json")
    assert read_json(folder / "quantization.json")["source"] == "models:/to-quantize@champion"
    with opened(info.model_uri) as found:
        assert found.folder.name == "model"


def test_of_a_logged_models_two_folders_nothing_is_taken_that_was_not_checked(tmp_path):
    model, tokenizer = (Path(shutil.copytree(EMBEDDED, tmp_path / name)) for name in ("model", "tokenizer"))
    (model / "tokenizer.json").unlink()
    (tokenizer / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    (tokenizer / "model.safetensors").write_bytes(b"never looked at")
    (model / "later.py").write_text("")
    _stand_in(Source(model, tokenizer, "a test"), read_json(model / "config.json"), tmp_path / "stand-in")
    found = {path.name: path.resolve().parent.name for path in (tmp_path / "stand-in").iterdir()}
    names = ("generation_config.json", "model.safetensors", "LICENSE")
    expected = {
        **dict.fromkeys(names, "model"),
        **dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    }
    assert found == {"config.json": "stand-in", **expected}


def test_a_licence_that_is_a_link_out_of_a_logged_model_is_not_copied(tmp_path):
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    (tmp_path / "id_ed25519").write_text("a key")
    (folder / "NOTICE").symlink_to(tmp_path / "id_ed25519")
    with pytest.raises(WeightsError, match="NOTICE is a link to"):
        _stand_in(Source(folder, folder, "a test"), read_json(folder / "config.json"), tmp_path / "stand-in")


def test_a_logged_model_of_the_other_kind_or_with_a_damaged_file_is_refused(tracking, tmp_path):
    info = onnx.log_model()
    with pytest.raises(WeightsError, match="is no transformers model: give one that `phi3-mlflow log transformers`"):
        export(info.model_uri, tmp_path / "onnx")
    info = transformers.log_model()
    with opened(info.model_uri) as found:
        path = found.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="bytes where"):
        export(info.model_uri, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
