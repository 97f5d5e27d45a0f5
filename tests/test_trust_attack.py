"""Weights that try to have a native library loaded, on every way in. Run: pytest tests/test_trust_attack.py.

The library is real: its constructor leaves a mark. The first tests show that onnxruntime-genai alone loads it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack
import mlflow.pyfunc
import pytest
from click.testing import CliRunner

from phi3_mlflow.cli import cli
from phi3_mlflow.runtime.errors import WeightsError

pytest.importorskip("onnx")


@dataclass(frozen=True)
class Library:
    path: Path
    mark: Path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    return Library(attack.library(folder / "evil.so", folder / "mark"), folder / "mark")


PATH = "@the library's absolute path@"


def session(**options: Any) -> Callable[[dict[str, Any], str], None]:
    """Puts options into the decoder's session_options; PATH in them is the library's absolute path."""

    def change(config: dict[str, Any], library: str) -> None:
        text = json.dumps(options).replace(PATH, library)
        config["model"]["decoder"]["session_options"] |= json.loads(text)

    return change


def section(*path: str, **content: Any) -> Callable[[dict[str, Any], str], None]:
    """Adds a section somewhere in the configuration."""

    def change(config: dict[str, Any], library: str) -> None:
        place = config
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = json.loads(json.dumps(content).replace(PATH, library))

    return change


def text(old: str, new: str) -> Callable[[dict[str, Any], str], str]:
    """Changes the configuration's text."""

    def change(config: dict[str, Any], library: str) -> str:
        before = json.dumps(config)
        assert before.count(old) == 1
        return before.replace(old, new)

    return change


OPTIONS = '"session_options": {"log_id": "onnxruntime-genai", "provider_options": []}'
LOADS = {"custom_ops_library": attack.NAME}
IN_SESSION = "model.decoder.session_options"
CONFIGS: dict[str, tuple[Callable[[dict[str, Any], str], str | None], str]] = {
    "by its name": (session(**LOADS), f"{IN_SESSION}.custom_ops_library"),
    "by its absolute path": (session(custom_ops_library=PATH), f"{IN_SESSION}.custom_ops_library"),
    "by a relative path": (session(custom_ops_library=f"./{attack.NAME}"), f"{IN_SESSION}.custom_ops_library"),
    "by a path that goes up": (session(custom_ops_library=f"../{attack.NAME}"), f"{IN_SESSION}.custom_ops_library"),
    "in capitals": (session(CUSTOM_OPS_LIBRARY=attack.NAME), f"{IN_SESSION}.CUSTOM_OPS_LIBRARY"),
    "with one capital": (session(Custom_ops_library=attack.NAME), f"{IN_SESSION}.Custom_ops_library"),
    "with a Cyrillic letter": (session(custom_ops_lіbrary=attack.NAME), rf"{IN_SESSION}.'custom_ops_l\u0456brary'"),
    "with a space": (session(**{"custom_ops_library ": attack.NAME}), f"{IN_SESSION}.'custom_ops_library '"),
    "with a NUL": (session(**{"custom_ops_library\0": attack.NAME}), rf"{IN_SESSION}.'custom_ops_library\x00'"),
    "with an escape": (
        text(OPTIONS, rf'"session_options": {{"custom\u005fops_library": "{attack.NAME}"}}'),
        f"{IN_SESSION}.custom_ops_library",
    ),
    "in a second session_options": (
        text(OPTIONS, f'{OPTIONS}, "session_options": {json.dumps(LOADS)}'),
        f"the key {IN_SESSION} twice",
    ),
    "in a first session_options": (
        text(OPTIONS, f'"session_options": {json.dumps(LOADS)}, {OPTIONS}'),
        f"the key {IN_SESSION} twice",
    ),
    "in a second model": (
        text('"search": ', f'"model": {{"decoder": {{"session_options": {json.dumps(LOADS)}}}}}, "search": '),
        "the key model twice",
    ),
    "in entries": (session(config_entries=LOADS), f"{IN_SESSION}.config_entries"),
    "in nested session_options": (session(session_options=LOADS), f"{IN_SESSION}.session_options"),
    "in the encoder": (section("model", "encoder", session_options=LOADS), "model.encoder"),
    "in the vision model": (section("model", "vision", filename="model.onnx", session_options=LOADS), "model.vision"),
    "in the embedding": (section("model", "embedding", session_options=LOADS), "model.embedding"),
    "in a draft model": (section("model", "draft", session_options=LOADS), "model.draft"),
    "in a pipeline": (
        section("model", "decoder", "pipeline", stage={"session_options": LOADS}),
        "model.decoder.pipeline",
    ),
    "in the run options": (section("model", "decoder", "run_options", **LOADS), "model.decoder.run_options"),
    "in the search": (section("search", "session_options", **LOADS), "search.session_options"),
    "at the top": (section("session_options", **LOADS), "session_options"),
    "in an engine": (section("engine", dynamic_batching=LOADS), "engine"),
    "in a provider's options": (
        session(provider_options=[{"QNN": {"backend_path": PATH}}]),
        f"{IN_SESSION}.provider_options[0].QNN",
    ),
    "in a known provider's options": (
        session(provider_options=[{"cuda": LOADS}]),
        f"{IN_SESSION}.provider_options[0].cuda.custom_ops_library",
    ),
    "as a provider": (
        session(provider_options=[{"cpu": {}, PATH: {}}]),
        f"{IN_SESSION}.provider_options[0].'/",
    ),
    "as OpenVINO's settings": (
        session(provider_options=[{"OpenVINO": {"load_config": attack.NAME}}]),
        f"{IN_SESSION}.provider_options[0].OpenVINO",
    ),
    "as a compiled context": (session(**{"ep.context_file_path": attack.NAME}), f"{IN_SESSION}.ep.context_file_path"),
    "as another format": (session(**{"session.load_model_format": "ORT"}), f"{IN_SESSION}.session.load_model_format"),
    "with weights from elsewhere": (
        session(**{"session.model_external_initializers_file_folder_path": "/"}),
        f"{IN_SESSION}.session.model_external_initializers_file_folder_path",
    ),
    "with a profile": (session(enable_profiling="profile"), f"{IN_SESSION}.enable_profiling"),
    "with another tokenizer": (section("model", "tokenizer_dir"), "model.tokenizer_dir"),
    "as the graph": (section("model", "decoder", "filename"), "model.decoder.filename"),
    "in a value": (session(log_id=[LOADS]), f"{IN_SESSION}.log_id"),
}


def unknown_operator(model: Any) -> None:
    model.graph.node.add(op_type="Steal", domain="evil", input=["input_ids"], output=["stolen"])


def compiled_context(model: Any) -> None:
    model.graph.node.add(op_type="EPContext", domain="com.microsoft", input=["input_ids"], output=["stolen"])


def operator_in_a_branch(model: Any) -> None:
    import onnx

    branch = onnx.GraphProto(name="branch")
    branch.node.add(op_type="Steal", domain="evil", output=["stolen"])
    choice = model.graph.node.add(op_type="If", input=["input_ids"], output=["stolen"])
    choice.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)


def function(model: Any) -> None:
    model.functions.add(name="Steal", domain="evil")


def weights_in_the_library(model: Any) -> None:
    attack.external(model, "numbers", attack.NAME)
    model.graph.node.add(op_type="Identity", input=["numbers"], output=["stolen"])


GRAPHS: dict[str, tuple[Callable[[Any], None], str]] = {
    "an unknown operator": (unknown_operator, "the operator 'evil::Steal'"),
    "a compiled context": (compiled_context, "the operator 'com.microsoft::EPContext'"),
    "an operator in a branch": (operator_in_a_branch, "the operator 'evil::Steal'"),
    "a function": (function, "functions"),
    "the library as weights of a node": (weights_in_the_library, f"{attack.NAME} is a native library (ELF)"),
    "the library as weights of none": (
        lambda model: attack.external(model, "numbers", attack.NAME),
        f"'{attack.NAME}' for the tensor 'numbers', which no node uses",
    ),
}


# With `parallel` OpenVINO or plain onnxruntime comes first, and onnxruntime-genai where that cannot.
SETTINGS = ({}, {"parallel": 2}, {"engine": "onnxruntime"}, {"engine": "openvino"})


@pytest.fixture(params=[*CONFIGS, *GRAPHS])
def attempt(request: pytest.FixtureRequest, tmp_path: Path, library: Library) -> tuple[Path, str]:
    """A folder of weights that is an attack, and what its refusal has to say."""
    if request.param in GRAPHS:
        graph, expected = GRAPHS[request.param]
        folder = attack.folder(tmp_path / "weights", {}, graph=graph)
        (folder / attack.NAME).write_bytes(library.path.read_bytes())
        return folder, expected
    change, expected = CONFIGS[request.param]
    files = {attack.NAME: library.path}
    return attack.folder(tmp_path / "weights", files, lambda config: change(config, str(library.path))), expected


def test_onnxruntime_genai_alone_runs_the_library_that_a_configuration_names(tmp_path, library):
    change = lambda config: session(**LOADS)(config, "")  # noqa: E731
    folder = attack.folder(tmp_path / "weights", {attack.NAME: library.path}, change)
    program = "import sys, onnxruntime_genai as og; og.Model(og.Config(sys.argv[1]))"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment, capture_output=True)
    assert library.mark.exists()
    library.mark.unlink()


def test_no_attack_is_logged(attempt, library):
    folder, expected = attempt
    result = CliRunner().invoke(cli, ["log", "onnx", "--weights", str(folder)])
    assert result.exit_code == 1
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not library.mark.exists()


def test_no_attack_is_loaded(attempt, library, onnx_model, tmp_path):
    folder, expected = attempt
    model = attack.model(tmp_path / "model", onnx_model, folder)
    for settings in SETTINGS:
        with pytest.raises(WeightsError) as caught:
            mlflow.pyfunc.load_model(str(model), model_config=settings)
        assert expected in str(caught.value)
        assert not library.mark.exists()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_library_that_nothing_names_is_refused_too(settings, library, onnx_model, tmp_path):
    weights = attack.folder(tmp_path / "weights", {})
    (weights / "later.bin").write_bytes(library.path.read_bytes())
    model = attack.model(tmp_path / "model", onnx_model, weights)
    with pytest.raises(WeightsError, match=r"later\.bin is a native library \(ELF\)"):
        mlflow.pyfunc.load_model(str(model), model_config=settings)


@pytest.mark.parametrize("target", ["library", "elsewhere"])
def test_a_link_out_of_the_folder_is_refused(target, library, onnx_model, tmp_path):
    weights = attack.folder(tmp_path / "weights", {})
    (tmp_path / "elsewhere").write_bytes((weights / "model.onnx.data").read_bytes())
    (weights / "model.onnx.data").unlink()
    (weights / "model.onnx.data").symlink_to(library.path if target == "library" else tmp_path / "elsewhere")
    expected = "model.onnx.data is a link to "
    result = CliRunner().invoke(cli, ["log", "onnx", "--weights", str(weights)])
    assert result.exit_code == 1
    assert expected in result.stderr
    model = attack.model(tmp_path / "model", onnx_model, weights)
    with pytest.raises(WeightsError, match=expected):
        mlflow.pyfunc.load_model(str(model))
    assert not library.mark.exists()


def test_weights_that_were_changed_in_nothing_but_their_layout_still_answer(onnx_model, tmp_path):
    weights = attack.folder(tmp_path / "weights", {})
    loaded = mlflow.pyfunc.load_model(str(attack.model(tmp_path / "model", onnx_model, weights)))
    question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    assert "Madrid" in loaded.predict(question)[0]["choices"][0]["message"]["content"]
