"""Ten thousand random operations on a decoder that fails at random: every caller gets what is its own.

Run with: python -m pytest tests/test_faults.py
"""

import gc
import logging
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import TOKENS, FakeDecoder

from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.service import Service

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from faults import Callers, Faulty, Question, settled

PATIENCE = 120  # seconds; only a caller without an answer takes as long
CLIENTS = 8
OPERATIONS = 2500  # in each of four runs

# Prompts that share beginnings of several chunks, and some that share none.
CONTENTS = ["yes", "no", "hello world", "one two", *(beginning + end for beginning in ("abcdefgh" * 2, "spain" * 3)
            for end in ("", "x", "yz", "the capital of"))]  # fmt: skip
# Most of these answers can only be written in one way, so that tokens are proposed.
FORMAT = {"type": "regex", "regex": "(yes|no), the capital of spain is (hello|madrid)"}
QUESTIONS = [
    {"messages": [{"role": "user", "content": content}], **options}
    for content in CONTENTS
    for options in ({"max_tokens": 1}, {"max_tokens": 6}, {"max_tokens": 9, "response_format": FORMAT})
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mixed"])
def mixed(request):
    """Whether the decoder mixes prompts and rows."""
    return request.param


@pytest.fixture(scope="module")
def questions(mixed):
    """Each with the answer of a decoder of its own, which proposes nothing."""

    def alone(body):
        service = Service(TOKENS, FakeDecoder(mixed=mixed), speculation=False)
        try:
            return service.start(body).wait().choices[0].text
        finally:
            service.close()

    return [Question(body, alone(body)) for body in QUESTIONS]


@pytest.fixture(autouse=True)
def quiet():
    """Each fault is in the log, with its traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", [1, 2])
def test_every_caller_gets_its_own_answer_or_the_fault_that_was_its_own(questions, mixed, seed):
    others = generations()  # of models that other tests have loaded
    decoder = Faulty(FakeDecoder(slots=3, mixed=mixed), seed, pause=0.001)
    callers = Callers(Service(TOKENS, decoder, queue_limit=6, renew_after=0.0), questions)

    def client(number):
        rng = random.Random(seed * 100 + number)
        for _ in range(OPERATIONS // CLIENTS):
            callers.ask(rng)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads) and time.monotonic() < limit:
        callers.fork()
        threads[0].join(0.5)
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
    assert callers.wrong == []
    assert not any(thread.is_alive() for thread in threads), "a caller without an answer"
    assert settled(callers.service)
    assert min(decoder.faults.values()) > 1
    assert callers.service.statistics().accepted > 50
    assert min(callers.counts[kind] for kind in ("iterated", "called back", "raised", "left", "failed", "table")) > 20

    decoder.sound = True
    for question in questions:
        assert callers.service.start(question.body).wait().choices[0].text == question.text
    assert settled(callers.service)
    kept = [each for each in generations() if not any(each is other for other in others)]
    callers.service.close()
    assert kept == [], "answers are kept that have ended"


def generations():
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Generation)]
