"""What the values of a JSON file may be: rules, and a check that names the key that breaks one.

Knows no file and no key's meaning.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeightsError, shorten
from . import files


@dataclass(frozen=True)
class Rule:
    """Whether a value fits, and the words for one that does."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Object:
    """An object of these keys, of which some have to be there. A plain mapping is one of which none has."""

    keys: Mapping[str, Any]
    needed: Collection[str]


@dataclass(frozen=True)
class List:
    """A list of at most so many items, all by one rule."""

    item: Any
    most: int


@dataclass(frozen=True)
class Named:
    """An object of at most so many keys, which are whatever fits."""

    key: Rule
    item: Any
    most: int


@dataclass(frozen=True)
class Either:
    """What the first of the alternatives that takes this type of value says."""

    alternatives: tuple[Any, ...]


def integer(least: int, most: int) -> Rule:
    """A whole number from the least to the most."""
    return Rule(f"an integer from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float) -> Rule:
    """A number from the least to the most."""

    def fits(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

    return Rule(f"a number from {least} to {most}", fits)


def one_of(*choices: str) -> Rule:
    """One of these texts."""
    return Rule(" or ".join(map(repr, choices)), lambda value: isinstance(value, str) and value in choices)


def text(most: int) -> Rule:
    """Plain text of 1 to so many characters."""

    def fits(value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= most and value.isascii() and value.isprintable()

    return Rule(f"1 to {most} printable ASCII characters", fits)


FLAG = Rule("true or false", lambda value: type(value) is bool)
NULL = Rule("null", lambda value: value is None)


def optional(rule: Any) -> Either:
    """Null, or what the rule says."""
    return Either((NULL, rule))


def check(path: Path, value: Any, allowed: Any, why: str, where: str = "") -> None:
    """Checks a value and all that is in it.

    Args:
        path: the file that it is from.
        value: as `files.plain` gives it.
        allowed: a Rule, List, Named, Either or Object; or a mapping with one of them for each key that may be there.
        why: what is said of an unknown key: why it is refused and what to do.
        where: the value's dotted path in the file.

    Raises:
        WeightsError: something does not fit; the message has its dotted path.
    """
    if isinstance(allowed, Object):
        check(path, value, allowed.keys, why, where)
        require(path, value, allowed.needed, where)
    elif isinstance(allowed, Either):
        taken = next((each for each in allowed.alternatives if _takes(each, value)), None)
        if taken is None:
            raise WeightsError(f"{path} has {where} {shorten(value)}: it must be {_words(allowed)}")
        check(path, value, taken, why, where)
    elif not _takes(allowed, value) or (isinstance(allowed, List | Named) and len(value) > allowed.most):
        raise WeightsError(f"{path} has {where} {shorten(value)}: it must be {_words(allowed)}")
    elif isinstance(allowed, List):
        for index, item in enumerate(value):
            check(path, item, allowed.item, why, f"{where}[{index}]")
    elif isinstance(allowed, Named):
        for name, inner in value.items():
            if not allowed.key.fits(name):
                raise WeightsError(f"{path} has the key {files.join(where, name)}: it must be {allowed.key.words}")
            check(path, inner, allowed.item, why, files.join(where, name))
    elif isinstance(allowed, Mapping):
        for name, inner in value.items():
            if name not in allowed:
                raise WeightsError(f"{path} has the key {files.join(where, name)}, {why}")
            check(path, inner, allowed[name], why, files.join(where, name))


def require(path: Path, value: Mapping[str, Any], keys: Collection[str], where: str = "") -> None:
    """Checks that dotted keys are there, and not null.

    Raises:
        WeightsError: one is not.
    """
    for key in keys:
        inner: Any = value
        for name in key.split("."):
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if inner is None:
            raise WeightsError(f"{path} has no {where}{'.' * bool(where)}{key}: copy or download it again")


def _takes(allowed: Any, value: Any) -> bool:
    """Whether a rule is about values of this type; a plain one, about this value."""
    if isinstance(allowed, Either):
        return any(_takes(each, value) for each in allowed.alternatives)
    if isinstance(allowed, List):
        return isinstance(value, list)
    if isinstance(allowed, Mapping | Named | Object):
        return isinstance(value, dict)
    return bool(allowed.fits(value))


def _words(allowed: Any) -> str:
    if isinstance(allowed, Either):
        return " or ".join(map(_words, allowed.alternatives))
    if isinstance(allowed, List):
        return f"a list of at most {allowed.most}"
    if isinstance(allowed, Named):
        return f"an object of at most {allowed.most} keys"
    return "an object" if isinstance(allowed, Mapping | Object) else str(allowed.words)
