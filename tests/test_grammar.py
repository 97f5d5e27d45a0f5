"""Run with: python -m pytest tests/test_grammar.py"""

import json
import os
import random
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.grammar import CACHED, Grammars

PIECES = [
    *(
        "\u2581",
        "\u2581\u2581\u2581\u2581",
        '\u2581"',
        *'{}[]":,-0123456789.eE\\abdnxyz',
        '{"',
        '":',
        '","',
        '"}',
        'a"',
    ),
    *("null", "true", "false", "\n", "10", "00", "\u00e9", "ab", "</s", "<|", "|>", "end"),
]
NAMES = list(dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]))
CONTROL = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|endoftext|>": len(NAMES),
    "<|end|>": len(NAMES) + 1,
    "<|user|>": len(NAMES) + 2,
}
EOS = [2, CONTROL["<|endoftext|>"], CONTROL["<|end|>"]]
LOGITS = len(NAMES) + 10  # as in Phi-3, the model gives more logits than the tokenizer has tokens
ZEROS = np.zeros(LOGITS, dtype=np.float32)


def tokenizer_json(names=NAMES, control=CONTROL):
    """A tokenizer of Phi-3's kind: BPE with byte fallback, "</s>" an added token that is not marked special."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": token, "content": name, "special": name != "</s>", **flags} for name, token in control.items()]
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "unk_token": "<unk>" if "<unk>" in names else None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {name: token for token, name in enumerate(names)},
                "merges": [],
            },
        }
    )


GRAMMARS = Grammars(tokenizer_json(), LOGITS, EOS)


def piece(token):
    name = NAMES[token]
    return bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("\u2581", " ").encode()


def wrap(schema, **keys):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **keys}}


def allowed(grammar):
    return set(np.flatnonzero(np.isfinite(grammar.mask(ZEROS))).tolist())


def spell(grammar, text):
    """Take a text byte by byte; False where the grammar does not allow it."""
    for byte in text.encode():
        token = NAMES.index(f"<0x{byte:02X}>") if byte > 127 else next(
            (t for t in allowed(grammar) if t < len(NAMES) and t not in EOS and piece(t) == bytes([byte])), -1
        )  # fmt: skip
        try:
            grammar.accept(token)
        except ValueError:
            return False
    return True


def accepts(grammar, text):
    grammar = grammar.copy()
    return spell(grammar, text) and allowed(grammar).issuperset(EOS)


CLOSERS = [NAMES.index(name) for name in ('"', "]", "}", '"}', 'a"')]


def walk(grammar, rng, limit=400):
    """The bytes of an answer of random allowed tokens, or None where it did not end within `limit` tokens."""
    answer = b""
    for _ in range(limit):
        tokens = allowed(grammar)
        ends, text = tokens.intersection(EOS), sorted(tokens.difference(EOS))
        assert len(ends) in (0, len(EOS))
        assert all(token in range(3, len(NAMES)) for token in text)
        assert grammar.finished == (not text)
        if ends and (not text or rng.random() < 0.5):
            grammar.accept(rng.choice(sorted(ends)))
            assert grammar.finished
            return answer
        closers = [token for token in text if token in CLOSERS]
        token = rng.choice(closers if closers and rng.random() < 0.25 else text)
        answer += piece(token)
        grammar.accept(token)
    return None


def closed(schema, **keys):
    return {"type": "object", "additionalProperties": False, "properties": schema, **keys}


NODE = closed(
    {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, required=["v"]
)
SCHEMAS = [
    {},
    {"type": "object"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "string"},
    {"type": "boolean"},
    {"type": ["null", "integer"]},
    {"const": 0.1},
    {"const": -7, "title": "t", "description": "d", "default": 1, "examples": [1], "deprecated": True},
    {"const": 2**53},
    {"const": 123456.789012345},
    {"enum": [1, 2.5, "a", None, True, [1, {"a": []}], {"b": {"c": "d"}}]},
    {"const": '</s> <|end|> <|user|> "q" \\ \u00e9\n\ufffe7'},
    closed({"</s>": {"const": "<s>"}}, required=["</s>"]),
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "exclusiveMaximum": 0.1, "minimum": -0.25},
    {"type": "number", "minimum": -1.5, "maximum": 2.25},
    {"type": "number", "exclusiveMaximum": 0},
    {"type": "integer", "exclusiveMinimum": -10, "exclusiveMaximum": 25},
    {"type": "integer", "minimum": 1.5, "maximum": 7.5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"type": "number", "multipleOf": 3, "minimum": -30, "maximum": 30},
    {"type": "string", "minLength": 2.0, "maxLength": 4},
    {"type": "string", "pattern": "^a.b$"},
    {"type": "string", "pattern": "^[^a]{1,3}$"},
    {"type": "string", "pattern": "^\\d{3}-\\w$"},
    {"type": "string", "pattern": "^$"},
    {"type": "string", "format": "date-time", "maxLength": 20},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "enum": ["a", "bb"], "minLength": 2},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False},
    {
        "type": "array",
        "prefixItems": [{"type": "boolean"}],
        "items": {"type": "null"},
        "minItems": 2,
        "uniqueItems": False,
    },
    closed({"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}}, required=["a"]),
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {}}, "required": ["b"], "additionalProperties": {"type": "null"}},
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
    closed({}, patternProperties={"^a": {"type": "integer"}}),
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
    closed({"a": {"type": "null"}, "b": {"type": "null"}}, required=["a", "b"], minProperties=2),
    closed(
        {"$ref": {"const": 1}, "x-guidance": {"const": 2}, "type": {}, "$schema": {}}, required=["$ref", "x-guidance"]
    ),
    {"anyOf": [{"type": "integer"}, closed({"k": {"const": "v"}}, required=["k"])]},
    {"oneOf": [closed({"k": {"const": "a"}}, required=["k"]), closed({"k": {"const": "b"}}, required=["k"])]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"type": "object", "allOf": [{"required": ["a"]}, closed({"a": {"maximum": 3}, "b": {}})]},
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    {"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "integer"}}, "minimum": 3},
    {"type": "integer", "anyOf": [{"minimum": 10}, {"maximum": -10}]},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.org/a", "type": "null"},
    {"properties": {"a": {"type": "null"}}, "items": {"type": "integer"}, "minimum": 5, "minLength": 3},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_whatever_walk_ends_by_itself_parses_and_validates(schema):
    compiled = GRAMMARS.compile(wrap(schema, strict=True, description="d"))
    validator = jsonschema.Draft202012Validator(schema)
    answers = [walk(compiled.copy(), random.Random(seed)) for seed in range(12)]
    ended = [answer.decode() for answer in answers if answer is not None]
    assert ended
    for answer in ended:
        validator.validate(json.loads(answer))


def test_a_json_object_is_an_object_and_ends_at_its_brace():
    compiled = GRAMMARS.compile({"type": "json_object", "json_schema": None, "regex": None})
    for seed in range(20):
        answer = walk(compiled.copy(), random.Random(seed))
        assert answer is None or isinstance(json.loads(answer), dict)
    assert not accepts(compiled, "[1]")
    assert spell(compiled, '{"a": [1, 2]}')
    assert compiled.finished
    assert allowed(compiled) == set(EOS)


def test_text_has_no_grammar():
    assert GRAMMARS.compile({"type": "text"}) is None


def test_whitespace_is_bounded_everywhere():
    compiled = GRAMMARS.compile({"type": "json_object"})
    assert accepts(compiled, '{"a":1}')
    assert accepts(compiled, '{\n  "a": 1,\n  "b": [ 1 ]\n}')
    for text in (' {"a":1}', '\n{"a":1}', '{"a":1} ', '{  "a":1}', '{\n\n"a":1}', '{\t"a":1}', '{"a":1\n' + " " * 17):
        assert not accepts(compiled, text)


def test_keys_are_forced_with_the_white_space_that_json_mostly_has_as_long_as_an_answer_has_it():
    compiled = GRAMMARS.compile(wrap(closed({"a": {"const": 1}, "b": {"type": "integer"}}, required=["a", "b"])))

    def forced():
        return b"".join(map(piece, compiled.forced()))

    assert forced() == b'{"a": 1, "b": '
    assert spell(compiled, '{"a":')
    assert forced() == b' 1, "b": '
    assert accepts(compiled, '1, "b":2}')  # nothing is forced but what is proposed
    copied = compiled.copy()
    assert spell(compiled, "1")
    assert forced() == b""
    assert spell(compiled, ', "')
    assert forced() == b'b"'
    assert b"".join(map(piece, copied.forced())) == b' 1, "b": '


def test_a_quote_is_forced_though_a_longer_token_begins_with_it():
    compiled = GRAMMARS.compile(wrap(closed({"a": {"type": "string"}, "b": {"type": "string"}}, required=["a", "b"])))
    assert b"".join(map(piece, compiled.forced())) == b'{"a": "'
    assert spell(compiled, '{"a": "x"')
    assert b"".join(map(piece, compiled.forced())) == b', "b": "'


def test_a_regex_holds_the_whole_answer():
    compiled = GRAMMARS.compile({"type": "regex", "regex": "(yes|no)[.!]?|[0-9]{2}"})
    for seed in range(20):
        assert re.fullmatch(r"(yes|no)[.!]?|[0-9]{2}", walk(compiled.copy(), random.Random(seed)).decode())
    assert accepts(compiled, "yes")
    assert not accepts(compiled, "yes, sir")


def test_control_tokens_are_never_allowed_even_where_their_text_is():
    for response_format in (wrap({"const": "<|end|></s>"}), {"type": "regex", "regex": '"<\\|end\\|></s>"'}):
        compiled = GRAMMARS.compile(response_format)
        assert accepts(compiled, '"<|end|></s>"')
        assert spell(compiled, '"')
        assert allowed(compiled) <= {NAMES.index("<0x3C>"), NAMES.index("<|")}
    compiled = GRAMMARS.compile({"type": "regex", "regex": "(?s:.*)"})
    assert allowed(compiled).isdisjoint({0, 1, CONTROL["<|user|>"], *range(len(NAMES) + 3, LOGITS)})


def test_free_names_cannot_repeat_a_declared_one_through_escapes():
    compiled = GRAMMARS.compile(
        wrap({"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}})
    )
    assert accepts(compiled, '{"a":1,"b":null}')
    assert not accepts(compiled, '{"a":null}')
    assert not accepts(compiled, '{"\\u0061":null}')


def test_properties_come_in_the_order_of_the_schema_whatever_was_compiled_before():
    for first, second in ("ab", "ba"):
        compiled = GRAMMARS.compile(wrap(closed({first: {}, second: {}})))
        assert accepts(compiled, f'{{"{first}":1,"{second}":2}}')
        assert not accepts(compiled, f'{{"{second}":1,"{first}":2}}')


def test_a_mask_leaves_the_logits_and_keeps_the_values_of_what_is_allowed():
    logits = np.arange(LOGITS, dtype=np.float32)
    compiled = GRAMMARS.compile(wrap({"type": "boolean"}))
    masked = compiled.mask(logits)
    assert masked.dtype == np.float32
    assert np.array_equal(logits, np.arange(LOGITS))
    assert np.array_equal(masked[np.isfinite(masked)], sorted(allowed(compiled)))


def test_a_copy_goes_its_own_way():
    compiled = GRAMMARS.compile(wrap({"enum": ["a", "b"]}))
    spell(compiled, '"')
    copy = compiled.copy()
    assert spell(compiled, 'a"')
    assert compiled.finished
    assert not copy.finished
    assert spell(copy, 'b"')


@pytest.mark.parametrize("token", [-1, 0, EOS[0], NAMES.index("["), CONTROL["<|user|>"], LOGITS - 1, LOGITS])
def test_a_token_that_is_not_allowed_is_a_programming_error(token):
    with pytest.raises(ValueError, match="not allowed"):
        GRAMMARS.compile({"type": "json_object"}).accept(token)


def test_a_number_may_end_or_go_on():
    compiled = GRAMMARS.compile(wrap({"type": "integer"}))
    assert spell(compiled, "12")
    assert not compiled.finished
    assert allowed(compiled).issuperset(EOS)
    compiled.accept(EOS[1])
    assert compiled.finished


def test_end_tokens_beyond_the_logits_are_left_out_and_one_must_remain():
    grammars = Grammars(tokenizer_json(), len(NAMES), [2, len(NAMES), 10**6])
    compiled = grammars.compile(wrap({"const": 1}))
    compiled.accept(NAMES.index("1"))
    assert np.flatnonzero(np.isfinite(compiled.mask(ZEROS[: len(NAMES)]))).tolist() == [2]
    with pytest.raises(ValueError, match="no end token"):
        Grammars(tokenizer_json(), len(NAMES), [10**6])


@pytest.mark.parametrize("schema", [{"const": "b"}, {"type": "string", "pattern": "^[bc]$"}])
def test_text_that_the_tokenizer_cannot_spell_is_an_error_and_no_answer(schema):
    names = ["a", '"', *(f"<0x{byte:02X}>" for byte in range(32))]
    grammars = Grammars(tokenizer_json(names, {"<end>": len(names)}), 40, [len(names)])
    with pytest.raises(InvalidRequest, match=r"cannot spell|could not be followed"):  # noqa: PT012
        grammar = grammars.compile(wrap(schema))
        for _ in range(4):
            assert not grammar.finished
            grammar.accept(int(np.isfinite(grammar.mask(np.zeros(40, dtype=np.float32))).argmax()))


def test_an_end_token_does_not_spell_text():
    names = ["b", '"', *(f"<0x{byte:02X}>" for byte in range(32))]
    grammar = Grammars(tokenizer_json(names, {}), 40, [0]).compile(wrap({"type": "string", "pattern": "^(b|\u00e9)$"}))
    grammar.accept(1)
    with pytest.raises(InvalidRequest, match="tokenizer cannot spell"):
        grammar.mask(np.zeros(40, dtype=np.float32))


def test_a_grammar_that_outgrows_the_limits_ends_in_a_clean_error():
    options = [{"type": "object", "properties": {f"k{i}": {"type": "string"}}} for i in range(900)]
    compiled = GRAMMARS.compile(wrap({"anyOf": options}))
    with pytest.raises(InvalidRequest, match="could not be followed any further: "):  # noqa: PT012
        for byte in '{"k1":"a","k2":"b","k3":"c"}':
            compiled.accept(NAMES.index(byte) if byte in NAMES else NAMES.index(f"<0x{ord(byte):02X}>"))
            assert not compiled.finished
            compiled.mask(ZEROS)


def test_a_grammar_that_could_not_be_followed_is_compiled_anew_for_the_next_answer():
    grammars = Grammars(tokenizer_json(), LOGITS, EOS)
    spent = grammars.compile(wrap({"const": 10}))
    assert len(grammars._compiled) == 1
    spent._matcher.consume_token(NAMES.index("a"))
    with pytest.raises(InvalidRequest, match="could not be followed any further"):
        spent.mask(ZEROS)
    # Copies share llguidance's lexer, and one that ran out of states fails for all of them.
    assert len(grammars._compiled) == 0
    assert accepts(grammars.compile(wrap({"const": 10})), "10")


def test_compiled_grammars_are_kept_and_the_oldest_go_first():
    grammars = Grammars(tokenizer_json(), LOGITS, EOS)
    for number in [0, *range(CACHED), 0, CACHED]:
        grammars.compile(wrap({"const": number}))
    kept = "".join(grammars._compiled)
    assert len(grammars._compiled) == CACHED
    assert '"enum":[0]' in kept
    assert '"enum":[1]' not in kept
    assert f'"enum":[{CACHED}]' in kept


def test_threads_share_one_set_of_grammars():
    failures = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(10):
            schema = rng.choice(SCHEMAS[30:40])
            answer = walk(GRAMMARS.compile(wrap(schema)), rng, 100)
            if answer is not None and not jsonschema.Draft202012Validator(schema).is_valid(json.loads(answer)):
                failures.append((schema, answer))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def shared(levels):
    """A schema in which one object stands in two places, in which another one does, and so on."""
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema, schema]}
    return schema


# A schema that is in itself.
ROUND = {"type": "array"}
ROUND["items"] = {"anyOf": [ROUND, ROUND]}


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(400)}

# (response_format, the field that the error names, what it says)
REFUSED = [
    (None, "response_format", "must be an object"),
    ({}, "response_format.type", "None"),
    ({"type": "yaml"}, "response_format.type", "text, json_object, json_schema, regex"),
    ({"type": ["text"]}, "response_format.type", "must be one of"),
    ({"type": "text", "schema": {}}, "response_format.schema", "not known"),
    ({"type": "json_object", "json_schema": {}}, "response_format.json_schema", "are: none"),
    ({"type": "json_schema"}, "response_format.json_schema", "missing"),
    ({"type": "json_schema", "json_schema": []}, "response_format.json_schema", "must be an object"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "missing"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema", "missing"),
    (wrap({}, name="a b"), "response_format.json_schema.name", "'a b'"),
    (wrap({}, name=5), "response_format.json_schema.name", "5"),
    (wrap({}, strict="yes"), "response_format.json_schema.strict", "true or false"),
    (wrap({}, description=1), "response_format.json_schema.description", "text"),
    (wrap({}, lenient=True), "response_format.json_schema.lenient", "description, name, schema, strict"),
    ({"type": "regex"}, "response_format.regex", "missing"),
    ({"type": "regex", "regex": ""}, "response_format.regex", "1 to"),
    ({"type": "regex", "regex": "x" * 5000}, "response_format.regex", "1 to"),
    ({"type": "regex", "regex": 1}, "response_format.regex", "must be a text"),
    ({"type": "regex", "regex": "(a"}, "response_format.regex", "unclosed group"),
    ({"type": "regex", "regex": "(?=a)b"}, "response_format.regex", "look-around"),
    ({"type": "regex", "regex": "[^\\s\\S]"}, "response_format.regex", "nothing matches it"),
    ({"type": "regex", "regex": "(?-u:\\xff)"}, "response_format.regex", "invalid UTF-8"),
    ({"type": "regex", "regex": "\ud800"}, "response_format.regex", "surrogate"),
]
SCHEMA = "response_format.json_schema.schema"
REFUSED_SCHEMAS = [
    (True, "", "JSON Schema object"),
    ([], "", "JSON Schema object"),
    ({"const": {1, 2}}, "", "is not JSON"),
    ({"const": float("nan")}, "", "is not JSON"),
    ({"const": "\ud800"}, "", "surrogate"),
    (nested(64), "", "levels deep"),
    (nested(5000), "", "levels deep"),
    (shared(24), "", "has [0-9]{9} characters"),
    (shared(30), "", "has [0-9]{11} characters"),
    (shared(400), "", "levels deep"),
    (ROUND, "", "levels deep"),
    ({"enum": ["x" * 1_000_000]}, "", "at most 1000000"),
    ({"type": "string", "maxLenght": 3}, "#/maxLenght", "not supported.*maxLength"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "#/$schema", "draft-07"),
    ({"$schema": 4}, "#/$schema", "4"),
    (
        {"items": {"$schema": "http://json-schema.org/draft-07/schema", "$id": "https://example.org"}},
        "#/items/$schema",
        "keeps to one draft",
    ),
    *(
        ({keyword: {}}, f"#/{keyword}", "not supported")
        for keyword in ("contains", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy")
    ),
    ({"not": {"pattern": "a"}}, "#/not", "contrary of `pattern`"),
    ({"not": {"type": "integer"}}, "#/not", "fraction"),
    ({"not": {"const": [1]}}, "#/not", "only texts, numbers"),
    ({"if": {"format": "date"}, "then": False}, "#/if", "contrary of `pattern`"),
    ({"propertyNames": {"format": "uuid"}}, "#/propertyNames", "with `format`"),
    ({"unevaluatedItems": False, "$ref": "#/$defs/a", "$defs": {"a": {}}}, "#/unevaluatedItems", "beside \\$ref"),
    ({"dependencies": {"a": "b"}}, "#/dependencies/a", "must be a schema"),
    ({"dependentRequired": []}, "#/dependentRequired", "must be an object"),
    ({"uniqueItems": 1}, "#/uniqueItems", "true or false"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems", "not supported"),
    ({"items": 5}, "#/items", "must be a schema"),
    ({"properties": []}, "#/properties", "object of schemas"),
    ({"properties": {"a/b~c": 1}}, "#/properties/a~1b~0c", "must be a schema"),
    ({"properties": {"\x01": {}}}, "#/properties", "control character"),
    ({"required": ["\x7f"]}, "#/required", "control character"),
    ({"enum": [["a\x00"]]}, "#/enum", "control character"),
    ({"const": {"\x1f": 1}}, "#/const", "control character"),
    ({"anyOf": []}, "#/anyOf", "at least one"),
    ({"allOf": {}}, "#/allOf", "at least one"),
    ({"allOf": [{"not": {"items": {"type": "null"}}}]}, "#/allOf/0/not", "not supported"),
    ({"type": "strin"}, "#/type", "string, number"),
    ({"type": []}, "#/type", "string, number"),
    ({"type": ["string", {}]}, "#/type", "string, number"),
    ({"enum": []}, "#/enum", "at least one"),
    ({"minLength": "a"}, "#/minLength", "whole number"),
    ({"minLength": True}, "#/minLength", "whole number"),
    ({"minItems": 10**7}, "#/minItems", "1000000"),
    ({"maxLength": -1}, "#/maxLength", "-1"),
    ({"minimum": "0"}, "#/minimum", "must be a number"),
    ({"exclusiveMinimum": "1"}, "#/exclusiveMinimum", "must be a number"),
    ({"minimum": 2**62}, "#/minimum", "1000000000000000000 is the largest"),
    ({"exclusiveMaximum": -1e30}, "#/exclusiveMaximum", "-1e\\+30"),
    ({"const": 0.12345678901234567}, "#/const", "15 digits"),
    ({"enum": [{"a": [10**400]}]}, "#/enum", "15 digits"),
    ({"multipleOf": 0}, "#/multipleOf", "above 0"),
    ({"multipleOf": 0.1}, "#/multipleOf", "whole"),
    ({"pattern": 1}, "#/pattern", "regular expression"),
    ({"pattern": "a" * 3000}, "#/pattern", "2048"),
    ({"type": "object", "properties": {"a": {"pattern": "(?<!a)b"}}}, "#/properties/a/pattern", "look-around"),
    ({"patternProperties": {"(": {}}}, "#/patternProperties/(", "unclosed"),
    ({"patternProperties": {"a": {}, "b": {}}}, "", "not disjoint"),
    ({"format": "idn-email"}, "#/format", "date-time, duration"),
    ({"format": ["date"]}, "#/format", "date"),
    ({"required": "a"}, "#/required", "property names"),
    ({"required": [1]}, "#/required", "property names"),
    ({"$ref": 1}, "#/$ref", "1"),
    ({"$ref": "https://example.org/a.json"}, "#/$ref", "no schema in this document"),
    ({"$ref": "#/$defs/a"}, "#/$ref", "no schema"),
    ({"$ref": "#/title", "title": "t"}, "#/$ref", "no schema"),
    ({"$ref": "#"}, "#", "requires itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}}, "#/$defs/a", "requires itself"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#", "requires itself"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#", "requires itself"),
    ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "#", "requires itself"),
    ({"anyOf": [{"$ref": "#"}, {"$ref": "#/anyOf/0"}]}, "#", "requires itself"),
    ({"$defs": {**CHAIN, "a400": {"$ref": "#/$defs/a0"}}, "$ref": "#/$defs/a0"}, "#", "requires itself"),
    ({"minProperties": 2}, "#/minProperties", "at most 1"),
    (closed({c: {} for c in "abcdefghijkl"}, minProperties=5), "#/minProperties", "choices among 12"),
    ({"type": "string", "allOf": [{"pattern": f".*{c}.*"} for c in "abcdefghi"]}, "#", "at most 8"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf", "its branches 1 and 0 may both hold"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "", "greater"),
    ({"type": "string", "pattern": "^abc$", "maxLength": 2}, "", "Unsatisfiable"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "", "Unsatisfiable"),
]


@pytest.mark.parametrize(
    ("response_format", "field", "problem"),
    REFUSED + [(wrap(schema), SCHEMA + pointer, problem) for schema, pointer, problem in REFUSED_SCHEMAS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_enforced_is_refused_by_name(response_format, field, problem):
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.compile(response_format)
    error = caught.value
    assert error.field.startswith(field)
    assert re.search(problem, str(error))
    assert "\n" not in str(error)
    assert len(str(error)) < 700


def test_a_long_chain_of_references_is_followed():
    compiled = GRAMMARS.compile(wrap({"$defs": {**CHAIN, "a400": {"const": 1}}, "$ref": "#/$defs/a0"}))
    assert accepts(compiled, "1")


needs_vocabulary = pytest.mark.skipif(
    "PHI3_TOKENIZER" not in os.environ, reason="PHI3_TOKENIZER names no folder with Phi-3's tokenizer"
)


def real():
    """The real tokenizer, and its grammars."""
    folder = Path(os.environ["PHI3_TOKENIZER"])
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    return Tokenizer.from_file(str(path)), Grammars(path.read_text("utf-8"), 32064, [2, 32000, 32001, 32007])


@needs_vocabulary
def test_in_the_real_vocabulary_an_answer_takes_less_than_half_of_its_steps():
    person = {"name": {"type": "string"}, "age": {"type": "integer"}, "married": {"type": "boolean"}}
    address = {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": ["string", "null"]}}
    fields = person | {"address": closed(address, required=list(address)), "kind": {"enum": ["person", "company"]}}
    answer = {"name": "Ada Lovelace", "age": 36, "married": True}
    answer |= {"address": {"street": "12 St James's Square", "city": "London", "zip": None}, "kind": "person"}
    tokenizer, grammars = real()
    compiled = grammars.compile(wrap(closed(fields, required=list(fields))))
    ids = tokenizer.encode("\n" + json.dumps(answer), add_special_tokens=False).ids[2:]
    tokens, steps = iter(ids), 0
    compiled.accept(next(tokens))
    while not compiled.finished:
        steps += 1
        for expected in [*compiled.forced(), None]:  # behind what comes as proposed, the step gives one token more
            token = next(tokens)
            compiled.accept(token)
            if compiled.finished or token != expected:
                break
    # The pieces of five values, and what ends a string or a number.
    assert (steps, len(ids)) == (24, 56)


@needs_vocabulary
def test_the_real_vocabulary_spells_answers_that_parse():
    tokenizer, grammars = real()
    compiled = grammars.compile(wrap({"$defs": {"node": NODE}, **NODE}))
    logits = np.zeros(32064, dtype=np.float32)
    for seed in range(3):
        grammar, rng, ids = compiled.copy(), random.Random(seed), []
        while not grammar.finished:
            tokens = np.flatnonzero(np.isfinite(grammar.mask(logits))).tolist()
            closers = [token for token in tokens if "}" in tokenizer.decode([token])]
            ids.append(rng.choice(closers or tokens))
            grammar.accept(ids[-1])
        jsonschema.Draft202012Validator(NODE | {"$defs": {"node": NODE}}).validate(json.loads(tokenizer.decode(ids)))
