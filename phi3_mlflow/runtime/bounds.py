"""What is known of a rewritten schema before llguidance compiles it: whether an answer can end, and the cost.

Knows the keywords that rewriting leaves; nothing of documents and drafts.
"""

from collections import defaultdict
from math import lcm
from typing import Any

from .references import escape

# Where schemas hold together, llguidance multiplies their alternatives out: what a million of them and their parts take
# stays below a second.
MAX_WORK = 1_000_000
# Time doubles with each expression that one text must match.
MAX_TOGETHER = 8
# Definitions within definitions: llguidance follows them on its stack.
MAX_NESTED = 100
# What a document may hold in all, so that compiling stays below a second.
LIMITS = {
    "patterns and formats": 500,
    "lengths of texts and bounds of numbers": 2_000,
    "values as `enum` or `const`": 30_000,
    "parts of objects and arrays as `enum` or `const`": 5_000,
    # Compiling an object takes time by the square of its properties, and more by that of its patterns.
    "counts of items (`minItems`, `maxItems`)": 300,
    "pairs of properties of one object": 1_000_000,
    "pairs of patterns of one object": 4_000,
}
MAX_REMAINDERS = 10_000

_POINT = 10_000  # multiples have at most four decimals

_SIMPLE = {
    "properties", "required", "items", "prefixItems", "additionalProperties", "patternProperties", "minimum",
    "maximum", "pattern", "minLength", "maxLength", "format", "multipleOf", "minItems", "maxItems", "minProperties",
    "maxProperties",
}  # fmt: skip
# How many expressions a text must match, and the same for the parts of an object or array by name; "*" is any other.
Tree = tuple[int, dict[str, Any]]


def too_costly(document: dict[str, Any]) -> str | None:
    """Why compiling a rewritten document would take too long; None where it does not."""
    cost = _Cost(document)
    cost.size(document)
    if cost.deepest > MAX_NESTED:
        return f"has references within what references lead to, more than {MAX_NESTED} deep"
    if cost.work > MAX_WORK:
        return "combines schemas (`allOf`, or keywords beside `$ref`, `anyOf`, `oneOf`) with too many alternatives"
    for what, limit in LIMITS.items():
        if cost.counts[what] > limit:
            return f"has {cost.counts[what]} {what}; at most {limit} can be enforced"
    if cost.work and lcm(*cost.multiples) > MAX_REMAINDERS * _POINT:
        return f"combines schemas whose `multipleOf` have a common multiple above {MAX_REMAINDERS}"
    if cost.counts["patterns and formats"] > MAX_TOGETHER:
        together = cost.together(document)
        most = max(cost.most, _worst(together, {}))
        if most > MAX_TOGETHER:
            return (
                f"combines schemas (`allOf`, or keywords beside `$ref`, `anyOf`, `oneOf`) so that one text must match "
                f"{most} patterns and formats; at most {MAX_TOGETHER} can be combined"
            )
    return None


class _Cost:
    """One walk each over a document for its size and for what its texts must match."""

    def __init__(self, document: dict[str, Any]):
        self.work = 0
        self.counts = dict.fromkeys(LIMITS, 0)
        self.multiples: set[int] = set()
        self.most = 0
        self.deepest = 0
        self._depth = 0
        self._definitions = document.get("$defs", {})
        self._sizes: dict[str, tuple[int, int]] = {}
        self._trees: dict[str, Tree] = {}

    def size(self, schema: Any) -> tuple[int, int]:
        """How many alternatives a schema has, and of how many parts they are once written out."""
        if isinstance(schema, bool):
            return 1, 1
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference not in self._sizes:
                self._sizes[reference] = 1, 1
                self._depth += 1
                self.deepest = max(self.deepest, self._depth)
                if self._depth <= MAX_NESTED:
                    self._sizes[reference] = self.size(self._definitions[reference.removeprefix("#/$defs/")])
                self._depth -= 1
            return self._sizes[reference]
        self._count(schema)
        own = 1 + len(schema.get("enum", [])) + sum(self.size(child)[1] for _, child in _parts(schema))
        together = []
        if "enum" in schema or "type" in schema or not _SIMPLE.isdisjoint(schema):
            kinds = schema.get("type", "any" if "enum" in schema else [""] * 6)
            together.append((len(kinds) if isinstance(kinds, list) else 1, own))
        together += [self.size(child) for child in schema.get("allOf", [])]
        if "anyOf" in schema:
            branches = [self.size(child) for child in schema["anyOf"]]
            together.append((sum(count for count, _ in branches), sum(parts for _, parts in branches)))
        alternatives = 1
        for count, _ in together:
            alternatives = min(alternatives * count, MAX_WORK)
        size = min(sum(parts * (alternatives // max(count, 1)) for count, parts in together), 2 * MAX_WORK)
        if len(together) > 1:
            self.work += size
        return alternatives, size

    def _count(self, schema: dict[str, Any]) -> None:
        names, patterns = len(schema.get("properties", {})), len(schema.get("patternProperties", {}))
        values = schema.get("enum", [])
        found = (
            ("pattern" in schema) + ("format" in schema) + patterns,
            bool(schema.keys() & {"minLength", "maxLength"}) + bool(schema.keys() & {"minimum", "maximum"}),
            len(values),
            sum(_values(value) for value in values if isinstance(value, (dict, list))),
            bool(schema.keys() & {"minItems", "maxItems"}),
            names**2,
            patterns**2,
        )
        for what, number in zip(LIMITS, found, strict=True):
            self.counts[what] += number
        if "multipleOf" in schema:
            self.multiples.add(int(schema["multipleOf"] * _POINT))

    def together(self, schema: Any) -> Tree:
        """What must be matched by the texts within a value that meets the schema."""
        if isinstance(schema, bool):
            return 0, {}
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference not in self._trees:
                self._trees[reference] = 0, {}
                self._trees[reference] = self.together(self._definitions[reference.removeprefix("#/$defs/")])
            return self._trees[reference]
        below: dict[str, Any] = {}
        for name, child in _parts(schema):
            tree = self.together(child)
            below[name] = _merged(below[name], tree, max) if name in below else tree
        made: Tree = ("pattern" in schema) + ("format" in schema), below
        for child in schema.get("allOf", []):
            made = _merged(made, self.together(child), int.__add__)
        if "anyOf" in schema:
            first, *rest = [self.together(child) for child in schema["anyOf"]]
            for tree in rest:
                first = _merged(first, tree, max)
            made = _merged(made, first, int.__add__)
        return made


def _parts(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    """The schemas for parts of a value, each with the part's name; items are counted from 0."""
    parts = list(schema.get("properties", {}).items())
    parts += [("*", child) for child in schema.get("patternProperties", {}).values()]
    parts += [(str(index), child) for index, child in enumerate(schema.get("prefixItems", []))]
    return parts + [("*", schema[keyword]) for keyword in ("items", "additionalProperties") if keyword in schema]


def _values(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_values(child) for child in children)


def _merged(a: Tree, b: Tree, join: Any) -> Tree:
    """Two trees as one, counts added where both hold, or the larger where either does."""
    if not a[0] and not a[1]:
        return b
    if not b[0] and not b[1]:
        return a
    names = dict.fromkeys([*a[1], *b[1]])
    nothing: Tree = 0, {}
    return join(a[0], b[0]), {name: _merged(a[1].get(name, nothing), b[1].get(name, nothing), join) for name in names}


def _worst(tree: Tree, seen: dict[int, int]) -> int:
    """The most that one text must match, where what holds for any name holds for each of the others as well."""
    if id(tree) not in seen:
        seen[id(tree)] = 0
        free = tree[1].get("*")
        below = [
            _worst(child if free is None or name == "*" else _merged(child, free, int.__add__), {} if free else seen)
            for name, child in tree[1].items()
        ]
        seen[id(tree)] = max([tree[0], *below])
    return seen[id(tree)]


def endless_at(document: dict[str, Any]) -> str | None:
    """The pointer of a schema that no finite value meets, as far as references decide it; the root or a definition.

    The least fixed point of what can be completed.
    """
    schemas: dict[str, Any] = {}
    _collect(document, "#", schemas)
    unmet = {}
    waiting = defaultdict(list)
    for pointer, schema in schemas.items():
        needs = [] if isinstance(schema, bool) else _needs(schema, pointer)
        unmet[pointer] = set(range(len(needs)))
        for index, alternatives in enumerate(needs):
            for target in alternatives:
                waiting[target].append((pointer, index))
    ready = [pointer for pointer, open_needs in unmet.items() if not open_needs]
    done = set()
    while ready:
        target = ready.pop()
        done.add(target)
        for pointer, index in waiting[target]:
            if index in unmet[pointer]:
                unmet[pointer].remove(index)
                if not unmet[pointer]:
                    ready.append(pointer)
    endless = [pointer for pointer in schemas if pointer not in done]
    named = [pointer for pointer in endless if pointer.count("/") == 2 and pointer.startswith("#/$defs/")]
    return None if not endless else "#" if "#" in endless or not named else named[0]


def _collect(schema: Any, pointer: str, found: dict[str, Any]) -> None:
    found[pointer] = schema
    if isinstance(schema, bool):
        return
    for keyword in ("$defs", "properties", "patternProperties"):
        for name, child in schema.get(keyword, {}).items():
            _collect(child, f"{pointer}/{keyword}/{escape(name)}", found)
    for keyword in ("anyOf", "allOf", "prefixItems"):
        for index, child in enumerate(schema.get(keyword, [])):
            _collect(child, f"{pointer}/{keyword}/{index}", found)
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            _collect(schema[keyword], f"{pointer}/{keyword}", found)


def _needs(schema: dict[str, Any], pointer: str) -> list[list[str]]:
    """What a value of this schema cannot do without: pointers, one of each list."""
    needs = [[schema["$ref"]]] if "$ref" in schema else []
    needs += [[f"{pointer}/allOf/{index}"] for index in range(len(schema.get("allOf", [])))]
    types = schema.get("type", "object")
    if "object" in types and len(types) in (1, len("object")) and isinstance(types, (str, list)):
        named = schema.get("properties", {})
        needs += [[f"{pointer}/properties/{escape(name)}"] for name in schema.get("required", []) if name in named]
    fewest, prefix = schema.get("minItems", 0), len(schema.get("prefixItems", []))
    needs += [[f"{pointer}/prefixItems/{index}"] for index in range(min(fewest, prefix))]
    if "items" in schema and fewest > prefix:
        needs.append([f"{pointer}/items"])
    if "anyOf" in schema:
        needs.append([f"{pointer}/anyOf/{index}" for index in range(len(schema["anyOf"]))])
    return needs
