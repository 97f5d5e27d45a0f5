"""Which JSON Schemas an answer can be held to: every keyword is enforced or refused by name.

Knows nothing about tokens, masks or llguidance's grammar; it says what llguidance 1.9 may be given.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from .errors import InvalidRequest, shorten

# A schema beyond these would spend more time in the grammar compiler than an answer is worth.
MAX_CHARACTERS = 65_536
MAX_DEPTH = 32
MAX_COUNT = 10_000
MAX_PATTERN = 2_048

# llguidance reads numbers as floats, exactly within these, and pads decimals to 18 digits of an int64 at most.
MAX_INTEGER = 2**53
MAX_DIGITS = 15
MAX_DECIMALS = 18
# Patterns that apply to one string at a time cost time that doubles with each: 20 of them took 27 seconds.
MAX_COMBINED = 8
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# llguidance's list (parser/src/json/formats.rs) without its placeholder "unknown".
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
DRAFTS = (
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)

ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
SCHEMA = {"items", "additionalProperties"}
SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
COUNTS = {"minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
ENFORCED = sorted(
    SCHEMA | SCHEMA_MAPS | SCHEMA_LISTS | COUNTS | NUMBERS
    | {"type", "enum", "const", "pattern", "format", "required", "$ref"}
)  # fmt: skip


def enforceable(schema: Any, field: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The schema reduced to the keywords that are enforced.

    Args:
        schema: a JSON Schema (drafts 6 to 2020-12), as plain JSON values.
        field: the request's field it came in; errors name `field` and a JSON pointer, `field#/properties/a`.

    Returns:
        The reduced schema, and its patterns (`pattern` and the names of `patternProperties`) by pointer.

    Raises:
        InvalidRequest: a keyword or value that cannot be enforced, a schema that is too large or too deep, or one
            that no finite answer can meet because it requires itself.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(field, f"must be a JSON Schema object; it is {shorten(schema)}")
    check_size(schema, field)
    checker = _Checker(field)
    reduced = checker.schema(schema, "#")
    for pointer, target in checker.references:
        if target not in checker.schemas:
            raise checker.error(f"{pointer}/$ref", f"points to {shorten(target)}, which is no schema in this document")
    combined = len(checker.patterns) + checker.formats
    if checker.combines and combined > MAX_COMBINED:
        raise checker.error(
            "#", f"combines schemas (`allOf`, or keywords beside `$ref`, `anyOf`, `oneOf`) and has {combined} patterns "
            f"and formats; at most {MAX_COMBINED} can be combined"
        )  # fmt: skip
    endless = checker.schemas.keys() - _completable(checker.schemas)
    if endless:
        raise checker.error(min(endless, key=len), "requires itself, so no answer could ever end")
    return reduced, checker.patterns


def check_size(value: Any, field: str) -> None:
    """Raise InvalidRequest for JSON that is nested deeper than MAX_DEPTH schemas or longer than MAX_CHARACTERS."""
    level, depth = [value], 0
    while level:
        depth += 1
        # Each level of a schema takes two of JSON: "properties" and the property.
        if depth > 2 * MAX_DEPTH:
            raise InvalidRequest(field, f"is nested more than {2 * MAX_DEPTH} levels deep; make it flatter")
        level = [child for item in level for child in _children(item)]
    size = len(json.dumps(value, ensure_ascii=False))
    if size > MAX_CHARACTERS:
        raise InvalidRequest(field, f"has {size} characters; at most {MAX_CHARACTERS} are allowed")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


class _Checker:
    """One walk over a schema: reduces it, and collects its subschemas, references and patterns by JSON pointer."""

    def __init__(self, field: str):
        self.field = field
        self.schemas: dict[str, Any] = {}
        self.references: list[tuple[str, str]] = []
        self.patterns: dict[str, str] = {}
        self.formats = 0
        self.combines = False
        self.kinds: list[tuple[set[str], Callable[[str, Any, str], Any]]] = [
            (SCHEMA, lambda _, value, pointer: self.schema(value, pointer)),
            (SCHEMA_MAPS, self.schema_map),
            (SCHEMA_LISTS, self.schema_list),
            (COUNTS, self.count),
            (NUMBERS, self.number),
            ({"type"}, self.type),
            ({"enum", "const"}, self.instances),
            ({"pattern"}, self.pattern),
            ({"format"}, self.format),
            ({"required"}, self.required),
            ({"$ref"}, self.reference),
        ]

    def error(self, pointer: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self.field}{pointer}", problem)

    def schema(self, schema: Any, pointer: str) -> Any:
        if isinstance(schema, list) and pointer.endswith("/items"):
            raise self.error(pointer, "must be one schema; use `prefixItems` for a list of them")
        if not isinstance(schema, (dict, bool)):
            raise self.error(pointer, f"must be a schema (an object or a boolean); it is {shorten(schema)}")
        if isinstance(schema, bool):
            self.schemas[pointer] = schema
            return schema
        reduced = {}
        for keyword, value in schema.items():
            at = f"{pointer}/{_escape(keyword)}"
            if keyword in ANNOTATIONS or (pointer == "#" and keyword == "$id"):
                continue
            if keyword == "$schema" and pointer == "#":
                if not isinstance(value, str) or value.rstrip("#") not in DRAFTS:
                    raise self.error(at, f"is {shorten(value)}; these drafts are supported: {', '.join(DRAFTS)}")
                continue
            # `uniqueItems: false` asks for nothing.
            if keyword == "uniqueItems" and value is False:
                continue
            check = next((check for names, check in self.kinds if keyword in names), None)
            if check is None:
                raise self.error(
                    at,
                    f"is not supported: an answer cannot be held to {shorten(keyword)}. "
                    f"Supported: {', '.join(ENFORCED)}",
                )
            reduced[keyword] = check(keyword, value, at)
        self.unique_names(reduced, pointer)
        _close_bounds(reduced)
        applied = reduced.keys() - {"$defs", "definitions"}
        self.combines |= "allOf" in applied or (len(applied) > 1 and not applied.isdisjoint({"$ref", "anyOf", "oneOf"}))
        self.schemas[pointer] = reduced
        return reduced

    def unique_names(self, schema: dict[str, Any], pointer: str) -> None:
        """Refuse counts of properties that repeated names could fake: llguidance lets free names repeat."""
        fewest, named = schema.get("minProperties", 0), set(schema.get("required", []))
        if fewest > max(1, len(named)):
            raise self.error(
                f"{pointer}/minProperties",
                f"is {fewest}; at most 1, or the number of `required` names, can be enforced",
            )

    def schema_map(self, keyword: str, value: Any, pointer: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(pointer, f"must be an object of schemas; it is {shorten(value)}")
        self.writable(dict.fromkeys(value), pointer)
        if keyword == "patternProperties":
            for name in value:
                self.pattern(keyword, name, f"{pointer}/{_escape(name)}")
        return {name: self.schema(schema, f"{pointer}/{_escape(name)}") for name, schema in value.items()}

    def schema_list(self, keyword: str, value: Any, pointer: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(pointer, f"must be a list of at least one schema; it is {shorten(value)}")
        return [self.schema(schema, f"{pointer}/{index}") for index, schema in enumerate(value)]

    def count(self, keyword: str, value: Any, pointer: str) -> int:
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole) or not 0 <= value <= MAX_COUNT:
            raise self.error(pointer, f"must be a whole number from 0 to {MAX_COUNT}; it is {shorten(value)}")
        return int(value)

    def number(self, keyword: str, value: Any, pointer: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(pointer, f"must be a number; it is {shorten(value)}")
        self.exact(value, pointer)
        # Validators divide in binary, where 0.3 is no multiple of 0.1.
        if keyword == "multipleOf" and (value <= 0 or value != int(value)):
            raise self.error(pointer, f"must be a positive whole number; it is {shorten(value)}")
        return value

    def exact(self, value: Any, pointer: str) -> None:
        """Refuse numbers that llguidance would round: it reads them as floats, and a float's last digit inexactly."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
            whole = isinstance(value, int) and len(digits) <= MAX_DIGITS + 1
            written = isinstance(exponent, int) and exponent >= -MAX_DECIMALS
            if abs(value) > MAX_INTEGER or not written or not (whole or len(digits) <= MAX_DIGITS):
                raise self.error(
                    pointer,
                    f"is {shorten(value)}; numbers up to {MAX_INTEGER} with at most {MAX_DIGITS} digits, "
                    f"{MAX_DECIMALS} of them after the point, can be enforced",
                )
        for child in _children(value):
            self.exact(child, pointer)

    def type(self, keyword: str, value: Any, pointer: str) -> Any:
        names = value if isinstance(value, list) and value else [value]
        for name in names:
            if name not in TYPES:
                raise self.error(pointer, f"is {shorten(name)}; the types are {', '.join(TYPES)}")
        return value

    def instances(self, keyword: str, value: Any, pointer: str) -> Any:
        if keyword == "enum" and (not isinstance(value, list) or not value):
            raise self.error(pointer, f"must be a list of at least one value; it is {shorten(value)}")
        self.exact(value, pointer)
        self.writable(value, pointer)
        return value

    def writable(self, value: Any, pointer: str) -> None:
        """Refuse control characters that llguidance writes as \\u and a number; answers do without those escapes."""
        names = list(value) if isinstance(value, dict) else [value]
        for text in names:
            if isinstance(text, str) and CONTROL.search(text):
                raise self.error(pointer, f"has a control character, which no answer can contain: {shorten(text)}")
        for child in _children(value):
            self.writable(child, pointer)

    def pattern(self, keyword: str, value: Any, pointer: str) -> str:
        if not isinstance(value, str) or len(value) > MAX_PATTERN:
            raise self.error(
                pointer, f"must be a regular expression of at most {MAX_PATTERN} characters; it is {shorten(value)}"
            )
        self.patterns[pointer] = value
        return value

    def format(self, keyword: str, value: Any, pointer: str) -> str:
        if value not in FORMATS:
            raise self.error(pointer, f"is {shorten(value)}; these formats can be enforced: {', '.join(FORMATS)}")
        self.formats += 1
        return str(value)

    def required(self, keyword: str, value: Any, pointer: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(pointer, f"must be a list of property names; it is {shorten(value)}")
        self.writable(value, pointer)
        return value

    def reference(self, keyword: str, value: Any, pointer: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"#(/[^%]*)?", value):
            raise self.error(
                pointer, f"is {shorten(value)}; references within the schema, `#` or `#/$defs/name`, are supported"
            )
        self.references.append((pointer.removesuffix("/$ref"), value))
        return value


def _close_bounds(schema: dict[str, Any]) -> None:
    """Replace exclusive bounds by the next number inside, as far as MAX_DIGITS go.

    Text just below an exclusive 1 (0.99999999999999999) is read back as 1, and llguidance takes 0 for above 0.
    """
    for exclusive, inclusive, tighter, sign in (
        ("exclusiveMinimum", "minimum", max, 1),
        ("exclusiveMaximum", "maximum", min, -1),
    ):
        if exclusive in schema:
            bound = Decimal(repr(schema.pop(exclusive)))
            step = Decimal(1).scaleb(max(bound.adjusted() - MAX_DIGITS + 1, -MAX_DECIMALS) if bound else -MAX_DIGITS)
            closed = float(bound + sign * step)
            schema[inclusive] = tighter(schema.get(inclusive, closed), closed)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _completable(schemas: dict[str, Any]) -> set[str]:
    """Pointers of the schemas that some finite value meets, as far as references decide it: the least fixed point."""
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
    return done


def _needs(schema: dict[str, Any], pointer: str) -> list[list[str]]:
    """What a value of this schema cannot do without: pointers, one of each list."""
    needs = [[schema["$ref"]]] if "$ref" in schema else []
    needs += [[f"{pointer}/allOf/{index}"] for index in range(len(schema.get("allOf", [])))]
    named = schema.get("properties", {})
    needs += [[f"{pointer}/properties/{_escape(name)}"] for name in schema.get("required", []) if name in named]
    fewest, prefix = schema.get("minItems", 0), len(schema.get("prefixItems", []))
    needs += [[f"{pointer}/prefixItems/{index}"] for index in range(min(fewest, prefix))]
    if "items" in schema and fewest > prefix:
        needs.append([f"{pointer}/items"])
    for word in ("anyOf", "oneOf"):
        if word in schema:
            needs.append([f"{pointer}/{word}/{index}" for index in range(len(schema[word]))])
    return needs
