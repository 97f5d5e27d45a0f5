"""The exporter: what the ONNX folder holds, and what happens when it cannot be made.

pytest tests/test_quantize.py
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from phi3_mlflow.quantize import export
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"


def edit(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    value = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}), "utf-8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "source"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a folder as transformers 5 saves it: the chat template in a file, and a top_k of 1."""
    room = tmp_path_factory.mktemp("export")
    source = Path(shutil.copytree(EMBEDDED, room / "source"))
    template = json.loads((source / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    (source / "chat_template.jinja").write_text(template, "utf-8")
    edit(source / "tokenizer_config.json", chat_template=None)
    edit(source / "generation_config.json", top_k=1, do_sample=True)
    return export(source, room / "new" / "onnx")


def test_the_folder_holds_the_model_and_its_tokenizer(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"config.json", "generation_config.json", "LICENSE"}
    assert (exported / "tokenizer.json").read_bytes() == (EMBEDDED / "tokenizer.json").read_bytes()


def test_nothing_is_left_beside_the_folder(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["onnx"]


def test_the_chat_template_is_in_the_tokenizer_config(exported: Path) -> None:
    wanted = json.loads((EMBEDDED / "tokenizer_config.json").read_text("utf-8"))
    assert json.loads((exported / "tokenizer_config.json").read_text("utf-8")) == wanted


def test_the_end_tokens_are_those_of_the_generation_config(exported: Path) -> None:
    genai = json.loads((exported / "genai_config.json").read_text("utf-8"))
    wanted = json.loads((EMBEDDED / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert genai["model"]["eos_token_id"] == wanted


def test_sampling_with_a_temperature_is_not_cut_to_one_candidate(exported: Path) -> None:
    assert json.loads((exported / "genai_config.json").read_text("utf-8"))["search"]["top_k"] > 1


def test_every_attention_layer_has_the_window_and_the_whole_cache(exported: Path) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    windows = [entry.i for node in attention for entry in node.attribute if entry.name == "local_window_size"]
    config = json.loads((EMBEDDED / "config.json").read_text("utf-8"))
    # onnxruntime counts the window as transformers does, with the current token in it.
    assert windows == [config["sliding_window"]] * config["num_hidden_layers"]
    assert "sliding_window" not in json.loads((exported / "genai_config.json").read_text("utf-8"))["model"]["decoder"]


def test_the_matrices_are_int4_in_blocks_of_32_at_accuracy_level_4(exported: Path) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    matrices = [node for node in graph.node if node.op_type == "MatMulNBits"]
    found = [{entry.name: entry.i for entry in node.attribute} for node in matrices]
    assert found
    assert {(entry["bits"], entry["block_size"], entry["accuracy_level"]) for entry in found} == {(4, 32, 4)}


def test_an_export_says_nothing_on_stdout_and_reports_its_lines(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    export(source, tmp_path / "onnx", precision="fp32", report=lines.append)
    assert capfd.readouterr() == ("", "")
    assert lines


def test_an_interrupted_export_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "onnx", report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damaged_weights_are_named_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    size = (source / "model.safetensors").stat().st_size
    (source / "model.safetensors").write_bytes(b"no weights".ljust(size))
    with pytest.raises(WeightsError, match=r"model\.safetensors begins with a header of \d+ bytes, and the file has"):
        export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_builder_says_last_is_told_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", hidden_act="mish")  # which transformers has, and the builder has not
    with pytest.raises(
        WeightsError, match=r"the model builder on local folder source failed with exit code 1: .*Error"
    ):
        export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", model_type="gemma")
    with pytest.raises(WeightsError, match=r"config\.json has model_type 'gemma': it must be one of phi3, "):
        export(source, tmp_path / "onnx")


def test_a_size_that_is_none_is_named(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", hidden_size="192")
    with pytest.raises(WeightsError, match=r"config\.json has hidden_size '192': it must be an integer from 1 to"):
        export(source, tmp_path / "onnx")
    edit(source / "config.json", hidden_size=None)
    with pytest.raises(WeightsError, match=r"config\.json has no hidden_size"):
        export(source, tmp_path / "onnx")


def test_another_shape_than_that_of_the_weights_is_named_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", intermediate_size=100)
    with pytest.raises(WeightsError, match=r"model\.safetensors has the tensor \S+ as F32 in the shape"):
        export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_onnx_folder_is_refused_with_the_verb_for_it(tmp_path: Path) -> None:
    folder = EMBEDDED.parent / "onnx"
    with pytest.raises(WeightsError, match=rf"holds an ONNX model .*`phi3-mlflow log onnx --weights {folder}`"):
        export(folder, tmp_path / "onnx")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).unlink()
    with pytest.raises(WeightsError, match=Path(name).suffix if name.endswith("safetensors") else name):
        export(source, tmp_path / "onnx")


@pytest.mark.parametrize("key", ["attn_implementation", "transformers_weights"])
def test_a_configuration_that_names_code_or_other_weights_is_refused(source: Path, tmp_path: Path, key: str) -> None:
    edit(source / "config.json", **{key: "organization/kernel"})
    with pytest.raises(WeightsError, match=f"has {key}"):
        export(source, tmp_path / "onnx")


def test_an_existing_destination_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    with pytest.raises(Phi3Error, match="exists already"):
        export(source, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("name", "value"), [("precision", "int3"), ("block_size", 33), ("accuracy_level", 2), ("block_size", 0)]
)
def test_an_argument_out_of_range_is_named_with_what_is_allowed(
    source: Path, tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(Phi3Error, match=f"`{name}` is {value!r}; it must be one of"):
        export(source, tmp_path / "onnx", **{name: value})  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)  # type: ignore[arg-type]
    with pytest.raises(Phi3Error, match=r"needs onnx-ir: pip install 'phi3-mlflow\[quantize\]'"):
        export(source, tmp_path / "onnx")
