"""Answers of several models to the same questions, one question at a time and the models in turn. Greedy."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error
from phi3_mlflow.runtime.service import Prepared

from .models import Subject
from .questions import Question

# Each model's own defaults would be another way to ask.
_ASKED: Mapping[str, Any] = {"temperature": 0, "n": 1, "max_time": 0, "logprobs": False}


@dataclass(frozen=True)
class Answer:
    """What a model said to a question.

    Attributes:
        ended: whether the model ended it itself.
        tokens: sampled, the end token included.
        first_token_ms: from the request to the first token.
        total_ms: from the request to the end.
    """

    text: str
    ended: bool
    tokens: int
    first_token_ms: float
    total_ms: float


def ask(
    subjects: Sequence[Subject], questions: Sequence[Question], advance: Callable[[int], Any] = lambda _: None
) -> list[list[Answer]]:
    """Asks every model every question. Which model comes first changes with each question, so that a busy machine
    spoils the times of all of them alike.

    Args:
        subjects: the models.
        questions: what to ask them.
        advance: is told of each answer.

    Returns:
        For each model its answers, in the order of the questions.

    Raises:
        InvalidRequest: a question cannot be asked; told before the first one is.
        Phi3Error: a model failed; names the model and the question.
    """
    for subject in subjects:
        for question in questions:
            prepare(subject, question)
    answers: list[list[Answer]] = [[] for _ in subjects]
    for number, question in enumerate(questions):
        for turn in range(len(subjects)):
            index = (number + turn) % len(subjects)
            answers[index].append(_answer(subjects[index], question))
            advance(1)
    return answers


def prepare(subject: Subject, question: Question) -> Prepared:
    """A question as the model is given it.

    Raises:
        InvalidRequest: it cannot be asked; names the question, the field and the model.
    """
    service = subject.service
    try:
        return service.prepare(service.parse({**_ASKED, **question.inputs}, task="llm/v1/chat"))
    except InvalidRequest as error:
        problem = str(error).partition("` ")[2]
        raise InvalidRequest(f"{question.place}.inputs.{error.field}", f"{problem} (by {subject.label})") from error


def _answer(subject: Subject, question: Question) -> Answer:
    run, start = None, time.monotonic()
    try:
        run = subject.service.run(prepare(subject, question))
        answer = run.wait()
    except Exception as error:
        raise failed(subject, question, error) from error
    finally:
        if run is not None:
            run.cancel()
    choice = answer.choices[0]
    return Answer(
        choice.text,
        choice.reason == "eos",
        choice.tokens,
        (run.first_token - start) * 1000,
        (run.ended - start) * 1000,
    )


def failed(subject: Subject, question: Question, error: Exception) -> Phi3Error:
    """What is told of a model that could not answer or score."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return Phi3Error(f"{subject.label} failed on {question.place}: {reason}")
