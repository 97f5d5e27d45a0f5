"""Run with: python -m pytest tests/serve/test_background.py"""

import logging
import threading
import time

import pytest

from phi3_mlflow.serve.background import Background, weigh

PATIENCE = 60  # seconds; only what is broken takes as long


@pytest.fixture
def background():
    """Makes backgrounds and closes them after the test."""
    made = []

    def make(work, items=100, room=1000):
        made.append(Background("things", work, items=items, room=room))
        return made[-1]

    yield make
    for each in made:
        each.close(0)


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_are_worked_off_in_their_order_in_another_thread(background):
    seen = []
    queue = background(lambda item: seen.append((item, threading.current_thread())))
    assert all(queue.put(item) for item in range(50))
    queue.close(PATIENCE)
    assert [item for item, _ in seen] == list(range(50))
    assert {thread for _, thread in seen}.isdisjoint({threading.current_thread()})
    assert (queue.done, queue.lost, queue.waiting) == (50, 0, 0)


def test_what_finds_no_room_is_lost_counted_and_said_once(background, caplog):
    go, begun = threading.Event(), threading.Event()
    queue = background(lambda item: begun.set() or go.wait(PATIENCE), items=3)
    assert queue.put("at work")
    assert begun.wait(PATIENCE)
    assert [queue.put(item) for item in range(5)] == [True] * 3 + [False] * 2
    assert (queue.lost, queue.waiting) == (2, 3)
    assert [line.getMessage() for line in caplog.records] == [
        "things: 1 lost (too many wait already); more of them are counted and not said"
    ]
    go.set()
    until(lambda: queue.done == 4)
    assert queue.put("later")
    until(lambda: queue.done == 5)
    assert queue.put("too heavy", 1001) is False
    assert len(caplog.records) == 2  # all was well between the two


def test_the_weight_of_what_waits_is_bounded(background):
    go, begun = threading.Event(), threading.Event()
    queue = background(lambda item: begun.set() or go.wait(PATIENCE), room=100)
    queue.put("at work")
    assert begun.wait(PATIENCE)
    assert [queue.put("item", 40) for _ in range(3)] == [True, True, False]
    go.set()
    until(lambda: queue.done == 3)
    assert queue.put("item", 100)


def test_an_urgent_item_goes_before_all_that_wait(background):
    go, begun, seen = threading.Event(), threading.Event(), []
    queue = background(lambda item: begun.set() or (go.wait(PATIENCE) and seen.append(item)))
    queue.put(0)
    assert begun.wait(PATIENCE)
    for item, first in ((1, False), (2, False), (3, True)):
        queue.put(item, first=first)
    go.set()
    queue.close(PATIENCE)
    assert seen == [0, 3, 1, 2]


def test_an_item_that_fails_is_lost_alone(background, caplog):
    queue = background(lambda item: 1 // item)
    for item in (0, 1, 0, 0, 2):
        queue.put(item)
    queue.close(PATIENCE)
    assert (queue.done, queue.lost) == (2, 3)
    assert "ZeroDivisionError" in caplog.text
    assert len(caplog.records) < 3


def test_what_an_item_failed_at_is_said_without_passwords(background, caplog):
    def fail(item):
        raise ConnectionError("http://me:the-password@host/health does not answer")

    queue = background(fail)
    queue.put(0)
    queue.close(PATIENCE)
    assert "http://host/health does not answer" in caplog.text
    assert "password" not in caplog.text


def test_where_the_thread_is_ended_another_goes_on_with_what_waits(background, monkeypatch):
    ends, seen = [], []
    monkeypatch.setattr(threading, "excepthook", ends.append)

    def work(item):
        if item == "end":
            raise SystemExit
        seen.append(item)

    queue = background(work)
    for item in ("a", "end", "b", "end", "c"):
        queue.put(item)
    until(lambda: seen == ["a", "b", "c"])
    assert queue.lost == 2
    queue.put("d")
    queue.close(PATIENCE)
    assert seen[-1] == "d"
    assert [end.exc_type for end in ends] == [SystemExit] * 2


def test_closing_does_not_wait_for_ever_and_counts_what_is_left(background, caplog):
    go, begun = threading.Event(), threading.Event()
    queue = background(lambda item: begun.set() or go.wait(PATIENCE))
    for item in range(3):
        queue.put(item)
    assert begun.wait(PATIENCE)
    queue.close(0.05)
    assert (queue.waiting, queue.lost) == (0, 2)
    assert "2 lost (they were not done within 0.05 seconds)" in caplog.text
    assert queue.put("late") is False
    assert queue.lost == 3
    go.set()
    queue.close(PATIENCE)


def test_a_log_that_is_broken_does_not_reach_whoever_puts_something_in(background, monkeypatch):
    def broken(*args, **values):
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(logging.Logger, "warning", broken)
    assert background(lambda item: None, items=0).put("item") is False


def test_a_body_is_weighed_no_further_than_the_limit():
    assert weigh({"messages": [{"role": "user", "content": "a" * 1000}]}, 10**6) in range(1000, 2500)
    assert weigh(None, 100) < 100
    assert weigh([[]] * 10**6, 1000) > 1000
    nested = []
    for _ in range(10_000):
        nested = [nested]
    assert weigh(nested, 10**9) >= 10_000
    began = time.thread_time()
    weigh([{"a": 1}] * 10**6, 1 << 20)
    assert time.thread_time() - began < 0.5
