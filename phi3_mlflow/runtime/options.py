"""The options of a request: name, type, range and default of each, checked in one place.

Knows nothing of where an option came from: a request body, MLflow's params, a model's own defaults.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from .errors import InvalidRequest, shorten
from .surrogates import half

MAX_STOP_SEQUENCES = 16
MAX_STOP_LENGTH = 256  # characters
MAX_LOGIT_BIAS = 1024  # tokens
_TOKEN_ID = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Options:
    """How one request is to be answered. A field left at None has no limit or no value of its own."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    response_format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})
    max_time: float | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    context_overflow: Literal["error", "drop_oldest"] = "error"
    repetition_guard: bool = True
    self_talk_guard: bool = True
    show_engine: bool = False

    def with_values(self, values: Mapping[str, Any]) -> "Options":
        """These options with the given ones in their place.

        Args:
            values: option names and values; None means not given.

        Raises:
            InvalidRequest: an unknown name, or a value of the wrong type or out of its range.
        """
        given = {name: check(name, value) for name, value in values.items() if value is not None}
        options = replace(self, **given)
        if given.get("top_logprobs") and not options.logprobs:
            problem = f"is {given['top_logprobs']}, and `logprobs` is not true; set that too, or leave this out"
            raise InvalidRequest("top_logprobs", problem)
        return options


@dataclass(frozen=True)
class Range:
    """Numbers of one kind from `low` to `high`; `above` leaves `low` itself out."""

    kind: Literal["integer", "number"]
    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        article = "an integer" if self.kind == "integer" else "a number"
        if math.isinf(self.high):
            return f"{article} {'above' if self.above else 'of at least'} {self.low}"
        return f"{article} {'above' if self.above else 'from'} {self.low} {'up ' if self.above else ''}to {self.high}"

    def check(self, name: str, value: Any) -> int | float:
        """The value as an int or a float; InvalidRequest where it is no such number."""
        if _is_real(value) and -math.inf < value < math.inf:
            inside = self.low < value if self.above else self.low <= value
            if inside and value <= self.high:
                try:
                    number = int(value) if self.kind == "integer" else float(value)
                except OverflowError:  # an integer beyond all floating-point numbers
                    number = math.inf
                if number == value:
                    return number
        raise InvalidRequest(name, f"is {shorten(value)}; it must be {self}")


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def check(self, name: str, value: Any) -> str:
        """The word; InvalidRequest where the value is none of them."""
        if not isinstance(value, str) or value not in self.words:
            raise InvalidRequest(name, f"is {shorten(value)}; it must be {' or '.join(map(repr, self.words))}")
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, name: str, value: Any) -> bool:
        """The value; InvalidRequest where it is neither."""
        if not isinstance(value, bool):
            raise InvalidRequest(name, f"is {shorten(value)}; it must be true or false")
        return value


RANGES = {
    "temperature": Range("number", 0, 2),
    "top_p": Range("number", 0, 1, above=True),
    "top_k": Range("integer", 0),
    "min_p": Range("number", 0, 1),
    "seed": Range("integer", -(2**63), 2**63 - 1),
    "max_tokens": Range("integer", 1),
    "n": Range("integer", 1, 16),
    "frequency_penalty": Range("number", -2, 2),
    "presence_penalty": Range("number", -2, 2),
    "repetition_penalty": Range("number", 0, 10, above=True),
    "repeat_last_n": Range("integer", -1),
    "max_time": Range("number", 0),
    "top_logprobs": Range("integer", 0, 20),
}
# Values that stand for none, as in llama.cpp's server: so a request can take a model's own default back.
NONE = {"seed": -1, "max_time": 0}
NAMES = tuple(option.name for option in fields(Options))


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check(name: str, value: Any) -> Any:
    """One option's value in the form that Options keeps; None where it stands for none.

    Raises:
        InvalidRequest: names the option, the value and what is allowed.
    """
    if name in RANGES:
        number = RANGES[name].check(name, value)
        return None if number == NONE.get(name) else number
    match name:
        case "stop":
            return _check_stop(value)
        case "logit_bias":
            return _check_logit_bias(value)
        case "response_format":
            # What it may hold is checked where it is compiled, in `grammar`.
            if not isinstance(value, Mapping):
                raise InvalidRequest(
                    name, f'is {shorten(value)}; it must be an object such as {{"type": "json_object"}}'
                )
            return value
        case "context_overflow":
            return OneOf(("error", "drop_oldest")).check(name, value)
        case "logprobs" | "repetition_guard" | "self_talk_guard" | "show_engine":
            return Flag().check(name, value)
    raise InvalidRequest(name, f"is not an option; the options are {', '.join(NAMES)}")


def _check_stop(value: Any) -> tuple[str, ...]:
    sequences = [value] if isinstance(value, str) else value
    if not isinstance(sequences, (list, tuple)):
        raise InvalidRequest("stop", f"is {shorten(value)}; it must be a string or a list of strings")
    if len(sequences) > MAX_STOP_SEQUENCES:
        raise InvalidRequest("stop", f"has {len(sequences)} entries; at most {MAX_STOP_SEQUENCES} are allowed")
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, str) or not 0 < len(sequence) <= MAX_STOP_LENGTH:
            problem = f"is {shorten(sequence)}; it must be a string of 1 to {MAX_STOP_LENGTH} characters"
            raise InvalidRequest(f"stop[{index}]", problem)
        if (place := half(sequence)) is not None:
            problem = f"has the lone surrogate U+{ord(sequence[place]):04X} at position {place}, which no text has"
            raise InvalidRequest(f"stop[{index}]", f"{problem}; leave it out")
    return tuple(sequences)


def _check_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        problem = f"is {shorten(value)}; it must be an object of token ids with a number from -100 to 100 each"
        raise InvalidRequest("logit_bias", problem)
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest("logit_bias", f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    biases = {}
    for token, bias in value.items():
        known = token in range(10**9) if isinstance(token, Integral) else _TOKEN_ID.fullmatch(str(token))
        if not known or isinstance(token, bool):
            raise InvalidRequest("logit_bias", f"has the key {shorten(token)}; the keys must be token ids")
        biases[int(token)] = Range("number", -100, 100).check(f"logit_bias[{int(token)}]", bias)
    return biases
