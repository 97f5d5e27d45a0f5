"""Which JSON Schemas an answer can be held to: every keyword is enforced, says nothing, or is refused by name.

Knows nothing about tokens, masks or llguidance's grammar; it says what llguidance 1.9 may be given.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from . import keywords
from .errors import InvalidRequest, shorten
from .nodes import Node
from .numbers import LARGEST, close_bounds, numerator, unwritable
from .patterns import BUILT_IN, FORMATS, MAX_HOSTNAME, MAX_PATTERN, Untranslatable, translate
from .references import References, escape
from .rewriting import Rewriter

# Beyond these a schema would spend more time being read than an answer is worth.
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32
MAX_COUNT = 1_000_000
MAX_TEXT = 100_000  # characters of one name, or of one text in `enum` or `const`
MAX_MULTIPLE = 10_000

ALL_FORMATS = (*sorted({*FORMATS, *BUILT_IN}), *keywords.UNENFORCED_FORMATS)


def enforceable(schema: Any, field: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The schema rewritten into what llguidance enforces exactly.

    Keywords mean what the draft that defines them says, whichever is declared; where drafts differ (`$ref` beside
    other keywords, `exclusiveMinimum: true`, lists as `items`, `id`) the declared one decides, 2020-12 if none is.
    Definitions that no reference reaches say nothing and are left out.

    Args:
        schema: a JSON Schema (drafts 4 to 2020-12), as plain JSON values that `check_size` lets pass.
        field: the request's field it came in; errors name `field` and a JSON pointer, `field#/properties/a`.

    Returns:
        The rewritten schema, and its patterns by the pointer where they stood.

    Raises:
        InvalidRequest: a keyword or value that cannot be enforced, a schema that is too costly, or one that no finite
            answer can meet because it requires itself.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(field, f"must be a JSON Schema object; it is {shorten(schema)}")
    reader = _Reader(schema, field)
    root = reader.node("#")
    return Rewriter(reader.node, field).document(root), reader.patterns


def check_size(value: Any, field: str) -> None:
    """Raise InvalidRequest for JSON that is nested deeper than MAX_DEPTH schemas or longer than MAX_CHARACTERS.

    A part that stands in many places is counted there, and looked at once. What is no JSON counts as one character.
    """
    sizes: dict[int, tuple[int, int]] = {}  # characters and levels, by the ids of objects and lists

    def measure(part: Any, level: int) -> tuple[int, int]:
        if not isinstance(part, dict | list | tuple):
            return _length(part), 0
        if id(part) not in sizes:
            # Each level of a schema takes two of JSON: "properties" and the property.
            if level > 2 * MAX_DEPTH:
                raise InvalidRequest(field, f"is nested more than {2 * MAX_DEPTH} levels deep; make it flatter")
            inner = [measure(each, level + 1) for each in (part.values() if isinstance(part, dict) else part)]
            names = sum(_length(str(name)) + 2 for name in part) if isinstance(part, dict) else 0
            length = 2 + names + sum(size for size, _ in inner) + 2 * max(0, len(inner) - 1)
            sizes[id(part)] = length, 1 + max((levels for _, levels in inner), default=0)
        if level + sizes[id(part)][1] > 2 * MAX_DEPTH + 1:
            raise InvalidRequest(field, f"is nested more than {2 * MAX_DEPTH} levels deep; make it flatter")
        return sizes[id(part)]

    size, _ = measure(value, 1)
    if size > MAX_CHARACTERS:
        raise InvalidRequest(field, f"has {size} characters; at most {MAX_CHARACTERS} are allowed")


def _length(value: Any) -> int:
    """The characters of a text, number, boolean or null in JSON."""
    try:
        return len(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        return 1


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


class _Reader:
    """Reads schemas of one document into nodes: checks each keyword's value and gives every draft's way one form."""

    def __init__(self, document: dict[str, Any], field: str):
        self.field = field
        self.patterns: dict[str, str] = {}
        self._nodes: dict[str, Node | bool] = {}
        declared = document.get("$schema", "json-schema.org/draft/2020-12/schema")
        self.draft = keywords.draft(declared) or 0
        if not self.draft:
            known = ", ".join(f"http://{uri}" for uri in keywords.DRAFTS)
            raise self.error("#/$schema", f"is {shorten(declared)}; these drafts are supported: {known}")
        self._references = References(document, self.draft)
        self._values: dict[str, tuple[Any, str]] = {"#": (document, self._references.base("#") or "")}
        self._kinds: dict[str, Callable[[Node, str, Any, str], None]] = {
            **dict.fromkeys(("additionalProperties", "propertyNames", "not", "if", "then", "else"), self._one),
            **dict.fromkeys(("properties", "patternProperties", "dependentSchemas"), self._map),
            **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), self._list),
            **dict.fromkeys(
                ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"), self._count
            ),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._bound),
            **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), self._unevaluated),
            "type": self._type,
            "enum": self._enum,
            "const": self._enum,
            "multipleOf": self._multiple,
            "items": self._items,
            "uniqueItems": self._unique,
            "required": self._required,
            "dependencies": self._dependencies,
            "dependentRequired": self._dependencies,
            "pattern": self._pattern,
            "format": self._format,
            "$ref": self._reference,
        }

    def error(self, pointer: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self.field}{pointer}", problem)

    def node(self, pointer: str) -> Node | bool:
        """The node of the schema at a pointer: the root, or the target of a reference read before."""
        if pointer not in self._nodes:
            value, base = self._values[pointer]
            self._nodes[pointer] = self._schema(value, pointer, base)
        return self._nodes[pointer]

    def _schema(self, schema: Any, at: str, base: str, within: frozenset[str] | None = None) -> Node | bool:
        """One schema; `within` are the types that the schema around it leaves, where both judge the same value."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self.error(at, f"must be a schema (an object or a boolean); it is {shorten(schema)}")
        own = self._references.base(at)
        node = Node(at, base if own is None else own)
        if "$ref" in schema and self.draft <= 7:
            schema = {"$ref": schema["$ref"]}
        if self._declares_another_draft(schema, own is not None):
            raise self.error(f"{at}/$schema", f"is {shorten(schema['$schema'])}; one document keeps to one draft")
        for keyword in ("type", "enum", "const"):
            if keyword in schema:
                self._kinds[keyword](node, keyword, schema[keyword], f"{at}/{keyword}")
        node.limit(None if "$ref" in schema else within)
        types = node.types()
        for keyword, value in schema.items():
            if keyword in keywords.NAMING or keyword in ("type", "enum", "const"):
                continue
            pointer = f"{at}/{escape(keyword)}"
            if keyword in keywords.ABOUT and not types & keywords.ABOUT[keyword]:
                continue
            if keyword in keywords.REFUSED:
                raise self.error(pointer, f"is not supported: {keywords.REFUSED[keyword]}")
            if keyword in self._kinds:
                self._kinds[keyword](node, keyword, value, pointer)
            elif keyword not in keywords.ANNOTATIONS:
                right = keywords.misspelled(keyword, keywords.REAL)
                if right:
                    raise self.error(pointer, f"is not supported; did you mean {right!r}?")
        self._settle(node, schema)
        return node

    def _declares_another_draft(self, schema: dict[str, Any], resource: bool) -> bool:
        """Whether a `$schema` within the document matters: with an identifier it begins a document of its own."""
        inner = keywords.draft(schema.get("$schema"))
        return "$schema" in schema and (inner is None or (resource and (inner <= 7) != (self.draft <= 7)))

    def _settle(self, node: Node, schema: dict[str, Any]) -> None:
        """What only shows once all keywords of a schema are read."""
        if isinstance(schema.get("items"), list) and "additionalItems" in schema and "array" in node.types():
            node["items"] = self._schema(schema["additionalItems"], f"{node.at}/additionalItems", node.base)
        for bound, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if schema.get(bound) is True and inclusive in node:
                node[bound] = schema[inclusive]
        problem = close_bounds(node)
        if problem:
            raise self.error(f"{node.at}/{problem}", f"is {shorten(schema[problem])}; {LARGEST} is the largest bound")
        if "if" not in node:
            node.pop("then", None)
            node.pop("else", None)
        applicators = node.keys() & {"$ref", "anyOf", "oneOf", "allOf", "if", "dependent"}
        for word, plain in (("unevaluatedItems", "items"), ("unevaluatedProperties", "additionalProperties")):
            if word in node:
                rest = node.pop(word)
                if plain in node:
                    continue
                if applicators:
                    raise self.error(
                        f"{node.at}/{word}", f"is not supported beside {', '.join(sorted(applicators))}; use `{plain}`"
                    )
                node[plain] = rest

    def _one(self, node: Node, keyword: str, value: Any, at: str) -> None:
        within = node.types() if keyword in keywords.COMBINING else None
        node[keyword] = self._schema(value, at, node.base, within)

    def _map(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise self.error(at, f"must be an object of schemas; it is {shorten(value)}")
        self._writable(list(value), at)
        within = node.types() if keyword == "dependentSchemas" else None
        keyword = "dependent" if keyword == "dependentSchemas" else keyword
        schemas = node.setdefault(keyword, {})
        for name, child in value.items():
            pointer = f"{at}/{escape(name)}"
            schema = self._schema(child, pointer, node.base, within)
            key = self._expression(name, pointer) if keyword == "patternProperties" else name
            schemas[key] = Node(pointer, node.base, {"allOf": [schemas[key], schema]}) if key in schemas else schema

    def _list(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, list) or not value:
            raise self.error(at, f"must be a list of at least one schema; it is {shorten(value)}")
        within = None if keyword == "prefixItems" else node.types()
        node[keyword] = [self._schema(child, f"{at}/{index}", node.base, within) for index, child in enumerate(value)]

    def _items(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if isinstance(value, list):
            if value:
                self._list(node, "prefixItems", value, at)
        else:
            node["items"] = self._schema(value, at, node.base)

    def _unevaluated(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if value is not True:
            node[keyword] = self._schema(value, at, node.base)

    def _count(self, node: Node, keyword: str, value: Any, at: str) -> None:
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole) or value < 0:
            raise self.error(at, f"must be a whole number from 0 on; it is {shorten(value)}")
        if value > MAX_COUNT and keyword.startswith("min"):
            raise self.error(at, f"is {shorten(value)}; at most {MAX_COUNT} can be enforced")
        if value <= MAX_COUNT:  # an answer does not get that long
            node[keyword] = min(int(value), node[keyword]) if keyword in node else int(value)

    def _bound(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if keyword.startswith("exclusive") and isinstance(value, bool):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(at, f"must be a number; it is {shorten(value)}")
        node[keyword] = value

    def _multiple(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(at, f"must be a number above 0; it is {shorten(value)}")
        # Validators divide in binary, where 0.3 is no multiple of 0.1.
        if value > MAX_MULTIPLE or value * 1024 % 1 or numerator(value) > MAX_MULTIPLE:
            raise self.error(
                at,
                f"is {shorten(value)}; whole numbers up to {MAX_MULTIPLE} and binary fractions to 1/16 can be enforced",
            )
        node[keyword] = int(value) if value == int(value) else value

    def _type(self, node: Node, keyword: str, value: Any, at: str) -> None:
        names = value if isinstance(value, list) and value else [value]
        for name in names:
            if name not in keywords.TYPES:
                raise self.error(at, f"is {shorten(name)}; the types are {', '.join(keywords.TYPES)}")
        node["type"] = list(dict.fromkeys(names))

    def _enum(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if keyword == "enum" and (not isinstance(value, list) or not value):
            raise self.error(at, f"must be a list of at least one value; it is {shorten(value)}")
        values = value if keyword == "enum" else [value]
        problem = unwritable(values)
        if problem:
            raise self.error(at, problem)
        self._writable(values, at)
        node.choose(values)

    def _writable(self, values: Any, at: str) -> None:
        """Refuse texts that are too long, and control characters, which llguidance writes as escapes with \\u."""
        level = [values]
        while level:
            for value in level:
                texts = value if isinstance(value, dict) else [value]
                for text in texts:
                    if isinstance(text, str) and len(text) > MAX_TEXT:
                        raise self.error(
                            at, f"has a text of {len(text)} characters; at most {MAX_TEXT} can be enforced"
                        )
                    if isinstance(text, str) and not text.isprintable() and any(_control(char) for char in text):
                        raise self.error(at, f"has a control character, which no answer can contain: {shorten(text)}")
            level = [child for value in level for child in _children(value)]

    def _expression(self, pattern: Any, at: str) -> str:
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            raise self.error(
                at, f"must be a regular expression of at most {MAX_PATTERN} characters; it is {shorten(pattern)}"
            )
        try:
            self.patterns[at] = translate(pattern)
        except Untranslatable as problem:
            raise self.error(at, f"is {shorten(pattern)}; {problem}") from None
        return self.patterns[at]

    def _pattern(self, node: Node, keyword: str, value: Any, at: str) -> None:
        node.setdefault("patterns", []).append(self._expression(value, at))

    def _format(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, str):
            raise self.error(at, f"must be a text; it is {shorten(value)}")
        if value in FORMATS:
            node.setdefault("patterns", []).append(FORMATS[value])
            if value == "hostname":
                node["maxLength"] = min(node.get("maxLength", MAX_HOSTNAME), MAX_HOSTNAME)
        elif value in BUILT_IN:
            node["format"] = value
        elif value in keywords.UNENFORCED_FORMATS or keywords.misspelled(value, ALL_FORMATS):
            formats = ", ".join(sorted({*FORMATS, *BUILT_IN}))
            raise self.error(at, f"is {shorten(value)}; these formats can be enforced: {formats}")

    def _required(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if value is False:  # draft 3's way of saying nothing
            return
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(at, f"must be a list of property names; it is {shorten(value)}")
        self._writable(value, at)
        node["required"] = list(dict.fromkeys(value))

    def _dependencies(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise self.error(at, f"must be an object; it is {shorten(value)}")
        self._writable(list(value), at)
        dependent = node.setdefault("dependent", {})
        for name, then in value.items():
            pointer = f"{at}/{escape(name)}"
            schema: Node | bool
            if isinstance(then, list):
                schema = Node(pointer, node.base, {"type": ["object"]})
                self._required(schema, "required", then, pointer)
            else:
                schema = self._schema(then, pointer, node.base, node.types())
            both = [dependent[name], schema] if name in dependent else []
            dependent[name] = Node(pointer, node.base, {"allOf": both}) if both else schema

    def _unique(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, bool):
            raise self.error(at, f"must be true or false; it is {shorten(value)}")
        if value:
            node["uniqueItems"] = True

    def _reference(self, node: Node, keyword: str, value: Any, at: str) -> None:
        if not isinstance(value, str):
            raise self.error(at, f"must be a text; it is {shorten(value)}")
        found = self._references.resolve(node.base, value)
        if found is None or not isinstance(found[1], (dict, bool)):
            raise self.error(
                at, f"is {shorten(value)}, which is no schema in this document; references lead to one within it, "
                "`#` or `#/$defs/name`"
            )  # fmt: skip
        pointer, target, base = found
        self._values.setdefault(pointer, (target, base))
        node["$ref"] = pointer


def _control(char: str) -> bool:
    return (char < " " and char not in "\b\t\n\f\r") or char == "\x7f"
