"""Where the references of a JSON Schema lead: identifiers, anchors and pointers within one document.

Knows where a document holds schemas, nothing about what they ask for.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

_ONE = {
    "items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
    "propertyNames", "not", "if", "then", "else",
}  # fmt: skip
_MANY = {"properties", "patternProperties", "dependencies", "dependentSchemas", "definitions", "$defs"}
_LISTS = {"items", "prefixItems", "anyOf", "oneOf", "allOf"}


def escape(name: str) -> str:
    """A name as one step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


class References:
    """The targets that references in one document can name.

    Args:
        document: the schema, as plain JSON values.
        draft: 4, 6, 7, 2019 or 2020; it decides between `id` and `$id`, and whether a fragment there is an anchor.
    """

    def __init__(self, document: dict[str, Any], draft: int):
        self._document = document
        self._word = "id" if draft == 4 else "$id"
        self._old = draft <= 7
        self._bases = {"#": ""}
        self._resources = {"": "#"}
        self._anchors: dict[tuple[str, str], str] = {}
        self._collect(document, "#", "")

    def base(self, pointer: str) -> str | None:
        """The base URI that begins at the schema at `pointer`; None where it has none of its own."""
        return self._bases.get(pointer)

    def resolve(self, base: str, reference: str) -> tuple[str, Any, str] | None:
        """What `reference` names where `base` is the base URI: its pointer, its value and the base URI around it.

        None where it names nothing in this document.
        """
        uri, fragment = urldefrag(urljoin(base, reference) if base else reference)
        start = self._resources.get(uri)
        if start is None:
            return None
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            pointer = self._anchors.get((uri, fragment))
            return None if pointer is None else (pointer, self._value(pointer), self._around(pointer))
        pointer = start + fragment
        try:
            return pointer, self._value(pointer), self._around(pointer)
        except (KeyError, IndexError, TypeError):
            return None

    def _around(self, pointer: str) -> str:
        while pointer not in self._bases:
            pointer = pointer.rpartition("/")[0]
        return self._bases[pointer]

    def _value(self, pointer: str) -> Any:
        value: Any = self._document
        for step in pointer.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list):
                if not re.fullmatch(r"0|[1-9][0-9]*", name):
                    raise KeyError(name)
                value = value[int(name)]
            else:
                value = value[name]
        return value

    def _collect(self, schema: Any, pointer: str, base: str) -> None:
        if not isinstance(schema, dict):
            return
        name = schema.get(self._word)
        if isinstance(name, str) and not (self._old and "$ref" in schema):
            uri, fragment = urldefrag(urljoin(base, name) if base else name)
            if fragment:
                self._anchors[uri, fragment] = pointer
            if not name.startswith("#"):
                base = self._bases[pointer] = uri
                self._resources.setdefault(uri, pointer)
        for word in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(word), str):
                self._anchors[base, schema[word]] = pointer
        for step, child in subschemas(schema):
            self._collect(child, pointer + step, base)


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a schema, each with the pointer's steps that lead to it."""
    for keyword, value in schema.items():
        if keyword in _MANY and isinstance(value, dict):
            for name, child in value.items():
                yield f"/{keyword}/{escape(name)}", child
        elif keyword in _LISTS and isinstance(value, list):
            for index, child in enumerate(value):
                yield f"/{keyword}/{index}", child
        elif keyword in _ONE:
            yield f"/{keyword}", value
