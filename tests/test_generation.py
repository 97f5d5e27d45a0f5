"""Run with: python -m pytest tests/test_generation.py"""

import json
import re
from typing import get_args

import numpy as np
import pytest
from fakes import EOS, IDS, TOKENS, VOCAB_SIZE, hashed, peak, spell, tokenizer_json

from phi3_mlflow.runtime.answers import StopReason, finish_reason
from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.grammar import Grammars
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.stops import Stops

END = IDS["<|end|>"]
GRAMMARS = Grammars(tokenizer_json(), VOCAB_SIZE, EOS)


def answering(*, options=None, max_tokens=100, limit="max_tokens", stops=None, grammar=None):
    return Generation(
        [1, 2, 3],
        options or Options(),
        max_tokens=max_tokens,
        limit=limit,
        vocab_size=VOCAB_SIZE,
        eos=EOS,
        text=TOKENS.decoder(),
        stops=stops or Stops(),
        grammar=grammar,
    )


def feed(generation, ids):
    """The pieces of a model that wants to say these ids; nothing may follow the last one."""
    pieces = []
    for token in ids:
        pieces.append(generation.accept(peak(token)))
        if pieces[-1].reason is not None:
            break
        assert generation.next == token
    assert all(piece.reason is None for piece in pieces[:-1])
    return pieces


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_an_answer_ends_at_an_end_token_which_is_counted_and_not_shown():
    for end in EOS:
        generation = answering()
        ids = spell("hello world")
        pieces = feed(generation, [*ids, end])
        assert (text(pieces), pieces[-1].reason, generation.next) == ("hello world", "eos", None)
        assert generation.sampled == len(ids) + 1


def test_an_empty_answer_is_one_sampled_end_token():
    generation = answering()
    assert feed(generation, [END])[-1].reason == "eos"
    assert generation.sampled == 1


@pytest.mark.parametrize("limit", ["max_tokens", "context"])
def test_an_answer_ends_when_its_tokens_are_used_up_and_says_by_which_limit(limit):
    ids = spell("hello world yes no one")
    generation = answering(max_tokens=3, limit=limit)
    pieces = feed(generation, ids)
    assert (len(pieces), pieces[-1].reason, generation.next, generation.sampled) == (3, limit, None, 3)
    assert text(pieces) == "hello world yes"


def test_stop_sequences_span_tokens_and_their_tokens_count():
    ids = spell("hello world is two")
    generation = answering(stops=Stops(["orld i"]))
    pieces = feed(generation, ids)
    assert (text(pieces), pieces[-1].reason) == ("hello w", "stop_sequence")
    assert generation.sampled == 3


def test_text_that_may_begin_a_stop_sequence_is_held_back_until_it_cannot():
    pieces = feed(answering(stops=Stops(["world?"])), [*spell("hello world!"), END])
    assert [piece.text for piece in pieces] == ["hello", " ", "world!", ""]


def test_a_stop_sequence_that_the_last_allowed_token_completes_wins_over_the_limit():
    pieces = feed(answering(max_tokens=2, stops=Stops(["world"])), spell("hello world"))
    assert (text(pieces), pieces[-1].reason) == ("hello ", "stop_sequence")


def test_held_back_text_is_released_at_the_limit_and_at_the_end():
    ids = spell("hello world")
    for last, reason in ((ids, "max_tokens"), ([*ids, END], "eos")):
        pieces = feed(answering(max_tokens=2 if last is ids else 9, stops=Stops(["world!"])), last)
        assert (text(pieces), pieces[-1].reason) == ("hello world", reason)


HALF = IDS["<0xC3>"]


def test_half_a_character_is_held_back_and_replaced_only_when_the_answer_ends():
    pieces = feed(answering(), [*spell("yes"), HALF, IDS["<0xA9>"], END])
    assert [piece.text for piece in pieces] == ["yes", "", "\u00e9", ""]
    pieces = feed(answering(), [*spell("yes"), HALF, END])
    assert [piece.text for piece in pieces] == ["yes", "", "\ufffd"]
    pieces = feed(answering(max_tokens=2), [*spell("yes"), HALF])
    assert [piece.text for piece in pieces] == ["yes", "\ufffd"]


def test_a_broken_character_at_the_end_can_complete_a_stop_sequence():
    pieces = feed(answering(stops=Stops(["\ufffd"])), [*spell("yes"), HALF, END])
    assert (text(pieces), pieces[-1].reason) == ("yes", "stop_sequence")


def test_guards_end_the_answer_and_are_named():
    speaks = [*spell("yes"), IDS["<0x0A>"], *TOKENS._inner.encode("User:", add_special_tokens=False).ids]
    pieces = feed(answering(), [*speaks, *spell("hello")])
    assert (text(pieces), pieces[-1].reason) == ("yes", "self_talk")
    loop = spell("yes no " * 200)
    generation = answering(max_tokens=1000)
    pieces = feed(generation, loop)
    assert pieces[-1].reason == "repetition"
    assert generation.sampled == len(pieces) < 100
    assert text(pieces).startswith("yes no")


def test_a_guard_that_stops_in_what_was_held_back_is_named_too():
    speaks = [*spell("yes"), IDS["<0x0A>"], *(IDS[letter] for letter in "User:")]
    pieces = feed(answering(stops=Stops(["\nUser:?"])), [*speaks, END])
    assert (text(pieces), pieces[-1].reason) == ("yes", "self_talk")


def test_the_answer_can_be_ended_from_outside_with_what_it_has():
    for reason in ("max_time", "cancelled"):
        generation = answering(stops=Stops(["world!"]))
        feed(generation, spell("hello world"))
        piece = generation.end(reason)
        assert (generation.next, piece.text, piece.reason) == (None, " world"[1:], reason)
        assert generation.sampled == 2


def test_logits_beyond_the_vocabulary_are_never_chosen():
    for options in (Options(), Options(temperature=2.0, seed=1), Options(temperature=2.0, top_p=0.9, seed=1)):
        generation = answering(options=options, max_tokens=10**6, stops=Stops(repetition=False, self_talk=False))
        for state in range(100):
            logits = hashed(state)
            logits[VOCAB_SIZE:] = 50
            logits[sorted(EOS)] = -50
            generation.accept(logits)
            assert generation.next is not None
            assert generation.next < VOCAB_SIZE


def test_every_stop_reason_has_a_finish_reason():
    reasons = {reason: finish_reason(reason) for reason in get_args(StopReason)}
    assert {reason for reason, finish in reasons.items() if finish == "stop"} == {
        "eos", "stop_sequence", "repetition", "self_talk",
    }  # fmt: skip
    assert {reason for reason, finish in reasons.items() if finish == "length"} == {
        "max_tokens", "context", "max_time", "cancelled",
    }  # fmt: skip


def conforming(response_format, options=None, seed=0, max_tokens=60):
    grammar = GRAMMARS.compile(response_format)
    stops = Stops(repetition=False, self_talk=False)
    generation = answering(options=options, grammar=grammar, max_tokens=max_tokens, stops=stops)
    pieces, tokens = [], []
    while not pieces or pieces[-1].reason is None:
        pieces.append(generation.accept(hashed((seed, len(pieces)))))
        tokens += [] if generation.next is None else [generation.next]
    return generation, pieces, tokens


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_conforms_to_its_grammar_whatever_the_model_wants(seed):
    generation, pieces, tokens = conforming({"type": "regex", "regex": "(yes|no), (one|two)"}, seed=seed)
    assert re.fullmatch("(yes|no), (one|two)", text(pieces))
    assert pieces[-1].reason == "eos"
    # Nothing could follow: no end token had to be sampled.
    assert generation.sampled == len(pieces)
    assert len(tokens) == len(pieces) - 1
    assert TOKENS.decode(tokens) != text(pieces)


def test_an_answer_whose_grammar_leaves_it_open_ends_at_an_end_token():
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}}}
    for seed in range(3):
        generation, pieces, _ = conforming(wanted, Options(temperature=1.0, seed=seed), seed)
        assert pieces[-1].reason == "eos"
        assert isinstance(json.loads(text(pieces))["a"], bool)
        assert generation.sampled == len(pieces)
    generation = answering(grammar=GRAMMARS.compile({"type": "regex", "regex": "y+"}))
    letter = IDS["y"]
    assert [generation.accept(peak(token)).reason for token in (letter, letter, END)] == [None, None, "eos"]
    assert generation.sampled == 3


def test_an_answer_that_the_limit_cuts_says_so_though_it_does_not_conform():
    _, pieces, _ = conforming({"type": "regex", "regex": "[a-z]{50}"}, max_tokens=5)
    assert pieces[-1].reason == "max_tokens"
    assert 5 <= len(text(pieces)) < 50


def test_a_grammar_that_nothing_can_follow_fails_the_answer():
    generation = answering(grammar=GRAMMARS.compile({"type": "regex", "regex": "y+"}))
    with pytest.raises(ArithmeticError):
        generation.accept(np.full(VOCAB_SIZE, np.nan, np.float32))
    with pytest.raises(InvalidRequest):
        GRAMMARS.compile({"type": "regex", "regex": "("})
