"""A comparison from its models and questions to its MLflow run: everything in order, and the alias last."""

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import LoggedModelInput
from mlflow.environment_variables import MLFLOW_GENAI_EVAL_MAX_SCORER_WORKERS, MLFLOW_GENAI_EVAL_MAX_WORKERS
from mlflow.genai.scorers import Scorer

from phi3_mlflow import tracking
from phi3_mlflow.machine import machine
from phi3_mlflow.progress import Progress
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error
from phi3_mlflow.unfinished import Unfinished

from .agreement import Agreement, agree
from .answers import Answer, ask
from .gate import Bounds, as_dict, judge, move, open_gate
from .models import Subject, loaded, resolve
from .questions import Question, read
from .report import log_run, log_verdict
from .scorers import SCORERS, needed, score
from .uncertainty import interval, ratio, share_interval

Scores = list[dict[str, bool]]


def compare(
    models: Sequence[str],
    questions: "str | Path | pd.DataFrame | Sequence[Mapping[str, Any]] | None" = None,
    *,
    gate: str | None = None,
    bounds: Bounds | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Asks logged models the same questions and compares their answers, speed, memory and size, as an MLflow run.

    All models are in memory at once and take turns, so that a busy machine spoils their times alike. Decoding is
    greedy unless a question says otherwise. The first model is the reference that the others are compared with.

    Args:
        models: URIs, two or more.
        questions: see `questions.read`; None for the embedded set.
        gate: an alias of the second model's registered model, which it gets where it is not worse than the first.
        bounds: what counts as not worse; see Bounds.
        seed: of the bootstrap.
        progress: shows how far it is; None for one of its own.

    Returns:
        `models` (what was measured of each, see docs/compare.md), `questions` (how many), `answers` (of each question),
        `machine`, `run_id`, and with a gate `gate`, whose `passed` says whether the alias was moved.

    Raises:
        InvalidRequest: a question or a bound is not one.
        Unfinished: the tracking store was lost on the way, or the alias was moved by somebody else; has the result.
        Phi3Error: a model failed, or the tracking store does not answer at the start. The alias is where it was then.
    """
    if len(models) < 2:
        given = "once" if models else "not at all"
        raise InvalidRequest("MODEL", f"is given {given}; give two or more, the first being the one to compare with")
    if bounds is not None and gate is None:
        raise InvalidRequest("bounds", f"is {bounds}, for moving an alias, and there is none: give `gate`")
    asked = read(questions)
    scorers = needed(asked)
    bounds = bounds or Bounds()
    tracking.check()
    names = [resolve(uri) for uri in models]
    door = None
    if gate is not None:
        bounds.check(sum(bool(question.expectations) for question in asked))
        door = open_gate(names, gate)
    result: dict[str, Any] | None = None
    lost: Exception | None = None
    try:
        with ExitStack() as stack:
            # With a tracking server, MLflow prints the addresses of runs on stdout.
            stack.enter_context(redirect_stdout(sys.stderr))
            progress = stack.enter_context(progress or Progress("compare"))
            subjects = stack.enter_context(loaded(names, progress.say))
            stack.enter_context(tracking.impatient())
            run = stack.enter_context(mlflow.start_run(run_name=f"compare {' '.join(each.label for each in subjects)}"))
            answers, agreements = _measure(subjects, asked, progress)
            progress.say("writing it into MLflow")
            scores = [
                [score(scorers, question, answer.text) for question, answer in zip(asked, given, strict=True)]
                for given in answers
            ]
            measured = [
                _model(subject, given, scored, alike, seed)
                for subject, given, scored, alike in zip(subjects, answers, scores, agreements, strict=True)
            ]
            found: dict[str, Any] = {
                "models": measured,
                "questions": len(asked),
                "answers": _rows(subjects, asked, answers, scores, agreements),
                "machine": machine(),
                "run_id": run.info.run_id,
            }
            if door is not None:
                right = [(_right(own), _right(other)) for own, other in zip(*scores, strict=True) if own]
                drifts = [each.drift for each in agreements[1] or ()]
                times = [(other.total_ms, own.total_ms) for own, other in zip(*answers, strict=True)]
                found["gate"] = as_dict(door, judge(bounds, right, drifts, times, seed), bounds)
            result = found
            try:
                _record(subjects, asked, scorers, answers, scores, result)
            except Exception as error:
                lost = error
                raise
    except Exception as error:
        if result is None:
            raise
        # Where the store is gone, the run cannot be ended either, and that says less.
        raise Unfinished("what was measured is not in MLflow: ", lost or error, result) from error
    if door is not None and result["gate"]["passed"]:
        with tracking.impatient():
            try:
                move(door)
            except Exception as error:
                unfinished = Unfinished("", error, result)
                with suppress(Exception):  # the run was told that the alias moved
                    log_verdict(result)
                raise unfinished from error
    return result


def _measure(
    subjects: Sequence[Subject], questions: Sequence[Question], progress: Progress
) -> tuple[list[list[Answer]], list[list[Agreement] | None]]:
    """Each model's answers, and how they agree with the first model's; None for itself."""
    progress.count("answers", len(questions) * (2 * len(subjects) - 1))
    answers = ask(subjects, questions, progress.advance)
    agreements: list[list[Agreement] | None] = [None]
    for subject, given in zip(subjects[1:], answers[1:], strict=True):
        rows = []
        for question, own, other in zip(questions, answers[0], given, strict=True):
            rows.append(agree(subjects[0], subject, question, (own, other)))
            progress.advance(1)
        agreements.append(rows)
    return answers, agreements


def _model(
    subject: Subject, answers: Sequence[Answer], scores: Scores, alike: Sequence[Agreement] | None, seed: int
) -> dict[str, Any]:
    names = [each.name for each in SCORERS.values() if any(each.name in row for row in scores)]
    judged = [row for row in scores if row]
    found: dict[str, Any] = {
        "model": subject.label,
        "uri": subject.name.given,
        "loaded": subject.name.uri,
        "model_id": subject.model_id,
        "facts": subject.facts,
        "right": _share([_right(row) for row in judged]) if judged else None,
        "scores": {name: _share([row[name] for row in scores if name in row]) for name in names},
        "tokens_per_second": _estimate([(each.tokens, each.total_ms / 1000) for each in answers], seed, ratio),
        "first_token_ms": _estimate([each.first_token_ms for each in answers], seed, np.median),
        "answer_ms": _estimate([each.total_ms for each in answers], seed, np.median),
        "memory_bytes": subject.memory,
        "size_bytes": subject.size,
        "agreement": None,
    }
    if alike is not None:
        drifts = [each.drift for each in alike if each.drift is not None]
        found["agreement"] = {
            "same": _share([each.first_difference is None for each in alike]),
            "drift": _estimate(drifts, seed) if len(drifts) == len(alike) else None,
            "nats_by_reference": _estimate([each.nats_by_reference for each in alike], seed),
            "nats_by_candidate": _estimate([each.nats_by_candidate for each in alike], seed),
            "nats_of_candidate": _estimate([each.nats_of_candidate for each in alike], seed),
        }
    return found


def _share(values: Sequence[bool]) -> dict[str, float]:
    low, high = share_interval(sum(values), len(values))
    return {"value": sum(values) / len(values), "low": low, "high": high, "asked": len(values)}


def _estimate(values: Sequence[Any], seed: int, statistic: Any = np.mean) -> dict[str, float]:
    low, high = interval(values, seed, statistic)
    return {"value": float(statistic(np.asarray(values, float))), "low": low, "high": high, "asked": len(values)}


def _right(scores: Mapping[str, bool]) -> bool:
    return all(scores.values())


def _rows(
    subjects: Sequence[Subject],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    scores: Sequence[Scores],
    agreements: Sequence[Sequence[Agreement] | None],
) -> list[dict[str, Any]]:
    """What was asked and what each model said, a row for each question and model."""
    return [
        {
            "question": question.messages[-1]["content"],
            "place": question.place,
            "model": subject.label,
            **asdict(answers[index][number]),
            "scores": scores[index][number],
            "agreement": None if (alike := agreements[index]) is None else asdict(alike[number]),
        }
        for number, question in enumerate(questions)
        for index, subject in enumerate(subjects)
    ]


def _record(
    subjects: Sequence[Subject],
    questions: Sequence[Question],
    scorers: Sequence[Scorer],
    answers: Sequence[Sequence[Answer]],
    scores: Sequence[Scores],
    result: Mapping[str, Any],
) -> None:
    """Puts everything into the active run and below it.

    Raises:
        Phi3Error: the tracking store does not answer any more, or did not keep something.
    """
    tracking.check()
    linked = [LoggedModelInput(each.model_id) for each in subjects if each.model_id is not None]
    if linked:
        mlflow.MlflowClient().log_inputs(result["run_id"], models=linked)
    for subject, given, scored, found in zip(subjects, answers, scores, result["models"], strict=True):
        _evaluate(subject, questions, scorers, given, scored, found)
    log_run(result)


def _evaluate(
    subject: Subject,
    questions: Sequence[Question],
    scorers: Sequence[Scorer],
    answers: Sequence[Answer],
    scores: Scores,
    found: Mapping[str, Any],
) -> None:
    """A run below the active one with MLflow's evaluation of one model, for its pages and its comparison of runs.

    Raises:
        Phi3Error: MLflow did not record what was scored.
    """
    numbers = {name: found[name]["value"] for name in ("tokens_per_second", "first_token_ms", "answer_ms")}
    numbers |= {name: found[name] for name in ("memory_bytes", "size_bytes") if found[name] is not None}
    if found["right"] is not None:
        numbers["right"] = found["right"]["value"]
    if found["agreement"] is not None:
        numbers |= {name: each["value"] for name, each in found["agreement"].items() if each is not None}
    with mlflow.start_run(run_name=subject.label, nested=True):
        mlflow.log_metrics(numbers, model_id=subject.model_id)
        if not scorers:
            return
        data = [
            {"inputs": dict(question.inputs), "outputs": answer.text, "expectations": dict(question.expectations)}
            for question, answer in zip(questions, answers, strict=True)
        ]
        with _few_workers(), _quietly():
            evaluated = mlflow.genai.evaluate(data=data, scorers=list(scorers), model_id=subject.model_id)
    # MLflow only warns where it could not keep something.
    for name, each in found["scores"].items():
        table = evaluated.result_df
        column = f"{name}/value"
        kept = 0 if table is None or column not in table else int(table[column].notna().sum())
        if kept != each["asked"] or abs(evaluated.metrics[f"{name}/mean"] - each["value"]) > 1e-9:
            problem = f"of the {each['asked']} scores of {subject.label} by {name} MLflow kept {kept}"
            raise Phi3Error(f"{problem}; its warnings above say why")


@contextmanager
def _few_workers() -> Iterator[None]:
    """Ten workers, which is MLflow's default, take more connections than its pool for a database has."""
    variables = (MLFLOW_GENAI_EVAL_MAX_WORKERS, MLFLOW_GENAI_EVAL_MAX_SCORER_WORKERS)
    before = [variable.get_raw() for variable in variables]
    for variable in variables:
        variable.set(2)
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.unset() if value is None else variable.set(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without MLflow's bar, and without what it prints about its run, which is below the one that is told of."""
    from mlflow.genai.evaluation import harness

    bar, harness.tqdm = harness.tqdm, None
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        harness.tqdm = bar
