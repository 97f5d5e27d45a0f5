"""Structured output: a request's response_format, and the tokens that it allows at each step of an answer.

Knows token ids and masks, through llguidance; knows no sampling and no text of the answer.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from .errors import InvalidRequest, shorten
from .schemas import check_size, enforceable
from .surrogates import half
from .tools import Offer

if TYPE_CHECKING:  # a name of llguidance's stub file, absent from the module
    from llguidance._lib import JsonCompileOptions

FIELD = "response_format"
KEYS = {"text": set(), "json_object": set(), "json_schema": {"json_schema"}, "regex": {"regex"}}
SCHEMA_KEYS = {"name", "description", "schema", "strict"}
MAX_REGEX = 4_096
CACHED = 32

# Between two JSON tokens: nothing, one space, or one line break with some indentation; never an endless run.
WHITESPACE = r"\x20|\n\x20{0,16}"
OPTIONS: "JsonCompileOptions" = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    # Without \u: llguidance 1.9.1 lets a free name spelled with \u0061 pass for another than "a".
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}
# White space as Python's json.dumps writes it. Where it may be left out or be another one, no key is forced.
USUAL: "JsonCompileOptions" = {
    **OPTIONS, "whitespace_pattern": None, "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "
}  # fmt: skip


class Grammars:
    """The grammars that one loaded model can be held to. Compiled ones are kept; safe to call from several threads.

    Args:
        tokenizer_json: the text of the model's tokenizer.json.
        vocab_size: the number of logits that the model gives, which may be larger than the tokenizer's vocabulary.
        eos_ids: the ids that end an answer; ids beyond `vocab_size` cannot be sampled and are left out.

    Attributes:
        eos: those of `eos_ids` that can be sampled, ascending.

    Raises:
        ValueError: the tokenizer cannot be read, or no end token is within the vocabulary.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Collection[int]):
        self.eos = sorted({int(token) for token in eos_ids if 0 <= token < vocab_size})
        if not self.eos:
            raise ValueError(f"no end token of {sorted(eos_ids)} is within the vocabulary of {vocab_size}")
        text, pieces = _without_control_tokens(tokenizer_json, vocab_size)
        self._tokenizer = LLTokenizer(text, eos_token=self.eos)
        self._text = np.zeros(vocab_size, dtype=bool)
        self._text[[token for token in pieces if token < vocab_size and token not in self.eos]] = True
        self._compiled: OrderedDict[str, tuple[LLMatcher, LLMatcher | None]] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, response_format: Mapping[str, Any]) -> "Grammar | None":
        """The grammar of an answer, in its first state.

        Args:
            response_format: OpenAI's `{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema",
                "json_schema": {"name", "schema", "description", "strict"}}`, or ours, `{"type": "regex", "regex": ...}`
                (Rust's syntax; it matches the whole answer). Keys whose value is None count as absent. A schema is
                enforced whatever `strict` says.

        Returns:
            A new Grammar, or None for text, which nothing restricts.

        Raises:
            InvalidRequest: a wrong shape, or a schema or regex that cannot be enforced; it names the feature.
        """
        if not isinstance(response_format, Mapping):
            raise InvalidRequest(FIELD, f"must be an object with a `type`; it is {shorten(response_format)}")
        given = {key: value for key, value in response_format.items() if value is not None}
        kind = given.pop("type", None)
        if not isinstance(kind, str) or kind not in KEYS:
            raise InvalidRequest(f"{FIELD}.type", f"is {shorten(kind)}; it must be one of {', '.join(KEYS)}")
        _only(given, KEYS[kind], FIELD)
        if kind == "text":
            return None
        if kind == "regex":
            return self._regex(given["regex"])
        return self._schema(given["json_schema"] if kind == "json_schema" else None)

    def _regex(self, regex: Any) -> "Grammar":
        field = f"{FIELD}.regex"
        if not isinstance(regex, str) or not 0 < len(regex) <= MAX_REGEX:
            raise InvalidRequest(field, f"must be a text of 1 to {MAX_REGEX} characters; it is {shorten(regex)}")
        _encodable(regex, field)
        return self._grammar(LLMatcher.grammar_from_regex(regex), field)

    def _schema(self, wrapper: Any) -> "Grammar":
        if wrapper is None:
            return self._json({"type": "object"}, FIELD)
        outer = f"{FIELD}.json_schema"
        if not isinstance(wrapper, Mapping):
            raise InvalidRequest(outer, f"must be an object with `name` and `schema`; it is {shorten(wrapper)}")
        given = {key: value for key, value in wrapper.items() if value is not None}
        _only(given, {"name", "schema"}, outer, SCHEMA_KEYS)
        name, strict, description = given["name"], given.get("strict", True), given.get("description", "")
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
            raise InvalidRequest(f"{outer}.name", f"must be 1 to 64 of a-z, A-Z, 0-9, _ and -; it is {shorten(name)}")
        if not isinstance(strict, bool):
            raise InvalidRequest(f"{outer}.strict", f"must be true or false; it is {shorten(strict)}")
        if not isinstance(description, str):
            raise InvalidRequest(f"{outer}.description", f"must be a text; it is {shorten(description)}")
        field = f"{outer}.schema"
        check_size(given["schema"], field)
        schema, patterns = enforceable(_plain(given["schema"], field), field)
        try:
            return self._json(schema, field)
        except InvalidRequest:
            # Where one pattern is at fault, the error should point at it and not at the whole schema.
            for pointer, pattern in patterns.items():
                self._json({"type": "string", "pattern": pattern}, f"{field}{pointer}")
            raise

    def calls(self, offer: Offer, *, listed: bool) -> "Grammar":
        """The grammar of calls of tools, as `json.dumps` writes them.

        Args:
            offer: which may be called.
            listed: whether they are one list, which may have several where the offer says so; else it is one call on
                lines of its own.

        Raises:
            InvalidRequest: the parameters of one of them are a schema that cannot be enforced.
        """
        fields = {each.name: f"tools[{place}].function.parameters" for place, each in enumerate(offer.functions)}
        plain = {each.name: _plain(each.parameters, fields[each.name]) for each in offer.functions}
        schemas = {name: enforceable(plain[name], fields[name])[0] for name in offer.names}
        # What one schema may cost is what all of them may cost together.
        together = {name: _rebased(schema, name) for name, schema in plain.items()}
        enforceable({"type": "object", "properties": together}, "tools")
        source, usual = (_calls_grammar(schemas, each, offer, listed) for each in (OPTIONS, USUAL))
        try:
            return self._grammar(source, "tools", usual)
        except InvalidRequest:
            # Where one tool is at fault, the error should point at it and not at all of them.
            for name, schema in schemas.items():
                self._json(schema, fields[name])
            raise

    def _json(self, schema: dict[str, Any], field: str) -> "Grammar":
        source, usual = (LLMatcher.grammar_from_json_schema(schema, overrides=each) for each in (OPTIONS, USUAL))
        return self._grammar(source, field, usual)

    def _grammar(self, source: str, field: str, usual: str | None = None) -> "Grammar":
        """A grammar in its first state, compiled at most once while it stays in the cache."""
        with self._lock:
            compiled = self._compiled.get(source)
            if compiled is not None:
                self._compiled.move_to_end(source)
        if compiled is None:
            matcher = self._matcher(source)
            # The first mask builds most of the lexer, and finds grammars that are too complex to be used.
            matcher.compute_bitmask()
            if matcher.is_error():
                raise InvalidRequest(field, f"cannot be enforced: {_reason(matcher)}")
            compiled = matcher, None if usual is None else self._matcher(usual)
            with self._lock:
                self._compiled[source] = compiled
                while len(self._compiled) > CACHED:
                    self._compiled.popitem(last=False)
        matcher, other = compiled
        discard = partial(self._discard, source)
        return Grammar(matcher.deep_copy(), _copy(other), self._tokenizer, self._text, self.eos, discard)

    def _matcher(self, source: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))

    def _discard(self, source: str) -> None:
        with self._lock:
            self._compiled.pop(source, None)


class Grammar:
    """Where one answer stands in its grammar: which tokens may come next. Not shared between threads; copy it.

    Made by `Grammars.compile`. Nothing bounds a string, a list or a number that the schema leaves open, so an answer
    may still run into its token limit; one that ends by itself is complete.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        usual: LLMatcher | None,
        tokenizer: LLTokenizer,
        text: np.ndarray,
        eos: list[int],
        discard: Callable[[], None],
    ):
        self._matcher = matcher
        self._usual = usual  # for what has USUAL's white space; None once the answer has not
        self._tokenizer = tokenizer
        self._text = text
        self._eos = eos
        self._discard = discard
        self._next: np.ndarray | None = None

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """The logits with -inf for every token that the grammar does not allow next.

        Args:
            logits: (vocab_size,) float32; left as they are.

        Returns:
            A new (vocab_size,) float32 array. End tokens are allowed where the answer may end, all of them.

        Raises:
            InvalidRequest: the grammar grew beyond llguidance's limits, or the tokenizer cannot spell what must follow.
        """
        allowed = self.allowed()
        if not allowed.any():
            raise InvalidRequest(FIELD, "asks for text that this model's tokenizer cannot spell")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Take the token that was sampled.

        Raises:
            ValueError: the token is not allowed here.
        """
        if not 0 <= token < len(self._text) or not self.allowed()[token]:
            raise ValueError(f"token {token} is not allowed by the grammar here")
        self._matcher.consume_token(token)
        if self._usual is not None and not self._usual.try_consume_tokens([token]):
            self._usual = None
        self._next = None

    def forced(self) -> list[int]:
        """The only text that may follow, as the tokenizer spells it, as far as there is no other; may be empty.

        White space goes on as USUAL has it, where the answer did so far. The answer may spell the text otherwise: in
        place of the last token it often has a longer one, which goes on with what is open (`compute_ff_tokens` leaves
        that out, and with it the quote before each string).
        """
        for matcher in (self._usual, self._matcher):
            if matcher is not None and (text := matcher.compute_ff_bytes()):
                return self._tokenizer.tokenize_bytes(text)
        return []

    def following(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may follow, one after the other."""
        return self._matcher.validate_tokens(list(tokens))

    def copy(self) -> "Grammar":
        """An independent grammar in the same state, for another choice of the same request."""
        return Grammar(
            self._matcher.deep_copy(), _copy(self._usual), self._tokenizer, self._text, self._eos, self._discard
        )

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but the end."""
        if self._matcher.is_error():
            return False  # the next mask says what went wrong
        if self._matcher.is_stopped():
            return True
        return self._matcher.is_accepting() and not (self.allowed() & self._text).any()

    def allowed(self) -> np.ndarray:
        """(vocab_size,) bool: the tokens that may come next, kept until one is accepted. Not to be changed.

        Raises:
            InvalidRequest: the grammar grew beyond llguidance's limits.
        """
        if self._next is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                # Copies share the lexer, and one that ran out of states fails for all of them.
                self._discard()
                raise InvalidRequest(FIELD, f"could not be followed any further: {_reason(self._matcher)}")
            self._next = np.unpackbits(bits, count=len(self._text), bitorder="little").view(bool) & self._text
            self._next[self._eos] = self._matcher.is_accepting()
        return self._next


def _without_control_tokens(tokenizer_json: str, vocab_size: int) -> tuple[str, list[int]]:
    """The tokenizer with unspellable names for its added tokens, and the ids of the pieces that spell text.

    llguidance spells text that must follow with the tokenizer's own encoder, which would turn the text of a control
    token, in a schema's constant say, into that token. It takes no logits beyond the vocabulary, so that is filled up.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    pieces = {piece: token for piece, token in model["vocab"].items() if piece not in added}
    used = set(pieces.values())
    size = max(vocab_size, 1 + max([*used, *added.values()]))
    model["vocab"] = pieces | {_unspellable(token): token for token in range(size) if token not in used}
    if model.get("unk_token") in added:
        model["unk_token"] = _unspellable(added[model["unk_token"]])
    tokenizer |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return json.dumps(tokenizer), sorted(used)


def _unspellable(token: int) -> str:
    """A name for a token that no text is encoded to: U+FFFE is no character, and no merge makes the name one piece."""
    return f"\ufffe{token}"


def _copy(matcher: LLMatcher | None) -> LLMatcher | None:
    return None if matcher is None else matcher.deep_copy()


def _rebased(schema: Any, name: str) -> Any:
    """A schema with its references as they are where it is the property of that name."""
    if isinstance(schema, list):
        return [_rebased(each, name) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _rebased(value, name) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/properties/{name}{reference[1:]}"
    return moved


def _calls_grammar(schemas: Mapping[str, Any], options: "JsonCompileOptions", offer: Offer, listed: bool) -> str:
    """Calls of functions with these schemas of their arguments; see Grammars.calls."""
    rules = []
    for place, (name, schema) in enumerate(schemas.items()):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        rules.append(f'call{place}: {head} arguments{place} "}}"')
        rules.append(f"arguments{place}: %json {json.dumps({**schema, 'x-guidance': options})}")
    call = f"({' | '.join(f'call{place}' for place in range(len(schemas)))})"
    several = f'(", " {call})*' if offer.parallel else ""
    start = f'"[" {call} {several} "]"' if listed else f'"\\n" {call} "\\n"'
    return LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *rules]))


def _only(given: Mapping[str, Any], needed: set[str], field: str, known: set[str] | None = None) -> None:
    for key in given:
        if key not in (known or needed):
            allowed = ", ".join(sorted(known or needed)) or "none"
            raise InvalidRequest(f"{field}.{key}", f"is not known here; the keys beside `type` are: {allowed}")
    for key in sorted(needed):
        if key not in given:
            raise InvalidRequest(f"{field}.{key}", "is missing")


def _encodable(text: str, field: str) -> None:
    if half(text) is not None:
        raise InvalidRequest(field, "has a surrogate that stands alone, which no answer can contain")


def _plain(value: Any, field: str) -> Any:
    """The value as plain dicts, lists, strings and numbers, in the order given (the order decides the grammar)."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    _encodable(text, field)
    return json.loads(text)


def _reason(matcher: LLMatcher) -> str:
    """llguidance's error in one line, without its hints to programmers."""
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if text.startswith("NoExtension"):
        return "nothing matches it"
    return text.split(" Enable 'coerce_one_of'")[0].split(" 1 | start:")[0][:300]
