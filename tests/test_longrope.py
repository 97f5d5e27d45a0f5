"""Sequences on both sides of the switch, on a decoder without a model.

Run with: python -m pytest tests/test_longrope.py
"""

import pytest
from fakes import FakeDecoder, spell
from test_scheduler import alone, ask

from phi3_mlflow.runtime.decoders.base import Growth, Part
from phi3_mlflow.runtime.decoders.longrope import Switching
from phi3_mlflow.runtime.scheduler import Scheduler

LETTERS = spell("abcdefghijklmnopqrstuvwxyz")[1:]
SWITCH = 12


class Forgetful(FakeDecoder):
    """Keeps a sequence only as long as it has room for all that is asked for, as onnxruntime-genai's generator does.

    Attributes:
        reserved: tokens that it has room for.
    """

    reserved = 0

    def reserve(self, slot, length):
        if length <= self.reserved:
            return True
        self.reserved = length
        self.rewind(slot, 0)
        return False

    def _append(self, slot, ids, prefilled):
        super()._append(slot, ids, prefilled)
        assert len(self._sequences[slot]) <= self.reserved


@pytest.fixture
def decoders():
    """One that forgets, and what keeps its sequences computed with one table."""
    inner = Forgetful(mixed=True, context_length=40)
    return inner, Switching(inner, SWITCH)


def held(inner):
    return [token for token, _ in inner._sequences[0]]


@pytest.mark.parametrize("length", [8, SWITCH, SWITCH + 4])
def test_what_a_decoder_loses_when_it_makes_room_is_not_counted_on(decoders, length):
    inner, switching = decoders
    assert not switching.reserve(0, 20)
    switching.step({0: Part(LETTERS[:length], 1)})
    assert switching.reserve(0, 20)
    assert held(inner) == LETTERS[:length]
    assert not switching.reserve(0, 30)
    assert held(inner) == []
    # The caller begins from nothing, and no token of before comes back.
    switching.rewind(0, 0)
    switching.step({0: Part(LETTERS[5:8], 1)})
    assert held(inner) == LETTERS[5:8]


def test_a_sequence_that_comes_to_the_other_side_is_computed_anew_in_the_room_that_was_reserved(decoders):
    inner, switching = decoders
    switching.reserve(0, SWITCH + 2)
    switching.step({0: Part(LETTERS[:SWITCH], 1)})
    inner.calls.clear()
    switching.step({0: Part(LETTERS[SWITCH : SWITCH + 1], 1)})
    assert ("rewind", 0, [0]) in inner.calls
    assert held(inner) == LETTERS[: SWITCH + 1]


def test_room_is_the_decoders_own(decoders):
    inner, switching = decoders
    growths = [Growth(0, 0, 9)]
    assert switching.room(growths) == inner.room(growths) == 9
    assert switching.capacity == inner.capacity


def test_conversations_that_grow_over_the_switch_get_the_answers_they_get_alone():
    decoder = Switching(Forgetful(mixed=True, context_length=40), SWITCH)
    scheduler = Scheduler(decoder, speculation=False)
    try:
        for length in (5, 9, 20, 6, 13, 26, 3):
            assert ask(scheduler, LETTERS[:length]).result() == alone(LETTERS[:length], mixed=True, context_length=40)
    finally:
        scheduler.close()
