"""`phi3-mlflow compare`: what it asks, scores, tests and logs, and when its gate moves an alias.

Run: pytest tests/test_compare.py
"""

import json
import os
import random
import re
import socket
import sys
import time
from collections import Counter
from statistics import NormalDist

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from interrupts import interrupted
from spoiled import spoil
from stores import server

from phi3_mlflow.builders import onnx
from phi3_mlflow.cli import cli
from phi3_mlflow.compare import comparison, questions, scorers
from phi3_mlflow.compare.agreement import agree
from phi3_mlflow.compare.answers import ask
from phi3_mlflow.compare.gate import Bounds, judge
from phi3_mlflow.compare.models import loaded, resolve
from phi3_mlflow.compare.report import figure
from phi3_mlflow.compare.uncertainty import interval, least_questions, not_worse, ratio, share_interval, upper
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error

NAME = "compared"
ONE, TWO = [f"models:/{NAME}/1"], [f"models:/{NAME}/1", f"models:/{NAME}/2"]
FEW = ["--margin", "0.3"]  # seven questions can show that


def compare(*arguments):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def meaning(alias):
    version = mlflow.MlflowClient().get_registered_model(NAME).aliases.get(alias)
    return None if version is None else str(version)


@pytest.fixture(scope="module")
def versions(tracking, tmp_path_factory):
    """The URIs of a registered model, an equal one, and one of which a layer is spoiled."""
    folder = spoil(tmp_path_factory.mktemp("spoiled") / "weights", "layers.1.")
    onnx.log_model(registered_model_name=NAME, alias="champion")
    onnx.log_model(registered_model_name=NAME)
    onnx.log_model(folder, registered_model_name=NAME)
    return [f"models:/{NAME}/{number}" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A file of seven questions, one of which is answered wrongly, and one of which expects nothing more."""
    rows = [json.loads(line) for line in questions.EMBEDDED.read_text("utf-8").splitlines()[:6]]
    wrong = {"inputs": {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}, "expectations": {"regex": "five"}}
    path = tmp_path_factory.mktemp("questions") / "seven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, wrong]), "utf-8")
    return path


def test_the_numbers_are_those_of_both_models_and_their_run_is_linked_with_them(versions, seven):
    result = compare(*versions[:2], "--questions", seven, "--json")

    assert result.exit_code == 0, result.output
    for noise in ("Evaluation completed", "Evaluating", "View evaluation", "\x1b", "\r", "%|"):
        assert noise not in result.output
    found = json.loads(result.stdout)
    reference, other = found["models"]
    assert (reference["model"], other["loaded"], found["questions"]) == (f"{NAME}/1", versions[1], 7)
    assert reference["right"]["value"] == pytest.approx(6 / 7)
    assert reference["right"]["low"] < 0.7 < 1 > reference["right"]["high"]
    assert (other["scores"]["matched"]["value"], other["scores"]["contained"]["asked"]) == (0, 6)
    assert other["agreement"]["same"]["value"] == 1
    assert other["agreement"]["drift"]["high"] == 0
    assert reference["agreement"] is None
    assert reference["size_bytes"] == other["size_bytes"] > 2**20
    for name in ("tokens_per_second", "first_token_ms", "answer_ms"):
        assert 0 < other[name]["low"] <= other[name]["value"] <= other[name]["high"]
    answer = found["answers"][0]
    assert (answer["text"], answer["ended"]) == ("The capital of Hungary is Budapest.", True)
    assert 0 < answer["first_token_ms"] < answer["total_ms"]

    client = mlflow.MlflowClient()
    run = client.get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert {each.model_id for each in run.inputs.model_inputs} == {reference["model_id"], other["model_id"]}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "compare.json",
        "compare.md",
        "compare.png",
    }
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert {child.info.run_name for child in children} == {f"{NAME}/1", f"{NAME}/2"}
    for child in children:
        assert child.data.metrics["contained/mean"] == 1
        traces = mlflow.search_traces(locations=[run.info.experiment_id], run_id=child.info.run_id, return_type="list")
        assert len(traces) == 7
    metrics = {metric.key: metric.value for metric in client.get_logged_model(other["model_id"]).metrics}
    assert metrics["right"] == pytest.approx(6 / 7)
    assert {"tokens_per_second", "answer_ms", "drift", "same", "contained/mean", "size_bytes"} <= metrics.keys()


def test_the_table_has_a_line_for_each_number_and_a_gate_its_verdicts(versions, seven):
    result = compare(f"models:/{NAME}@champion", versions[2], "--questions", seven, "--gate", "champion", *FEW)

    assert result.exit_code == 1, result.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines() if "|" in line]
    cells = {row[0]: row[1:] for row in rows}
    assert cells[""] == [f"{NAME}@champion", f"{NAME}/3"]
    assert re.fullmatch(r"85\.7 % \[49, 97\]", cells["right"][0])
    assert cells["same answers"][0] == "-"
    assert re.fullmatch(r"0\.1\d* \[.*\]", cells["drift, nats a token"][1])
    assert all(re.fullmatch(r"[\d.]+ m?s \[.*\]", cell) for cell in cells["answer"])
    assert "kept    margin     lost 0 and won 0 of 7 questions" in result.stdout
    assert re.search(r"broken  drift      0\.1\d* nats a token, at most 0\.\d+; allowed below 0\.01", result.stdout)
    assert f"the alias champion of {NAME} stays as it is" in result.stdout
    assert meaning("champion") == "1"
    run = mlflow.get_run(result.stdout.splitlines()[-1].removeprefix("run "))
    assert (run.info.status, run.data.tags["phi3_gate"], run.data.params["gate_margin"]) == (
        "FINISHED",
        "refused",
        "0.3",
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_shows_what_is_done_and_then_the_table_alone(versions, seven, tmp_path):
    from keyboard import Terminal

    (tmp_path / "one.jsonl").write_text(seven.read_text("utf-8").splitlines()[0], "utf-8")
    environment = {"MLFLOW_EXPERIMENT_NAME": "tests"}
    terminal = Terminal(
        *versions[:2], "--questions", "one.jsonl", folder=tmp_path, verb="compare", environment=environment
    )
    try:
        assert terminal.end() == 0
        terminal.match(r"^run \w{32}$")
        lines = terminal.text.splitlines()
    finally:
        terminal.close()

    steps = [f"{step} ..." for step in ("starting", f"loading {NAME}/1", f"loading {NAME}/2", "writing it into MLflow")]
    steps.insert(3, "0 of 3 answers |")
    places = [terminal.shown.find(f"compare: {step}".encode()) for step in steps]
    assert places == sorted(places), terminal.shown
    assert places[0] == 1  # after the carriage return: before anything else
    assert "logical cores" in lines[0]
    assert "1 question; in brackets 95 % intervals:" in lines
    for noise in ("compare:", "INFO", "WARNING", "%|"):
        assert noise not in terminal.text


def test_the_gate_moves_an_alias_to_an_equal_model_and_makes_one_that_is_new(versions, seven):
    result = compare(*versions[:2], "--questions", seven, "--gate", "next", *FEW, "--slowdown", "1000")

    assert result.exit_code == 0, result.output
    assert f"the alias next of {NAME} means version 2 (new)" in result.stdout
    assert "kept    slowdown" in result.stdout
    assert (meaning("next"), meaning("champion")) == ("2", "1")


def test_spoiled_weights_are_refused_and_equal_ones_pass_twenty_times_of_twenty(versions, tmp_path):
    # Five matrices of a layer, and the one whose scales show least.
    parts = {"layer": "layers.3.", "matrix": "layers.1.mlp.up_proj"}
    folders = [spoil(tmp_path / name / "weights", part) for name, part in parts.items()]
    for folder in folders:
        onnx.save_model(folder.parent / "model", folder)
    uris = [*versions[:2], *(str(folder.parent / "model") for folder in folders)]
    asked = questions.read()
    judged = scorers.needed(asked)
    with loaded([resolve(uri) for uri in uris]) as (reference, *candidates):
        own, *others = ask([reference, *candidates], asked)
        passed = Counter()
        for candidate, given in zip(candidates, others, strict=True):
            pairs = list(zip(asked, own, given, strict=True))
            drifts = [agree(reference, candidate, question, (a, b)).drift for question, a, b in pairs]
            right = [
                tuple(all(scorers.score(judged, question, each.text).values()) for each in (a, b))
                for question, a, b in pairs
            ]
            for seed in range(20):
                picked = random.Random(seed).sample(range(len(asked)), 54)
                verdicts = judge(Bounds(), [right[i] for i in picked], [drifts[i] for i in picked], [], seed)
                passed[candidate.label] += all(verdict.kept for verdict in verdicts)

    assert [passed[candidate.label] for candidate in candidates] == [20, 0, 0]


def test_a_model_that_fails_in_the_middle_is_named_with_the_question(versions, seven):
    asked = questions.read(seven)
    with loaded([resolve(uri) for uri in versions[:2]]) as subjects:
        answered = []

        def close(count):
            answered.append(count)
            if len(answered) == 5:
                subjects[1].service.close()

        with pytest.raises(Phi3Error, match=rf"^{NAME}/2 failed on seven.jsonl:\d: "):
            ask(subjects, asked, close)


def test_a_question_that_does_not_fit_is_told_before_the_first_answer(versions, seven, tmp_path):
    onnx.save_model(tmp_path / "small", model_config={"context_length": 16})

    result = compare(versions[0], tmp_path / "small", "--questions", seven)

    assert result.exit_code == 2
    assert re.search(r"`seven.jsonl:1.inputs.messages` (is|are) .*the context holds 16.*\(by small\)", result.stderr)


SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[", "`bad.jsonl:2` is not a JSON object"),
        ("3", "`bad.jsonl:2` is 3; it must be an object"),
        ({"inputs": {"messages": []}}, "`bad.jsonl:2.inputs.messages` is []"),
        ({"inputs": {"messages": SPAIN, "warmth": 1}}, "`bad.jsonl:2.inputs.warmth` is not a field"),
        ({"inputs": {"messages": SPAIN, "n": 2}}, "`bad.jsonl:2.inputs.n` must be 1"),
        ({"expectations": {}}, "`bad.jsonl:2.inputs` is None"),
        ({"inputs": {"messages": SPAIN}, "answer": "Madrid"}, "`bad.jsonl:2.answer` is not known"),
        ({"inputs": {"messages": SPAIN}, "expectations": {"regex": "("}}, "`bad.jsonl:2.expectations.regex` is '('"),
        ({"inputs": {"messages": SPAIN}, "expectations": {"max_words": 0}}, "it must be the most words"),
        ({"inputs": {"messages": SPAIN}, "expectations": {"has": "x"}}, "`bad.jsonl:2.expectations.has` is not known"),
    ],
    ids=str,
)
def test_a_bad_question_is_refused_with_its_line(versions, tmp_path, row, message):
    text = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"inputs": {"messages": SPAIN}}) + "\n" + text, "utf-8")

    result = compare(*versions[:2], "--questions", path)

    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ONE, "`MODEL` is given once; give two or more"),
        ([*TWO, "--margin", "0.05"], "--margin needs --gate ALIAS"),
        ([*TWO, "--drift", "inf"], "--drift needs --gate ALIAS"),
        ([*TWO, "--slowdown", "2"], "--slowdown needs --gate ALIAS"),
        ([*TWO, "--gate", "new"], "`--margin` is 0.05, which 7 questions"),
        ([*TWO, "--gate", "new", "--margin", "1"], "`--margin` is 1; it must be"),
        ([*TWO, "--gate", "new", *FEW, "--drift", "0"], "`--drift` is 0; it must"),
        ([*ONE, "runs:/1/model", "--gate", "new", *FEW], "`--gate` moves an alias of a registered model"),
        ([*ONE, *TWO, "--gate", "new", *FEW], "`--gate` takes two models"),
        ([*ONE, *ONE, "--gate", "new", *FEW], "`--gate` would compare version 1 of compared with itself"),
        ([*TWO, "--gate", "champio", *FEW], f"`--gate` is champio, and {NAME} has no such alias but champion; give"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_gate_that_means_nothing_is_refused_before_anything_is_loaded(versions, seven, arguments, message):
    result = compare(*arguments, "--questions", seven)

    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert meaning("new") is meaning("champio") is None


def test_what_is_not_there_is_one_line(versions, seven, tmp_path):
    for wrong, message in [
        (f"models:/{NAME}@nobody", "alias nobody not found"),
        (str(tmp_path / "nowhere"), "cannot be loaded"),
        (f"models:/{NAME}/99", "cannot be loaded"),
    ]:
        result = compare(versions[0], wrong, "--questions", seven)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()[-1]) < 400
        assert "Traceback" not in result.stderr


def test_a_tracking_server_that_is_not_there_is_told_within_seconds(versions, seven, tracking):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    mlflow.set_tracking_uri(address)
    try:
        result = compare(*versions[:2], "--questions", seven)
    finally:
        mlflow.set_tracking_uri(tracking)

    assert result.exit_code == 1
    assert f"the tracking store {address} does not answer" in result.stderr


def test_an_alias_that_somebody_else_moved_meanwhile_stays_there(versions, seven, monkeypatch):
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "contested", "1")
    log_run = comparison.log_run

    def moved(result):
        log_run(result)
        client.set_registered_model_alias(NAME, "contested", "3")

    monkeypatch.setattr(comparison, "log_run", moved)
    result = compare(*versions[:2], "--questions", seven, "--gate", "contested", *FEW)

    assert result.exit_code == 1
    assert "was moved from version 1 to 3 meanwhile, and stays there" in result.stderr
    assert meaning("contested") == "3"
    run = mlflow.get_run(result.stdout.splitlines()[-1].removeprefix("run "))
    assert run.data.tags["phi3_gate"] == "refused"
    assert "of compared stays as it is" in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/compare.md")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_it_and_the_alias_stays(versions, tmp_path):
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "patient", "1")
    path = tmp_path / "long.jsonl"
    row = {
        "inputs": {"messages": [{"role": "user", "content": "Count from 1 to 30."}]},
        "expectations": {"json": False},
    }
    path.write_text((json.dumps(row) + "\n") * 2000, "utf-8")
    command = [sys.executable, "-m", "phi3_mlflow", "compare", *versions[:2], "--questions", path, "--gate", "patient"]

    def begun():
        runs = mlflow.search_runs(order_by=["attributes.start_time DESC"], output_format="list", max_results=1)
        return bool(runs) and runs[0].info.status == "RUNNING"

    status, out, error = interrupted(command, begun, 60, env={**os.environ, "MLFLOW_EXPERIMENT_NAME": "tests"})

    assert (status, out) == (1, b"")
    assert error.endswith(b"Aborted!\n")
    assert b"Traceback" not in error
    assert meaning("patient") == "1"
    (run,) = mlflow.search_runs(order_by=["attributes.start_time DESC"], output_format="list", max_results=1)
    assert (run.info.run_name, run.info.status) == (f"compare {NAME}/1 {NAME}/2", "FAILED")


def test_a_tracking_server_that_is_lost_in_the_middle_costs_the_run_and_not_the_numbers(seven, tracking, tmp_path):
    measure = comparison._measure

    def lose(*arguments):
        process.kill()
        process.wait()
        return measure(*arguments)

    with server(tmp_path, f"sqlite:///{tmp_path / 'db'}") as (address, process), pytest.MonkeyPatch.context() as patch:
        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("lost")
        try:
            for _ in range(2):
                onnx.log_model(registered_model_name=NAME)
            patch.setattr(comparison, "_measure", lose)
            start = time.monotonic()
            result = compare(*TWO, "--questions", seven, "--gate", "champion", *FEW)
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_experiment("tests")

    assert time.monotonic() - start < 120
    assert result.exit_code == 1
    assert "| right " in result.stdout
    assert "kept    margin" in result.stdout
    assert "the alias champion of compared stays as it is" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: what was measured is not in MLflow: the tracking store {address} does not answer: ")
    assert "Traceback" not in result.stderr


def test_questions_may_be_a_table_with_cells_that_are_empty():
    expected = {"contains": "Madrid"}
    table = pd.DataFrame([{"inputs": {"messages": SPAIN}, "expectations": expected}, {"inputs": {"messages": SPAIN}}])

    first, second = questions.read(table)

    assert (first.messages, first.expectations, second.expectations) == (SPAIN, expected, {})
    with pytest.raises(InvalidRequest, match=r"`questions\[0\].inputs` is None"):
        questions.read(pd.DataFrame([{"expectations": expected}]))


def test_bounds_without_an_alias_to_move_are_refused():
    with pytest.raises(InvalidRequest, match=r"`bounds` is Bounds\(margin=0.1, .*, for moving an alias, and there is"):
        comparison.compare(["models:/a/1", "models:/b/1"], bounds=Bounds(margin=0.1))


def test_the_embedded_questions_are_enough_for_the_gates_own_margin():
    asked = questions.read()

    assert sum(bool(question.expectations) for question in asked) >= least_questions(Bounds().margin)
    assert {name for question in asked for name in question.expectations} == set(questions.EXPECTATIONS)
    assert not {each.name for each in scorers.SCORERS.values()} & set(questions.EXPECTATIONS)


@pytest.mark.parametrize(
    ("expectations", "right", "wrong"),
    [
        ({"expected_response": "Madrid"}, " Madrid\n", "Madrid."),
        ({"contains": ["Madrid", "spain"]}, "madrid in Spain", "Madrid"),
        ({"contains": "Madrid"}, "It is Madrid.", "Paris"),
        ({"regex": r"\b4$"}, "2 + 2 = 4", "4 it is"),
        ({"json": True}, '{"a": 1}', "{a: 1}"),
        ({"json": False}, "text", "[1]"),
        ({"refusal": True}, "I\u2019m sorry, but I can\u2019t help with that.", "Of course."),
        ({"refusal": False}, "The sorry state of things.", "As an AI, I cannot say."),
        ({"max_words": 2}, "two words", "now three words"),
    ],
    ids=str,
)
def test_each_scorer_says_yes_and_no_and_nothing_where_nothing_is_expected(expectations, right, wrong):
    question = questions.Question({"messages": SPAIN}, expectations, "here")
    every = list(scorers.SCORERS.values())

    assert list(scorers.score(every, question, right).values()) == [True]
    assert list(scorers.score(every, question, wrong).values()) == [False]
    assert len(scorers.needed([question])) == 1


def test_not_worse_is_shown_as_seldom_as_it_should_be_where_a_candidate_is_worse_by_the_margin():
    draw = np.random.default_rng(0)
    for lose, win in ((0.10, 0.0), (0.15, 0.05), (0.3, 0.2)):
        outcomes = draw.multinomial(100, [lose, win, 1 - lose - win], size=4000)
        shown = np.mean([not_worse(lost, won, 100, 0.1) <= 0.05 for lost, won, _ in outcomes])
        assert shown < 0.06
    better = draw.multinomial(100, [0.02, 0.02, 0.96], size=1000)
    assert np.mean([not_worse(lost, won, 100, 0.1) <= 0.05 for lost, won, _ in better]) > 0.9


def test_models_that_answer_alike_need_enough_questions():
    for margin in (0.01, 0.05, 0.3):
        least = least_questions(margin)
        assert not_worse(0, 0, least, margin) <= 0.05 < not_worse(0, 0, least - 1, margin)
    assert not_worse(0, 0, 52, 0.05) == pytest.approx(NormalDist().cdf(-((52 * 0.05 / 0.95) ** 0.5)))


def test_intervals_repeat_hold_the_value_and_are_honest_about_few():
    values = np.random.default_rng(1).exponential(size=80)

    low, high = interval(values, 3)
    assert (low, high) == interval(values, 3) != interval(values, 4)
    assert low < values.mean() < high
    assert low < upper(values, 3) < high
    assert interval([(2, 1), (2, 1)], 0, ratio) == (2, 2)
    assert share_interval(10, 10) == (pytest.approx(0.722, abs=0.001), 1)
    assert share_interval(0, 10) == (pytest.approx(0), pytest.approx(0.278, abs=0.001))


def test_a_drift_that_cannot_be_measured_is_no_drift_that_is_kept():
    right = [(True, True)] * 60

    kept = {verdict.bound: verdict.kept for verdict in judge(Bounds(), right, [None] * 60, [])}
    assert kept == {"margin": True, "drift": False}
    assert [verdict.bound for verdict in judge(Bounds(drift=float("inf")), right, [None] * 60, [])] == ["margin"]
    worse = [(True, False)] * 3 + right[3:]
    assert not judge(Bounds(), worse, [0.0] * 60, [])[0].kept
    slow = judge(Bounds(slowdown=1.5), right, [0.0] * 60, [(2.0, 1.0)] * 60)
    assert [verdict.kept for verdict in slow] == [True, True, False]


def test_the_plot_of_several_models_is_drawn(versions, tmp_path):
    result = comparison.compare([*versions, versions[0]], [{"inputs": {"messages": SPAIN}}])

    assert [model["model"] for model in result["models"]][-1] == f"{NAME}/1 (2)"
    figure(result).savefig(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    long = json.loads(json.dumps(result).replace(f'"{NAME}/', '"phi3-mini-4k-instruct-onnx-int4/'))
    legend = figure(long).axes[1].get_legend()
    assert len({text.get_text() for text in legend.get_texts()}) == 4
