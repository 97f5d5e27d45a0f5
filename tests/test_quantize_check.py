"""The check at the end of quantization: what it measures, what it writes, and what the command line makes of it.

Run with: python -m pytest tests/test_quantize_check.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from families import SMALL

from phi3_mlflow.builders import onnx
from phi3_mlflow.cli import cli
from phi3_mlflow.quantize import Check, check, evidence, export
from phi3_mlflow.quantize.evidence import Checked, Evidence, Passage
from phi3_mlflow.quantize.sources import read_json
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError
from phi3_mlflow.runtime.snapshots import WEIGHTS
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "artifacts" / "transformers"
SAME = Passage("short", 256, 10.0, 10.0, 1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def passages():
    return Check().texts(EMBEDDED, read_json(EMBEDDED / "config.json"))


def test_the_passages_are_the_ends_of_the_text_and_one_goes_beyond_the_window(passages):
    ids = Tokens.from_folder(EMBEDDED).encode_text(check.TEXT.read_text("utf-8"))
    assert passages == {"short": ids[-256:], "long": ids[:2304]}


def test_what_is_not_rounded_costs_nothing_beyond_the_window_too(passages, fp32_onnx):
    for found in check.compare(EMBEDDED, fp32_onnx, passages):
        assert abs(found.rise) < 0.1
        assert found.same_token > 0.998
        assert found.divergence < 1e-4
        assert found.logit_error < 1e-3


def test_what_is_rounded_costs_something_and_the_error_is_that_of_the_logits(passages):
    (found,) = check.compare(EMBEDDED, ROOT / "artifacts" / "onnx", {"short": passages["short"]})
    assert found.perplexity != found.reference_perplexity
    assert 0.5 < found.same_token < 1
    assert found.divergence > 0.005
    assert 0.02 < found.logit_error < 0.5


def test_the_numbers_are_what_their_names_say():
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found[0] += 3  # which changes no probability
    sums = check._Sums()
    sums.add(found[:2], expected[:2], [0, 1])  # as two chunks
    sums.add(found[2:], expected[2:], [])
    passage = sums.passage("short", 3)
    assert passage.perplexity == pytest.approx((1 / (0.25 * 0.5)) ** 0.5)
    assert passage.reference_perplexity == pytest.approx((1 / (0.5 * 0.5)) ** 0.5)
    assert passage.same_token == pytest.approx(2 / 3)
    assert passage.divergence == pytest.approx((0.5 * np.log(2) + 0.25 * np.log(0.5)) / 3)
    difference = np.array([np.log(0.5), np.log(2), 0])
    assert passage.logit_error == pytest.approx((difference.var() / expected.var(1).sum()) ** 0.5)


def test_logits_that_are_no_numbers_are_refused():
    sums = check._Sums()
    sums.add(np.full((2, 3), np.nan), np.eye(2, 3), [0])
    with pytest.raises(WeightsError, match="the logits are no numbers"):
        sums.passage("short", 2)


def test_transformers_computes_in_float32_on_weights_of_16_bits(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source = SMALL["Phi-4-mini"].write(tmp_path / "source")  # its embeddings are shared with the output
    AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16).save_pretrained(source)
    ids = list(range(5, 45))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype="float32")(torch.tensor([ids])).logits[0].numpy()
    with check._reference(source) as logits_of:
        for _ in range(2):
            assert np.array_equal(logits_of(ids), expected)


@pytest.mark.parametrize(
    ("content", "message"), [("Hello.", "has 3 tokens for this model: at least 16 are needed"), (b"\xff", "as text")]
)
def test_a_text_that_cannot_be_used_is_told_before_anything_is_made(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Phi3Error, match=message):
        export(EMBEDDED, tmp_path / "onnx", check=Check(path))
    assert [each.name for each in tmp_path.iterdir()] == ["text.txt"]


def test_a_bound_that_is_none_is_refused():
    for bound in (-1, float("nan"), float("inf")):
        with pytest.raises(Phi3Error, match=r"`max_perplexity_rise` is .*; it must be 0 or more, in percent"):
            Check(max_perplexity_rise=bound)


def test_one_passage_beyond_the_bound_is_enough():
    passages = [replace(SAME, perplexity=10.4), replace(SAME, name="long", perplexity=9.0)]
    assert not Checked("text.txt", "transformers", passages, 3.9).passed
    assert Checked("text.txt", "transformers", passages, 4.1).passed
    assert Checked("text.txt", "transformers", passages).passed


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A folder as the command line writes it, what that printed, and its exit code."""
    room = tmp_path_factory.mktemp("checked")
    # In the embedded model's own words rounding makes it worse, by a tenth.
    (room / "text.txt").write_text("Hello! How can I help you? " * 10, "utf-8")
    asked = ["--text", str(room / "text.txt"), "--max-perplexity-rise", "0", "--json"]
    result = CliRunner().invoke(cli, ["quantize", str(EMBEDDED), str(room / "onnx"), *asked])
    return room / "onnx", result


def test_the_command_line_ends_with_1_beyond_the_bound_and_says_what_it_measured(checked):
    folder, result = checked
    assert result.exit_code == 1, result.output
    printed = json.loads(result.stdout)
    assert printed == {"folder": str(folder), **read_json(folder / "quantization.json")}
    assert printed["check"]["passed"] is False
    assert printed["check"]["max_perplexity_rise"] == 0
    (passage,) = printed["check"]["passages"]
    assert passage["perplexity_rise"] > 0
    assert "0 % is allowed" in evidence.table(evidence.read(folder))


def test_the_next_step_is_named_where_the_bound_is_kept(tmp_path):
    folder = tmp_path / "a folder"
    result = CliRunner().invoke(cli, ["quantize", str(EMBEDDED), str(folder), "--no-check"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert result.stderr == f"Log it:  phi3-mlflow log onnx --weights '{folder}'\n"


def test_a_lower_perplexity_is_called_noise_where_there_is_one():
    def shown(*perplexities):
        passages = [replace(SAME, perplexity=each) for each in perplexities]
        return evidence.table(Evidence({}, "x", None, Checked("text.txt", "transformers", passages)))

    assert "below the reference's (short, 256 tokens) is noise: so short a text cannot show an" in shown(9.9)
    assert shown(9.9, 10.1).count("short, 256 tokens") == 1
    assert "noise" not in shown(10.0, 10.1, 9.9999)


def test_what_was_written_is_read_back(tmp_path):
    written = Evidence({"precision": "fp32"}, "local folder x", "lora", Checked("a.txt", "t", [SAME], 2.5))
    evidence.write(tmp_path, written)
    assert evidence.read(tmp_path) == written
    assert evidence.read(tmp_path / "nowhere") is None


def test_a_logged_model_shows_the_evidence_as_params_metrics_and_in_the_card(checked, tracking):
    folder, _ = checked
    client = mlflow.MlflowClient()
    info = onnx.log_model(folder, registered_model_name="checked")
    logged = client.get_logged_model(info.model_id)
    assert logged.params["quantization_method"] == "rtn"
    assert logged.params["quantization_check"] in client.get_model_version("checked", "1").description
    wanted = evidence.metrics(evidence.read(folder))
    assert {"quantization_short_perplexity", "quantization_short_perplexity_rise"} <= wanted.keys()
    assert {metric.key: metric.value for metric in logged.metrics} == wanted
    assert Path(mlflow.artifacts.download_artifacts(info.model_uri), WEIGHTS, "quantization.json").is_file()
    with mlflow.start_run() as run:
        onnx.log_model(folder)
    assert client.get_run(run.info.run_id).data.metrics == wanted


@pytest.mark.parametrize("change", [{"check": {"passages": []}}, {"choices": 3}, {"source": "a\nb"}, {"adapter": []}])
def test_evidence_that_is_none_is_refused_before_anything_is_logged(checked, tmp_path, change):
    folder = Path(shutil.copytree(checked[0], tmp_path / "onnx"))
    path = folder / "quantization.json"
    path.write_text(json.dumps(read_json(path) | change), "utf-8")
    with pytest.raises(WeightsError, match=r"quantization\.json is not what `phi3-mlflow quantize` writes"):
        onnx.save_model(tmp_path / "model", folder)
    path.write_text("{", "utf-8")
    with pytest.raises(WeightsError, match=r"quantization\.json is not JSON"):
        onnx.save_model(tmp_path / "model", folder)
    assert not (tmp_path / "model").exists()
