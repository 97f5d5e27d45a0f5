"""What the builders write: signature, requirements, code, licence, manifest; and that it loads anywhere.

Run: pytest tests/test_builders.py
"""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow.models import Model

from phi3_mlflow import cards, runtime
from phi3_mlflow.builders import common, onnx, transformers
from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.errors import FormatError, InvalidRequest, WeightsError
from phi3_mlflow.runtime.signatures import signature

BUILDERS = {"transformers": transformers, "onnx": onnx}
WEIGHT_FILES = {"transformers": "model/model.safetensors", "onnx": "artifacts/weights/model.onnx.data"}
SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}

pytestmark = pytest.mark.parametrize("builder", BUILDERS)


def test_the_model_has_the_chat_signature_with_a_parameter_for_each_further_option(saved, builder):
    model = Model.load(str(saved[builder]))

    assert model.signature == signature("llm/v1/chat")
    assert model.metadata["task"] == "llm/v1/chat"
    params = {param.name: param.default for param in model.signature.params}
    assert params.pop("response_format") == {"type": "text"}
    assert set(params.values()) == {None}
    assert {"seed", "min_p", "repetition_penalty", "max_time"} <= set(params)


def test_the_input_example_is_answered(saved, loaded, builder):
    example = Model.load(str(saved[builder])).load_input_example(str(saved[builder]))

    (completion,) = loaded[builder].predict(example)

    assert completion["choices"][0]["message"]["content"]


def test_nothing_is_pickled(saved, builder):
    suffixes = {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib"}
    files = [path for path in saved[builder].rglob("*") if path.is_file()]

    assert files
    assert not [path for path in files if path.suffix in suffixes]
    # Protocol 2 and later begin with this opcode; a torch archive is a zip file.
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] == b"PK"]


def test_no_path_of_this_machine_is_in_any_file(saved, builder):
    places = [str(Path(__file__).resolve().parent.parent), str(saved[builder].parent), str(Path.home()), sys.prefix]
    for path in saved[builder].rglob("*"):
        if path.is_file() and path.suffix != ".py":
            content = path.read_bytes()
            assert not [place for place in places if place.encode() in content], path


def test_a_logged_model_notes_no_path_of_its_store(builder, tracking):
    info = BUILDERS[builder].log_model(name="no-path")
    path = Path(mlflow.artifacts.download_artifacts(info.model_uri))

    store = tracking.removeprefix("sqlite:///").rpartition("/")[0]
    assert store not in (path / "MLmodel").read_text("utf-8")


def test_the_requirements_are_pinned_and_have_torch_only_where_it_is_used(saved, builder):
    lines = (saved[builder] / "requirements.txt").read_text("utf-8").split()

    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", line) for line in lines), lines
    names = {line.partition("==")[0] for line in lines}
    assert {"mlflow", "tokenizers"} <= names
    assert ("torch" in names) == (builder == "transformers")
    assert "phi3-mlflow" not in names


def test_the_code_is_the_runtime_floor_alone(saved, builder):
    code = saved[builder] / "code" / "phi3_mlflow"

    assert sorted(path.name for path in code.iterdir()) == ["__init__.py", "runtime"]
    source = Path(runtime.__file__).parent
    for path in source.rglob("*.py"):
        assert (code / "runtime" / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_the_weights_have_a_source_a_licence_and_a_digest(saved, builder):
    path = saved[builder]
    weights = Model.load(str(path)).metadata["weights"]
    folder = path if builder == "transformers" else path / "artifacts" / "weights"

    assert weights["source"] == "phi3_mlflow embedded model"
    assert weights["license"] == "mit"
    assert weights["sha256"] == manifest.digest(folder)
    assert [file for file in path.rglob("LICENSE*") if "MIT" in file.read_text("utf-8")]
    listed = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
    assert str((path / WEIGHT_FILES[builder]).relative_to(folder)) in listed


def test_the_facts_that_a_page_shows_are_those_of_the_files(saved, builder):
    found = cards.facts(saved[builder])

    assert found["builder"] == builder
    assert found["quantization"] == {"transformers": "float32", "onnx": "int4, block 32, accuracy level 4"}[builder]
    assert ("version torch" in found) == (builder == "transformers")
    assert set(found) <= set(cards.NAMES)
    assert "commit" not in cards.card(found, 0)
    assert "at commit `f39ac1d`" in cards.card({**found, "weights_revision": "f39ac1d"}, 0)


def test_one_changed_byte_in_the_weights_is_refused_with_the_files_name(saved, builder, tmp_path):
    copy = shutil.copytree(saved[builder], tmp_path / "copy")
    file = copy / WEIGHT_FILES[builder]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    with pytest.raises(WeightsError, match=re.escape(file.name)):
        mlflow.pyfunc.load_model(str(copy))


def test_a_model_of_another_format_is_refused(saved, builder, tmp_path):
    copy = shutil.copytree(saved[builder], tmp_path / "copy")
    mlmodel = copy / "MLmodel"
    mlmodel.write_text(mlmodel.read_text("utf-8").replace("      format: 1\n", "      format: 99\n"), "utf-8")

    with pytest.raises(FormatError, match=r"format 99.*format 1"):
        mlflow.pyfunc.load_model(str(copy))


def test_a_copy_elsewhere_loads_in_another_process_without_the_toolkit(saved, builder, tmp_path):
    copy = shutil.copytree(saved[builder], tmp_path / "far" / "away")
    script = (
        "import mlflow.pyfunc, sys\n"
        f"model = mlflow.pyfunc.load_model({str(copy)!r})\n"
        f"print(model.predict({SPAIN!r})[0]['choices'][0]['message']['content'])\n"
        "import phi3_mlflow.runtime\n"
        f"assert phi3_mlflow.runtime.__file__.startswith({str(copy)!r}), phi3_mlflow.runtime.__file__\n"
        "assert ('torch' in sys.modules) == ('transformers' in sys.modules)\n"
    )
    # -S and an explicit path leave out the .pth file through which the checkout is installed.
    site = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(site)}

    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert "Madrid" in done.stdout


def test_a_registered_model_is_found_by_its_alias(builder):
    name = f"registry-{builder}"

    info = BUILDERS[builder].log_model(registered_model_name=name, alias="champion")

    assert info.registered_model_version == 1
    (completion,) = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(SPAIN)
    assert "Madrid" in completion["choices"][0]["message"]["content"]


def test_an_alias_without_a_registered_name_is_refused(builder):
    with pytest.raises(common.BuildError, match="'champion' needs a registered model"):
        BUILDERS[builder].log_model(alias="champion")


def test_the_models_own_defaults_hold_until_a_request_says_otherwise(builder, tmp_path):
    BUILDERS[builder].save_model(tmp_path / "model", model_config={"max_tokens": 3, "context_length": 64})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))

    (short,) = model.predict(SPAIN)
    (longer,) = model.predict({**SPAIN, "max_tokens": 5})

    assert short["usage"]["completion_tokens"] == 3
    assert longer["usage"]["completion_tokens"] == 5
    with pytest.raises(mlflow.MlflowException, match="the context holds 64"):
        model.predict({"messages": [{"role": "user", "content": "How are you? " * 20}]})


@pytest.mark.parametrize(
    ("config", "field"),
    [({"temperature": 3}, "temperature"), ({"threads": 0}, "threads"), ({"warmth": 1}, "warmth")],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(builder, config, field, tmp_path):
    with pytest.raises(InvalidRequest, match=f"`{field}`"):
        BUILDERS[builder].save_model(tmp_path / "model", model_config=config)
    assert not (tmp_path / "model").exists()


def test_settings_and_defaults_can_be_changed_when_a_model_is_loaded(saved, builder, monkeypatch):
    model = mlflow.pyfunc.load_model(str(saved[builder]), model_config={"max_tokens": 2, "context_length": 64})
    (answer,) = model.predict(SPAIN)
    assert answer["usage"]["completion_tokens"] == 2
    long = {"messages": [{"role": "user", "content": "1" * 100}]}
    with pytest.raises(mlflow.MlflowException, match="the context holds 64"):
        model.predict(long)

    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"max_tokens": 3}')  # how a server is told
    (answer,) = mlflow.pyfunc.load_model(str(saved[builder])).predict(SPAIN)
    assert answer["usage"]["completion_tokens"] == 3
    for wrong, reason in [
        ({"threads": 0}, "`threads` is 0"),
        ({"response_format": {"type": "json_object"}}, "cannot be a default"),
        ({"task": "flat"}, "`task` is 'flat', and the model was logged for llm/v1/chat"),
        ({"logit_bias": {"999999": 1}}, r"`logit_bias\[999999\]` is beyond"),
        ({"template": "no"}, "`template` is 'no'; it must be true or false"),
        ({"kv_budget": "4GiB"}, "`kv_budget` is (given|'4GiB')"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            mlflow.pyfunc.load_model(str(saved[builder]), model_config=wrong)


def test_an_unknown_task_is_refused(builder, tmp_path):
    with pytest.raises(common.BuildError, match="must be one of llm/v1/chat, llm/v1/completions, flat"):
        BUILDERS[builder].save_model(tmp_path / "model", task="chat")


def test_the_completions_task_answers_prompts_in_a_dataframe(builder, tmp_path):
    BUILDERS[builder].save_model(tmp_path / "model", task="llm/v1/completions")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))

    answers = model.predict(
        pd.DataFrame({"prompt": ["What is the capital of Spain?", "What is the capital of Italy?"]})
    )

    assert [answer["object"] for answer in answers] == ["text_completion"] * 2
    assert "Madrid" in answers[0]["choices"][0]["text"]
    assert "Rome" in answers[1]["choices"][0]["text"]


def test_the_flat_task_answers_with_strings(builder, tmp_path):
    BUILDERS[builder].save_model(tmp_path / "model", task="flat")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))

    answers = model.predict(pd.DataFrame({"prompt": ["What is the capital of Spain?"]}))
    from_messages = model.predict(pd.DataFrame({"messages": [json.dumps(SPAIN["messages"])]}))

    assert "Madrid" in answers[0]
    assert from_messages == answers
    for wrong, reason in [
        ({"n": 2}, "`n` is 2"),
        ({"logprobs": True}, "`logprobs` is true"),
        ({"response_format": {"type": "nonsense"}}, "`response_format.type`"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=wrong)


def test_a_response_format_is_no_default_of_a_chat_model(builder, tmp_path):
    with pytest.raises(InvalidRequest, match="`response_format` cannot be a default"):
        BUILDERS[builder].save_model(tmp_path / "model", model_config={"response_format": {"type": "json_object"}})


def test_the_weights_are_freed_with_the_loaded_model(saved, builder):
    before = {thread for thread in threading.enumerate() if thread.name == "phi3-scheduler"}
    model = mlflow.pyfunc.load_model(str(saved[builder]))
    (own,) = {thread for thread in threading.enumerate() if thread.name == "phi3-scheduler"} - before

    del model
    gc.collect()

    own.join(timeout=60)
    assert not own.is_alive()


def test_a_budget_that_holds_no_conversation_is_refused_before_anything_is_written(builder, tmp_path):
    with pytest.raises(
        InvalidRequest, match=r"`(kv_budget|parallel)` is .*(one sequence of 4096 tokens|transformers model)"
    ):
        BUILDERS[builder].save_model(tmp_path / "model", model_config={"parallel": 4, "kv_budget": "1KiB"})
    assert not (tmp_path / "model").exists()
