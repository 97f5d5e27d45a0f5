"""Run with: python -m pytest tests/test_schemas.py"""

import contextlib
import json
import random
import string
import time

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema.validators import validator_for
from test_grammar import GRAMMARS, NAMES, closed, walk, wrap

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.patterns import Untranslatable, none_of, translate

DRAFT4 = "http://json-schema.org/draft-04/schema#"
DRAFT7 = "http://json-schema.org/draft-07/schema#"


# Of two tokens for the same byte, a mask allows the later one.
BYTES = [NAMES.index(f"<0x{byte:02X}>") for byte in range(256)]
BYTES[:128] = [
    NAMES.index(name) if (name := chr(byte).replace(" ", "\u2581")) in NAMES else BYTES[byte] for byte in range(128)
]


def holds(grammar, document):
    """Whether the grammar accepts the document as compact JSON, spelled byte by byte."""
    grammar = grammar.copy()
    for byte in json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode():
        try:
            grammar.accept(BYTES[byte])
        except ValueError:
            return False
    return bool(grammar._matcher.is_accepting())


def validator(schema):
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


EVENT = {
    "oneOf": [
        closed({"kind": {"const": "click"}, "x": {"type": "integer"}}, required=["kind", "x"]),
        closed({"kind": {"enum": ["key", "text"]}, "keys": {"type": "string"}}, required=["kind"]),
        {"type": "null"},
    ]
}
# (schema, documents that meet it, documents that do not), after what real schemas do.
CASES = {
    "draft 4 bounds": (
        {"$schema": DRAFT4, "type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 5},
        [1, 5, 0.5],
        [0, -1, 6],
    ),
    "a bound that is not exclusive": (
        {"$schema": DRAFT4, "type": "integer", "minimum": 3, "exclusiveMinimum": False},
        [3, 4],
        [2],
    ),
    "draft 4 identifiers": (
        {
            "$schema": DRAFT4,
            "id": "http://example.org/root.json",
            "definitions": {"size": {"id": "#size", "type": "integer"}, "far": {"id": "far.json", "type": "null"}},
            "properties": {"a": {"$ref": "#size"}, "b": {"$ref": "far.json"}, "id": {"type": "string"}},
        },
        [{"a": 1, "b": None, "id": "x"}],
        [{"a": "1"}, {"b": 1}, {"id": 5}],
    ),
    "anchors and identifiers of 2020-12": (
        {
            "$id": "https://example.org/a",
            "$defs": {"b": {"$anchor": "here", "type": "integer"}, "c": {"$id": "c", "type": "null"}},
            "properties": {"x": {"$ref": "#here"}, "y": {"$ref": "/c"}},
        },
        [{"x": 1, "y": None}],
        [{"x": "1"}, {"y": 0}],
    ),
    "keywords beside a reference in draft 7": (
        {"$schema": DRAFT7, "$ref": "#/definitions/a", "minimum": 3, "definitions": {"a": {"type": "integer"}}},
        [1, 5],
        ["1"],
    ),
    "keywords beside a reference since 2019-09": (
        {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}},
        [3],
        [2, 3.5],
    ),
    "references through percent signs and slashes": (
        {"properties": {"v": {"$ref": "#/definitions/a%20b~1c"}}, "definitions": {"a b/c": {"type": "boolean"}}},
        [{"v": True}],
        [{"v": 1}],
    ),
    "a definition nobody refers to says nothing": (
        {"type": "null", "definitions": {"a": {"uniqueItems": True}, "b": {"$ref": "http://example.org/elsewhere"}}},
        [None],
        [1],
    ),
    "keywords of other types say nothing": (
        {"type": "object", "minLength": 3, "uniqueItems": True, "format": "regex", "maximum": "x"},
        [{}],
        ["abc"],
    ),
    "a list of items": (
        {"$schema": DRAFT7, "type": "array", "items": [{"type": "string"}, {"type": "null"}], "additionalItems": False},
        [[], ["a"], ["a", None]],
        [[1], ["a", None, 1]],
    ),
    "additional items": (
        {"$schema": DRAFT7, "items": [{"type": "string"}], "additionalItems": {"type": "integer"}, "minItems": 2},
        [["a", 1], ["a", 1, 2]],
        [["a"], ["a", "b"]],
    ),
    "additional items without a list of items say nothing": (
        {"type": "array", "items": {"type": "integer"}, "additionalItems": {"type": "null"}},
        [[1, 2]],
        [[None]],
    ),
    "dependencies on names": (
        {"$schema": DRAFT7, "type": "object", "properties": {"a": {}, "b": {}}, "dependencies": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "dependencies on schemas": (
        {
            "$schema": DRAFT7,
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "dependencies": {"a": {"properties": {"b": {"minimum": 5}}, "required": ["b"]}},
        },
        [{}, {"b": 1}, {"a": 1, "b": 5}, 3],
        [{"a": 1}, {"a": 1, "b": 1}],
    ),
    "dependent names and schemas": (
        {
            "type": "object",
            "properties": {"a": {}, "b": {}, "c": {}},
            "dependentRequired": {"a": ["b"]},
            "dependentSchemas": {"b": {"required": ["c"]}},
        },
        [{}, {"c": 1}, {"b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
    ),
    "branches that a constant tells apart": (
        EVENT,
        [{"kind": "click", "x": 1}, {"kind": "key"}, {"kind": "text", "keys": "a"}, None],
        [{"kind": "click"}, {"kind": "other"}, {"kind": "key", "x": 1}, 1],
    ),
    "branches that a required name tells apart": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "branches that the schema around them tells apart": (
        {
            "type": "object",
            "required": ["kind"],
            "oneOf": [
                {"properties": {"kind": {"enum": ["a"]}, "v": {"type": "integer"}}},
                {"properties": {"kind": {"enum": ["b"]}, "v": {"type": "string"}}},
            ],
        },
        [{"kind": "a", "v": 1}, {"kind": "b", "v": "x"}],
        [{"kind": "a", "v": "x"}, {"kind": "c"}, {"v": 1}],
    ),
    "one or many": (
        {
            "oneOf": [{"$ref": "#/$defs/s"}, {"type": "array", "items": {"$ref": "#/$defs/s"}}],
            "$defs": {"s": {"type": "string"}},
        },
        ["a", ["a"], []],
        [1, [1]],
    ),
    "lists of different items": (
        {"oneOf": [{"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}]},
        [["a"], [1, 2]],
        [[], ["a", 1]],
    ),
    "texts that begin differently": (
        {"type": "string", "oneOf": [{"pattern": "^http:"}, {"pattern": "^arn:"}, {"enum": ["none"]}]},
        ["http:x", "arn:x", "none"],
        ["x"],
    ),
    "numbers apart": (
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}, {"const": 4.5}]},
        [3, 5, 4.5],
        [4],
    ),
    "not": (
        {"type": "string", "not": {"enum": ["", "no", "none"]}},
        ["n", "non", "x", "nonee"],
        ["", "no", "none", 1],
    ),
    "not a name": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "not": {"required": ["b"]}},
        [{}, {"a": None}, {"c": 1}],
        [{"b": 1}, {"a": None, "b": 1}],
    ),
    "not these numbers": ({"type": "integer", "not": {"enum": [0, 3]}}, [-1, 1, 2, 4], [0, 3]),
    "not a type": ({"not": {"type": ["string", "array", "object"]}}, [1, None, True], ["a", [], {}]),
    "if a constant": (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer"}},
            "required": ["kind"],
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["size"]},
            "else": {"properties": {"size": False}},
        },
        [{"kind": "a", "size": 1}, {"kind": "b"}],
        [{"kind": "a"}, {"kind": "b", "size": 1}],
    ),
    "if without then or else says nothing": ({"type": "null", "if": {"pattern": "x"}}, [None], [1]),
    "names of properties": (
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]{1,3}$"},
            "additionalProperties": {"type": "null"},
        },
        [{}, {"a": None, "abc": None}],
        [{"A": None}, {"abcd": None}, {"a": 1}],
    ),
    "one of the properties": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"c": 1}],
        [{}],
    ),
    "at most one of the properties": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1},
        [{}, {"a": 1}, {"b": 1}, {"c": 1}],
        [{"a": 1, "b": 1}, {"a": 1, "c": 1}],
    ),
    "two of three properties": (
        closed({"a": {}, "b": {}, "c": {}}, minProperties=2, maxProperties=2),
        [{"a": 1, "b": 1}, {"b": 1, "c": 1}],
        [{}, {"a": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "unevaluated properties without other schemas": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        [{}, {"a": 1}],
        [{"b": 1}],
    ),
    "halves": ({"type": "number", "multipleOf": 0.5}, [0, 1.5, 2, -0.5], [0.3, 1.25]),
    "bounds beyond what floats hold": (
        {"type": "integer", "minimum": -9223372036854775808, "maximum": 9223372036854775807},
        [0, 10**17],
        [9223372036854775808, 2**70],
    ),
    "bounds with many digits": ({"type": "number", "minimum": 0.12345678901234567, "maximum": 1}, [0.2, 1], [0.1]),
    "long texts": ({"type": "string", "maxLength": 32768}, ["a" * 100], [1]),
    "unique items that cannot repeat": ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[], [1]], [[1, 1]]),
    "integers written with a point": ({"type": "integer", "minimum": 1.0, "maximum": 3.0}, [1, 3], [0, 4]),
    "texts without quotes": ({"type": "string", "pattern": '^[^"\\\\]+$'}, ["a", "a\nb"], ['"', "\\", 'a"']),
    "texts without slashes": ({"type": "string", "pattern": "^[^\\\\/]*$"}, ["", "a"], ["\\", "/"]),
    "brackets in a class": ({"type": "string", "pattern": "^[[a]+$"}, ["[", "a["], ["]", "b"]),
    "two signs in a class": ({"type": "string", "pattern": "^[a&&b]+$"}, ["a&", "b"], ["c"]),
    "white space": ({"type": "string", "pattern": "^\\S+$"}, ["a"], ["a b", "\u00a0"]),
    "days of February": ({"format": "date"}, ["2024-02-29", "2000-02-29"], ["2023-02-29", "1900-02-29", "2023-04-31"]),
    "times of the day": ({"format": "time"}, ["23:59:59Z", "00:00:00.5+01:00"], ["24:00:00Z", "23:59:60Z", "1:00:00Z"]),
    "moments": ({"format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-28"]),
    "host names": ({"format": "hostname"}, ["example.org", "a-b"], ["-a", "a..b", "xn--X", "a" * 64]),
    "relative references": ({"format": "uri-reference"}, ["/a/b?c#d", "http://a.b/c", "a", ""], ["a b", "\\", "a|b"]),
    "pointers": ({"format": "json-pointer"}, ["", "/a/b~0c"], ["a", "/~2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_held_to_what_the_schema_says(name):
    schema, valid, invalid = CASES[name]
    compiled = GRAMMARS.compile(wrap(schema))
    judge = validator(schema)
    checked = "format" not in json.dumps(schema) or name == "days of February"
    for document in valid:
        assert judge.is_valid(document) or not checked, document
        assert holds(compiled, document), document
    for document in invalid:
        assert not judge.is_valid(document) or not checked, document
        assert not holds(compiled, document), document


@pytest.mark.parametrize("name", [name for name in CASES if "format" not in json.dumps(CASES[name][0])])
def test_random_answers_to_such_schemas_are_valid(name):
    schema = CASES[name][0]
    compiled = GRAMMARS.compile(wrap(schema))
    answers = [walk(compiled.copy(), random.Random(seed), 200) for seed in range(4)]
    for answer in answers:
        if answer is not None:
            validator(schema).validate(json.loads(answer))


@pytest.mark.parametrize(
    "keyword",
    [
        "x-order", "example", "readonly", "name", "self", "_format", "nullable", "id", "links", "media", "options",
        "enumNames", "markdownDescription", "javaType", "discriminator", "_uniqueItems", "multiple", "$license",
        "contentEncoding", "contentMediaType", "deprecated", "tsType", "required:",
    ],
)  # fmt: skip
def test_a_keyword_that_no_draft_defines_says_nothing(keyword):
    if keyword == "required:":
        with pytest.raises(InvalidRequest, match="did you mean 'required'"):
            GRAMMARS.compile(wrap({"type": "null", keyword: ["a"]}))
    else:
        assert holds(GRAMMARS.compile(wrap({"type": "null", keyword: {"not": 5}})), None)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("additonalProperties", "additionalProperties"),
        ("aditionalProperties", "additionalProperties"),
        ("additionalproperties", "additionalProperties"),
        ("maxLenght", "maxLength"),
        ("minlength", "minLength"),
        ("maxmimum", "maximum"),
        ("propertes", "properties"),
        ("requried", "required"),
        ("patern", "pattern"),
        ("oneof", "oneOf"),
        ("itmes", "items"),
        ("Type", "type"),
        ("uniqueitems", "uniqueItems"),
        ("formats", "format"),
    ],
)
def test_a_misspelled_keyword_is_refused_with_the_right_one(wrong, right):
    with pytest.raises(InvalidRequest, match=f"#/{wrong}` is not supported; did you mean '{right}'"):
        GRAMMARS.compile(wrap({wrong: 1}))


@pytest.mark.parametrize("name", ["int32", "int64", "byte", "double", "password", "color", "textarea", "ISO 8601"])
def test_a_format_that_no_draft_defines_says_nothing(name):
    assert holds(GRAMMARS.compile(wrap({"type": ["string", "integer"], "format": name})), "x")


@pytest.mark.parametrize("name", ["datetime", "date_time", "regex", "idn-email", "iri", "host-name"])
def test_a_format_that_is_not_enforced_is_refused_with_those_that_are(name):
    with pytest.raises(InvalidRequest, match="these formats can be enforced: date, date-time"):
        GRAMMARS.compile(wrap({"type": "string", "format": name}))


@pytest.mark.parametrize(
    "uri",
    [
        *(f"http://json-schema.org/draft-{draft}/schema{end}" for draft in ("04", "06", "07") for end in ("", "#")),
        "https://json-schema.org/draft-07/schema#",
        "https://json-schema.org/draft/2019-09/schema",
        "https://json-schema.org/draft/2020-12/schema#",
        "http://json-schema.org/schema#",
    ],
)
def test_a_draft_is_known_by_any_of_its_spellings(uri):
    assert holds(GRAMMARS.compile(wrap({"$schema": uri, "items": {"$schema": uri}, "type": "null"})), None)


LEAVES = st.sampled_from(
    [
        True,
        {"type": "string"},
        {"type": "integer", "minimum": 0, "maximum": 3},
        {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5},
        {"enum": ["a", "b", 1, None]},
        {"const": "a"},
        {"type": ["null", "boolean"]},
        {"pattern": "^a"},
        {"type": "string", "minLength": 2},
        {"required": ["a"]},
        {"minProperties": 1},
        {"maxItems": 1},
    ]
)


def _objects(schemas):
    names = st.lists(st.sampled_from("abc"), unique=True, max_size=2)
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), schemas, max_size=3)},
        optional={
            "required": names,
            "additionalProperties": st.one_of(st.just(False), schemas),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(0, 3),
            "dependentRequired": st.dictionaries(st.sampled_from("abc"), names, max_size=2),
            "propertyNames": st.sampled_from([{"pattern": "^[ab]"}, {"enum": ["a", "b"]}, {"maxLength": 1}]),
        },
    )


def _combined(schemas):
    several = st.lists(schemas, min_size=1, max_size=3)
    return st.one_of(
        _objects(schemas),
        st.fixed_dictionaries({"anyOf": several}, optional={"type": st.sampled_from(["object", "string"])}),
        st.fixed_dictionaries({"oneOf": several}),
        st.fixed_dictionaries({"allOf": several}),
        st.fixed_dictionaries({"not": schemas}),
        st.fixed_dictionaries({"if": schemas}, optional={"then": schemas, "else": schemas}),
        st.fixed_dictionaries(
            {"type": st.just("array")},
            optional={
                "items": schemas,
                "prefixItems": several,
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(0, 3),
            },
        ),
        st.fixed_dictionaries({"$ref": st.just("#/$defs/leaf")}, optional={"minLength": st.just(1)}),
    )


SCHEMAS = st.recursive(LEAVES, _combined, max_leaves=8)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 2, 0.5, "", "a", "ab", "b", "ba"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "c", "bc"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, LEAVES, st.lists(VALUES, min_size=8, max_size=8), st.integers())
def test_no_accepted_schema_lets_an_invalid_document_pass(schema, leaf, documents, seed):
    schema = {"$defs": {"leaf": leaf}, **(schema if isinstance(schema, dict) else {})}
    try:
        compiled = GRAMMARS.compile(wrap(schema))
    except InvalidRequest:
        return
    judge = jsonschema.Draft202012Validator(schema)
    for document in documents:
        assert judge.is_valid(document) or not holds(compiled, document), (schema, document)
    answer = walk(compiled, random.Random(seed), 60)
    assert answer is None or judge.is_valid(json.loads(answer)), (schema, answer)


TEXT = {"type": "string"}
SLOW = {
    "large enum": {"enum": ["".join(random.Random(i).choices(string.ascii_lowercase, k=20)) for i in range(20_000)]},
    "enum of objects": {"enum": [{"a": i, "b": [i]} for i in range(5_000)]},
    "many properties": {"type": "object", "properties": {f"property{i}": TEXT for i in range(9_000)}},
    "many bounds": {"properties": {f"p{i}": {"type": "number", "minimum": i + 0.12345} for i in range(5_000)}},
    "many alternatives": {"anyOf": [{"properties": {f"k{i}": TEXT}, "required": [f"k{i}"]} for i in range(5_000)]},
    "many patterns": {
        "properties": {f"p{i}": {"pattern": f"^(?:\\S+\\s+){{0,{i % 50}}}\\S$", "maxLength": 99} for i in range(1_900)}
    },
    "many patterns of names": {"type": "object", "patternProperties": {f"^a{i}x": TEXT for i in range(400)}},
    "counted repetitions": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,20})$"},
    "combined patterns": {"type": "string", "allOf": [{"pattern": f".*{c}.*"} for c in string.ascii_lowercase]},
    "products of alternatives": {
        "allOf": [{"anyOf": [{"type": "object", "required": [f"{a}{b}"]} for b in "abcdefgh"]} for a in "abcdefgh"]
    },
    "conditions": {
        "type": "object",
        "allOf": [{"if": {"properties": {"k": {"const": i}}}, "then": {"required": [f"r{i}"]}} for i in range(20)],
    },
    "branches of a choice": {"oneOf": [{"properties": {f"k{i}": {"type": "null"}}} for i in range(300)]},
    "doubling references": {
        "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(20)}
        | {"a20": {"type": "null"}},
        "$ref": "#/$defs/a0",
    },
    "doubling properties": {
        "$defs": {f"a{i}": {"properties": {name: {"$ref": f"#/$defs/a{i + 1}"} for name in "xy"}} for i in range(25)}
        | {"a25": TEXT},
        "allOf": [{"$ref": "#/$defs/a0"}, {"required": ["x"]}],
    },
    "long chain of references": {
        "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5_000)} | {"a5000": TEXT},
        "$ref": "#/$defs/a0",
    },
    "remainders": {"type": "integer", "allOf": [{"multipleOf": 9_973}, {"multipleOf": 9_967}]},
    "a fraction's remainders": {"type": "number", "multipleOf": 1 / 1024},
    "misspellings": {"properties": {f"p{i}": {f"word{i}s": 1, f"keyw{i}rd": 2} for i in range(5_000)}},
    "a long constant": {"const": "\u00e9\u20ac" * 200_000},
    "a long name": {"type": "object", "properties": {"n" * 500_000: TEXT}},
    "many counts of items": {
        "properties": {f"a{i}": {"type": "array", "maxItems": 900_000 + i, "items": {}} for i in range(900)}
    },
    "a long text that is excluded": {"type": "string", "not": {"const": "a" * 10_000}},
    "many texts that are excluded": {
        "type": "string",
        "not": {"enum": ["".join(random.Random(i).choices(string.ascii_lowercase, k=20)) for i in range(5_000)]},
    },
    "lists of lists": {"type": "array", "minItems": 10**5, "items": {"type": "array", "minItems": 10**5, "items": {}}},
}


@pytest.mark.parametrize("name", SLOW)
def test_a_schema_made_to_be_slow_is_compiled_or_refused_in_time(name):
    start = time.process_time()
    with contextlib.suppress(InvalidRequest):
        GRAMMARS.compile(wrap(SLOW[name]))
    assert time.process_time() - start < 4  # below 1 where nothing else runs


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a long constant", "#/const` has a text of 400000 characters; at most 100000 can be enforced"),
        ("a long name", "#/properties` has a text of 500000 characters; at most 100000"),
        ("many counts of items", r"#` has 900 counts of items \(`minItems`, `maxItems`\); at most 300"),
        ("a long text that is excluded", "#/not` is not supported here: texts of at most 200 characters"),
        ("many texts that are excluded", "#/not` is not supported here: texts of at most 200 characters, 20000 tog"),
    ],
)
def test_what_would_take_too_long_is_refused_by_name(name, problem):
    with pytest.raises(InvalidRequest, match=problem):
        GRAMMARS.compile(wrap(SLOW[name]))


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", "(?<!a)b", "(a)\\1", "\\bword", "a{,3}", "[]", "\\cJ", "a{200}{200}", "\0"]
)
def test_an_expression_that_would_mean_something_else_is_refused(pattern):
    with pytest.raises(Untranslatable):
        translate(pattern)


def test_everything_but_some_texts():
    compiled = GRAMMARS.compile(wrap({"type": "string", "pattern": none_of(["ab", "abc", '"', "\\", "\u00e9]"])}))
    for text in ("", "a", "abcd", "b", '""', "\\\\", "\u00e9", "\u00e9]]"):
        assert holds(compiled, text)
    for text in ("ab", "abc", '"', "\\", "\u00e9]"):
        assert not holds(compiled, text)
