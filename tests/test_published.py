"""The layouts in which Microsoft published Phi-3, under their own names: the README's commands, run on them.

The files are the embedded model's, in the form that the published ones had in 2024.

Run with: python -m pytest tests/test_published.py
"""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from hub import downloaded, pointed_at

from phi3_mlflow.cli import cli
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder
from phi3_mlflow.weights import ONNX_FOLDER, REVISIONS

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"
NAME, ONNX_NAME = "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct-onnx"
GRAPH = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
# Code that says so when it is run.
CODE = b"import pathlib; pathlib.Path('code-has-run').touch()\n"
CARD = {
    "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT License\n\nCopyright\n", ".gitattributes": b"x",
    "SECURITY.md": b"# Security", "CODE_OF_CONDUCT.md": b"# Conduct", "NOTICE.md": b"# Notice",
}  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def beside_the_tokenizer():
    """What transformers 4 wrote beside tokenizer.json."""
    added = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    config = json.loads((EMBEDDED / "tokenizer_config.json").read_text("utf-8"))
    names = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if key in config}
    return {
        "added_tokens.json": json.dumps({t["content"]: t["id"] for t in added if "|" in t["content"]}).encode(),
        "special_tokens_map.json": json.dumps(names).encode(),
        "tokenizer.model": b"sentencepiece",
    }


@pytest.fixture(scope="module")
def transformers_files(tmp_path_factory):
    """Two shards with an index, configuration as transformers 4.40 wrote it, and code beside them."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("published")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype="auto")
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size * 3 // 4)
    assert {path.name for path in folder.glob("*.safetensors")} == SHARDS
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")
    config |= {
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": config.pop("dtype"),
        "transformers_version": "4.40.2",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    code = dict.fromkeys(("configuration_phi3.py", "modeling_phi3.py", "sample_finetune.py"), CODE)
    return {**contents(folder), **CARD, **code, **beside_the_tokenizer()}


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    """Under the published names, with the genai_config.json of 2024 and positions as an input of the graph."""
    import onnx
    from onnxruntime_genai.models.builder import Phi3MiniModel, create_model, parse_extra_options

    # onnxruntime-genai's own builder as it was used then: without what `export` adds for the sliding window.
    room = tmp_path_factory.mktemp("published-onnx")
    built, folder = room / "built", room / "folder"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for fused in ("is_fused_rope_supported", "is_packed_matmul_supported"):
            patch.setattr(Phi3MiniModel, fused, lambda self: False)
        how = ("", str(EMBEDDED), str(built), "int4", "cpu", str(room / "cache"))
        options = ["block_size=32", "accuracy_level=4", "windowed_kv_cache=false"]
        create_model(*how, **parse_extra_options(*how, options))
    model = onnx.load(built / "model.onnx")
    assert "position_ids" in {value.name for value in model.graph.input}
    onnx.save_model(model, folder / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data", size_threshold=0)
    now = json.loads((built / "genai_config.json").read_text("utf-8"))["model"]
    decoder = now["decoder"]
    kept = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    config = {
        "model": {
            "bos_token_id": 1,
            "context_length": now["context_length"],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                **{name: decoder[name] for name in kept},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
            "eos_token_id": now["eos_token_id"],
            "pad_token_id": now["pad_token_id"],
            "type": "phi3",
            "vocab_size": now["vocab_size"],
        },
        "search": {
            "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0,
            "max_length": now["context_length"], "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": True, "repetition_penalty": 1.0,
            "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps(config, indent=4), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return {**contents(folder), **beside_the_tokenizer(), "configuration_phi3.py": CODE}


@pytest.fixture
def hub(tmp_path, monkeypatch, transformers_files, onnx_files):
    monkeypatch.chdir(tmp_path)
    others = ("cpu_and_mobile/cpu-int4-rtn-block-32", "cuda/cuda-fp16", "directml/directml-int4-awq-block-128")
    onnx_repository = {f"{ONNX_FOLDER}/{name}": content for name, content in onnx_files.items()}
    onnx_repository |= {f"{folder}/genai_config.json": b"{}" for folder in others} | CARD | {"config.json": b"{}"}
    with pointed_at(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, transformers_files, commit=REVISIONS[NAME])
        server.add(ONNX_NAME, onnx_repository, commit=REVISIONS[ONNX_NAME])
        yield server


def log(*arguments):
    result = CliRunner().invoke(cli, ["log", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def answers(uri, **config):
    model = mlflow.pyfunc.load_model(uri, model_config=config)
    (found,) = model.predict({"messages": [{"role": "user", "content": "What is the capital of Spain?"}]})
    return "Madrid" in found["choices"][0]["message"]["content"]


def test_the_readmes_commands_log_what_is_published(hub, tmp_path, transformers_files, onnx_files):
    uri = log("transformers", "--weights", NAME)
    unneeded = {"configuration_phi3.py", "modeling_phi3.py", "sample_finetune.py", ".gitattributes", "SECURITY.md"}
    assert downloaded(hub) == set(transformers_files) - unneeded - {"CODE_OF_CONDUCT.md"}
    assert answers(uri)

    uri = log("onnx", "--weights", ONNX_NAME)
    names = {f"{ONNX_FOLDER}/{name}" for name in set(onnx_files) - unneeded}
    assert downloaded(hub) == names | {"README.md", "LICENSE", "NOTICE.md"}
    assert answers(uri)
    assert answers(uri, parallel=2, engine="onnxruntime")

    (tmp_path / "my-phi3-int4").mkdir()
    for name, content in onnx_files.items():
        (tmp_path / "my-phi3-int4" / name).write_bytes(content)
    assert answers(log("onnx", "--weights", "./my-phi3-int4"))
    assert not list(tmp_path.rglob("code-has-run"))


def test_a_graph_that_takes_positions_runs_with_several_slots(tmp_path, onnx_files):
    for name, content in onnx_files.items():
        (tmp_path / name).write_bytes(content)
    one, several = GenaiDecoder(tmp_path, context_length=256), BatchedDecoder(tmp_path, slots=2, context_length=256)
    prompt = np.random.default_rng(0).integers(5, 2000, 40).tolist()
    for at in range(0, len(prompt), one.chunk):
        part = Part(prompt[at : at + one.chunk], 1)
        expected = one.step({0: part})[0][-1].copy()
        found = several.step({1: part})[1][-1].copy()
    assert np.abs(found - expected).max() < 0.1 * np.std(expected)
    one.close()
    several.close()
