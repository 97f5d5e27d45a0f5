"""A schema that was read: one form for what the drafts write in many ways.

Knows how values and types meet, nothing of text, references or what can be enforced.
"""

from collections.abc import Iterable
from typing import Any

# "number" includes "integer", as in JSON Schema.
ALL_TYPES = frozenset({"string", "number", "boolean", "object", "array", "null"})


class Node(dict[str, Any]):
    """A schema's keywords. Values that are schemas are nodes or booleans themselves.

    `type` is a list; `const` is an `enum` of one; `patterns` are all expressions that a text must match; `items` are
    those behind `prefixItems`; `dependent` maps a property's name to what holds for the object that has it; bounds
    are inclusive; `$ref` is a pointer from the document's root.

    Args:
        at: the JSON pointer of the schema in the document.
        base: the base URI that its references start from.
        keywords: the node's first keywords.
    """

    def __init__(self, at: str, base: str, keywords: dict[str, Any] | None = None):
        super().__init__(keywords or {})
        self.at = at
        self.base = base

    def types(self) -> frozenset[str]:
        """The types that this node's own `type` and `enum` leave."""
        types = ALL_TYPES if "type" not in self else frozenset(self["type"])
        if "enum" in self:
            types = meet(types, frozenset(type_of(value) for value in self["enum"]))
        return types - {"integer"} if "number" in types else types

    def limit(self, within: frozenset[str] | None) -> None:
        """Leave only types that are in `within` too; None leaves all."""
        if within is not None and within != ALL_TYPES:
            types = meet(self.types(), within)
            if types != self.types() or "type" not in self:
                self["type"] = sorted(types)
        if "enum" in self:
            types = self.types()
            self["enum"] = [value for value in self["enum"] if meet(types, frozenset({type_of(value)}))]

    def choose(self, values: list[Any]) -> None:
        """Allow these values only, of those that were allowed so far."""
        if "enum" in self:
            values = [value for value in self["enum"] if any(same(value, other) for other in values)]
        self["enum"] = values


def meet(a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
    """The types that values of both sets of types can have."""
    common = a & b
    if ("integer" in a and "number" in b) or ("integer" in b and "number" in a):
        common |= {"integer"}
    return common - {"integer"} if "number" in common else common


def type_of(value: Any) -> str:
    """The type of a JSON value; "integer" for numbers without a fraction, however they are written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def common(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two lists of JSON values share one."""
    others = list(b)
    texts = {value for value in others if isinstance(value, str)}
    rest = [value for value in others if not isinstance(value, str)]
    return any(value in texts if isinstance(value, str) else any(same(value, other) for other in rest) for value in a)
