"""Questions to compare models with, and what is expected of the answers. Knows no model and no tracking store."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from phi3_mlflow.runtime.chat import parse_chat
from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.options import Options

EMBEDDED = Path(__file__).parent / "questions.jsonl"
_KEYS = ("inputs", "expectations", "tags")


@dataclass(frozen=True)
class Question:
    """One row of a question set, in the form that `mlflow.genai.evaluate` takes.

    Attributes:
        inputs: `messages`, and options of the request.
        expectations: what is expected of the answer, by the names in EXPECTATIONS; may be empty.
        place: where it stands, for error messages.
    """

    inputs: Mapping[str, Any]
    expectations: Mapping[str, Any]
    place: str

    @property
    def messages(self) -> Sequence[Mapping[str, str]]:
        """The conversation that is to be answered."""
        return self.inputs["messages"]


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: object) -> bool:
    return _text(value) or (isinstance(value, list) and bool(value) and all(map(_text, value)))


def _pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


# What may be expected, whether a value is one, and in words.
EXPECTATIONS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "expected_response": (_text, "the whole answer, as text"),
    "contains": (_texts, "text that the answer has, or a list of such texts"),
    "regex": (_pattern, "a regular expression that is found in the answer"),
    "json": (lambda value: isinstance(value, bool), "true or false: whether the answer is JSON"),
    "refusal": (lambda value: isinstance(value, bool), "true or false: whether the answer declines"),
    "max_words": (lambda value: type(value) is int and value > 0, "the most words that the answer has, at least 1"),
}


def read(source: "str | Path | pd.DataFrame | Sequence[Mapping[str, Any]] | None" = None) -> list[Question]:
    """A question set, checked.

    Args:
        source: a file with a JSON object a line; or a DataFrame or list of such rows; None for the embedded set. A row
            has `inputs` (`messages`, and options of the request), `expectations` (see EXPECTATIONS), which may be
            left out, and `tags`, which are not looked at.

    Raises:
        InvalidRequest: a row is not a question; names the row and what is wrong with it.
        OSError: the file cannot be read.
    """
    if source is None or isinstance(source, (str, Path)):
        path = Path(source or EMBEDDED)
        return _checked([(f"{path.name}:{number}", row) for number, row in _lines(path)])
    if isinstance(source, pd.DataFrame):
        source = [{str(key): value for key, value in row.items()} for row in source.to_dict(orient="records")]
    return _checked([(f"questions[{index}]", row) for index, row in enumerate(source)])


def _lines(path: Path) -> list[tuple[int, Any]]:
    rows = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidRequest("--questions", f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path.name}:{number}", f"is not a JSON object: {error}") from error
    return rows


def _checked(rows: Sequence[tuple[str, Any]]) -> list[Question]:
    if not rows:
        raise InvalidRequest("--questions", "has no questions; a question is a JSON object with `inputs`")
    return [_question(place, row) for place, row in rows]


def _question(place: str, row: Any) -> Question:
    if not isinstance(row, Mapping):
        raise InvalidRequest(place, f"is {shorten(row)}; it must be an object with `inputs` and `expectations`")
    # A column of a table has an empty cell where a row has nothing.
    given = {key: value for key, value in row.items() if isinstance(value, Mapping) or not _is_missing(value)}
    for key in given:
        if key not in _KEYS:
            raise InvalidRequest(f"{place}.{key}", f"is not known; a question has {', '.join(_KEYS)}")
    inputs, expected = given.get("inputs"), given.get("expectations", {})
    for key, value in (("inputs", inputs), ("expectations", expected)):
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{place}.{key}", f"is {shorten(value)}; it must be an object")
    if inputs.get("n", 1) != 1:  # type: ignore[union-attr]
        raise InvalidRequest(f"{place}.inputs.n", "must be 1: one answer is compared with another")
    try:
        parse_chat(inputs, Options())  # type: ignore[arg-type]
    except InvalidRequest as error:
        problem = str(error).partition("` ")[2]
        raise InvalidRequest(f"{place}.inputs.{error.field}", problem) from error
    for key, value in expected.items():
        if key not in EXPECTATIONS:
            raise InvalidRequest(f"{place}.expectations.{key}", f"is not known; there are {', '.join(EXPECTATIONS)}")
        fits, words = EXPECTATIONS[key]
        if not fits(value):
            raise InvalidRequest(f"{place}.expectations.{key}", f"is {shorten(value)}; it must be {words}")
    return Question(dict(inputs), dict(expected), place)  # type: ignore[arg-type]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
