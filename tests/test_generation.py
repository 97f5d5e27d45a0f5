"""Run with: python -m pytest tests/test_generation.py"""

import json
import re
from typing import get_args

import numpy as np
import pytest
from fakes import EOS, IDS, TOKENS, VOCAB_SIZE, hashed, peak, spell, tokenizer_json

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.generation import Generation, StopReason, finish_reason
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
    """The steps of a model that wants to say these ids; nothing may follow the last one."""
    steps = []
    for token in ids:
        steps.append(generation.accept(peak(token)))
        if steps[-1].reason is not None:
            break
        assert steps[-1].token == token
    assert all(step.reason is None for step in steps[:-1])
    return steps


def text(steps):
    return "".join(step.text for step in steps)


def test_an_answer_ends_at_an_end_token_which_is_counted_and_not_shown():
    for end in EOS:
        generation = answering()
        ids = spell("hello world")
        steps = feed(generation, [*ids, end])
        assert (text(steps), steps[-1].reason, steps[-1].token) == ("hello world", "eos", None)
        assert generation.sampled == len(ids) + 1


def test_an_empty_answer_is_one_sampled_end_token():
    generation = answering()
    assert feed(generation, [END])[-1].reason == "eos"
    assert generation.sampled == 1


@pytest.mark.parametrize("limit", ["max_tokens", "context"])
def test_an_answer_ends_when_its_tokens_are_used_up_and_says_by_which_limit(limit):
    ids = spell("hello world yes no one")
    generation = answering(max_tokens=3, limit=limit)
    steps = feed(generation, ids)
    assert (len(steps), steps[-1].reason, steps[-1].token, generation.sampled) == (3, limit, None, 3)
    assert text(steps) == "hello world yes"


def test_stop_sequences_span_tokens_and_their_tokens_count():
    ids = spell("hello world is two")
    generation = answering(stops=Stops(["orld i"]))
    steps = feed(generation, ids)
    assert (text(steps), steps[-1].reason) == ("hello w", "stop_sequence")
    assert generation.sampled == 3


def test_text_that_may_begin_a_stop_sequence_is_held_back_until_it_cannot():
    steps = feed(answering(stops=Stops(["world?"])), [*spell("hello world!"), END])
    assert [step.text for step in steps] == ["hello", " ", "world!", ""]


def test_a_stop_sequence_that_the_last_allowed_token_completes_wins_over_the_limit():
    steps = feed(answering(max_tokens=2, stops=Stops(["world"])), spell("hello world"))
    assert (text(steps), steps[-1].reason) == ("hello ", "stop_sequence")


def test_held_back_text_is_released_at_the_limit_and_at_the_end():
    ids = spell("hello world")
    for last, reason in ((ids, "max_tokens"), ([*ids, END], "eos")):
        steps = feed(answering(max_tokens=2 if last is ids else 9, stops=Stops(["world!"])), last)
        assert (text(steps), steps[-1].reason) == ("hello world", reason)


HALF = IDS["<0xC3>"]


def test_half_a_character_is_held_back_and_replaced_only_when_the_answer_ends():
    steps = feed(answering(), [*spell("yes"), HALF, IDS["<0xA9>"], END])
    assert [step.text for step in steps] == ["yes", "", "\u00e9", ""]
    steps = feed(answering(), [*spell("yes"), HALF, END])
    assert [step.text for step in steps] == ["yes", "", "\ufffd"]
    steps = feed(answering(max_tokens=2), [*spell("yes"), HALF])
    assert [step.text for step in steps] == ["yes", "\ufffd"]


def test_a_broken_character_at_the_end_can_complete_a_stop_sequence():
    steps = feed(answering(stops=Stops(["\ufffd"])), [*spell("yes"), HALF, END])
    assert (text(steps), steps[-1].reason) == ("yes", "stop_sequence")


def test_guards_end_the_answer_and_are_named():
    speaks = [*spell("yes"), IDS["<0x0A>"], *TOKENS._inner.encode("User:", add_special_tokens=False).ids]
    steps = feed(answering(), [*speaks, *spell("hello")])
    assert (text(steps), steps[-1].reason) == ("yes", "self_talk")
    loop = spell("yes no " * 200)
    generation = answering(max_tokens=1000)
    steps = feed(generation, loop)
    assert steps[-1].reason == "repetition"
    assert generation.sampled == len(steps) < 100
    assert text(steps).startswith("yes no")


def test_a_guard_that_stops_in_what_was_held_back_is_named_too():
    speaks = [*spell("yes"), IDS["<0x0A>"], *(IDS[letter] for letter in "User:")]
    steps = feed(answering(stops=Stops(["\nUser:?"])), [*speaks, END])
    assert (text(steps), steps[-1].reason) == ("yes", "self_talk")


def test_the_answer_can_be_ended_from_outside_with_what_it_has():
    for reason in ("max_time", "cancelled"):
        generation = answering(stops=Stops(["world!"]))
        feed(generation, spell("hello world"))
        step = generation.end(reason)
        assert (step.token, step.text, step.reason) == (None, " world"[1:], reason)
        assert generation.sampled == 2


def test_logits_beyond_the_vocabulary_are_never_chosen():
    for options in (Options(), Options(temperature=2.0, seed=1), Options(temperature=2.0, top_p=0.9, seed=1)):
        generation = answering(options=options, max_tokens=10**6, stops=Stops(repetition=False, self_talk=False))
        for state in range(100):
            logits = hashed(state)
            logits[VOCAB_SIZE:] = 50
            logits[sorted(EOS)] = -50
            step = generation.accept(logits)
            assert step.token is not None
            assert step.token < VOCAB_SIZE


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
    steps = []
    while not steps or steps[-1].reason is None:
        steps.append(generation.accept(hashed((seed, len(steps)))))
    return generation, steps


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_conforms_to_its_grammar_whatever_the_model_wants(seed):
    generation, steps = conforming({"type": "regex", "regex": "(yes|no), (one|two)"}, seed=seed)
    assert re.fullmatch("(yes|no), (one|two)", text(steps))
    assert steps[-1].reason == "eos"
    # Nothing could follow: no end token had to be sampled.
    assert generation.sampled == len(steps)
    assert TOKENS.decode([step.token for step in steps[:-1]]) != text(steps)


def test_an_answer_whose_grammar_leaves_it_open_ends_at_an_end_token():
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}}}
    for seed in range(3):
        generation, steps = conforming(wanted, Options(temperature=1.0, seed=seed), seed)
        assert steps[-1].reason == "eos"
        assert isinstance(json.loads(text(steps))["a"], bool)
        assert generation.sampled == len(steps)
    generation = answering(grammar=GRAMMARS.compile({"type": "regex", "regex": "y+"}))
    letter = IDS["y"]
    assert [generation.accept(peak(token)).reason for token in (letter, letter, END)] == [None, None, "eos"]
    assert generation.sampled == 3


def test_an_answer_that_the_limit_cuts_says_so_though_it_does_not_conform():
    _, steps = conforming({"type": "regex", "regex": "[a-z]{50}"}, max_tokens=5)
    assert steps[-1].reason == "max_tokens"
    assert 5 <= len(text(steps)) < 50


def test_a_grammar_that_nothing_can_follow_fails_the_answer():
    generation = answering(grammar=GRAMMARS.compile({"type": "regex", "regex": "y+"}))
    with pytest.raises(ArithmeticError):
        generation.accept(np.full(VOCAB_SIZE, np.nan, np.float32))
    with pytest.raises(InvalidRequest):
        GRAMMARS.compile({"type": "regex", "regex": "("})
