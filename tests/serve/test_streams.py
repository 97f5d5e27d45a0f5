"""The way of pieces from a run to a client.

Run: pytest tests/serve/test_streams.py
"""

import asyncio
import threading
import time

import pytest
from fakes import TOKENS, FakeDecoder, spell

from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve import invocations
from phi3_mlflow.serve.errors import HttpError
from phi3_mlflow.serve.streams import Pieces

BODY = {"messages": [{"role": "user", "content": "one"}], "n": 2}


async def taken(service, body, seconds):
    """The reasons of the choices of one request that has so much time."""
    deadline = time.monotonic() + seconds
    pieces = Pieces(deadline)
    pieces.runs.append(service.start(body, deliver=pieces.deliver(), deadline=deadline))
    return [piece.reason async for _, piece in pieces if piece.reason]


@pytest.fixture
def busy():
    """A service whose only slot is in use until an event is set."""
    going = threading.Event()
    decoder = FakeDecoder(lambda prompt: spell("one two"), on_call=lambda *call: going.wait(30))
    service = Service(TOKENS, decoder, renew_after=None)
    service.start(BODY)
    yield service, going
    going.set()
    service.close()


def test_time_that_is_over_before_the_answer_is_begun_is_an_error_and_no_empty_answer(busy):
    service, going = busy
    threading.Timer(0.5, going.set).start()

    with pytest.raises(HttpError, match="before the answer was begun") as error:
        asyncio.run(taken(service, BODY, seconds=0.1))

    assert error.value.status == 503
    assert invocations.refused(error.value).status_code == 503


def test_a_requests_own_max_time_ends_it_with_what_it_has_even_if_that_is_nothing(busy):
    service, going = busy
    threading.Timer(0.5, going.set).start()

    assert asyncio.run(taken(service, BODY | {"max_time": 0.1}, seconds=60)) == ["max_time", "max_time"]
