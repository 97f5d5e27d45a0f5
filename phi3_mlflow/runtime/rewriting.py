"""Schemas in the keywords that llguidance 1.9 enforces exactly, from nodes that may use all of them.

Knows what llguidance can and cannot do; reads no document.
"""

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

from .alternatives import Inexact, Logic
from .bounds import endless_at, too_costly
from .errors import InvalidRequest
from .nodes import ALL_TYPES, Node, meet

# Schemas after rewriting; choices among properties that counts leave; schemas within schemas for the same value.
MAX_SCHEMAS = 6_000
MAX_SUBSETS = 64
MAX_WITHIN = 48
# llguidance keeps one state for each remainder of a `multipleOf`.
MAX_REMAINDERS = 20_000


_APPLICATORS = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependent"}


class Rewriter:
    """Rewrites one document.

    Args:
        target: gives the node of the schema at a pointer, a `$ref`'s.
        field: the request's field that errors name, with a pointer.
    """

    def __init__(self, target: Callable[[str], Node | bool], field: str):
        self._target = target
        self._field = field
        self._logic = Logic(target)
        # By pointer, or by the node's identity where it stands within what was written in place of a reference.
        self._names: dict[str | int, str] = {}
        self._waiting: list[tuple[str, Node | bool]] = []
        self._inlined = 0
        self._count = 0
        self._remainders = 0

    def _error(self, pointer: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._field}{pointer}", problem)

    def document(self, root: Node | bool) -> dict[str, Any]:
        """The whole document: the root, and under `$defs` what references reach from there."""
        made = self._schema(root)
        definitions: dict[str, Any] = {}
        origins = {}
        while self._waiting:
            name, node = self._waiting.pop()
            definitions[name] = self._schema(node)
            origins[f"#/$defs/{name}"] = "#" if isinstance(node, bool) else node.at
        if isinstance(made, bool):
            made = {} if made else {"not": {}}
        if definitions:
            made = {"$defs": definitions, **made}
        endless = endless_at(made)
        if endless is not None:
            raise self._error(origins.get(endless, "#"), "requires itself, so no answer could ever end")
        problem = too_costly(made)
        if problem:
            raise self._error("#", problem)
        return made

    def _schema(self, node: Node | bool, given: tuple[Node, ...] = ()) -> dict[str, Any] | bool:
        if isinstance(node, bool):
            return node
        self._count += 1
        if self._count > MAX_SCHEMAS:
            raise self._error(node.at, f"and the rest make more than {MAX_SCHEMAS} schemas once written out")
        types = node.types()
        if not types:
            return False
        made: dict[str, Any] = {}
        if "enum" in node:
            made["enum"] = node["enum"]
        elif "type" in node:
            made["type"] = node["type"][0] if len(node["type"]) == 1 else node["type"]
        for keyword in ("minimum", "maximum", "minLength", "maxLength", "format", "maxItems", "minItems"):
            if keyword in node:
                made[keyword] = node[keyword]
        if "multipleOf" in node:
            made["multipleOf"] = node["multipleOf"]
            self._remainders += int(max(node["multipleOf"], 1))
            if self._remainders > MAX_REMAINDERS:
                raise self._error(f"{node.at}/multipleOf", f"and those before it add up to more than {MAX_REMAINDERS}")
        also: list[Node | bool] = []
        if "patterns" in node:
            made["pattern"], *more = node["patterns"]
            also += [Node(node.at, node.base, {"type": ["string"], "patterns": [pattern]}) for pattern in more]
        if types & {"array"}:
            self._array(node, made)
        if types & {"object"}:
            self._object(node, made, also)
        return self._combine(node, made, also, given)

    def _array(self, node: Node, made: dict[str, Any]) -> None:
        if "prefixItems" in node:
            made["prefixItems"] = [self._child(child) for child in node["prefixItems"]]
        if "items" in node:
            made["items"] = self._child(node["items"])
        if "uniqueItems" in node:
            most = node.get("maxItems", 2)
            if made.get("items") is False:
                most = min(most, len(made.get("prefixItems", [])))
            if most > 1:
                raise self._error(
                    f"{node.at}/uniqueItems", "is not supported: an answer cannot be held to items that differ"
                )

    def _object(self, node: Node, made: dict[str, Any], also: list[Node | bool]) -> None:
        for keyword in ("properties", "patternProperties"):
            if keyword in node:
                made[keyword] = {name: self._child(child) for name, child in node[keyword].items()}
        if "additionalProperties" in node:
            made["additionalProperties"] = self._child(node["additionalProperties"])
        if node.get("required"):
            made["required"] = node["required"]
        if "propertyNames" in node:
            also += self._names_of(node)
        if "minProperties" in node or "maxProperties" in node:
            also += self._counted(node, made)
        for name, then in node.get("dependent", {}).items():
            if name in node.get("required", []):
                also.append(then)
                continue
            absent = Node(node.at, node.base, {"type": sorted(ALL_TYPES), "properties": {name: False}})
            if isinstance(then, Node) and then.keys() <= {"type", "required"} and "required" in then:
                present = Node(then.at, then.base, {"type": ["object"], "required": [name, *then["required"]]})
            else:
                named = Node(node.at, node.base, {"type": ["object"], "required": [name]})
                present = Node(node.at, node.base, {"allOf": [named, then]})
            if then is not True:
                also.append(Node(node.at, node.base, {"anyOf": [absent, present]}))

    def _names_of(self, node: Node) -> list[Node | bool]:
        """`propertyNames` as properties that are allowed."""
        names = node["propertyNames"]
        if isinstance(names, bool):
            return [] if names else [Node(node.at, node.base, {"maxProperties": 0})]
        if "string" not in names.types():
            return [Node(node.at, node.base, {"maxProperties": 0})]
        made = []
        closed = {"type": sorted(ALL_TYPES), "additionalProperties": False}
        for part in self._logic.parts(names):
            for keyword in part.keys() - {"type", "enum", "patterns", "minLength", "maxLength", "allOf", "$ref"}:
                raise self._error(names.at, f"is not supported with `{keyword}`")
            if "enum" in part:
                allowed = {name: True for name in part["enum"] if isinstance(name, str)}
                made.append(Node(names.at, names.base, {**closed, "properties": allowed}))
            patterns = list(part.get("patterns", []))
            if "minLength" in part or "maxLength" in part:
                patterns.append(f"^(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})$")
            made += [Node(names.at, names.base, {**closed, "patternProperties": {p: True}}) for p in patterns]
        if sum("patternProperties" in part for part in [*made, node]) > 1:
            raise self._error(
                names.at,
                "is not supported with more than one of `pattern`, `minLength`, `maxLength`, and patterns of names",
            )
        return list(made)

    def _counted(self, node: Node, made: dict[str, Any]) -> list[Node | bool]:
        """`minProperties` and `maxProperties`, where llguidance counts: with nothing optional beside free names.

        Free names may repeat in an answer, so that more than one of them cannot be asked for.
        """
        required = set(node.get("required", []))
        optional = [
            name for name, child in made.get("properties", {}).items() if name not in required and child is not False
        ]
        free = made.get("additionalProperties") is not False or any(
            child is not False for child in made.get("patternProperties", {}).values()
        )
        fewest, most = node.get("minProperties", 0), node.get("maxProperties")
        if fewest <= len(required):
            fewest = 0
        if most is not None and not free and most >= len(required) + len(optional):
            most = None
        if not fewest and most is None:
            return []
        bounds = {"minProperties": fewest or None, "maxProperties": most}
        bounds = {keyword: value for keyword, value in bounds.items() if value is not None}
        if not free and fewest > len(required) + len(optional):
            return [False]
        if fewest > len(required) + 1 and free:
            raise self._error(
                f"{node.at}/minProperties",
                f"is {fewest}; with free names at most 1, or the number of `required` names, can be enforced",
            )
        if not optional or (not free and fewest <= 1 and most in (None, 1) and not required):
            made.update(bounds)
            return []
        if fewest and most is None and fewest == len(required) + 1:
            branches: list[dict[str, Any]] = [{"required": [name]} for name in optional]
            if free:
                branches.append({"properties": dict.fromkeys(optional, False), "minProperties": fewest})
        else:
            branches = self._subsets(node, optional, len(required), fewest, most, free)
        if len(branches) > MAX_SUBSETS:
            keyword = "minProperties" if fewest else "maxProperties"
            raise self._error(
                f"{node.at}/{keyword}",
                f"leaves {len(branches)} choices among {len(optional)} optional properties; at most {MAX_SUBSETS} "
                "can be enforced",
            )
        types = {"type": ["object"]}
        options: list[Node | bool] = [Node(node.at, node.base, {**types, **branch}) for branch in branches]
        if node.types() != {"object"}:
            options.append(Node(node.at, node.base, {"type": sorted(node.types() - {"object"})}))
        return [Node(node.at, node.base, {"anyOf": options})]

    def _subsets(
        self, node: Node, optional: list[str], required: int, fewest: int, most: int | None, free: bool
    ) -> list[dict[str, Any]]:
        """One branch for each choice of optional properties that the counts allow."""
        if len(optional) > 12:
            return [{}] * (MAX_SUBSETS + 1)
        low = 0 if free else max(0, fewest - required)
        high = len(optional) if most is None else min(len(optional), most - required)
        branches = []
        for chosen in chain.from_iterable(combinations(optional, size) for size in range(low, high + 1)):
            branch: dict[str, Any] = {"properties": {name: False for name in optional if name not in chosen}}
            branch["required"] = list(chosen)
            if free and fewest > required + len(chosen):
                branch["minProperties"] = fewest
            if free and most is not None:
                branch["maxProperties"] = most
            branches.append(branch)
        return branches

    def _combine(
        self, node: Node, made: dict[str, Any], also: list[Node | bool], given: tuple[Node, ...]
    ) -> dict[str, Any]:
        """Add what else holds for the same value: `$ref`, `allOf`, `anyOf`, and what becomes one of them.

        Args:
            node: the schema.
            made: what it says by itself, rewritten.
            also: nodes that hold as well, beside those the node names.
            given: the nodes around it that judge the same value.
        """
        also += node.get("allOf", [])
        choices = [node["anyOf"]] if "anyOf" in node else []
        try:
            if "oneOf" in node:
                choices.append(self._logic.exclusive(node, list(given)))
            if "not" in node:
                also.append(self._logic.negation(node["not"], node.types()))
            if node.get("then", True) is not True or node.get("else", True) is not True:
                condition, then, otherwise = node["if"], node.get("then", True), node.get("else", True)
                contrary = self._logic.negation(condition, node.types())
                choices.append([_both(node, condition, then), _both(node, contrary, otherwise)])
        except Inexact as problem:
            raise self._error(problem.at, f"is not supported here: {problem}") from None
        choices += [part["anyOf"] for part in also if isinstance(part, Node) and part.keys() == {"anyOf"}]
        also = [part for part in also if part is not True and not (isinstance(part, Node) and part.keys() == {"anyOf"})]
        kinds = [also[i : i + 1] for i in range(len(also))] + choices
        if made.keys() == {"type"} and any(self._within(branches, node.types()) for branches in kinds):
            made = {}
        within = (*given, node)
        if "$ref" in node:
            if made or also or choices:
                also.insert(0, Node(node.at, node.base, {"$ref": node["$ref"]}))
            else:
                return self._reference(*self._end(node["$ref"]))
        together = bool(made) + len(also) + len(choices) > 1
        combined: dict[str, Any] = {}
        several = [self._held(part, within, together) for part in also]
        for choice in choices:
            branches = [self._held(branch, within, together) for branch in choice]
            if "anyOf" in combined:
                several.append({"anyOf": branches})
            else:
                combined["anyOf"] = branches
        if several:
            combined["allOf"] = several
        # llguidance takes properties in the order in which it meets them.
        keywords = list(node)
        first = [keyword for keyword in keywords if keyword in ("properties", "$ref", "allOf", "anyOf", "oneOf")]
        return {**combined, **made} if first and first[0] != "properties" else {**made, **combined}

    def _within(self, branches: list[Node | bool], types: frozenset[str]) -> bool:
        """Whether all branches are for these types alone."""
        for branch in branches:
            kinds = ALL_TYPES
            for part in self._logic.parts(branch):
                kinds = meet(kinds, part.types())
            if branch is True or meet(kinds, types) != kinds:
                return False
        return True

    def _held(self, node: Node | bool, given: tuple[Node, ...], together: bool) -> dict[str, Any] | bool:
        """A schema that holds together with others: in place of a reference what it leads to.

        llguidance intersects what references lead to only where it has read all of that before.
        """
        if len(given) > MAX_WITHIN:
            at = given[-1].at
            raise self._error(
                at, f"combines schemas more than {MAX_WITHIN} deep, or requires itself, so no answer could ever end"
            )
        if not (together and isinstance(node, Node) and node.keys() == {"$ref"}):
            return self._schema(node, given)
        self._inlined += 1
        made = self._held(self._end(node["$ref"])[1], (*given, node), together)
        self._inlined -= 1
        return made

    def _end(self, pointer: str) -> tuple[str, Node | bool]:
        """Where a chain of references ends; one that runs in a circle ends where it closes."""
        seen = {pointer}
        node = self._target(pointer)
        while isinstance(node, Node) and node.keys() == {"$ref"} and node["$ref"] not in seen:
            pointer = node["$ref"]
            seen.add(pointer)
            node = self._target(pointer)
        return pointer, node

    def _reference(self, key: str | int, node: Node | bool) -> dict[str, Any]:
        """A reference to a node's definition, which is written once."""
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self._waiting.append((self._names[key], node))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _child(self, node: Node | bool) -> dict[str, Any] | bool:
        """A schema for a part of the value: by reference where it would otherwise be written for every copy."""
        if self._inlined and isinstance(node, Node) and not node.keys().isdisjoint(_APPLICATORS):
            return self._schema(node) if node.keys() == {"$ref"} else self._reference(id(node), node)
        return self._schema(node)


def _both(node: Node, a: Node | bool, b: Node | bool) -> Node | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return Node(node.at, node.base, {"allOf": [a, b]})
