"""Where weights come from. Run: pytest tests/test_weights.py.

The hub is a stand-in (hub.py here); its client is the real one.
"""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import protobuf
import pytest
import shards
from hub import TOKEN, Hub, downloaded, pointed_at
from huggingface_hub import constants

from phi3_mlflow import weights
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.weights import ONNX_FOLDER, REVISIONS, Weights, resolve

NAME = "microsoft/Phi-3-mini-4k-instruct"
ONNX_NAME = "microsoft/Phi-3-mini-4k-instruct-onnx"
GRAPH = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
MIT = b"Microsoft.\nCopyright (c) Microsoft Corporation.\n\nMIT License\n\nPermission is hereby granted"

# As the model builder of 2024 wrote it for Phi-3-mini.
GENAI_CONFIG = {
    "model": {
        "bos_token_id": 1,
        "context_length": 4096,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": GRAPH,
            "head_size": 96,
            "hidden_size": 3072,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        "eos_token_id": [32000, 32001, 32007],
        "pad_token_id": 32000,
        "type": "phi3",
        "vocab_size": 32064,
    },
    "search": {
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": 4096,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    },
}


DECODER = GENAI_CONFIG["model"]["decoder"]
FIRST, SECOND, THIRD = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2, 3))
TOKENIZER = (Path(__file__).resolve().parent.parent / "artifacts" / "onnx" / "tokenizer.json").read_bytes()


def transformers_files() -> dict[str, bytes]:
    config = {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "x.Phi3Config"},
        "vocab_size": 32064, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 299_584}, "weight_map": places}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": [32000, 32001, 32007]}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": shards.whole("a", 200_000, seed=1),
        "model-00002-of-00002.safetensors": shards.whole("b", 100_000, seed=2),
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": b'{"model_max_length": 4096}',
        "tokenizer.model": b"sentencepiece",
        "chat_template.jinja": b"{{ messages }}",
    }


def phi3_graph(weights: bytes) -> bytes:
    """A graph with the inputs and outputs of Phi-3-mini, and one node."""
    cache = ("batch_size", 32, "length", 96)
    values = [
        *(protobuf.field(11, protobuf.value(name, "batch_size", "length")) for name in ("input_ids", "attention_mask")),
        protobuf.field(12, protobuf.value("logits", "batch_size", "length", 32064)),
    ]
    for layer in range(32):
        for kind in ("key", "value"):
            values.append(protobuf.field(11, protobuf.value(f"past_key_values.{layer}.{kind}", *cache)))
            values.append(protobuf.field(12, protobuf.value(f"present.{layer}.{kind}", *cache)))
    return protobuf.model(protobuf.graph([protobuf.node("Gather", "w", "x")], [weights], b"".join(values)))


def onnx_files() -> dict[str, bytes]:
    weights = protobuf.tensor("w", location=f"{GRAPH}.data", offset="0", length="300000")
    return {
        "genai_config.json": json.dumps(GENAI_CONFIG).encode(),
        GRAPH: phi3_graph(weights),
        f"{GRAPH}.data": random.Random(3).randbytes(300_000),
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": b"{}",
        "tokenizer.model": b"sentencepiece",
        "config.json": b'{"auto_map": {}}',
        "special_tokens_map.json": b'{"pad_token": "<|endoftext|>"}',
        "added_tokens.json": b"{ }",
    }


def save(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def transformers_folder(tmp_path: Path) -> Path:
    return save(tmp_path / "tuned", transformers_files())


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    return save(tmp_path / "int4", onnx_files())


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(what: str | Path, form: weights.Form, **options: str) -> str:
    """The message with which weights are refused: one line, without the token or a signed address."""
    with pytest.raises(WeightsError) as caught:
        resolve(what, form, **options)
    message = str(caught.value)
    assert "\n" not in message
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown
    assert "X-Amz-Signature" not in shown
    return message


class TestEmbedded:
    @pytest.mark.parametrize("form", ["transformers", "onnx"])
    def test_the_embedded_model_is_complete_in_both_forms(self, form):
        found = resolve("embedded", form)
        assert (found.source, found.revision, found.license) == ("phi3_mlflow embedded model", None, "mit")

    @pytest.mark.parametrize("place", ["phi3_mlflow/artifacts", "artifacts"])
    def test_it_is_found_in_an_installed_package_and_in_a_checkout(self, tmp_path, monkeypatch, place):
        monkeypatch.setattr(weights, "__file__", str(tmp_path / "phi3_mlflow" / "weights.py"))
        folder = save(tmp_path / place / "onnx", onnx_files())
        assert resolve("embedded", "onnx").folder == folder

    def test_an_installation_without_it_says_where_it_looked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "__file__", str(tmp_path / "phi3_mlflow" / "weights.py"))
        assert f"looked in {tmp_path}/phi3_mlflow/artifacts" in refused("embedded", "onnx")

    def test_a_revision_is_refused(self):
        assert "goes with a Hugging Face id" in refused("embedded", "onnx", revision="main")


class TestLocalFolder:
    def test_a_transformers_folder_is_taken_as_it_is(self, transformers_folder):
        for what in (transformers_folder, str(transformers_folder), f"{transformers_folder}/"):
            assert resolve(what, "transformers") == Weights(transformers_folder, "local folder tuned", None, "unknown")

    def test_an_onnx_folder_is_taken_as_it_is(self, onnx_folder):
        assert resolve(onnx_folder, "onnx") == Weights(onnx_folder, "local folder int4", None, "unknown")

    def test_a_single_safetensors_file_needs_no_index(self, transformers_folder):
        (transformers_folder / "model.safetensors.index.json").unlink()
        (transformers_folder / "model-00001-of-00002.safetensors").rename(transformers_folder / "model.safetensors")
        resolve(transformers_folder, "transformers")

    def test_a_relative_folder_and_a_home_folder_are_found(self, transformers_folder, monkeypatch):
        monkeypatch.chdir(transformers_folder.parent)
        monkeypatch.setenv("HOME", str(transformers_folder.parent))
        assert resolve("tuned", "transformers").folder == transformers_folder
        assert resolve("~/tuned", "transformers").folder == transformers_folder

    def test_a_local_folder_wins_over_a_hub_id_of_the_same_name(self, tmp_path, monkeypatch):
        save(tmp_path / NAME, transformers_files())
        monkeypatch.chdir(tmp_path)
        assert resolve(NAME, "transformers").source == "local folder Phi-3-mini-4k-instruct"

    def test_a_file_is_refused(self, transformers_folder):
        assert "is a file: give the folder" in refused(transformers_folder / "config.json", "transformers")

    @pytest.mark.parametrize(
        "text", ["./missing", "/missing/folder", "missing", "~/missing", "a--b/c", "a/../b", "a/b/"]
    )
    def test_a_missing_path_is_explained_in_both_readings(self, text):
        message = refused(text, "onnx")
        assert "neither a folder that exists" in message
        assert "nor a Hugging Face id" in message

    @pytest.mark.parametrize("form", ["transformers", "onnx"])
    def test_what_is_no_name_is_refused(self, form):
        assert "weights is 5; it must be `embedded`, a folder or" in refused(5, form)
        assert "weights is None" in refused(None, form)
        assert "revision is 5; it must be a branch, tag or commit" in refused("a/b", form, revision=5)

    def test_a_path_object_is_never_a_hub_id(self):
        assert "neither a folder that exists" in refused(Path("organization/name"), "onnx")

    def test_a_revision_is_refused(self, onnx_folder):
        assert "('main') goes with a Hugging Face id" in refused(onnx_folder, "onnx", revision="main")


class TestTransformersForm:
    @pytest.mark.parametrize(
        "name", ["config.json", "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    def test_a_missing_file_is_named(self, transformers_folder, name):
        (transformers_folder / name).unlink()
        assert f"{transformers_folder / name} is missing" in refused(transformers_folder, "transformers")

    def test_missing_weights_are_named(self, transformers_folder):
        for path in transformers_folder.glob("model*"):
            path.unlink()
        assert "model.safetensors is missing" in refused(transformers_folder, "transformers")

    def test_an_onnx_folder_is_refused_with_the_way_on(self, onnx_folder):
        assert f"`phi3-mlflow log onnx --weights {onnx_folder}`" in refused(onnx_folder, "transformers")

    def test_pickled_weights_are_refused(self, transformers_folder):
        for path in transformers_folder.glob("model*"):
            path.unlink()
        (transformers_folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        message = refused(transformers_folder, "transformers")
        assert "pytorch_model.bin is a pickle" in message
        assert "save_pretrained" in message

    def test_an_adapter_alone_is_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        assert "merge_and_unload" in refused(tmp_path, "transformers")

    def test_a_model_that_needs_its_own_code_is_refused(self, transformers_folder):
        change(transformers_folder / "config.json", model_type="phi3small")
        assert "`auto_map`" in refused(transformers_folder, "transformers")

    def test_another_model_type_is_refused(self, transformers_folder):
        (transformers_folder / "config.json").write_text('{"model_type": "gemma"}')
        assert "has model_type 'gemma': it must be one of phi3, phi, llama, qwen2, qwen3" in refused(
            transformers_folder, "transformers"
        )

    def test_another_architecture_is_refused(self, transformers_folder):
        change(transformers_folder / "config.json", architectures=["Phi3ForSequenceClassification"])
        assert "not Phi3ForCausalLM" in refused(transformers_folder, "transformers")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{}", "has no `weight_map`"),
            ('{"weight_map": []}', "has no `weight_map`"),
            ('{"weight_map": {"a": "../secret"}}', "names '../secret', which is not a file beside it"),
            ("{", "is not JSON"),
            ("[]", "is not a JSON object"),
            ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "has no `metadata`"),
            ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "has the key weight_map.a twice"),
        ],
    )
    def test_an_index_that_makes_no_sense_is_refused(self, transformers_folder, content, reason):
        (transformers_folder / "model.safetensors.index.json").write_text(content)
        assert f"model.safetensors.index.json {reason}" in refused(transformers_folder, "transformers")

    @pytest.mark.parametrize(
        ("places", "reason"),
        [
            ({"a": 1, "b": 2, "c": 2}, f"{SECOND} lacks the tensor 'c', which model.safetensors.index.json has there"),
            ({"a": 1, "b": 3}, f"{THIRD} is missing"),
            ({"a": 2, "b": 2}, f"{SECOND} lacks the tensor 'a', which"),
            ({"a": 1, "b": 1}, f"{FIRST} lacks the tensor 'b', which"),
            ({"a": 2, "b": 1}, f"{FIRST} has the tensor a, and model.safetensors.index.json has it in '{SECOND}'"),
            ({"b": 2, "c": 1}, f"{FIRST} has the tensor a, and model.safetensors.index.json has it nowhere"),
        ],
    )
    def test_an_index_that_contradicts_its_shards_is_refused(self, transformers_folder, places, reason):
        names = {tensor: (FIRST, SECOND, THIRD)[place - 1] for tensor, place in places.items()}
        change(transformers_folder / "model.safetensors.index.json", weight_map=names)
        assert reason in refused(transformers_folder, "transformers")

    def test_two_shards_with_one_tensor_are_refused(self, transformers_folder):
        both = shards.header({"a": ("U8", [2]), "b": ("U8", [3])})
        (transformers_folder / SECOND).write_bytes(shards.file(both, bytes(5)))
        message = refused(transformers_folder, "transformers")
        assert f"{SECOND} has the tensor a, and model.safetensors.index.json has it in '{FIRST}'" in message

    def test_a_damaged_shard_and_a_damaged_file_beside_an_index_are_refused(self, transformers_folder):
        (transformers_folder / "model.safetensors").write_bytes(shards.file("{", b""))
        assert "the header of" in refused(transformers_folder, "transformers")
        (transformers_folder / "model.safetensors").unlink()
        content = (transformers_folder / SECOND).read_bytes()
        (transformers_folder / SECOND).write_bytes(content[:-1])
        assert f"{SECOND} has 99791 bytes of numbers, and its tensors take 99792" in refused(
            transformers_folder, "transformers"
        )

    def test_an_empty_file_is_refused(self, transformers_folder):
        (transformers_folder / "model-00001-of-00002.safetensors").write_bytes(b"")
        assert "model-00001-of-00002.safetensors is empty" in refused(transformers_folder, "transformers")

    @pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE", "README.md"])
    def test_a_licence_that_is_a_link_to_a_file_elsewhere_is_refused(self, transformers_folder, tmp_path, name):
        (tmp_path / "id_ed25519").write_text("a key")
        (transformers_folder / name).symlink_to(tmp_path / "id_ed25519")
        assert f"{name} is a link to" in refused(transformers_folder, "transformers")

    def test_a_git_lfs_pointer_is_refused_with_the_way_on(self, transformers_folder):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (transformers_folder / "model-00001-of-00002.safetensors").write_bytes(pointer)
        assert "run `git lfs pull`" in refused(transformers_folder, "transformers")


class TestOnnxForm:
    @pytest.mark.parametrize("name", ["genai_config.json", GRAPH, f"{GRAPH}.data", "tokenizer.json"])
    def test_a_missing_file_is_named(self, onnx_folder, name):
        (onnx_folder / name).unlink()
        assert f"{onnx_folder / name} is missing" in refused(onnx_folder, "onnx")

    def test_a_transformers_folder_is_refused_with_the_way_on(self, transformers_folder):
        message = refused(transformers_folder, "onnx")
        assert f"run `phi3-mlflow quantize {transformers_folder} {transformers_folder}-int4` first" in message

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"type": "gemma"}, "has model.type 'gemma': it must be 'phi3' or "),
            ({"decoder": {}}, "has no model.decoder.filename"),
            ({"decoder": {"filename": 1}}, "has model.decoder.filename 1"),
            (
                {"decoder": {**DECODER, "filename": "/etc/passwd.onnx"}},
                "names '/etc/passwd.onnx', which is not a file beside it",
            ),
            ({"decoder": {**DECODER, "filename": "a\\b.onnx"}}, "which is not a file beside it"),
        ],
    )
    def test_a_configuration_that_makes_no_sense_is_refused(self, onnx_folder, changes, reason):
        (onnx_folder / "genai_config.json").write_text(json.dumps({"model": {**GENAI_CONFIG["model"], **changes}}))
        assert reason in refused(onnx_folder, "onnx")

    def test_an_empty_configuration_is_refused(self, onnx_folder):
        (onnx_folder / "genai_config.json").write_text("{}")
        assert "has no model.type" in refused(onnx_folder, "onnx")

    def test_a_graph_with_the_weights_inside_needs_no_data_file(self, onnx_folder):
        (onnx_folder / GRAPH).write_bytes(phi3_graph(protobuf.tensor("w")))
        (onnx_folder / f"{GRAPH}.data").unlink()
        resolve(onnx_folder, "onnx")

    def test_the_data_file_of_a_graph_that_onnx_wrote_is_required(self, onnx_folder):
        onnx = pytest.importorskip("onnx")
        import numpy as np

        tensor = onnx.numpy_helper.from_array(np.ones(4096, np.float32), "w")
        output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4096])
        model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [output], [tensor]))
        onnx.save(model, onnx_folder / GRAPH, save_as_external_data=True, location="weights.data.v2")
        config = json.loads((onnx_folder / "genai_config.json").read_text())
        for key in ("inputs", "outputs", "num_hidden_layers"):
            del config["model"]["decoder"][key]
        (onnx_folder / "genai_config.json").write_text(json.dumps(config))
        resolve(onnx_folder, "onnx")
        (onnx_folder / "weights.data.v2").unlink()
        assert "weights.data.v2 is missing" in refused(onnx_folder, "onnx")

    def test_a_file_that_is_a_link_to_somewhere_else_is_refused(self, onnx_folder, tmp_path):
        (tmp_path / "secret").write_text("{}")
        for name in ("config.json", "tokenizer.json"):
            (onnx_folder / name).unlink()
            (onnx_folder / name).symlink_to(tmp_path / "secret")
            assert f"{name} is a link to {tmp_path / 'secret'}, outside its folder" in refused(onnx_folder, "onnx")
            (onnx_folder / name).unlink()
            (onnx_folder / name).write_text("{}")


class TestLicense:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("README.md", "---\nlanguage:\n- en\nlicense: MIT\ntags: [x]\n---\n# Card", "mit"),
            ("README.md", '---\nlicense: "apache-2.0"\n---\n', "apache-2.0"),
            ("README.md", "---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
            ("README.md", "---\nlicense: other\n---\n", "other"),
            ("README.md", "# Card\nlicense: mit\n", "unknown"),
            ("LICENSE", MIT.decode(), "mit"),
            ("LICENSE.txt", "MIT License\n", "mit"),
            ("LICENSE", "The MIT License (MIT)\n", "mit"),
            ("LICENSE", "Apache License\nVersion 2.0", "unknown"),
            ("LICENSE", "This is not the MIT License", "unknown"),
        ],
    )
    def test_it_is_read_from_the_model_card_or_the_licence_file(self, onnx_folder, name, text, expected):
        (onnx_folder / name).write_text(text)
        assert resolve(onnx_folder, "onnx").license == expected

    def test_the_model_card_comes_before_the_licence_file(self, onnx_folder):
        (onnx_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (onnx_folder / "LICENSE").write_bytes(MIT)
        assert resolve(onnx_folder, "onnx").license == "apache-2.0"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that holds both of Microsoft's repositories, and a client that points to it with an empty cache."""
    monkeypatch.chdir(tmp_path)
    with pointed_at(monkeypatch, tmp_path / "cache") as server:
        unneeded = {"modeling_phi3.py": b"code", "pytorch_model.bin": b"pickle", "figures/loss.json": b"{}"}
        card = {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": MIT, ".gitattributes": b"x"}
        server.add(NAME, {**transformers_files(), **unneeded, **card}, commit=REVISIONS[NAME])
        folders = (ONNX_FOLDER, "cpu_and_mobile/cpu-int4-rtn-block-32", "cuda/cuda-fp16")
        files = {f"{folder}/{name}": content for folder in folders for name, content in onnx_files().items()}
        files[f"{ONNX_FOLDER}/configuration_phi3.py"] = b"code"
        server.add(ONNX_NAME, {**files, "config.json": b"{}", "LICENSE": MIT}, commit=REVISIONS[ONNX_NAME])
        yield server


class TestHub:
    def test_only_the_needed_transformers_files_come_at_the_pinned_revision(self, hub, tmp_path):
        found = resolve(NAME, "transformers")
        assert found.folder.is_relative_to(tmp_path / "cache")
        assert (found.source, found.revision, found.license) == (NAME, REVISIONS[NAME], "mit")
        assert downloaded(hub) == {*transformers_files(), "README.md", "LICENSE"}
        assert {name: (found.folder / name).read_bytes() for name in transformers_files()} == transformers_files()

    def test_only_the_needed_onnx_folder_comes_at_the_pinned_revision(self, hub):
        found = resolve(ONNX_NAME, "onnx")
        assert found.folder.match(f"{REVISIONS[ONNX_NAME]}/{ONNX_FOLDER}")
        assert (found.source, found.revision) == (f"{ONNX_NAME}/{ONNX_FOLDER}", REVISIONS[ONNX_NAME])
        assert found.license == "mit"
        assert downloaded(hub) == {*(f"{ONNX_FOLDER}/{name}" for name in onnx_files()), "LICENSE"}

    def test_another_folder_is_named_after_the_repository(self, hub):
        found = resolve(f"{ONNX_NAME}/cuda/cuda-fp16", "onnx")
        assert found.source == f"{ONNX_NAME}/cuda/cuda-fp16"
        assert found.folder.name == "cuda-fp16"

    def test_every_request_names_the_pinned_commit_and_tells_no_more_than_needed(self, hub):
        resolve(NAME, "transformers")
        for request in hub.take():
            assert REVISIONS[NAME] in request.path
            assert "torch" not in request.headers["user-agent"]

    def test_the_token_goes_to_the_hub_but_not_to_the_storage_host(self, hub):
        resolve(NAME, "transformers")
        requests = hub.take()
        assert any(request.path.startswith("/cdn/") for request in requests)
        for request in requests:
            expected = None if request.path.startswith("/cdn/") else f"Bearer {TOKEN}"
            assert request.headers.get("authorization") == expected

    @pytest.mark.parametrize(("name", "form"), [(NAME, "transformers"), (ONNX_NAME, "onnx")])
    def test_the_second_time_no_request_is_made(self, hub, name, form):
        first = resolve(name, form)
        hub.take()
        assert resolve(name, form) == first
        assert hub.take() == []

    def test_a_branch_is_resolved_to_its_commit(self, hub):
        first = hub.add("someone/tuned", transformers_files())
        assert resolve("someone/tuned", "transformers") == Weights(
            Path(constants.HF_HUB_CACHE, "models--someone--tuned", "snapshots", first),
            "someone/tuned",
            first,
            "unknown",
        )
        second = hub.add("someone/tuned", {**transformers_files(), "generation_config.json": b"{}"})
        hub.take()
        assert resolve("someone/tuned", "transformers").revision == second
        assert downloaded(hub) == {"generation_config.json"}
        assert resolve("someone/tuned", "transformers", revision=first).revision == first

    def test_a_branch_is_taken_from_the_cache_when_the_hub_is_away(self, hub, caplog):
        commit = hub.add("someone/tuned", transformers_files(), branch="feature/x")
        first = resolve("someone/tuned", "transformers", revision="feature/x")
        hub.answer("/api/", 503)
        assert resolve("someone/tuned", "transformers", revision="feature/x") == first
        assert f"using commit {commit}" in caplog.text

    def test_microsofts_phi_3_is_mit_without_a_card(self, hub):
        hub.add("microsoft/Phi-3-other", transformers_files())
        assert resolve("microsoft/Phi-3-other", "transformers").license == "mit"

    def test_an_onnx_repository_without_folders_is_taken_from_its_top(self, hub):
        commit = hub.add("someone/onnx", onnx_files())
        found = resolve("someone/onnx", "onnx")
        assert (found.source, found.revision) == ("someone/onnx", commit)
        hub.take()
        assert resolve("someone/onnx", "onnx", revision=commit) == found
        assert hub.take() == []

    def test_a_cache_that_another_program_began_is_completed(self, hub):
        from huggingface_hub import hf_hub_download

        hf_hub_download(NAME, "config.json", revision=REVISIONS[NAME])
        hub.take()
        resolve(NAME, "transformers")
        assert "config.json" not in downloaded(hub)

    def test_two_files_of_the_same_content_are_downloaded_once(self, hub):
        content = transformers_files()["model-00001-of-00002.safetensors"]
        files = {**transformers_files(), "consolidated.safetensors": content}
        del files["tokenizer.model"], files["model-00002-of-00002.safetensors"]
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        hub.add("someone/twin", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
        found = resolve("someone/twin", "transformers")
        assert (found.folder / "consolidated.safetensors").read_bytes() == content
        assert sum(r.path.startswith("/cdn/") and r.path.endswith(".safetensors") for r in hub.take()) == 1


class TestWrongRepository:
    def test_onnx_of_a_transformers_repository_names_the_way_on(self, hub):
        message = refused(NAME, "onnx")
        assert f"{NAME} has no genai_config.json in {ONNX_FOLDER} or its top folder" in message
        assert "-onnx repository" in message
        assert f"phi3-mlflow quantize {NAME} FOLDER" in message

    def test_a_folder_that_does_not_exist_is_refused_with_those_that_do(self, hub):
        message = refused(f"{ONNX_NAME}/cpu", "onnx")
        assert "has no genai_config.json in cpu: name one of its folders" in message
        assert f"{ONNX_NAME}/cuda/cuda-fp16" in message

    def test_transformers_of_an_onnx_repository_names_the_way_on(self, hub):
        hub.add("someone/onnx", {f"cpu/{GRAPH}": b"x", "cpu/genai_config.json": b"{}"})
        assert "without -onnx" in refused("someone/onnx", "transformers")

    def test_a_repository_with_pickles_only_is_refused_without_downloading_them(self, hub):
        files = {name: content for name, content in transformers_files().items() if not name.startswith("model")}
        hub.add("someone/pickled", {**files, "pytorch_model.bin": b"pickle"})
        assert "model.safetensors is missing" in refused("someone/pickled", "transformers")
        assert "pytorch_model.bin" not in downloaded(hub)


class TestBrokenTransfer:
    SHARD = "model-00001-of-00002.safetensors"

    @pytest.fixture(autouse=True)
    def _small_chunks(self, monkeypatch):
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    def ranges(self, server: Hub) -> list[str | None]:
        path = f"/cdn/{NAME}/{REVISIONS[NAME]}/{self.SHARD}"
        return [request.headers.get("range") for request in server.take() if request.path == path]

    def test_a_cut_connection_is_taken_up_again_where_it_broke(self, hub):
        hub.cut(f"/cdn/{NAME}", 150_000)
        found = resolve(NAME, "transformers")
        assert (found.folder / self.SHARD).read_bytes() == transformers_files()[self.SHARD]
        assert self.ranges(hub) == [None, "bytes=150000-"]

    def test_a_later_call_goes_on_where_an_earlier_one_was_stopped(self, hub):
        hub.cut("/cdn/", 150_000)
        hub.cut("/cdn/", 0, times=10**6)
        message = refused(NAME, "transformers")
        assert "it goes on where it stopped" in message
        hub.heal()
        hub.take()
        found = resolve(NAME, "transformers")
        assert (found.folder / self.SHARD).read_bytes() == transformers_files()[self.SHARD]
        assert self.ranges(hub) == ["bytes=150000-"]
        assert not list(Path(constants.HF_HUB_CACHE).rglob("*.partial"))

    def test_a_part_that_is_longer_than_the_file_is_thrown_away(self, hub):
        blob = hashlib.sha256(transformers_files()[self.SHARD]).hexdigest()
        blobs = Path(constants.HF_HUB_CACHE, "models--microsoft--Phi-3-mini-4k-instruct", "blobs")
        blobs.mkdir(parents=True)
        (blobs / f"{blob}.partial").write_bytes(b"x" * 200_001)
        found = resolve(NAME, "transformers")
        assert (found.folder / self.SHARD).read_bytes() == transformers_files()[self.SHARD]

    def test_what_a_killed_client_left_of_a_small_file_is_swept_away(self, hub):
        blobs = Path(constants.HF_HUB_CACHE, "models--microsoft--Phi-3-mini-4k-instruct", "blobs")
        blobs.mkdir(parents=True)
        content = transformers_files()["config.json"]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / f"{blob}.0123abcd.incomplete").write_bytes(content[:10])
        resolve(NAME, "transformers")
        assert (blobs / blob).read_bytes() == content
        assert not list(blobs.glob("*.incomplete"))

    def test_what_has_arrived_is_not_downloaded_again(self, hub):
        hub.answer("model-00002-of-00002", 500)
        assert "answered 500" in refused(NAME, "transformers")
        hub.heal()
        hub.take()
        resolve(NAME, "transformers")
        assert self.ranges(hub) == []

    def test_a_damaged_weight_file_is_refused_and_comes_right_the_next_time(self, hub):
        hub.corrupt(f"/cdn/{NAME}")
        assert f"{self.SHARD} of {NAME} arrived damaged" in refused(NAME, "transformers")
        found = resolve(NAME, "transformers")
        assert (found.folder / self.SHARD).read_bytes() == transformers_files()[self.SHARD]

    def test_a_damaged_small_file_is_refused_and_comes_right_the_next_time(self, hub):
        hub.corrupt(f"GET /{NAME}/resolve/{REVISIONS[NAME]}/tokenizer.json")
        assert "tokenizer.json arrived damaged" in refused(NAME, "transformers")
        found = resolve(NAME, "transformers")
        assert (found.folder / "tokenizer.json").read_bytes() == transformers_files()["tokenizer.json"]

    def test_two_at_once_download_a_file_once(self, hub):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: resolve(NAME, "transformers"), range(2))
        assert first == second
        assert self.ranges(hub) == [None]


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "headers", "expected"),
        [
            (401, {"X-Error-Code": "RepoNotFound"}, "127.0.0.1 has no repository microsoft/Phi-3-mini-4k-instruct"),
            (404, {"X-Error-Code": "RepoNotFound"}, "there is no local folder microsoft/Phi-3-mini-4k-instruct"),
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "check your token"),
            (403, {}, "refused access to microsoft/Phi-3-mini-4k-instruct (403)"),
            (403, {"X-Error-Code": "GatedRepo"}, "asks you to accept its terms"),
            (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision"),
            (429, {}, "allows no more requests for now"),
            (500, {}, "answered 500"),
            (503, {}, "answered 503"),
        ],
    )
    def test_an_answer_of_the_hub_is_explained_in_one_line(self, hub, status, headers, expected):
        hub.answer("/api/models", status, headers)
        assert expected in refused(NAME, "transformers")

    def test_a_missing_repository_is_explained_in_both_readings(self, hub):
        message = refused("models/phi3", "transformers")
        assert "has no repository models/phi3 that is open to you" in message
        assert "no local folder models/phi3" in message

    def test_an_unknown_revision_is_named(self, hub):
        assert "has no revision 'v9'" in refused(NAME, "transformers", revision="v9")
        assert "has no revision '00000" in refused(NAME, "transformers", revision="0" * 40)

    def test_a_refusal_in_the_middle_is_explained(self, hub):
        for match in ("GET /cdn/", "HEAD"):
            hub.heal()
            hub.answer(match, 403)
            assert "refused access" in refused(NAME, "transformers")

    def test_offline_by_the_users_wish_is_explained(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert f"not complete in the cache {constants.HF_HUB_CACHE}" in refused(NAME, "transformers")
        assert hub.take() == []

    def test_without_a_network_the_error_says_what_to_do(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        message = refused(NAME, "transformers")
        assert "from 127.0.0.1 failed (ConnectError)" in message
        assert "check the network" in message

    def test_a_page_instead_of_an_answer_is_a_network_problem(self, hub):
        hub.answer("/api/models", 200, body=b"<html>Log in to the hotel's network</html>")
        assert "check the network" in refused(NAME, "transformers")

    def test_an_endpoint_that_is_no_address_is_refused(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "nowhere")
        assert "(UnsupportedProtocol)" in refused(NAME, "transformers")

    def test_a_token_with_impossible_characters_is_not_shown(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN + "\u00e9")
        assert "the token in HF_TOKEN" in refused(NAME, "transformers")

    def test_a_name_that_the_hub_does_not_allow_is_refused(self, hub):
        assert "is not a name that 127.0.0.1 allows" in refused("a/b.git", "transformers")

    def test_a_full_disk_is_noticed_before_the_download(self, hub, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
        message = refused(NAME, "transformers")
        assert "needs 0.0 GB" in message
        assert "set HF_HOME" in message
        assert downloaded(hub) == set()

    def test_a_disk_that_fills_up_is_explained(self, hub, monkeypatch):
        def full(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("phi3_mlflow.hub.http_get", full)
        assert "is full" in refused(NAME, "transformers")

    def test_a_cache_folder_that_cannot_be_made_is_named(self, hub, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
        message = refused(NAME, "transformers")
        assert "Not a directory" in message
        assert "set HF_HOME" in message


PROGRAM = """
import sys
import phi3_mlflow.weights as weights
assert not {"huggingface_hub", "httpx", "mlflow", "torch"} & set(sys.modules)
try:
    found = weights.resolve(sys.argv[1], sys.argv[2])
except weights.WeightsError as error:
    sys.exit(str(error))
sys.stdout.write(f"{found.revision} {found.folder}")
"""


class TestOwnProcess:
    """The client as users meet it: configured by its environment variables, in a process of its own."""

    def run(self, server: Hub, home: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        root = str(Path(weights.__file__).parents[1])
        values = {**os.environ, "PYTHONPATH": root, "HF_ENDPOINT": server.url, "HF_HOME": str(home), **env}
        return subprocess.run([sys.executable, "-c", PROGRAM, *args], env=values, capture_output=True, text=True)

    def test_download_then_offline(self, hub, tmp_path):
        absent = self.run(hub, tmp_path / "home", ONNX_NAME, "onnx", HF_HUB_OFFLINE="1")
        assert absent.returncode == 1
        assert "HF_HUB_OFFLINE is set" in absent.stderr
        assert hub.take() == []

        first = self.run(hub, tmp_path / "home", ONNX_NAME, "onnx", TQDM_POSITION="-1")  # bars without a terminal
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith(REVISIONS[ONNX_NAME])
        assert f"{GRAPH}.data"[-40:] in first.stderr  # the client's progress bar
        assert hub.take() != []

        for env in ({"HF_HUB_OFFLINE": "1"}, {}):
            again = self.run(hub, tmp_path / "home", ONNX_NAME, "onnx", **env)
            assert again.stdout == first.stdout
            assert hub.take() == []
