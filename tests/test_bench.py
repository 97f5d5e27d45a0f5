"""`phi3-mlflow bench`: what it counts, prints, draws and logs, on both builders.

Run: pytest tests/test_bench.py
"""

import json
import os
import re
import sys

import mlflow
import pytest
from click.testing import CliRunner
from interrupts import interrupted

from phi3_mlflow.bench.requests import Requests, subject
from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.cli import cli

# A prefix of more than the largest chunk that a decoder takes, since only whole chunks are used again.
SMALL = ["--prompt-tokens", "32", "--tokens", "8", "--concurrency", "3,2", "--rounds", "2", "--prefix", "300"]
TINY = ["--prompt-tokens", "16", "--tokens", "2", "--concurrency", "1", "--rounds", "1", "--prefix", "16"]


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def measured(*arguments):
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory):
    """One with defaults that are bad for measuring."""
    path = tmp_path_factory.mktemp("odd") / "model"
    config = {"context_length": 256, "queue_limit": 1, "n": 2, "max_time": 0.001, "temperature": 1.0}
    onnx.save_model(path, model_config=config)
    return path


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_the_numbers_are_those_of_what_was_asked(saved, builder):
    result = measured(saved[builder], *SMALL)

    assert result["model"]["builder"] == builder
    assert result["model"]["engine"] == ("onnxruntime-genai" if builder == "onnx" else builder)
    assert result["model"]["parallel"] == 1
    assert result["model"]["context_length"] == 4096
    assert set(result["versions"]) >= ({"torch"} if builder == "transformers" else {"onnxruntime-genai"})
    assert [row["requests"] for row in result["concurrency"]] == [1, 2, 3]
    for row in result["concurrency"]:
        assert row["prompt_tokens"] == 32
        assert row["completion_tokens"] == row["requests"] * 8 * 2
        assert 0 < row["first_token_ms"] <= row["first_token_worst_ms"]
        assert row["tokens_per_second"] > 0
        assert row["per_token_ms"] > 0
    prefix = result["prefix"]
    assert prefix["unseen"]["cached_tokens"] == 0
    assert 256 <= prefix["seen"]["cached_tokens"] < 316 < prefix["prompt_tokens"] < 330
    memory = result["memory"]
    assert all(value > 2**20 for value in memory.values())
    assert memory["peak_bytes"] >= memory["after_loading_bytes"] * 0.9


@pytest.mark.parametrize("raw", [False, True], ids=["template", "raw"])
def test_a_completions_model_is_measured_alike(tmp_path, raw):
    onnx.save_model(tmp_path / "model", task="llm/v1/completions", template=not raw)

    result = measured(tmp_path / "model", *SMALL)

    assert result["concurrency"][2]["prompt_tokens"] == 32
    assert result["concurrency"][2]["completion_tokens"] == 3 * 8 * 2
    assert result["prefix"]["seen"]["cached_tokens"] > 0


def test_a_completions_pipeline_is_measured_alike(tmp_path):
    transformers.save_model(tmp_path / "model", task="llm/v1/completions")

    assert measured(tmp_path / "model", *TINY)["concurrency"][0]["completion_tokens"] == 2


def test_the_table_names_machine_model_and_versions_and_has_a_line_for_each_case():
    result = bench(*SMALL, "--rounds", "1")

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.search(r"\d+ logical cores, [\d.]+ GiB", lines[0])
    assert re.search(
        r"embedded-model, onnx through onnxruntime-genai, parallel 1, onnxruntime [\d.]+, onnxruntime-genai [\d.]+$",
        lines[1],
    )
    assert "Prompts of 32 tokens, answers of 8, medians of 1 round:" in lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    cases = {row[0]: row[1:] for row in rows}
    for count in ("1", "2", "3"):
        assert all(re.fullmatch(r"<?[\d.]+( m?s)?", cell) for cell in cases[count])
        assert len(cases[count]) == 4
    assert cases["300 shared tokens unseen"][1] == "0"
    assert int(cases["300 shared tokens seen"][1]) > 0
    for moment in ("before loading", "after loading", "at most"):
        assert re.fullmatch(r"[\d.]+ [MG]iB", cases[moment][0])


def test_answers_of_one_token_have_no_time_per_token(saved):
    result = measured(saved["onnx"], *TINY, "--tokens", "1")

    assert result["concurrency"][0]["per_token_ms"] is None
    assert result["concurrency"][0]["completion_tokens"] == 1


def test_the_models_own_defaults_do_not_cut_the_answers(odd_model):
    result = measured(odd_model, *TINY, "--tokens", "100")

    assert result["model"]["context_length"] == 256
    assert result["concurrency"][0]["completion_tokens"] == 100


def test_answers_that_end_too_early_are_not_passed_off_as_measured(tmp_path):
    onnx.save_model(tmp_path / "model", model_config={"stop": list("0123456789")})

    result = bench(tmp_path / "model", *TINY)

    assert result.exit_code == 1
    assert "an answer ended (stop_sequence) after 1 tokens and should have 2" in result.stderr


def together(path, parallel):
    with subject(str(path), parallel) as (found, _):
        requests = Requests(found)
        return requests.together([requests.digits(8) for _ in range(3)], 300)


def test_parallel_replaces_the_setting_of_a_model_that_was_logged_without_it(saved):
    one_by_one, at_once = (together(saved["onnx"], parallel) for parallel in (None, 3))

    assert max(answer.first for answer in at_once) < min(answer.end for answer in at_once)
    assert max(answer.first for answer in one_by_one) > min(answer.end for answer in one_by_one)
    assert measured(saved["onnx"], *TINY, "--parallel", "3")["model"]["parallel"] == 3


def test_the_models_limits_of_its_queue_do_not_spoil_a_measurement(odd_model):
    result = measured(odd_model, *TINY, "--concurrency", "8")

    assert [row["requests"] for row in result["concurrency"]] == [1, 8]


def test_settings_from_the_environment_hold_as_they_do_for_a_server(saved, monkeypatch):
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"parallel": 2, "prefix_reuse": "all"}')
    model = measured(saved["onnx"], *TINY)["model"]
    assert (model["parallel"], model["prefix_reuse"]) == (2, "all")

    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", "parallel=2")
    refused = bench(saved["onnx"], *TINY)
    assert (refused.exit_code, "is not a JSON object" in refused.stderr) == (2, True)


def test_a_model_of_somebody_else_is_refused(tmp_path):
    class Other(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    mlflow.pyfunc.save_model(tmp_path / "other", python_model=Other(), pip_requirements=[])
    result = bench(tmp_path / "other", *TINY)

    assert result.exit_code == 1
    assert "was not logged by phi3_mlflow" in result.stderr


def test_a_plot_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    plot = tmp_path / ("long" * 100 + ".png")
    result = bench(*TINY, "--plot", plot)

    assert (result.exit_code, result.stdout) == (1, "")
    problem = f"Error: --plot: {plot} cannot be written (File name too long); name a file in a folder that can\n"
    assert result.stderr.endswith(problem)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_plot_that_cannot_be_written_at_the_end_costs_no_numbers(saved, tmp_path):
    plot = tmp_path / "full.png"
    plot.symlink_to("/dev/full")

    result = bench(saved["onnx"], *TINY, "--plot", plot)

    assert result.exit_code == 1
    assert "| requests at once |" in result.stdout
    assert f"Error: the plot {plot} could not be written: [Errno 28] No space left on device\n" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_cannot_be_logged_at_the_end_costs_no_numbers(saved, monkeypatch):
    def lost(*_):
        raise mlflow.MlflowException("the store is gone")

    monkeypatch.setattr("phi3_mlflow.bench.measure.log_run", lost)

    result = bench(saved["onnx"], *TINY, "--log", "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout)["concurrency"][0]["requests"] == 1
    assert result.stderr.splitlines()[-1] == "Error: what was measured is not in MLflow: the store is gone"


def test_a_plot_is_a_png(saved, tmp_path):
    result = bench(saved["onnx"], *TINY, "--plot", tmp_path / "bench.png")

    assert result.exit_code == 0, result.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_log_makes_a_run_with_the_numbers_the_plot_and_the_table(saved):
    result = measured(saved["onnx"], *SMALL, "--log")

    client = mlflow.MlflowClient()
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["tokens"] == "8"
    assert run.data.params["model_builder"] == "onnx"
    assert run.data.params["model_engine"] == "onnxruntime-genai"
    assert "logical cores" in run.data.params["machine"]
    assert run.data.metrics["prefix_seen_cached_tokens"] > 0
    assert run.data.metrics["memory_peak_bytes"] == result["memory"]["peak_bytes"]
    history = client.get_metric_history(result["run_id"], "tokens_per_second")
    rows = {row["requests"]: row["tokens_per_second"] for row in result["concurrency"]}
    assert {point.step: point.value for point in history} == rows
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert names == {"bench.md", "bench.json", "bench.png"}
    table = mlflow.artifacts.load_text(f"runs:/{result['run_id']}/bench.md")
    assert "| requests at once |" in table


def test_log_prints_the_run_below_the_table(saved):
    result = bench(saved["onnx"], *TINY, "--log")

    assert result.exit_code == 0, result.output
    run_id = re.fullmatch("run ([0-9a-f]{32})", result.stdout.splitlines()[-1])[1]
    assert mlflow.MlflowClient().get_run(run_id).info.run_name == "bench phi3_mlflow-embedded-model"


def test_help_has_an_example():
    result = bench("--help")

    assert result.exit_code == 0
    assert "phi3-mlflow bench models:/phi3@champion" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "'--tokens': 0"),
        (["--prompt-tokens", "-1"], "'--prompt-tokens': -1"),
        (["--rounds", "two"], "'--rounds': 'two'"),
        (["--prefix", "0"], "'--prefix': 0"),
        (["--parallel", "65"], "'--parallel': 65"),
        (["--concurrency", "1,two"], "`--concurrency` is '1,two'"),
        (["--concurrency", "0"], "`--concurrency` is '0'"),
        (["--concurrency", ""], "`--concurrency` is ''"),
        (["--plot", "bench.pdf"], "`--plot` is 'bench.pdf'"),
        (["--plot", "no/such/folder/bench.png"], "`--plot` is 'no/such/folder/bench.png'"),
        (["--prompt-tokens", "256"], "`--prompt-tokens` is 256, and the model's context holds 256 tokens"),
        (["--prompt-tokens", "4"], "`--prompt-tokens` is 4; it must be at least"),
        (["--prompt-tokens", "200"], "`--tokens` is 64, and the model's context holds 256 tokens"),
        (["--prefix", "256"], "`--prefix` is 256, and the model's context holds 256 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_value_is_refused_by_its_name(odd_model, arguments, message):
    result = bench(odd_model, *arguments)

    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_transformers_model_cannot_take_parallel(saved):
    result = bench(saved["transformers"], *TINY, "--parallel", "4")

    assert result.exit_code == 2
    assert "a transformers model answers one request at a time" in result.stderr


def test_a_flat_model_cannot_be_measured(tmp_path):
    onnx.save_model(tmp_path / "model", task="flat")

    result = bench(tmp_path / "model")

    assert result.exit_code == 1
    assert "the flat task's answers have no token counts" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_it_at_once_and_without_a_traceback(saved, tmp_path):
    # Most of the requests are still waiting in the queue when it comes.
    sizes = ["--prompt-tokens", "3000", "--tokens", "9", "--concurrency", "24"]
    command = [sys.executable, "-m", "phi3_mlflow", "bench", str(saved["transformers"]), *sizes]
    # The progress bar comes after two seconds.
    status, out, error = interrupted(command, b"bench:", 60, cwd=tmp_path)

    assert status == 1
    assert out == b""
    assert error.endswith(b"Aborted!\n")
    assert b"Traceback" not in error
