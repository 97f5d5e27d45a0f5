"""Scorers of answers that need no judge, for `mlflow.genai.evaluate`. Each says nothing where nothing is expected.

Their names are not those of the expectations: MLflow keeps both beside each other by their names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.genai.judges.builtin import CategoricalRating
from mlflow.genai.scorers import RegexMatch, ResponseLength, Scorer, scorer

from .questions import Question

# How answers decline, in the words of chat models.
_REFUSAL = re.compile(
    r"\b(i['\u2019]?m (sorry|unable|not able)|i am (sorry|unable|not able)|i apologi[sz]e|as an ai\b"
    r"|i (can['\u2019]t|cannot|can not|won['\u2019]t|will not|do not know|don['\u2019]t know|must decline))",
    re.IGNORECASE,
)


@scorer
def exact(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the answer is the expected one, but for white space around it."""
    expected = expectations.get("expected_response")
    return None if expected is None else outputs.strip() == expected.strip()


@scorer
def contained(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the answer has every expected text in it, in whatever case."""
    expected = expectations.get("contains")
    if expected is None:
        return None
    texts = [expected] if isinstance(expected, str) else expected
    return all(text.casefold() in outputs.casefold() for text in texts)


@scorer
def matched(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the expected pattern is found in the answer, by MLflow's RegexMatch."""
    expected = expectations.get("regex")
    return None if expected is None else _yes(RegexMatch(pattern=expected)(outputs=outputs))


@scorer
def valid_json(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the answer is JSON, where it should be, and is none where it should not."""
    expected = expectations.get("json")
    if expected is None:
        return None
    try:
        json.loads(outputs)
    except (ValueError, RecursionError):
        return not expected
    return bool(expected)


@scorer
def refused(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the answer declines where it should, and does not where it should not."""
    expected = expectations.get("refusal")
    return None if expected is None else bool(_REFUSAL.search(outputs)) == expected


@scorer
def length(outputs: str, expectations: Mapping[str, Any]) -> bool | None:
    """Whether the answer has at most the expected number of words, by MLflow's ResponseLength."""
    expected = expectations.get("max_words")
    return None if expected is None else _yes(ResponseLength(max_length=expected, unit="words")(outputs=outputs))


SCORERS: Mapping[str, Scorer] = {
    "expected_response": exact,
    "contains": contained,
    "regex": matched,
    "json": valid_json,
    "refusal": refused,
    "max_words": length,
}


def needed(questions: Sequence[Question]) -> list[Scorer]:
    """The scorers of which some question expects something."""
    return [each for name, each in SCORERS.items() if any(name in question.expectations for question in questions)]


def score(scorers: Sequence[Scorer], question: Question, text: str) -> dict[str, bool]:
    """The scores of an answer by their names, without those that say nothing of it."""
    found = {each.name: each(outputs=text, expectations=dict(question.expectations)) for each in scorers}
    return {name: bool(value) for name, value in found.items() if value is not None}


def _yes(feedback: Any) -> bool:
    return feedback.value == CategoricalRating.YES
