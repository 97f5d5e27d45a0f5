"""How long a request is told to wait."""

import time
from types import SimpleNamespace

import pytest

from phi3_mlflow.runtime.jobs import Job
from phi3_mlflow.runtime.pace import Pace

PROMPT = range(100)


def job(reading=0.0, answering=0.0, sampled=0, most=100):
    """A job whose prompt was read in so many seconds, and that has answered for so many since."""
    generation = SimpleNamespace(prompt=PROMPT, most_tokens=len(PROMPT) + most - 1, sampled=sampled)
    made = Job(generation, deliver=None)
    made.read = time.monotonic() - answering
    made.admitted = made.read - reading
    return made


def slots(*jobs):
    return [SimpleNamespace(job=each) for each in jobs]


@pytest.fixture
def pace():
    """Prompts take 2 seconds, answers have 50 tokens, one every 0.1 s."""
    pace = Pace()
    pace.ended(job(2, 49 * 0.1, 50))
    return pace


def test_averages_follow_slowly(pace):
    assert (pace.reading, pace.tokens, pace.gap) == pytest.approx((2, 50, 0.1), rel=0.01)
    pace.ended(job(4, 99 * 0.2, 100))
    assert (pace.reading, pace.tokens, pace.gap) == pytest.approx((2.4, 60, 0.12), rel=0.01)
    pace.ended(job(9))  # its client left before there was an answer
    assert pace.tokens == pytest.approx(60)


@pytest.mark.parametrize(
    ("running", "seconds"),
    {
        "soon": ([(2, 4.8, 49), (2, 0, 1)], 1),
        "the first that ends": ([(2, 2.9, 30), (2, 0.9, 10)], 2),  # 20 tokens more
        "slower than others were": ([(2, 99, 100, 200)] * 2, 88),  # 0.87 s each: some still count as quick
        "longer than others were": ([(2, 5.9, 60)] * 2, 4),  # 40 more that it may have
        "none may be so long": ([(2, 0.9, 10, 30)] * 2, 2),
        "the prompt is still read": ([(1,)] * 2, 6),
        "the prompt takes long": ([(5,)] * 2, 5),
        "one token": ([(2, 0, 1)] * 2, 5),
    }.values(),
)
def test_a_request_waits_until_the_first_answer_ends(pace, running, seconds):
    assert pace.patience(slots(*(job(*each) for each in running)), before=0) in (seconds, seconds + 1)


def test_a_free_slot_is_there_at_once(pace):
    assert pace.patience(slots(None, job(2, 0, 1)), before=0) == 1


def test_those_before_it_get_slots_first(pace):
    assert pace.patience(slots(None, None), before=4) in (14, 15)  # 7 seconds each, two at once


def test_who_knows_nothing_says_the_least():
    assert Pace().patience(slots(job(), job()), before=9) == 1
    assert Pace().patience(slots(job(1, 9.9, 100, most=300)), before=0) in (20, 21)
