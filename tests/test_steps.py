"""What goes into a step, on a machine whose clock is the test's.

Run with: python -m pytest tests/test_steps.py
"""

import itertools
from types import SimpleNamespace

import pytest
from fakes import FakeDecoder
from test_scheduler import LETTERS, Gate, ask

from phi3_mlflow.runtime import scheduler as admitting
from phi3_mlflow.runtime import steps as composing
from phi3_mlflow.runtime.scheduler import Scheduler

GAP = 0.25  # seconds
LONG = (LETTERS * 20)[:500]


class Machine(FakeDecoder):
    """A decoder whose steps take a time for themselves and for each token.

    Attributes:
        now: its clock, in seconds.
        steps_taken: (seconds, tokens of answers, tokens of each part of a prompt) of each step.
    """

    def __init__(self, monkeypatch, base, each, *, mixed=True, **values):
        super().__init__(lambda prompt: LETTERS * 20, context_length=1100, chunk=16, mixed=mixed, **values)
        self.now, self.base, self.each, self.cost = 0.0, base, each, 0.16
        self.steps_taken = []
        for module in (admitting, composing):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def step(self, parts):
        answers = sum(len(part.ids) for slot, part in parts.items() if self._answers[slot])
        prompts = [len(part.ids) for slot, part in parts.items() if not self._answers[slot]]
        logits = super().step(parts)
        seconds = self.base + self.each * (answers + sum(prompts))
        self.now += seconds
        self.steps_taken.append((seconds, answers, prompts))
        return logits


def beside_an_answer(decoder, prompts, **values):
    """The steps from the arrival of some prompts, in the middle of an answer, to the end of the last of them."""
    came = []

    def on_call(name, slot, ids):
        if name == "decode" and len(decoder.steps_taken) == 5 and not came:
            came.extend(ask(scheduler, prompt, 1) for prompt in prompts)

    decoder._on_call = on_call
    scheduler = Scheduler(decoder, token_gap=GAP, speculation=False, **values)
    try:
        running = ask(scheduler, LETTERS[:20], 400)
        while not came:
            assert running.events.get(timeout=120).reason is None
        assert [one.result()[1] for one in came] == ["max_tokens"] * len(prompts)
        running.job.cancel()
        while running.events.get(timeout=120).reason is None:
            pass
    finally:
        scheduler.close()
    return [step for step in decoder.steps_taken[6:] if step[2]]


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_goes_on_while_prompts_are_read_in_the_time_that_may_pass(monkeypatch, count):
    taken = beside_an_answer(Machine(monkeypatch, 0.057, 0.0116, slots=4), [LONG[at:] for at in range(count)])
    assert {answers for _, answers, _ in taken} == {1}
    # What a prompt adds to a step is known when one has been read; before, it is what the decoder says.
    assert all(seconds <= 1.05 * GAP for seconds, _, _ in taken)
    assert all(seconds <= GAP for seconds, _, _ in taken[4:])
    assert all(seconds >= 0.75 * GAP for seconds, _, _ in taken[:-1])


def test_a_slow_machine_reads_a_little_in_each_step_and_a_fast_one_much(monkeypatch):
    slow = beside_an_answer(Machine(monkeypatch, 0.5, 0.1, slots=2), [LONG])
    assert {sum(prompts) for _, _, prompts in slow} == {4}
    fast = beside_an_answer(Machine(monkeypatch, 0.001, 0.0001, slots=6), [LONG[at:] for at in range(5)])
    assert max(sum(prompts) + answers for _, answers, prompts in fast) in range(253, 257)
    assert len(fast) < 25


def test_a_step_of_more_than_a_block_of_rows_has_whole_ones_of_them(monkeypatch):
    # In the time that may pass 163 tokens have room; they would take as long as 192.
    taken = beside_an_answer(Machine(monkeypatch, 0.005, 0.0015, slots=4), [LONG[at:] for at in range(3)])
    sizes = [sum(prompts) + answers for _, answers, prompts in taken]
    # The first one is what the decoder says.
    assert max(sizes[1:]) in range(125, 129)
    assert sum(size > 120 for size in sizes) >= 8


def test_a_machine_that_was_held_up_once_finds_its_pace_again(monkeypatch):
    decoder = Machine(monkeypatch, 0.02, 0.005, slots=2)
    step = decoder.step

    def held_up(parts):
        decoder.now += 30 * (len(decoder.steps_taken) == 12)
        return step(parts)

    decoder.step = held_up
    taken = beside_an_answer(decoder, [LONG])
    assert min(sum(prompts) for _, _, prompts in taken[5:10]) == 4
    assert max(sum(prompts) for _, _, prompts in taken[-10:]) >= 32


@pytest.mark.parametrize("each", [0.001, 0.1])
def test_where_no_answer_waits_a_prompt_is_read_in_whole_chunks_and_its_rest(monkeypatch, each):
    decoder = Machine(monkeypatch, 0.01, each, slots=1)
    scheduler = Scheduler(decoder, token_gap=GAP, speculation=False)
    try:
        for length in (1, 15, 16, 17, 33, 500, 333):
            decoder.steps_taken.clear()
            ask(scheduler, (LETTERS[length % 7 :] * 30)[:length], 1).result()
            (parts,) = zip(*(prompts for _, _, prompts in decoder.steps_taken), strict=True)
            *whole, rest = parts
            assert sum(parts) == length
            assert all(part % 16 == 0 for part in whole)
            assert rest % 16 == 0 or rest < 16
            assert max(parts) <= (16 if each > 0.01 else 256)
        if each < 0.01:
            assert max(parts) == 256
    finally:
        scheduler.close()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_moves(monkeypatch, mixed):
    gate = Gate()
    decoder = Machine(monkeypatch, 0.0, 1.0, mixed=mixed, slots=2, on_call=gate)
    scheduler = Scheduler(decoder, token_gap=GAP, renew_after=None)
    try:
        long = ask(scheduler, LONG[:480], 1)  # 30 chunks
        assert gate.reached.wait(120)
        short = [ask(scheduler, [at, *LETTERS[:31]], 1) for at in range(5, 45)]  # 2 chunks each, 80 in all
        gate.open.set()
        for one in [*short, long]:
            one.result()
    finally:
        scheduler.close()
    parts = [(slot, len(ids)) for name, slot, ids in decoder.calls if name == "prefill"]
    slots = [slot for slot, _ in parts]
    first = slots.index(1)
    assert first <= 2  # the first short one is served almost at once
    assert slots[first : first + 12].count(1) >= 7
    read = list(itertools.accumulate(size * (slot == 0) for slot, size in parts))
    assert read.index(480) < len(parts) - 10  # and the long one is done before the last of them


def test_chunks_that_were_parted_are_used_again_and_begin_where_chunks_do(monkeypatch):
    decoder = Machine(monkeypatch, 0.2, 0.01, slots=3)
    taken = beside_an_answer(decoder, [LONG[3:50], LONG[3:60]])
    assert {size for _, _, (size, *_) in taken} <= set(range(16))
    copies = [call for call in decoder.calls if call[0] == "copy"]
    assert [length for _, _, (_, length) in copies] == [32]
    ends = list(itertools.accumulate(len(ids) for name, slot, ids in decoder.calls if (name, slot) == ("prefill", 1)))
    assert {16, 32} <= set(ends)
