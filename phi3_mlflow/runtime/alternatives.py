"""What JSON Schema says with `not`, `if` and `oneOf`, said with `anyOf`: contraries, and branches kept apart.

Knows the logic of keywords; nothing of llguidance.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

from .nodes import ALL_TYPES, Node, common, meet, type_of
from .numbers import close_bounds
from .patterns import literal_start, none_of

Target = Callable[[str], Node | bool]
# References followed into each other; pairs of schemas compared in one document.
MAX_DEPTH = 6
MAX_COMPARISONS = 10_000


class Inexact(ValueError):
    """A schema that cannot be said otherwise: the pointer of what stands in the way, and why."""

    def __init__(self, at: str, problem: str):
        super().__init__(problem)
        self.at = at


class Logic:
    """The logic of one document's schemas.

    Args:
        target: gives the node that a `$ref` leads to.
    """

    def __init__(self, target: Target):
        self._target = target
        self._comparisons = 0

    def negation(self, node: Node | bool, within: frozenset[str] = ALL_TYPES, depth: int = 0) -> Node | bool:
        """A node for exactly the values, of the types in `within`, that `node` does not allow.

        Raises:
            Inexact: a keyword whose contrary no keywords express (`pattern`, `format`, `items`, ...).
        """
        if isinstance(node, bool):
            return not node
        if depth > MAX_DEPTH:
            raise Inexact(node.at, "its schemas nest too deep to be negated")
        return any_of(node, self._contraries(node, within, depth))

    def _contraries(self, node: Node, within: frozenset[str], depth: int) -> Iterator[Node | bool]:
        others = _other_types(node, within)
        if others:
            yield _typed(node, *others)
        for keyword, value in node.items():
            if keyword == "type" or value is True:
                continue
            if keyword == "enum":
                yield from _other_values(node, value, within)
            elif keyword in ("minimum", "maximum"):
                bound = "exclusiveMaximum" if keyword == "minimum" else "exclusiveMinimum"
                yield _typed(node, "number", **{bound: value})
            elif keyword in _COUNTS:
                kind, contrary, step = _COUNTS[keyword]
                if value + step >= 0:
                    yield _typed(node, kind, **{contrary: value + step})
            elif keyword == "required":
                for name in value:
                    yield _typed(node, "object", properties={name: False})
            elif keyword == "properties":
                for name, child in value.items():
                    other = self.negation(child, depth=depth + 1)
                    if other is not False:
                        yield _typed(node, "object", properties={name: other}, required=[name])
            elif keyword == "prefixItems":
                for index, child in enumerate(value):
                    other = self.negation(child, depth=depth + 1)
                    if other is not False:
                        yield _typed(node, "array", prefixItems=[True] * index + [other], minItems=index + 1)
            elif keyword == "$ref":
                yield self.negation(self._target(value), within, depth + 1)
            elif keyword == "allOf":
                for child in value:
                    yield self.negation(child, within, depth + 1)
            elif keyword == "anyOf":
                yield Node(node.at, node.base, {"allOf": [self.negation(child, within, depth + 1) for child in value]})
            elif keyword == "not":
                yield value
            else:
                raise Inexact(node.at, f"the contrary of `{_SAID.get(keyword, keyword)}` cannot be expressed")

    def exclusive(self, node: Node, given: list[Node]) -> list[Node | bool]:
        """The branches of a node's `oneOf`, rewritten so that a value meets at most one: an `anyOf` of them.

        Where two branches may hold together, each is held to what the other does not allow; where that cannot be said
        exactly, to having a property or an item that tells them apart, or to lacking one that the other requires.

        Args:
            node: the schema that the `oneOf` stands in.
            given: nodes that the value meets as well.

        Raises:
            Inexact: two branches may both hold, and nothing can tell them apart.
        """
        branches: list[Node | bool] = node["oneOf"]
        given = [part for around in [node, *given] for part in self.parts(around)]
        made: list[Node | bool] = []
        for index, branch in enumerate(branches):
            rest: list[Node | bool] = []
            for other_index, other in enumerate(branches):
                if index != other_index and not self.disjoint(branch, other, given):
                    try:
                        rest.append(self._without(branch, other, node, given))
                    except Inexact as problem:
                        raise Inexact(
                            f"{node.at}/oneOf",
                            f"its branches {index} and {other_index} may both hold, and {problem}",
                        ) from None
            made.append(Node(f"{node.at}/oneOf/{index}", node.base, {"allOf": [branch, *rest]}) if rest else branch)
        return made

    def _without(self, branch: Node | bool, other: Node | bool, node: Node, given: list[Node]) -> Node | bool:
        """A node that no value meets together with both branches: what `other` does not allow, or a part of that."""
        try:
            return self.negation(other, node.types())
        except Inexact as problem:
            if isinstance(branch, bool) or isinstance(other, bool):
                raise
            mine, others = self.parts(branch), self.parts(other)
            names = {name for part in mine + others for name in part.get("properties", {})}
            marks = [_typed(node, "object", required=[name]) for name in sorted(names)]
            for mark in [_typed(node, "array", minItems=1), *marks]:
                both = Node(node.at, node.base, {"allOf": [branch, mark]})
                if self._admits(branch, mark["type"][0]) and self.disjoint(both, other, given):
                    return mark
            required = {name for part in others for name in part.get("required", [])}
            if not required:
                raise problem
            absent = [_typed(other, "object", properties={name: False}) for name in sorted(required)]
            types = _other_types(other, node.types())
            return any_of(other, iter([*([_typed(other, *types)] if types else []), *absent]))

    def _admits(self, branch: Node, kind: str) -> bool:
        """Whether a branch is for values of this type alone."""
        types = ALL_TYPES
        for part in self.parts(branch):
            types = meet(types, part.types())
        return types == {kind}

    def parts(self, node: Node | bool) -> list[Node]:
        """The nodes that all hold where this does: itself, its `$ref`'s target, its `allOf`, and theirs."""
        found: dict[int, Node] = {}
        waiting = [node]
        while waiting:
            part = waiting.pop()
            if isinstance(part, Node) and id(part) not in found:
                found[id(part)] = part
                waiting += part.get("allOf", [])
                if "$ref" in part:
                    waiting.append(self._target(part["$ref"]))
        return list(found.values())

    def disjoint(self, a: Node | bool, b: Node | bool, given: Iterable[Node] = (), depth: int = 0) -> bool:
        """Whether it is certain that no value meets a, b and all that is given; False says nothing."""
        if a is False or b is False:
            return True
        if isinstance(a, bool) or isinstance(b, bool) or depth > MAX_DEPTH:
            return False
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            raise Inexact(a.at, f"telling branches apart takes more than {MAX_COMPARISONS} comparisons")
        mine, others = self.parts(a), self.parts(b)
        left, right = [*mine, *given], [*others, *given]
        types = ALL_TYPES
        for part in left + others:
            types = meet(types, part.types())
        if all(self._apart(kind, left, right, depth) for kind in types):
            return True
        for here, other in ((mine, b), (others, a)):
            for part in here:
                for word in ("anyOf", "oneOf"):
                    if word in part and all(self.disjoint(branch, other, given, depth + 1) for branch in part[word]):
                        return True
        return False

    def _apart(self, kind: str, left: list[Node], right: list[Node], depth: int) -> bool:
        """Whether no value of one type meets all of `left` and all of `right`."""
        for part in left + right:
            if "enum" in part and not any(
                meet(frozenset({kind}), frozenset({type_of(value)})) for value in part["enum"]
            ):
                return True
        for a in left:
            for b in right:
                if "enum" in a and "enum" in b and not common(a["enum"], b["enum"]):
                    return True
                if _ranges_apart(kind, a, b) or _ranges_apart(kind, b, a):
                    return True
                if kind == "string" and (_texts_apart(a, b) or _texts_apart(b, a)):
                    return True
        if kind == "array" and self._items_apart(left, right, depth):
            return True
        if kind == "object":
            required = {name for part in left + right for name in part.get("required", [])}
            for name in required:
                mine = [child for part in left if (child := _property(part, name)) is not True]
                others = [child for part in right if (child := _property(part, name)) is not True]
                if False in mine or False in others:
                    return True
                if any(self.disjoint(x, y, depth=depth + 1) for x in mine for y in others):
                    return True
        return False

    def _items_apart(self, left: list[Node], right: list[Node], depth: int) -> bool:
        """Whether some item that there must be cannot meet both."""
        fewest = max(part.get("minItems", 0) for part in left + right)
        length = 1 + max(len(part.get("prefixItems", [])) for part in left + right)
        for index in range(min(fewest, length)):
            mine = [item for part in left if (item := _item(part, index)) is not True]
            others = [item for part in right if (item := _item(part, index)) is not True]
            if False in mine or False in others:
                return True
            if any(self.disjoint(x, y, depth=depth + 1) for x in mine for y in others):
                return True
        return False


# Characters of texts that `not` excludes: each is a level of an expression.
MAX_EXCLUDED, MAX_EXCLUDED_TOGETHER = 200, 20_000
_SAID = {"patterns": "pattern", "dependent": "dependencies"}
_COUNTS = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


def _other_values(node: Node, values: list[Any], within: frozenset[str]) -> Iterator[Node]:
    """Nodes for the values that are none of these, of the types that these have."""
    kinds: dict[str, list[Any]] = {}
    for value in values:
        kinds.setdefault("number" if type_of(value) == "integer" else type_of(value), []).append(value)
    if kinds.keys() & {"object", "array"}:
        raise Inexact(node.at, "only texts, numbers, true, false and null can be excluded")
    if "string" in kinds:
        sizes = [len(text) for text in kinds["string"]]
        if max(sizes) > MAX_EXCLUDED or sum(sizes) > MAX_EXCLUDED_TOGETHER:
            raise Inexact(
                node.at,
                f"texts of at most {MAX_EXCLUDED} characters, {MAX_EXCLUDED_TOGETHER} together, can be excluded",
            )
        yield _typed(node, "string", patterns=[none_of(kinds["string"])])
    if "boolean" in kinds and len(set(kinds["boolean"])) == 1:
        yield Node(node.at, node.base, {"enum": [not kinds["boolean"][0]]})
    if "number" in kinds:
        number = "number" if "number" in within else "integer"
        numbers = sorted(kinds["number"])
        yield _typed(node, number, exclusiveMaximum=numbers[0])
        for low, high in pairwise(numbers):
            yield _typed(node, number, exclusiveMinimum=low, exclusiveMaximum=high)
        yield _typed(node, number, exclusiveMinimum=numbers[-1])


def _typed(node: Node, *types: str, **keywords: Any) -> Node:
    made = Node(node.at, node.base, {"type": sorted(types), **keywords})
    if close_bounds(made):
        raise Inexact(node.at, "its bounds are too large to be negated")
    return made


def any_of(node: Node, branches: Iterator[Node | bool]) -> Node | bool:
    """A node that holds where one of the branches does, for the schema that `node` was read from."""
    left = [branch for branch in branches if branch is not False]
    if not left or True in left:
        return bool(left)
    return left[0] if len(left) == 1 else Node(node.at, node.base, {"anyOf": left})


def _other_types(node: Node, within: frozenset[str]) -> frozenset[str]:
    """The types in `within` that a node does not allow."""
    types = node.types()
    others = within - types
    if "number" in types:
        others -= {"integer"}
    if "integer" in types and "number" in within:
        if "enum" not in node:
            raise Inexact(node.at, "numbers cannot be held to having a fraction")
        others -= {"number"}
    return others


_RANGES = {
    "string": ("minLength", "maxLength"),
    "number": ("minimum", "maximum"),
    "integer": ("minimum", "maximum"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def _ranges_apart(kind: str, a: Node, b: Node) -> bool:
    low, high = _RANGES.get(kind, ("", ""))
    if low == "minimum" and "enum" in a:
        numbers = [value for value in a["enum"] if type_of(value) in ("integer", "number")]
        return all(value < b.get(low, value) or value > b.get(high, value) for value in numbers)
    if low not in a:
        return False
    if high in b:
        return bool(a[low] > b[high])
    if kind == "object":
        return b.get("additionalProperties") is False and not b.get("patternProperties") and a[low] > len(
            b.get("properties", {})
        )  # fmt: skip
    return False


def _texts_apart(a: Node, b: Node) -> bool:
    starts = [start for pattern in a.get("patterns", []) if (start := literal_start(pattern))]
    if not starts:
        return False
    if "enum" in b:
        return all(any(not text.startswith(start) for start in starts) for text in b["enum"] if isinstance(text, str))
    others = [start for pattern in b.get("patterns", []) if (start := literal_start(pattern))]
    return any(not (x.startswith(y) or y.startswith(x)) for x in starts for y in others)


def _item(node: Node, index: int) -> Node | bool:
    prefix = node.get("prefixItems", [])
    return prefix[index] if index < len(prefix) else node.get("items", True)


def _property(node: Node, name: str) -> Node | bool:
    """What a node asks of one property; True where patterns may ask for something else."""
    if name in node.get("properties", {}):
        return node["properties"][name]
    return True if node.get("patternProperties") else node.get("additionalProperties", True)
