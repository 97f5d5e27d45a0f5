"""The words of JSON Schema: drafts, keywords, formats, and which unknown word is a misspelling of a known one.

Knows words only, nothing about their values or how they are enforced.
"""

from functools import lru_cache

# With http or https, with or without the empty fragment. The last two are aliases: of the newest draft at its time,
# and of draft 4 with the keyword `self`.
DRAFTS = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
    "json-schema.org/schema": 7,
    "iglucentral.com/schemas/com.snowplowanalytics.self-desc/schema/jsonschema/1-0-0": 4,
}
NEWEST = 2020

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# The types that a keyword says something about. What is not here says something about every type.
_ABOUT = (
    ({"string"}, ("minLength", "maxLength", "pattern", "format")),
    ({"number", "integer"}, ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    (
        {"array"},
        (
            "items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems",
            "contains", "minContains", "maxContains",
        ),
    ),
    (
        {"object"},
        (
            "properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames",
            "required", "minProperties", "maxProperties", "dependencies", "dependentRequired", "dependentSchemas",
        ),
    ),
)  # fmt: skip
ABOUT = {keyword: types for types, keywords in _ABOUT for keyword in keywords}
COMBINING = ("enum", "const", "$ref", "anyOf", "oneOf", "allOf", "not", "if", "then", "else")
ASSERTING = {*ABOUT, *COMBINING, "type"}
# Real keywords that no answer can be held to, whatever their value.
REFUSED = {
    "contains": "an array cannot be made to contain something",
    "$dynamicRef": "its target depends on where it is used",
    "$recursiveRef": "its target depends on where it is used",
    "extends": "it is a keyword of draft 3; use `allOf`",
    "disallow": "it is a keyword of draft 3; use `not`",
    "divisibleBy": "it is a keyword of draft 3; use `multipleOf`",
}
REAL = (*sorted(ASSERTING), *REFUSED)
# Keywords that hold schemas for references, or name them, and say nothing by themselves.
NAMING = {"$defs", "definitions", "$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor"}
ANNOTATIONS = {
    "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$vocabulary",
    "contentEncoding", "contentMediaType", "contentSchema", "minContains", "maxContains", "additionalItems",
}  # fmt: skip

# Formats that some draft from 4 to 2020-12 defines and no regular expression or no known one can decide.
UNENFORCED_FORMATS = ("regex", "iri", "iri-reference", "idn-email", "idn-hostname", "uri-template")


def draft(uri: object) -> int | None:
    """The draft that a `$schema` names: 4, 6, 7, 2019 or 2020; None where it is none that is supported."""
    if not isinstance(uri, str):
        return None
    return DRAFTS.get(uri.removeprefix("https://").removeprefix("http://").removesuffix("#"))


@lru_cache(maxsize=4_096)
def misspelled(word: str, known: tuple[str, ...]) -> str | None:
    """The known word that an unknown one looks like, or None.

    A word that begins with a sign (`_format`) is meant to be different. One slip (a letter more, less, changed or
    swapped with the next) counts in words of 5 letters, two from 8 on where the length differs by one at most
    (`multiple` is a word of its own); in shorter words only capitals may differ.
    """
    if not word[:1].isalpha() or not word.isascii():
        return None
    small = word.lower()
    letters = set(small)
    found = []
    for right in known:
        slips = 0 if len(right) < 5 else 1 if len(right) < 8 else 2
        # An edit changes the set of letters by two at most.
        if (
            abs(len(right) - len(word)) <= min(slips, 1)
            and len(letters.symmetric_difference(right.lower())) <= 2 * slips
        ):
            distance = _distance(small, right.lower(), slips)
            if distance <= slips:
                found.append((distance, right))
    return min(found)[1] if found else None


def _distance(a: str, b: str, most: int) -> int:
    """Edits from a to b: insert, delete, replace, swap neighbours (optimal string alignment); `most` + 1 if more."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                best = min(best, last[j - 2] + 1)
            row.append(best)
        if min(row) > most:
            return most + 1
    return row[-1]
