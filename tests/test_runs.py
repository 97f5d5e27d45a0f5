"""How answers get to whoever asked: iterated, awaited, called back, left, and when the thread is gone.

Run with: python -m pytest tests/test_runs.py
"""

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
import tracemalloc

import pytest
from fakes import TOKENS, FakeDecoder, spell

from phi3_mlflow.runtime import scheduler
from phi3_mlflow.runtime.answers import Answer
from phi3_mlflow.runtime.errors import Busy, Unavailable
from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.runs import Table
from phi3_mlflow.runtime.service import Service

PATIENCE = 60  # seconds; only what hangs takes as long
ENDLESS = spell("bcdefghijklmnopqrstuvwxyz") * 4000


@pytest.fixture
def load():
    """Makes services over a fake decoder, and closes them after the test."""
    loaded = []

    def make(script=None, *, scheduling=None, **values):
        loaded.append(Service(TOKENS, FakeDecoder(script, **values), **(scheduling or {})))
        return loaded[-1]

    yield make
    for service in loaded:
        service.close()


def says(text):
    return lambda prompt: spell(text)


def ask(text="one", **options):
    return {"messages": [{"role": "user", "content": text}], **options}


LONG = {"max_tokens": 90_000, "repetition_guard": False}


def endless(load, **values):
    return load(lambda prompt: ENDLESS, context_length=100_000, **values)


def until(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def text(run):
    return "".join(piece.text for piece in run)


def test_the_pieces_of_a_run_are_taken_once(load):
    service = load(says("hello world"))
    run = service.start(ask())
    assert text(run) == "hello world"
    for take in (lambda: list(run), run.wait):
        with pytest.raises(RuntimeError, match="taken already"):
            take()
    ended = threading.Event()
    run = service.start(ask(), deliver=lambda event: event.last and ended.set())
    with pytest.raises(RuntimeError, match="taken already"):
        iter(run)
    assert ended.wait(PATIENCE)
    assert run.answer.choices[0].text == "hello world"


def test_a_run_that_is_closed_before_its_first_piece_is_cancelled(load):
    service = endless(load)
    run = service.start(ask(**LONG))
    pieces = iter(run)
    pieces.close()
    del pieces
    assert [job.ending() for job in run.jobs] == ["cancelled"]


def test_pieces_are_awaited_without_a_thread_that_waits(load):
    service = load(says("hello world yes"), slots=2)

    async def client(count):
        runs = [service.start(ask(n=1 + number % 2)) for number in range(count)]
        before = threading.active_count()
        found = []
        for run in runs:
            found.append([piece async for piece in run])
        assert threading.active_count() <= before
        return found

    for number, pieces in enumerate(asyncio.run(client(20))):
        texts = ["".join(piece.text for piece in pieces if piece.choice == choice) for choice in range(1 + number % 2)]
        assert texts == ["hello world yes"] * len(texts)
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_what_ended_a_run_is_raised_where_it_is_awaited(load):
    def fails(name, slot, ids):
        if name == "decode":
            raise MemoryError("out of memory")

    async def client(run):
        return [piece async for piece in run]

    with pytest.raises(MemoryError):
        asyncio.run(client(load(says("hello world"), on_call=fails).start(ask())))


def test_a_run_whose_event_loop_is_closed_in_the_middle_is_cancelled(load, caplog):
    service = endless(load)
    runs = []

    async def client():
        runs.append(service.start(ask(**LONG)))
        async for _ in runs[0]:
            break  # and the iterator is left open

    loop = asyncio.new_event_loop()
    loop.run_until_complete(client())
    loop.close()
    until(lambda: not service.statistics().running)
    assert runs[0].answer.choices[0].reason == "cancelled"
    assert service.start(ask(max_tokens=1)).wait().choices[0].tokens == 1


def test_a_task_that_is_cancelled_while_it_awaits_frees_its_slot(load):
    service = endless(load)

    async def client():
        async for _ in service.start(ask(**LONG)):
            pass

    async def main():
        task = asyncio.create_task(client())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: not service.statistics().running)


def test_cancelling_from_another_thread_ends_the_answer_with_what_it_has(load):
    service = endless(load)
    run = service.start(ask(**LONG))
    pieces = iter(run)
    first = next(pieces)
    threading.Thread(target=run.cancel).start()
    rest = list(pieces)
    assert (rest[-1].reason, rest[-1].last) == ("cancelled", True)
    assert run.answer.choices[0].text == first.text + "".join(piece.text for piece in rest)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_costs_its_own_request_alone(load, error, caplog):
    service = load(says("hello world yes no one two"), slots=2)
    called = []

    def deliver(event):
        called.append(event)
        raise error("of the caller")

    bad = service.start(ask(), deliver=deliver)
    assert text(service.start(ask())) == "hello world yes no one two"
    until(lambda: bad.ended)
    assert len(called) == 1
    assert bad.answer.choices[0].reason == "cancelled"
    assert "raised an error" in caplog.text
    assert service.statistics().alive


def test_a_callback_gets_the_exception_that_ended_its_request(load):
    def fails(name, slot, ids):
        raise MemoryError("out of memory")

    events, ended = [], threading.Event()
    run = load(on_call=fails).start(ask(), deliver=lambda event: (events.append(event), ended.set()))
    assert ended.wait(PATIENCE)
    assert [type(event) for event in events] == [MemoryError]
    assert run.error is events[0]


@pytest.mark.parametrize("again", [False, True], ids=["once", "at every call"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_when_the_thread_dies_all_that_runs_or_waits_ends_and_nothing_more_is_taken(load, error, again, caplog):
    hold, entered, dead = threading.Event(), threading.Event(), []

    def on_call(name, slot, ids):
        entered.set()
        assert hold.wait(PATIENCE)
        if again or not dead:
            dead.append(name)
            raise error

    service = load(on_call=on_call, slots=2)
    runs = [service.start(ask(str(number))) for number in range(5)]
    rows = [service.prepare(service.parse(ask(n=2))) for _ in range(3)]
    table = service.run_table(rows)
    assert entered.wait(PATIENCE)
    hold.set()
    for run in runs:
        with pytest.raises(Unavailable, match=f"the model's thread ended \\({error.__name__}\\): load the model again"):
            run.wait()
    assert {type(answer) for _, answer in table} == {Unavailable}
    for refused in (lambda: service.start(ask()), lambda: service.run_table(rows)):
        with pytest.raises(Unavailable, match="thread ended"):
            refused()
    until(lambda: service._scheduler._decoder.closed)
    assert not service.statistics().alive


def test_after_close_the_text_says_closed(load):
    service = endless(load)
    run = service.start(ask(**LONG))
    service.close()
    for refused in (run.wait, lambda: service.start(ask())):
        with pytest.raises(Unavailable, match="the model was closed: load it again"):
            refused()


def test_close_ends_what_waits_for_a_decoder_that_does_not_come_back(load, monkeypatch):
    stuck, back = threading.Event(), threading.Event()

    def on_call(name, slot, ids):
        if name == "decode":
            stuck.set()
            assert back.wait(PATIENCE)

    service = load(says("hello world"), on_call=on_call)
    events = []
    running = [service.start(ask(n=2)), service.start(ask(), deliver=events.append)]
    table = service.run_table([service.prepare(service.parse(ask()))] * 3)
    assert stuck.wait(PATIENCE)
    monkeypatch.setattr(scheduler, "_CLOSING", 0.01)
    service.close()
    for wait in (running[0].wait, lambda: service.start(ask())):
        with pytest.raises(Unavailable, match="the model was closed"):
            wait()
    outcomes = [str(outcome) for _, outcome in table]
    assert outcomes == ["the model was closed, and has not come back from its last step: load it again"] * 3
    assert [str(event) for event in events] == outcomes[:1]
    assert service.statistics().waiting == 0
    monkeypatch.undo()
    back.set()
    service.close()  # waits until the thread has ended
    assert len(events) == 1
    assert running[0].answer.choices[0].text == "hello"
    assert service._scheduler._decoder.closed


def test_statistics_are_of_one_moment_whatever_goes_on(load):
    failing = iter(range(10**9))

    def on_call(name, slot, ids):
        if name == "prefill" and next(failing) % 13 == 5:
            raise MemoryError

    logging.disable(logging.CRITICAL)
    service, odd, stop = load(slots=3, on_call=on_call), [], threading.Event()
    started = 0
    lock = threading.Lock()

    def watch():
        while not stop.is_set():
            with lock:
                low = started
            now = service.statistics()
            with lock:
                high = started
            known = now.running + now.waiting + now.ended + now.failed
            if not (low <= known <= high + 4 and now.running <= 3 and now.held <= now.capacity):
                odd.append((low, high, now))

    def client(number):
        nonlocal started
        for each in range(60):
            run = service.start(ask(max_tokens=3))
            with lock:
                started += 1
            if each % 7 == 0:
                run.cancel()
            with contextlib.suppress(MemoryError):
                run.wait()

    watcher = threading.Thread(target=watch)
    watcher.start()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(PATIENCE)
    stop.set()
    watcher.join(PATIENCE)
    logging.disable(logging.NOTSET)
    assert odd == []
    end = service.statistics()
    assert (end.running, end.waiting, end.ended + end.failed) == (0, 0, 240)
    assert end.failed > 10


def forked(act, within=20.0):
    """The code with which a forked child ended; None for one that hangs."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = act()
        finally:
            os._exit(code)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > start + within:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


@pytest.mark.parametrize("locked", [False, True], ids=["idle", "while the lock is held"])
def test_a_forked_child_is_told_at_once_that_the_model_stayed_behind(load, locked):
    service = load(says("yes"))
    rows = [service.prepare(service.parse(ask()))]

    def act():
        for call in (lambda: service.start(ask()), lambda: service.run_table(rows)):
            with pytest.raises(Unavailable, match=r"its thread did not come along: load the model in the new process$"):
                call()
        assert not service.statistics().alive
        service.close()
        return 0

    if locked:
        with service._scheduler._wake:
            assert forked(act) == 0
    else:
        assert forked(act) == 0
    assert service.start(ask()).wait().choices[0].text == "yes"


def test_a_table_makes_only_a_window_of_its_answers(load):
    rows, n = 5_000, 16
    service = load(says("yes"), slots=4)
    prepared = [service.prepare(service.parse(ask(n=n, max_tokens=1)))] * rows
    table = service.run_table(prepared)
    most = 0
    for count, (_, answer) in enumerate(table):
        assert isinstance(answer, Answer)
        if count % 50 == 0:
            most = max(most, sum(isinstance(each, Generation) for each in gc.get_objects()))
        if count == 200:
            break
    table.cancel()
    # Four slots and the row that waits; of what ended only the answer is kept, however slowly it is taken.
    assert n <= most <= 6 * n


def test_a_table_of_a_hundred_thousand_rows_takes_little_memory_and_ends_with_its_deadline(load):
    service = endless(load)
    prepared = [service.prepare(service.parse(ask(n=16, **LONG)))] * 100_000
    tracemalloc.start()
    try:
        table = service.run_table(prepared, deadline=time.monotonic() + 0.5)
        found = dict(table)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 100_000
    begun = [answer for answer in found.values() if answer is not None]
    assert 1 <= len(begun) < 5
    assert all(choice.reason == "max_time" for answer in begun for choice in answer.choices)
    assert most < 60e6
    assert service.statistics().running == service.statistics().waiting == 0


def test_every_run_of_a_table_that_is_said_to_begin_ends(load):
    begun, entered, go = [], threading.Event(), threading.Event()

    def on_call(name, slot, ids):
        entered.set()
        assert go.wait(PATIENCE)

    service = load(says("yes"), on_call=on_call, scheduling={"queue_limit": 1, "queue_timeout": 0.01})
    rows = [service.prepare(service.parse(ask()))] * 2
    first = service.start(ask())
    assert entered.wait(PATIENCE)
    late = service.run_table(rows, begun=begun.append)
    assert len(begun) == 1
    with pytest.raises(Busy):
        service.run_table(rows, begun=begun.append)
    assert len(begun) == 1  # nothing was for the one that was refused
    time.sleep(0.1)  # longer than a request may wait, and than the scheduler looks away
    go.set()
    assert [type(answer) for _, answer in late] == [Busy, Busy]
    assert [bool(run.ended) for run in begun] == [True]
    first.wait()


def test_a_table_that_is_left_ends_what_goes_on(load):
    service = endless(load)
    table = service.run_table([service.prepare(service.parse(ask(**LONG)))] * 50)
    until(lambda: service.statistics().running)
    table.cancel()
    assert len(list(table)) == 50
    until(lambda: service.statistics().running == service.statistics().waiting == 0)


def test_a_row_that_is_made_while_its_table_is_left_is_cancelled(load):
    service = endless(load)
    prepared = service.prepare(service.parse(ask(**LONG)))

    def make(row):
        table.cancel()  # another thread, at this moment
        return service._run(prepared, None, lambda event: None, renew=False)

    table = Table([0], make, None)
    assert [job.ending() for job in table.jobs()] == ["cancelled"]
