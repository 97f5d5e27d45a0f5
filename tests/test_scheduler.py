"""Run with: python -m pytest tests/test_scheduler.py"""

import itertools
import math
import queue
import random
import re
import threading
import time
from functools import partial

import pytest
from fakes import EOS, TOKENS, VOCAB_SIZE, FakeDecoder, spell
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.blocks import OutOfBlocks
from phi3_mlflow.runtime.errors import Busy, Unavailable
from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.jobs import MOST, Batch, Job, Queue
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.scheduler import Scheduler
from phi3_mlflow.runtime.stops import Stops

PATIENCE = 120  # seconds; only a broken scheduler takes as long
PLAIN = {"repetition": False, "self_talk": False}
LETTERS = spell("abcdefghijklmnopqrstuvwxyz")[1:]


def generation(prompt, max_tokens=6, seed=None, kind=Generation):
    return kind(
        prompt,
        Options(temperature=0.0 if seed is None else 1.0, seed=seed),
        max_tokens=max_tokens,
        limit="max_tokens",
        vocab_size=VOCAB_SIZE,
        eos=EOS,
        text=TOKENS.decoder(strip=False),
        stops=Stops(**PLAIN),
    )


class Ask:
    """A job and what it was delivered."""

    def __init__(self, prompt, max_tokens=6, seed=None, kind=Generation):
        self.events = queue.SimpleQueue()
        self.job = Job(generation(prompt, max_tokens, seed, kind), self.events.put, renew=True)

    def result(self):
        """(text, reason, sampled) of the answer, or the exception that ended it. Nothing may come after the end."""
        text = ""
        while True:
            event = self.events.get(timeout=PATIENCE)
            if isinstance(event, Exception):
                return event
            text += event.text
            if event.reason is not None:
                return text, event.reason, self.job.generation.sampled


def alone(prompt, max_tokens=6, seed=None, **values):
    """The answer of a fresh decoder, without a scheduler."""
    decoder, answer, text = FakeDecoder(**values), generation(prompt, max_tokens, seed), ""
    for start in range(0, len(prompt), decoder.chunk):
        ids = prompt[start : start + decoder.chunk]
        logits = decoder.step({0: Part(ids, int(start + decoder.chunk >= len(prompt)))})
    while True:
        piece = answer.accept(logits[0][0])
        text += piece.text
        if piece.reason is not None:
            return text, piece.reason, answer.sampled
        logits = decoder.step({0: Part([answer.next], 1)})


class Gate:
    """Stops the decoder at its next call until the test lets it go on."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, name, slot, ids):
        self.reached.set()
        assert self.open.wait(PATIENCE)


@pytest.fixture
def start():
    """Starts schedulers, and closes them after the test."""
    started = []

    def begin(decoder, renew_after=None, **values):
        started.append(Scheduler(decoder, renew_after=renew_after, **values))
        return started[-1]

    yield begin
    for scheduler in started:
        scheduler.close()


def ask(scheduler, *arguments, **values):
    asked = Ask(*arguments, **values)
    submit(scheduler, asked)
    return asked


def submit(scheduler, *asked):
    """Hands jobs over as one request."""

    def fail(error):
        for one in asked:
            one.events.put(error)

    scheduler.submit([one.job for one in asked], fail)


def idle(scheduler):
    return [slot.job for slot in scheduler._slots] == [None] * len(scheduler._slots) and not scheduler._waiting


def test_an_answer_is_what_the_decoder_gives_alone(start):
    scheduler = start(FakeDecoder())
    for prompt in ([5], LETTERS[:4], LETTERS[:9], LETTERS):
        assert ask(scheduler, prompt).result() == alone(prompt)
        assert ask(scheduler, prompt, seed=3).result() == alone(prompt, seed=3)


def test_prompts_are_prefilled_in_chunks_and_tokens_decoded_one_by_one(start):
    decoder = FakeDecoder(lambda prompt: spell("hello world"))
    assert ask(start(decoder), LETTERS[:10]).result()[1:] == ("eos", 3)
    hello, world = spell("hello world")
    assert decoder.calls == [
        ("rewind", 0, [0]),
        ("prefill", 0, LETTERS[:4]),
        ("prefill", 0, LETTERS[4:8]),
        ("prefill", 0, LETTERS[8:10]),
        ("decode", None, [hello]),
        ("decode", None, [world]),
    ]


def test_whole_chunks_of_an_earlier_prompt_are_used_again_and_nothing_else(start):
    decoder = FakeDecoder()
    scheduler = start(decoder)

    def prefilled(prompt):
        decoder.calls.clear()
        assert ask(scheduler, prompt).result() == alone(prompt)
        return [len(ids) for name, _, ids in decoder.calls if name == "prefill"]

    first = LETTERS[:10]
    assert prefilled(first) == [4, 4, 2]
    assert prefilled(first) == [2]
    assert prefilled(first[:8]) == [4]  # at least one token has to be prefilled
    assert prefilled(first) == [4, 2][1:]
    assert prefilled([*first, *LETTERS[20:25]]) == [4, 3]
    assert prefilled([*first[:9], *LETTERS[20:25]]) == [4, 2]
    assert prefilled([*first[:5], 7, 7, 7]) == [4]
    assert prefilled([7, *first]) == [4, 4, 3]


def test_tokens_that_decoding_wrote_are_not_used_again(start):
    decoder = FakeDecoder(lambda prompt: LETTERS[10:16])
    scheduler = start(decoder)
    ask(scheduler, LETTERS[:8], 20).result()
    decoder.calls.clear()
    ask(scheduler, LETTERS[:20]).result()
    assert decoder.calls[0] == ("rewind", 0, [8])


def test_idle_time_turns_an_answer_into_what_prefill_writes(start):
    decoder = FakeDecoder(lambda prompt: LETTERS[10:19], on_call=lambda name, slot, ids: renewed(name, ids))
    done = threading.Event()

    def renewed(name, ids):
        if name == "prefill" and ids == LETTERS[12:16] and decoder.count("decode") == 9:
            done.set()

    scheduler = start(decoder, renew_after=0.0)
    turn = LETTERS[:10]
    ask(scheduler, turn, 20).result()
    assert done.wait(PATIENCE)
    decoder.calls.clear()
    asked = ask(scheduler, LETTERS[:24], 3)
    asked.result()
    # 19 tokens are known: the prompt's last two and the answer's first six were computed again, in whole chunks.
    assert asked.job.reused == 16
    assert decoder.calls[:2] == [("rewind", 0, [16]), ("prefill", 0, LETTERS[16:20])]


def test_what_idle_time_computes_again_is_what_a_fresh_run_gives(start):
    decoder = FakeDecoder(slots=2)
    scheduler = start(decoder, renew_after=0.0)
    prompt, known, rng = LETTERS[:5], 0, random.Random(0)
    for _ in range(8):
        asked = ask(scheduler, prompt, 4, kind=Recorded)
        assert asked.result() == alone(prompt, 4)
        assert asked.job.reused == known // 4 * 4
        settle(scheduler)
        known = len(prompt) + len(asked.job.generation.said)
        prompt = [*prompt, *asked.job.generation.said, *rng.choices(LETTERS, k=3)]


class Recorded(Generation):
    """Remembers the tokens that it gave to be decoded."""

    said = ()

    def accept(self, logits):
        piece = super().accept(logits)
        self.said = (*self.said, *([] if self.next is None else [self.next]))
        return piece


def settle(scheduler):
    """Waits until idle time has done what it can."""
    limit = time.monotonic() + PATIENCE
    while scheduler._prefixes.renewable() or not idle(scheduler):
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_a_request_that_comes_while_an_answer_is_computed_again_is_served_at_once(start):
    came = []

    def on_call(name, slot, ids):
        if name == "prefill" and decoder.count("decode") == 12 and not came:
            came.append(ask(scheduler, [*LETTERS[:9], 7], 2))  # in the middle of it

    decoder = FakeDecoder(lambda prompt: LETTERS[4:16] if len(prompt) == 4 else [], on_call=on_call)
    scheduler = start(decoder, renew_after=0.0)
    ask(scheduler, LETTERS[:4], 20).result()
    while not came:
        time.sleep(0.001)
    assert came[0].result() == ("", "eos", 1)
    assert came[0].job.reused == 8  # the chunk that had been computed again too


def test_an_answer_that_is_being_computed_again_counts_as_kept(start):
    came, held = [], []

    def on_call(name, slot, ids):
        held.append(sum(map(len, decoder._sequences)))
        if name == "prefill" and decoder.count("decode") > 10 and not came:
            came.append(ask(scheduler, LETTERS[:3], 30))  # needs more than is left beside the whole answer

    decoder = FakeDecoder(lambda prompt: LETTERS, slots=2, capacity=48, context_length=48, on_call=on_call)
    scheduler = start(decoder, renew_after=0.0)
    ask(scheduler, LETTERS[:8], 28).result()
    while not came:
        time.sleep(0.001)
    assert came[0].result()[1] in ("eos", "max_tokens")
    settle(scheduler)
    assert max(held) <= 48


def test_idle_time_leaves_as_much_of_the_machine_as_it_takes(start):
    calls = []

    def on_call(name, slot, ids):
        if name == "prefill" and decoder.count("decode"):
            calls.append(time.monotonic())
            time.sleep(0.05)

    decoder = FakeDecoder(lambda prompt: LETTERS, on_call=on_call)
    scheduler = start(decoder, renew_after=0.0)
    ask(scheduler, LETTERS[:4], 20).result()
    settle(scheduler)
    assert len(calls) > 3
    assert all(after - before >= 0.1 for before, after in itertools.pairwise(calls))


def test_a_decoder_that_fails_in_idle_time_is_not_tried_again_and_the_next_answer_is_right(start, caplog):
    failed = []

    def on_call(name, slot, ids):
        if name == "prefill" and decoder.count("decode") == 5 and not failed:
            failed.append(name)
            raise Failure

    decoder = FakeDecoder(on_call=on_call)
    scheduler = start(decoder, renew_after=0.0)
    assert ask(scheduler, LETTERS[:4]).result() == alone(LETTERS[:4])
    settle(scheduler)
    assert failed
    assert ask(scheduler, LETTERS[:9]).result() == alone(LETTERS[:9])


def test_all_tokens_are_used_again_where_that_is_asked_for(start):
    decoder = FakeDecoder(lambda prompt: LETTERS[6:12])
    scheduler = start(decoder, reuse="all")
    ask(scheduler, LETTERS[:6], 20).result()
    decoder.calls.clear()
    asked = ask(scheduler, LETTERS[:15], 3)
    asked.result()
    assert asked.job.reused == 12
    assert decoder.calls[:2] == [("rewind", 0, [12]), ("prefill", 0, LETTERS[12:15])]
    asked = ask(scheduler, [*LETTERS[:7], 7], 3)  # the history was edited
    asked.result()
    assert asked.job.reused == 7


def test_all_tokens_are_copied_from_a_slot_that_is_in_use_where_that_is_asked_for(start):
    came = []

    def on_call(name, slot, ids):
        if name == "decode" and decoder.count("decode") == 5 and not came:
            came.append(ask(scheduler, LETTERS[:20], 2))

    decoder = FakeDecoder(lambda prompt: LETTERS[len(prompt) :], slots=2, on_call=on_call)
    scheduler = start(decoder, reuse="all")
    first = ask(scheduler, LETTERS[:6], 16)
    assert first.result()[1] == "max_tokens"
    assert came[0].result()[0] == TOKENS.decode(LETTERS[20:22], strip=False)
    assert came[0].job.reused == 11  # the prompt and five tokens of the answer in the making


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(1, 3),
    chunk=st.integers(1, 5),
    prompts=st.lists(st.lists(st.sampled_from(LETTERS[:2]), min_size=1, max_size=14), min_size=2, max_size=8),
)
def test_reuse_never_changes_an_answer(slots, chunk, prompts):
    scheduler = Scheduler(FakeDecoder(slots=slots, chunk=chunk), renew_after=0.0)
    try:
        asked = [ask(scheduler, prompt) for prompt in prompts]
        for prompt, asked_one in zip(prompts, asked, strict=True):
            assert asked_one.result() == alone(prompt, chunk=chunk)
    finally:
        scheduler.close()


def test_a_job_takes_the_free_slot_that_shares_the_most(start):
    decoder = FakeDecoder(slots=2, on_call=(gate := Gate()))
    scheduler = start(decoder)
    first, second = LETTERS[:9], LETTERS[9:18]
    both = [ask(scheduler, first), ask(scheduler, second)]
    gate.open.set()
    assert [asked.result() for asked in both] == [alone(first), alone(second)]
    for prompt in (second, first, second):
        slot = [first, second].index(prompt)
        decoder.calls.clear()
        ask(scheduler, prompt).result()
        assert decoder.calls[0] == ("rewind", slot, [8])


def test_waiting_jobs_start_in_the_order_in_which_they_came(start):
    decoder = FakeDecoder(on_call=(gate := Gate()))
    scheduler = start(decoder)
    asked = [ask(scheduler, [token, token]) for token in LETTERS[:6]]
    gate.open.set()
    for one in asked:
        one.result()
    assert [ids[0] for name, _, ids in decoder.calls if name == "prefill"] == LETTERS[:6]


def test_requests_with_many_jobs_take_turns(start):
    decoder = FakeDecoder(lambda prompt: [], on_call=(gate := Gate()))
    scheduler = start(decoder)
    asked = [ask(scheduler, [5])]  # holds the slot until all have come
    assert gate.reached.wait(PATIENCE)
    tables = [[Ask([at, at]) for at in LETTERS[:3]], [Ask([at, at]) for at in LETTERS[3:6]], [Ask([LETTERS[6]])]]
    for table in tables:
        submit(scheduler, *table)
    gate.open.set()
    for one in [*asked, *itertools.chain(*tables)]:
        one.result()
    served = [ids[0] for name, _, ids in decoder.calls if name == "prefill"][1:]
    assert served == [LETTERS[at] for at in (0, 3, 6, 1, 4, 2, 5)]


def test_a_long_prompt_does_not_stop_the_others(start):
    decoder = FakeDecoder(lambda prompt: LETTERS[:5], slots=2, on_call=(gate := Gate()))
    scheduler = start(decoder)
    short, long = ask(scheduler, [5, 6], 20), ask(scheduler, LETTERS, 20)
    gate.open.set()
    assert short.result()[1] == long.result()[1] == "eos"
    names = [(name, slot) for name, slot, _ in decoder.calls if name != "rewind"]
    # A token for the short one between two chunks of the long one.
    assert names[:7] == [("prefill", 0), ("decode", None), *[("prefill", 1), ("decode", None)] * 2, ("prefill", 1)]


def test_prompts_are_prefilled_in_the_order_in_which_they_came_whatever_their_slot(start):
    decoder = FakeDecoder(lambda prompt: [], slots=2, on_call=(gate := Gate()))
    scheduler = start(decoder)
    asked = [ask(scheduler, [5]), ask(scheduler, LETTERS[:12]), ask(scheduler, LETTERS[12:24])]
    gate.open.set()
    for one in asked:
        one.result()
    # The third job gets the first one's slot while the second is still being prefilled.
    assert decoder.prefilled() == [0, 1, 1, 1, 0, 0, 0]


def test_several_slots_decode_in_one_step(start):
    decoder = FakeDecoder(slots=3, on_call=(gate := Gate()))
    scheduler = start(decoder)
    prompts = [LETTERS[at : at + 4] for at in (0, 4, 8)]
    asked = [ask(scheduler, prompt, 8) for prompt in prompts]
    gate.open.set()
    assert [one.result() for one in asked] == [alone(prompt, 8) for prompt in prompts]
    assert max(len(ids) for name, _, ids in decoder.calls if name == "decode") == 3


def stops_in(phase, change):
    """A decoder that does `change` to the job during the given phase; jobs then end with their next look."""
    asked = []

    def on_call(name, slot, ids):
        if asked and name == phase:
            change(asked[0].job)

    return FakeDecoder(lambda prompt: LETTERS, on_call=on_call), asked


def expire(job):
    job.deadline = 0.0


ENDINGS = [("cancelled", Job.cancel), ("max_time", expire)]


@pytest.mark.parametrize(("reason", "change"), ENDINGS)
@pytest.mark.parametrize("phase", ["rewind", "prefill", "decode"])
def test_a_job_ends_within_one_step_in_every_phase(start, phase, reason, change):
    decoder, asked = stops_in(phase, change)
    scheduler = start(decoder)
    asked.append(one := Ask(LETTERS[:12], 20))
    submit(scheduler, one)
    text, why, sampled = one.result()
    assert why == reason
    assert decoder.count("prefill") == {"rewind": 0, "prefill": 1, "decode": 3}[phase]
    assert decoder.count("decode") == (1 if phase == "decode" else 0)
    # What was sampled until then is shown and counted.
    assert (text, sampled) == {"rewind": ("", 0), "prefill": ("", 0), "decode": ("ab", 2)}[phase]
    asked.clear()
    assert ask(scheduler, [5], 3).result() == ("abc", "max_tokens", 3)
    assert idle(scheduler)


@pytest.mark.parametrize(("reason", "change"), ENDINGS)
def test_a_job_that_waits_for_a_slot_can_end(start, reason, change):
    decoder = FakeDecoder(lambda prompt: LETTERS, on_call=(gate := Gate()))
    scheduler = start(decoder)
    running, waiting, last = ask(scheduler, [5], 3), ask(scheduler, [6], 3), ask(scheduler, [7], 3)
    assert gate.reached.wait(PATIENCE)
    change(waiting.job)
    gate.open.set()
    assert running.result() == last.result() == ("abc", "max_tokens", 3)
    assert waiting.result() == ("", reason, 0)
    assert [6] not in [ids for _, _, ids in decoder.calls]


def test_a_deadline_that_is_not_reached_changes_nothing(start):
    scheduler = start(FakeDecoder())
    one = Ask(LETTERS)
    one.job.deadline = float("inf")
    submit(scheduler, one)
    assert one.result() == alone(LETTERS)


def test_cancelling_an_ended_job_is_harmless(start):
    scheduler = start(FakeDecoder())
    one = ask(scheduler, LETTERS)
    assert one.result() == alone(LETTERS)
    one.job.cancel()
    assert ask(scheduler, LETTERS).result() == alone(LETTERS)
    assert one.events.empty()


class Failure(Exception):
    pass


@pytest.mark.parametrize("phase", ["rewind", "prefill", "decode"])
def test_a_decoder_that_fails_ends_the_running_answers_and_the_next_ones_are_right(start, phase, caplog):
    failing = [True]

    def on_call(name, slot, ids):
        if name == phase and failing:
            failing.clear()
            raise Failure("out of memory")

    scheduler = start(FakeDecoder(on_call=on_call))
    assert isinstance(ask(scheduler, LETTERS[:10]).result(), Failure)
    # What the failed call may have left in the decoder does not reach the next answer.
    for prompt in (LETTERS[:10], LETTERS[:11]):
        assert ask(scheduler, prompt).result() == alone(prompt)
    assert "the decoder failed" in caplog.text


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_of_several_slots_that_fails_is_tried_again_slot_by_slot(start, mixed):
    poisoned = LETTERS[3]

    def on_call(name, slot, ids):
        gate(name, slot, ids)
        if name == "decode" and (len(ids) > 1 or poisoned in ids) and failing:
            failing.pop()
            raise Failure

    # Where they decode together first, and then the one that decodes the poisoned token alone.
    gate, failing = Gate(), [1, 2]
    scheduler = start(FakeDecoder(lambda prompt: [poisoned if prompt[0] == LETTERS[0] else LETTERS[9]] * 5, slots=3,
                                  mixed=mixed, chunk=99, on_call=on_call))  # fmt: skip
    bad, good, other = (ask(scheduler, LETTERS[at : at + 3], 5) for at in (0, 4, 7))
    gate.open.set()
    assert isinstance(bad.result(), Failure)
    assert good.result() == other.result() == ("jjjjj", "max_tokens", 5)
    assert ask(scheduler, LETTERS[:3], 5).result() == ("ddddd", "max_tokens", 5)
    assert scheduler.statistics().failed == 1


@pytest.mark.parametrize("phase", ["rewind", "prefill", "copy"])
def test_a_call_that_concerns_one_slot_fails_that_slots_answer_alone(start, phase):
    def on_call(name, slot, ids):
        if name == "decode" and len(ids) == 2 and not bad:
            running.set()
            assert go_on.wait(PATIENCE)
        if name == phase and go_on.is_set() and failing:
            failing.clear()
            raise Failure

    bad, failing, running, go_on = [], [True], threading.Event(), threading.Event()
    scheduler = start(FakeDecoder(slots=3, context_length=99, on_call=on_call))
    good = [Ask(LETTERS[:9], 60), Ask(LETTERS[9:18], 60)]
    submit(scheduler, *good)
    assert running.wait(PATIENCE)
    bad.append(ask(scheduler, LETTERS[:11]))
    go_on.set()
    assert isinstance(bad[0].result(), Failure)
    assert [one.result() for one in good] == [
        alone(LETTERS[:9], 60, context_length=99),
        alone(LETTERS[9:18], 60, context_length=99),
    ]
    assert ask(scheduler, LETTERS[:11]).result() == alone(LETTERS[:11])


class Broken(Generation):
    def accept(self, logits):
        raise Failure

    def end(self, reason):
        raise Failure


def test_an_answer_that_fails_ends_alone(start):
    scheduler = start(FakeDecoder(slots=2, on_call=(gate := Gate())))
    good, bad, other = ask(scheduler, LETTERS[:5]), ask(scheduler, [5], kind=Broken), ask(scheduler, LETTERS[5:9])
    gate.open.set()
    assert isinstance(bad.result(), Failure)
    assert [good.result(), other.result()] == [alone(LETTERS[:5]), alone(LETTERS[5:9])]
    bad = Ask([5], kind=Broken)
    bad.job.cancel()
    submit(scheduler, bad)
    assert isinstance(bad.result(), Failure)
    assert ask(scheduler, [5]).result() == alone([5])


def test_close_ends_running_and_waiting_jobs_the_thread_and_the_decoder():
    decoder = FakeDecoder(on_call=(gate := Gate()))
    scheduler = Scheduler(decoder)
    asked = [ask(scheduler, LETTERS, 30) for _ in range(3)]
    assert gate.reached.wait(PATIENCE)
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    gate.open.set()
    closer.join(PATIENCE)
    results = [one.result() for one in asked]
    # The gate may let the first one's few steps through before the close is seen.
    assert all(isinstance(result, Unavailable) for result in results[1:])
    assert isinstance(results[0], Unavailable) or results[0] == alone(LETTERS, 30)
    assert decoder.closed
    assert not scheduler._thread.is_alive()
    scheduler.close()
    with pytest.raises(Unavailable, match="closed"):
        submit(scheduler, Ask([5]))


def test_close_may_be_called_in_the_schedulers_own_thread():
    ended = threading.Event()
    decoder = FakeDecoder()
    scheduler = Scheduler(decoder)

    def deliver(event):
        scheduler.close()
        ended.set()

    scheduler.submit([Job(generation([5]), deliver)], deliver)
    assert ended.wait(PATIENCE)
    scheduler._thread.join(PATIENCE)
    assert decoder.closed


@pytest.mark.parametrize("slots", [1, 3])
def test_ten_thousand_cancelled_jobs_leak_no_slot(start, slots):
    rng = random.Random(slots)
    by_call = {}

    def on_call(name, slot, ids):
        while victims and rng.random() < 0.7:
            victims.pop().cancel()

    victims = []
    decoder = FakeDecoder(lambda prompt: LETTERS, slots=slots, chunk=2, on_call=on_call)
    scheduler = start(decoder)
    asked = []
    for _ in range(5000):
        one = Ask(rng.choices(LETTERS, k=rng.randint(1, 5)), 4)
        moment = rng.choice(["before", "after", "during"])
        if moment == "before":
            one.job.cancel()
        if moment == "during":
            victims.append(one.job)
        submit(scheduler, one)
        if moment == "after":
            one.job.cancel()
        asked.append(one)
    for one in asked:
        _, reason, sampled = one.result()
        assert reason in ("cancelled", "max_tokens")
        assert sampled <= 4
        by_call[reason] = by_call.get(reason, 0) + 1
    assert ask(scheduler, [5], 3).result() == ("abc", "max_tokens", 3)
    assert by_call["cancelled"] > 1000
    assert idle(scheduler)
    assert all(one.events.empty() for one in asked)


@pytest.mark.parametrize("slots", [1, 3])
def test_each_of_many_threads_gets_its_own_answer(start, slots):
    scheduler = start(FakeDecoder(lambda prompt: list(reversed(prompt)), slots=slots))
    failures = []

    def client(number):
        rng = random.Random(number)
        for _ in range(15):
            prompt = rng.choices(LETTERS, k=rng.randint(1, 8))
            result = ask(scheduler, prompt, 20).result()
            if result != (TOKENS.decode(reversed(prompt), strip=False), "eos", len(prompt) + 1):
                failures.append((prompt, result))

    threads = [threading.Thread(target=partial(client, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert idle(scheduler)


def test_jobs_wait_until_the_decoder_has_room_for_all_that_they_may_need(start):
    running = []

    def on_call(name, slot, ids):
        gate(name, slot, ids)
        if name == "decode":
            running.append(len(ids))

    gate = Gate()
    # Each may need 8 + 6 - 1 tokens: two fit, in three slots.
    scheduler = start(FakeDecoder(slots=3, capacity=38, context_length=30, on_call=on_call))
    asked = [ask(scheduler, LETTERS[at : at + 8]) for at in (0, 8, 16)]
    gate.open.set()
    assert [one.result() for one in asked] == [alone(LETTERS[at : at + 8]) for at in (0, 8, 16)]
    assert max(running) == 2


def test_room_is_reckoned_in_whole_blocks(start):
    # Each needs 8 + 6 - 1 tokens, which take two blocks: together as many tokens as there is room for, and too many
    # blocks. The fourth finds idle slots whose blocks it needs.
    scheduler = start(FakeDecoder(slots=3, capacity=40, block=10, context_length=30, on_call=(gate := Gate())))
    asked = [ask(scheduler, LETTERS[at : at + 8]) for at in (0, 8, 16)]
    gate.open.set()
    assert [one.result() for one in asked] == [alone(LETTERS[at : at + 8]) for at in (0, 8, 16)]
    assert ask(scheduler, LETTERS[:20], 11).result() == alone(LETTERS[:20], 11)


def test_as_many_answers_run_as_have_room_beside_the_prefix_that_they_share(start):
    most, sizes = 0, []
    gate = Gate()

    def on_call(name, slot, ids):
        nonlocal most
        gate(name, slot, ids)
        now = scheduler.statistics()
        most = max(most, now.running)
        sizes.append((now.used, now.held))
        assert 0 <= now.used <= now.held <= now.capacity

    prefix = (LETTERS * 4)[:90]
    # Each needs 90 + 4 + 6 - 1 tokens, which take 13 blocks: two that share nothing have room.
    values = {"chunk": 8, "context_length": 104, "mixed": True}
    decoder = FakeDecoder(slots=6, block=8, capacity=26 * 8, on_call=on_call, **values)
    scheduler = start(decoder)
    prompts = [[*prefix, *LETTERS[at : at + 4]] for at in range(6)]
    asked = [ask(scheduler, prompt, 6) for prompt in prompts]
    gate.open.set()
    assert [one.result() for one in asked] == [alone(prompt, 6, **values) for prompt in prompts]
    assert most == 6
    assert max(sizes)[1] <= 26 * 8
    assert scheduler.counts.computed == 94 + 5 * 6  # eleven blocks that all of them share, and what is behind them
    held = scheduler.statistics().held
    assert held == 8 * len({block for table in decoder._blocks.tables for block in table}) < 6 * 90
    # Something else that needs nearly all of it makes the others go.
    other = (LETTERS[::-1] * 4)[:99]
    assert ask(scheduler, other, 6).result() == alone(other, 6, **values)
    assert scheduler.statistics().held <= 26 * 8


class Bounded(FakeDecoder):
    """Remembers whether it ever ran out of blocks."""

    ran_out = False

    def _append(self, slot, ids, prefilled):
        try:
            super()._append(slot, ids, prefilled)
        except OutOfBlocks:
            self.ran_out = True
            raise


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    chunk=st.integers(1, 6),
    block=st.integers(1, 7),
    more=st.integers(0, 8),
    mixed=st.booleans(),
    prompts=st.lists(st.lists(st.sampled_from(LETTERS[:2]), min_size=1, max_size=20), min_size=1, max_size=10),
)
def test_what_was_admitted_never_runs_out_of_room(slots, chunk, block, more, mixed, prompts):
    capacity = (-(-26 // block) + more) * block
    values = {"chunk": chunk, "mixed": mixed, "context_length": 26}
    decoder = Bounded(slots=slots, block=block, capacity=capacity, **values)
    scheduler = Scheduler(decoder, renew_after=0.0)
    try:
        for some in (prompts[::2], prompts[1::2]):
            asked = [ask(scheduler, prompt) for prompt in some]
            assert [one.result() for one in asked] == [alone(prompt, **values) for prompt in some]
    finally:
        scheduler.close()
    assert not decoder.ran_out


def test_idle_slots_keep_their_tokens_until_the_room_is_needed(start):
    decoder = FakeDecoder(lambda prompt: [], slots=3, capacity=40, context_length=40)
    scheduler = start(decoder)
    prompts = [LETTERS[at : at + 8] for at in (0, 8, 16)]
    for prompt in prompts:
        ask(scheduler, prompt, 5).result()
    decoder.calls.clear()
    ask(scheduler, [*prompts[1], 5], 5).result()
    assert decoder.prefilled() == [1]  # all three had stayed
    decoder.calls.clear()
    ask(scheduler, [*prompts[2], 5], 20).result()
    # 28 tokens may be needed: of the other two the one that was used longest ago had to go.
    assert [call for call in decoder.calls if call[0] == "rewind"] == [("rewind", 2, [8]), ("rewind", 0, [0])]


def test_a_prefix_is_copied_from_a_slot_in_use(start):
    decoder = FakeDecoder(slots=2, on_call=(gate := Gate()))
    scheduler = start(decoder)
    first, second = LETTERS[:10], [*LETTERS[:9], *LETTERS[20:24]]
    asked = [ask(scheduler, first, 20), ask(scheduler, second)]
    gate.open.set()
    assert [one.result() for one in asked] == [alone(first, 20), alone(second)]
    assert ("copy", 1, [0, 8]) in decoder.calls
    assert [one.job.reused for one in asked] == [0, 8]


def test_a_prefix_is_not_copied_where_that_takes_longer_than_what_is_lost(start):
    decoder = FakeDecoder(lambda prompt: [], slots=2, context_length=99)
    scheduler = start(decoder)
    document = [*LETTERS[:16], *LETTERS[:16], *LETTERS[4:20], *LETTERS[:16]]
    ask(scheduler, [*document, 5, 5, 5, 5]).result()
    decoder.calls.clear()
    asked = ask(scheduler, [*document, 6, 6, 6, 6])
    asked.result()
    assert asked.job.reused == 64
    assert decoder.calls[0] == ("rewind", 0, [64])


def test_a_prefix_is_copied_where_the_slot_would_lose_what_comes_after_it(start):
    decoder = FakeDecoder(lambda prompt: [], slots=2)
    scheduler = start(decoder)
    ask(scheduler, LETTERS[:16]).result()
    ask(scheduler, [*LETTERS[:8], 7, 7]).result()
    decoder.calls.clear()
    ask(scheduler, LETTERS[:17]).result()
    assert decoder.prefilled() == [0]  # the first prompt was left whole
    assert decoder.calls[0] == ("rewind", 0, [16])


def test_a_request_that_waits_too_long_to_be_begun_is_told_to_come_back(start):
    hold = threading.Event()
    decoder = FakeDecoder(lambda prompt: LETTERS, on_call=lambda name, slot, ids: hold.wait(0.01), context_length=999)
    scheduler = start(decoder, queue_timeout=0.1)
    running = ask(scheduler, [5], 900)
    waiting = [Ask([6]), Ask([7])]
    submit(scheduler, *waiting)
    errors = [one.result() for one in waiting]
    for refused in errors:
        assert isinstance(refused, Busy)
        assert refused.seconds >= 1
        assert re.fullmatch(r"the request waited for its turn for 0.1 seconds; try again in \d+ seconds?", str(refused))
    running.job.cancel()
    hold.set()
    assert running.result()[1] == "cancelled"
    assert ask(scheduler, [6], 3).result() == ("abc", "max_tokens", 3)


def test_a_table_that_is_being_answered_does_not_count_as_waiting(start):
    decoder = FakeDecoder(lambda prompt: [], on_call=(gate := Gate()))
    scheduler = start(decoder, queue_limit=1)
    table = [Ask([token, token]) for token in LETTERS[:5]]
    submit(scheduler, *table)
    assert gate.reached.wait(PATIENCE)
    single = ask(scheduler, [5])
    with pytest.raises(Busy, match="1 request is waiting"):
        ask(scheduler, [6])
    gate.open.set()
    assert [one.result()[1] for one in [*table, single]] == ["eos"] * 6


def test_requests_that_find_free_slots_are_not_refused(start):
    scheduler = start(FakeDecoder(slots=8), queue_limit=2)
    for _ in range(20):
        asked = [ask(scheduler, LETTERS[at : at + 4]) for at in range(8)]  # at once, before the thread has a look
        assert [one.result() for one in asked] == [alone(LETTERS[at : at + 4]) for at in range(8)]


def test_a_request_that_was_begun_may_wait_for_the_rest_of_it(start):
    hold = threading.Event()
    decoder = FakeDecoder(lambda prompt: LETTERS[:9], on_call=lambda name, slot, ids: hold.wait(0.02))
    scheduler = start(decoder, queue_timeout=0.1)
    table = [Ask([token]) for token in LETTERS[:4]]  # each takes 0.2 seconds
    submit(scheduler, *table)
    assert [one.result()[:2] for one in table] == [("abcdef", "max_tokens")] * 4


def test_the_queue_takes_as_many_requests_as_it_may(start):
    scheduler = Scheduler(FakeDecoder(on_call=(gate := Gate())), queue_limit=2)
    try:
        first = ask(scheduler, [5])
        assert gate.reached.wait(PATIENCE)
        several = [Ask([6]), Ask([7]), Ask([8])]
        submit(scheduler, *several)
        last = ask(scheduler, [9])
        refused = Ask([10])
        with pytest.raises(Busy, match=r"2 requests are waiting; try again in \d+ second"):
            submit(scheduler, refused)
        gate.open.set()
        assert [one.result() for one in (first, *several, last)] == [alone([token]) for token in (5, 6, 7, 8, 9)]
        submit(scheduler, refused)
        assert refused.result() == alone([10])
    finally:
        gate.open.set()
        scheduler.close()


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    chunk=st.integers(1, 6),
    prompts=st.lists(st.lists(st.sampled_from(LETTERS[:3]), min_size=1, max_size=20), min_size=1, max_size=8),
)
def test_a_decoder_that_mixes_prompts_and_rows_gives_the_answers_it_gives_alone(slots, chunk, prompts):
    scheduler = Scheduler(FakeDecoder(slots=slots, chunk=chunk, mixed=True))
    try:
        asked = [ask(scheduler, prompt) for prompt in prompts]
        assert [one.result() for one in asked] == [alone(prompt, chunk=chunk, mixed=True) for prompt in prompts]
    finally:
        scheduler.close()


def test_before_an_answer_has_ended_those_that_run_say_how_long_one_takes(start):
    reached, go_on = threading.Event(), threading.Event()
    steps = itertools.count(1)

    def on_call(name, slot, ids):
        if name == "decode":
            time.sleep(0.001)
            if next(steps) == 10:
                reached.set()
                go_on.wait(PATIENCE)

    decoder = FakeDecoder(script=lambda prompt: [6] * 500, on_call=on_call, context_length=1000)
    scheduler = start(decoder, speculation=False)
    one = ask(scheduler, [5, 6, 7, 8], 497)
    assert reached.wait(PATIENCE)
    (slot,) = scheduler._slots
    assert slot.job.generation.sampled == 10
    before = time.monotonic() - slot.job.read
    estimate = scheduler._pace.patience([slot], before=0)
    after = time.monotonic() - slot.job.read
    go_on.set()
    assert math.ceil(max(1, before * 487 / 9)) <= estimate <= math.ceil(max(1, after * 487 / 9))
    one.result()
    assert scheduler._pace.tokens == 497
    assert scheduler._pace.gap > 0


def test_waiting_jobs_are_looked_through_while_others_come(start):
    """Thousands come from several threads while those whose patience is over are taken out: nobody is forgotten."""
    scheduler = start(FakeDecoder(on_call=lambda name, slot, ids: time.sleep(0.001)), queue_timeout=0.02)
    asked = [[] for _ in range(3)]

    def client(number):
        for _ in range(1500):
            asked[number].append(ask(scheduler, [5 + number], 2))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    results = [one.result() for one in itertools.chain(*asked)]
    assert len(results) == 4500
    late = [result for result in results if isinstance(result, Busy)]
    assert len(late) > 100
    assert all(isinstance(result, Busy) or result[1] in ("max_tokens", "eos") for result in results)
    assert idle(scheduler)


def test_the_queue_is_looked_at_with_the_lock_in_hand(start):
    """Else another thread changes it meanwhile, which is an error that ends everybody's answers."""
    scheduler = start(FakeDecoder(on_call=lambda name, slot, ids: time.sleep(0.001)), queue_timeout=0.1)
    held = []

    class Watched(Queue):
        @property
        def unbegun(self):
            held.append(scheduler._wake._is_owned())
            return super().unbegun

    scheduler._waiting.__class__ = Watched
    asked = [ask(scheduler, [5], 500) for _ in range(4)]
    results = [one.result() for one in asked]
    assert any(isinstance(result, Busy) for result in results)
    assert len(held) > 4
    assert all(held)


@pytest.mark.parametrize(("renew", "after"), [(False, 0.0), (True, None)])
def test_idle_time_is_spent_on_nothing_that_has_no_next_turn_or_where_it_is_switched_off(start, renew, after):
    scheduler = start(FakeDecoder(), renew_after=after)
    one = Ask(LETTERS[:9], 20)
    one.job.renew = renew
    submit(scheduler, one)
    one.result()
    time.sleep(0.05)
    assert scheduler.statistics().renewed == 0


def test_jobs_whose_time_is_over_are_ended_a_few_at_a_time():
    jobs = [Job(None, print, deadline=0.0) for _ in range(2 * MOST + 1)]
    queue = Queue()
    queue.add(Batch(jobs, print))
    assert [len(queue.take_ending()) for _ in range(4)] == [MOST, MOST, 1, 0]
    assert not queue
