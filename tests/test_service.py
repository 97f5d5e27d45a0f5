"""Run with: python -m pytest tests/test_service.py"""

import itertools
import math
import pickle
import threading

import pytest
from fakes import IDS, TOKENS, VOCAB_SIZE, FakeDecoder, spell

from phi3_mlflow.runtime import service as service_module
from phi3_mlflow.runtime.answers import Piece
from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.errors import Busy, InvalidRequest, Unavailable, WeightsError
from phi3_mlflow.runtime.model import AnswerFailed, ModelUnavailable, OutOfTime, RequestRefused, TryLater
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.prompts import DEFAULT_MAX_TOKENS
from phi3_mlflow.runtime.service import Service

LETTERS = spell("abcdefghijklmnopqrstuvwxyz")
ENDLESS = LETTERS[1:] * 400


@pytest.fixture
def load():
    """Makes services over a fake decoder, and closes them after the test."""
    loaded = []

    def make(script=None, **values):
        loaded.append(Service(TOKENS, FakeDecoder(script, **values)))
        return loaded[-1]

    yield make
    for service in loaded:
        service.close()


def says(text):
    return lambda prompt: spell(text)


def chat(*contents, **options):
    """A conversation that a user begins; a content that begins with "system:" is one of a system message."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [
        {"role": "system", "content": content[7:]}
        if content.startswith("system:")
        else {"role": next(roles), "content": content}
        for content in contents
    ]
    return Request(tuple(messages), Options(**options))


def length(*contents):
    return len(TOKENS.encode_chat(chat(*contents).prompt))


def answer(service, request):
    return service.run(service.prepare(request)).wait()


def test_a_request_is_answered_with_both_counts(load):
    service = load(says("madrid"))
    given = answer(service, chat("the capital of spain"))
    assert [(c.text, c.reason, c.tokens) for c in given.choices] == [("madrid", "eos", 2)]
    assert given.prompt_tokens == length("the capital of spain")
    assert given.dropped == 0


def test_an_answer_comes_in_pieces_that_make_up_the_whole(load):
    service = load(says("hello world yes"))
    run = service.run(service.prepare(chat("hello")))
    pieces = list(run)
    assert [piece.text for piece in pieces] == ["hello", " world", " yes", ""]
    assert pieces[-1] == Piece(0, "", "eos", None, last=True)
    assert run.answer.choices[0].text == "hello world yes"


def test_each_token_of_an_answer_has_its_log_probability_and_the_likeliest_ones_beside_it(load):
    service = load(says("hello world yes"))
    whole = answer(service, chat("one", logprobs=True, top_logprobs=2)).choices[0]
    assert [(told.start, told.token) for told in whole.logprobs] == [(0, b"hello"), (5, b" world"), (11, b" yes")]
    for told in whole.logprobs:
        # The fake's logits: 10 for the token it says, -10 for all others.
        assert told.logprob == pytest.approx(-math.log1p((VOCAB_SIZE - 1) * math.exp(-20)))
        assert told.top[0] == (told.token, told.logprob)
        assert told.top[1] == (b"<unk>", pytest.approx(told.logprob - 20))
    assert answer(service, chat("one")).choices[0].logprobs is None
    assert [told.top for told in answer(service, chat("one", logprobs=True)).choices[0].logprobs] == [(), (), ()]


def test_tokens_behind_bytes_that_never_became_a_character_begin_where_their_text_does(load):
    ids = [IDS["<0xF0>"], IDS["<0x9F>"], *spell("yes"), IDS["<0xE2>"], *spell("no"), IDS["<0xC3>"]]
    choice = answer(load(lambda prompt: ids), chat("one", logprobs=True)).choices[0]
    assert choice.text == "\ufffd yes\ufffd no\ufffd"
    starts = [told.start for told in choice.logprobs]
    assert [starts[0], starts[1]] == [0, 0]
    for told in choice.logprobs:
        word = told.token.decode(errors="replace")
        assert choice.text[told.start :].startswith(word[:1] if "\ufffd" in word else word)


def test_pieces_carry_the_log_probabilities_of_the_tokens_whose_text_they_begin(load):
    service = load(says("yes hello, é"))
    run = service.run(service.prepare(chat("one", logprobs=True, stop=("lo!",))))
    pieces = [piece for piece in run if piece.text]
    assert b"".join(told.token for piece in pieces for told in piece.logprobs) == run.answer.choices[0].text.encode()
    shown = 0
    for piece in pieces:
        assert all(shown <= told.start < shown + len(piece.text) for told in piece.logprobs)
        shown += len(piece.text)
    assert [told for piece in pieces for told in piece.logprobs] == run.answer.choices[0].logprobs


def test_tokens_of_a_stop_sequence_have_no_log_probability_in_the_answer(load):
    service = load(says("hello world yes"))
    choice = answer(service, chat("one", logprobs=True, stop=("ld y",))).choices[0]
    assert (choice.text, choice.tokens) == ("hello wor", 3)
    assert [told.token for told in choice.logprobs] == [b"hello", b" world"]


def test_rows_are_answered_together_and_each_is_named_when_it_has_ended(load):
    service = load(lambda prompt: [token for token in prompt if token in LETTERS[1:]], slots=2)
    rows = [service.prepare(chat(letter * (7 - at), max_tokens=20)) for at, letter in enumerate("abcdef")]
    ended = dict(service.run_table(rows))
    assert sorted(ended) == list(range(6))
    texts = [ended[row].choices[0].text for row in range(6)]
    assert texts == ["a" * 7, "b" * 6, "c" * 5, "d" * 4, "e" * 3, "f" * 2]
    assert list(service.run_table([])) == []


def test_rows_that_begin_alike_follow_each_other_in_the_only_slot(load):
    service = load(says(""))
    documents = ["abcdefgh", "ijklmnop"]
    rows = [service.prepare(Request([*spell(documents[at % 2]), 5 + at], Options(), "prompt")) for at in range(8)]
    answers = dict(service.run_table(rows))
    assert sorted(answers[row].cached_tokens for row in range(8)) == [0] * 2 + [8] * 6


def test_with_several_slots_the_longest_rows_come_first(load, monkeypatch):
    service, begun = load(says(""), slots=2, chunk=16), []
    make = service._run
    monkeypatch.setattr(
        service, "_run", lambda row, *rest, **more: begun.append(len(row.ids)) or make(row, *rest, **more)
    )
    options = Options(max_tokens=6)
    rows = [service.prepare(Request(LETTERS[:length], options, "prompt")) for length in (3, 9, 1, 7)]
    assert len(list(service.run_table(rows))) == 4
    assert begun == [9, 7, 3, 1]


def test_a_raw_prompt_goes_without_template_and_keeps_the_leading_space(load):
    service = load(says("hello"))
    given = answer(service, Request("the capital", Options(), "prompt"))
    assert given.prompt_tokens == len(TOKENS.encode_text("the capital"))
    assert given.choices[0].text == " hello"


def test_max_tokens_default_to_what_the_context_leaves_at_most_512(load):
    given = answer(load(lambda prompt: ENDLESS, context_length=64), chat("one"))
    assert given.choices[0].reason == "context"
    assert given.choices[0].tokens == 64 - length("one")
    given = answer(load(lambda prompt: ENDLESS, context_length=2048), chat("one", repetition_guard=False))
    assert (given.choices[0].reason, given.choices[0].tokens) == ("max_tokens", DEFAULT_MAX_TOKENS)


def test_max_tokens_that_the_context_cannot_hold_end_with_the_context(load):
    room = 64 - length("one")
    service = load(lambda prompt: ENDLESS, context_length=64)
    for wanted, reason in ((1, "max_tokens"), (room, "max_tokens"), (room + 1, "context"), (10**30, "context")):
        choice = answer(service, chat("one", max_tokens=wanted)).choices[0]
        assert (choice.reason, choice.tokens) == (reason, min(wanted, room))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_counts(load):
    service = load(says("yes"), context_length=64)
    most = next(n for n in range(64) if length("a" * n) == 63)
    assert answer(service, chat("a" * most)).choices[0].tokens == 1
    for many in (1, 30):
        with pytest.raises(InvalidRequest) as caught:
            service.prepare(chat("a" * (most + many)))
        assert caught.value.field == "messages"
        assert f" {63 + many} tokens" in str(caught.value)
        assert "the context holds 64" in str(caught.value)
    with pytest.raises(InvalidRequest, match=r"`prompt` is 64 tokens long .* the context holds 64 .*; shorten it"):
        service.prepare(Request("a" * (64 - 2), Options(), "prompt"))
    with pytest.raises(InvalidRequest, match=r'64 tokens long .* or set `context_overflow` to "drop_oldest"'):
        service.prepare(chat("a" * 20, "b" * 20, "c" * (64 - length("a" * 20, "b" * 20, ""))))


def test_megabytes_are_refused_without_being_encoded(load, monkeypatch):
    service = load(says("yes"))
    monkeypatch.setattr(service.tokens, "encode_chat", lambda *arguments: pytest.fail("encoded"))
    monkeypatch.setattr(service.tokens, "encode_text", lambda prompt: pytest.fail("encoded"))
    text = "hello world " * 500_000
    for request in (chat(text), chat("a", "b", text), Request(text, Options(), "prompt"), chat(*["a"] * 99_999)):
        with pytest.raises(InvalidRequest, match=r"at least \d+ tokens long .* the context holds 64") as caught:
            service.prepare(request)
        assert len(str(caught.value)) < 300
        if request.prompt is text:
            assert f"at least {len(text) // TOKENS.longest_piece} tokens" in str(caught.value)


def seen(service, request):
    """The prompt that a request was given to the model with, and how many messages were dropped."""
    prompts = []
    service._scheduler._decoder._script = lambda prompt: prompts.append(prompt) or []
    given = answer(service, request)
    assert given.prompt_tokens == len(prompts[0])
    return prompts[0], given.dropped


def test_drop_oldest_drops_turns_until_the_rest_fits_with_room_for_the_answer(load):
    service = load(says(""), context_length=64)
    contents = ["system:two", "a" * 20, "b" * 20, "c" * 12, "d" * 3, "one"]
    options = {"context_overflow": "drop_oldest", "max_tokens": 8}
    assert length(*contents) > 64
    assert seen(service, chat(*contents, **options)) == (
        TOKENS.encode_chat(chat("system:two", "c" * 12, "d" * 3, "one").prompt), 2,
    )  # fmt: skip
    # The room for the answer counts: all that fits without it need not fit with it.
    small = ["system:two", "a" * 12, "b" * 3, "one"]
    room = 64 - length(*small)
    assert seen(service, chat(*small, context_overflow="drop_oldest", max_tokens=room))[1] == 0
    assert seen(service, chat(*small, context_overflow="drop_oldest", max_tokens=room + 1))[1] == 2
    # At most half of the context is kept free for the answer.
    assert seen(service, chat(*small, context_overflow="drop_oldest", max_tokens=1000))[1] == 2
    assert seen(service, chat("a" * 20, **options))[1] == 0


def test_drop_oldest_never_drops_a_system_message_or_the_last_message(load):
    service = load(says(""), context_length=64)
    messages = chat("a" * 20, "b" * 10, "system:two", "c" * 10, "d" * 10, "one").prompt
    options = Options(context_overflow="drop_oldest", max_tokens=20)
    ids, dropped = seen(service, Request(messages, options))
    kept = [message for message in messages if message["role"] == "system" or message["content"] == "one"]
    assert dropped == 4
    assert ids == TOKENS.encode_chat(kept)
    for contents in (["system:" + "s" * 70, "one"], ["system:two", "a", "b", "c" * 70], ["a", "b", "c" * 70]):
        with pytest.raises(InvalidRequest, match=r"`messages` are .*\d tokens long .* holds 64 .* no older turn"):
            service.prepare(chat(*contents, context_overflow="drop_oldest"))


def test_drop_oldest_on_megabytes_of_turns_encodes_a_few_times_only(load, monkeypatch):
    service = load(says(""), context_length=64)
    encoded = []
    encode = service.tokens.encode_chat

    def counted(messages, *more):
        encoded.append(messages)
        return encode(messages, *more)

    monkeypatch.setattr(service.tokens, "encode_chat", counted)
    contents = ["hello world " * 100] * 4000 + ["one", "two", "one"]
    ids, dropped = seen(service, chat("system:yes", *contents, context_overflow="drop_oldest", max_tokens=4))
    assert ids == encode(chat("system:yes", "one", "two", "one").prompt)
    assert dropped == 4000
    assert len(encoded) < 15


def test_choices_differ_and_repeat_as_a_whole_with_a_seed(load):
    service = load(context_length=64)
    request = chat("hello", n=3, seed=5, temperature=1.0, max_tokens=20)
    first, second = answer(service, request), answer(service, request)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert texts[0] == answer(service, chat("hello", seed=5, temperature=1.0, max_tokens=20)).choices[0].text
    other = answer(service, chat("hello", n=3, seed=6, temperature=1.0, max_tokens=20))
    assert texts != [choice.text for choice in other.choices]
    assert first.prompt_tokens == length("hello")


def test_each_choice_streams_under_its_own_number(load):
    service = load(slots=2)
    run = service.run(service.prepare(chat("hello", n=4, seed=1, temperature=1.0, max_tokens=9)))
    pieces = list(run)
    for index, choice in enumerate(run.answer.choices):
        own = [piece for piece in pieces if piece.choice == index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.reason for piece in own][:-1] == [None] * (len(own) - 1)
        assert own[-1].reason == choice.reason


def test_max_time_ends_the_answer_with_what_there_is(load):
    service = load(lambda prompt: ENDLESS)
    choice = answer(service, chat("one", max_time=5e-324)).choices[0]
    assert (choice.text, choice.reason, choice.tokens) == ("", "max_time", 0)


def test_the_earlier_of_max_time_and_deadline_holds(load, monkeypatch):
    service = load(says("yes"))
    monkeypatch.setattr(service_module.time, "monotonic", lambda: 100.0)
    cases = [(None, None, None), (5, None, 105), (5, 103, 103), (5, 200, 105), (None, 7, 7)]
    for max_time, deadline, expected in cases:
        run = service.run(service.prepare(chat("one", n=2, max_time=max_time)), deadline=deadline)
        assert [job.deadline for job in run.jobs] == [expected] * 2


def test_logit_bias_acts_on_the_answer_and_is_checked_against_the_vocabulary(load):
    service = load(says("hello world"))
    choice = answer(service, chat("one", logit_bias={IDS["<|end|>"]: 100.0})).choices[0]
    assert (choice.text, choice.tokens) == ("", 1)
    service.prepare(chat("one", logit_bias={VOCAB_SIZE - 1: 1.0}))
    with pytest.raises(InvalidRequest, match=f"token ids are below {VOCAB_SIZE}") as caught:
        service.prepare(chat("one", logit_bias={VOCAB_SIZE: 1.0}))
    assert caught.value.field == f"logit_bias[{VOCAB_SIZE}]"


def test_stop_sequences_and_guards_end_answers_and_have_switches(load):
    talk = "yes\nUser: no"
    service = load(says(talk))
    assert answer(service, chat("one", stop=("s\n",))).choices[0].reason == "stop_sequence"
    spoken = answer(service, chat("one")).choices[0]
    assert (spoken.text, spoken.reason) == ("yes", "self_talk")
    assert answer(service, chat("one", self_talk_guard=False)).choices[0].text == talk
    loops = load(says("yes no " * 200), context_length=2048)
    assert answer(loops, chat("one")).choices[0].reason == "repetition"
    assert answer(loops, chat("one", repetition_guard=False)).choices[0].reason == "eos"


def test_the_guards_know_what_the_last_message_asked_for(load):
    service = load(says("yes\nUser: no"))
    assert answer(service, chat("Write a dialogue")).choices[0].reason == "eos"
    assert answer(service, Request("Write a dialogue", Options())).choices[0].reason == "eos"
    assert answer(service, chat("Write a dialogue", "no", "one")).choices[0].reason == "self_talk"


def test_a_response_format_holds_the_answer_to_it_and_switches_the_guards_off(load):
    service = load(says("hello"), context_length=2048)
    regex = r"yes\nUser: no"
    for n in (1, 2):
        given = answer(service, chat("one", n=n, response_format={"type": "regex", "regex": regex}))
        assert [(choice.text, choice.reason) for choice in given.choices] == [("yes\nUser: no", "eos")] * n
    long = {"type": "regex", "regex": "(yes no ){100}"}
    assert answer(service, chat("one", response_format=long, max_tokens=1000)).choices[0].text == "yes no " * 100
    with pytest.raises(InvalidRequest, match="response_format"):
        service.prepare(chat("one", response_format={"type": "xml"}))


def test_closing_a_stream_early_frees_its_slot(load):
    service = load(lambda prompt: ENDLESS, context_length=100_000)
    run = service.run(service.prepare(chat("one", max_tokens=90_000, n=2, repetition_guard=False)))
    stream = iter(run)
    assert next(stream).reason is None
    stream.close()
    assert [job.ending() for job in run.jobs] == ["cancelled"] * 2
    assert answer(service, chat("two", max_tokens=3)).choices[0].reason == "max_tokens"
    assert service._scheduler._decoder.count("decode") < 90_000
    assert all(slot.job is None for slot in service._scheduler._slots)


def test_what_the_decoder_raises_reaches_the_caller_and_the_next_request_works(load):
    failing = [True]

    def on_call(name, slot, ids):
        if name == "decode" and failing:
            failing.clear()
            raise MemoryError("out of memory")

    service = load(says("yes"), on_call=on_call)
    with pytest.raises(MemoryError):
        answer(service, chat("one", n=2))
    assert answer(service, chat("one")).choices[0].text == "yes"


def test_threads_share_a_service(load):
    service = load(lambda prompt: [token for token in prompt if token in LETTERS][1:6], slots=2)
    results = {}

    def client(number):
        for _ in range(10):
            text = "abcdefgh"[number] * 5
            results.setdefault(number, set()).add(answer(service, chat(text, max_tokens=9)).choices[0].text)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {number: {"abcdefgh"[number] * 5} for number in range(8)}


def test_a_closed_service_refuses_requests():
    service = Service(TOKENS, FakeDecoder(says("yes")))
    service.close()
    with pytest.raises(Unavailable, match="closed"):
        answer(service, chat("one"))


def test_errors_cross_the_border_of_a_process():
    errors = [Busy("3 requests are waiting", 7), WeightsError("no file"), Unavailable("the model was closed")]
    for error in (InvalidRequest("seed", "is 1.5"), *errors):
        same = pickle.loads(pickle.dumps(error))
        assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))
    refused = RequestRefused(InvalidRequest("seed", "is 1.5"), "row 3: ")
    failed = AnswerFailed("row 3: "), ModelUnavailable(Unavailable("the model was closed"))
    for refusal in (refused, TryLater(Busy("full", 7)), OutOfTime(""), *failed):
        same = pickle.loads(pickle.dumps(refusal))
        assert type(same) is type(refusal)
        assert same.serialize_as_json() == refusal.serialize_as_json()
