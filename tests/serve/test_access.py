"""Run with: python -m pytest tests/serve/test_access.py"""

import contextlib
import io
import json
import os
import re
import time
from datetime import datetime
from pathlib import Path

import pytest
from fakes import TOKENS, FakeDecoder, spell

from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve.access import AccessLog
from phi3_mlflow.serve.access import line as fields_of
from phi3_mlflow.serve.records import Record

PATIENCE = 60  # seconds; only what is broken takes as long
SECRET = "hello capital"


@pytest.fixture
def service():
    service = Service(TOKENS, FakeDecoder(lambda prompt: spell("madrid yes")))
    yield service
    service.close()


def body(**options):
    return {"messages": [{"role": "user", "content": SECRET}], **options}


def answered(service, **options):
    """The record of a request that was answered."""
    record = Record("POST", "/v1/chat/completions", client="127.0.0.1", key="team-a", model="phi3", body=body())
    record.runs = [service.start(body(**options))]
    record.runs[0].wait()
    record.status, record.ended = 200, time.monotonic()
    return record


def lines(log, stream):
    log.close(PATIENCE)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_who_asked_what_model_how_it_ended_and_how_long_it_took(service):
    stream = io.StringIO()
    log = AccessLog(stream)
    record = answered(service, n=2, max_tokens=2)
    record.trace_id = "tr-1"
    log.ended(record)
    (line,) = lines(log, stream)
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(record.began, abs=0.002)
    assert line["time"].endswith("Z")
    assert {name: line[name] for name in ("id", "client", "key", "method", "route", "model", "stream", "status")} == {
        "id": record.id, "client": "127.0.0.1", "key": "team-a", "method": "POST", "route": "/v1/chat/completions",
        "model": "phi3", "stream": False, "status": 200,
    }  # fmt: skip
    assert "error" not in line
    assert line["prompt_tokens"] == len(TOKENS.encode_chat(body()["messages"]))
    assert line["completion_tokens"] == 4
    assert line["finish_reasons"] == ["length", "length"]
    assert line["cached_tokens"] == 0
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert line["trace"] == "tr-1"


def test_texts_are_left_out_unless_asked_for(service):
    for prompts in (False, True):
        stream = io.StringIO()
        log = AccessLog(stream, prompts=prompts)
        log.ended(answered(service))
        (line,) = lines(log, stream)
        assert (SECRET in stream.getvalue()) is prompts
        assert ("madrid" in stream.getvalue()) is prompts
        if prompts:
            assert line["body"] == body()
            assert line["answers"] == [["madrid yes"]]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("`messages` is 'hello capital'; it must be a list", "`messages` is [...]"),
        ('`stop[0]` is "hello\'s capital"; no', "`stop[0]` is [...]"),
        ("`messages` is ['hello capit...; it must be", "`messages` is [[...]"),
        ("the server's log says why", "the server's log says why"),
        ("`n` is 0; it must be from 1 to 8", "`n` is 0; it must be from 1 to 8"),
    ],
)
def test_what_an_error_quotes_from_the_request_is_left_out_too(error, shown):
    stream = io.StringIO()
    log = AccessLog(stream)
    log.ended(Record("POST", "/v1/chat/completions", status=400, error=error))
    (line,) = lines(log, stream)
    assert line["error"] == shown
    assert not {"prompt_tokens", "finish_reasons", "seconds", "key", "model"} & line.keys()


def test_a_text_of_many_megabytes_is_named_and_not_kept():
    stream = io.StringIO()
    log = AccessLog(stream, prompts=True)
    log.ended(Record("POST", "/v1/completions", status=400, body={"prompt": "a" * (8 << 20)}))
    (line,) = lines(log, stream)
    assert line["body"] == "more than 4 MiB"


def test_an_answer_that_was_cut_or_failed_is_told_from_one_that_ended(service):
    stream = io.StringIO()
    log = AccessLog(stream)
    service._scheduler._decoder._on_call = lambda name, slot, ids: time.sleep(0.01)
    left = Record("POST", "/v1/chat/completions", model="phi3", status=499, error="the client left")
    left.runs = [service.start(body())]
    left.runs[0].cancel()
    left.runs[0].wait()
    log.ended(left)

    def fail(name, slot, ids):
        raise RuntimeError("broken")

    service._scheduler._decoder._on_call = fail
    failed = Record("POST", "/v1/chat/completions", model="phi3", status=500, error="the model failed")
    failed.runs = [service.start(body())]
    with pytest.raises(RuntimeError):
        failed.runs[0].wait()
    log.ended(failed)
    told = lines(log, stream)
    assert [(line["status"], line.get("finish_reasons"), line["error"]) for line in told] == [
        (499, ["abort"], "the client left"),
        (500, None, "the model failed"),
    ]


def plain(*records, **options):
    stream = io.StringIO()
    log = AccessLog(stream, plain=True, **options)
    for record in records:
        log.ended(record)
    log.close(PATIENCE)
    return [line.partition(" ")[2].partition(" ")[2] for line in stream.getvalue().splitlines()]


def test_a_line_for_a_person_says_what_is_known_and_nothing_else(service):
    whole = answered(service, n=2, max_tokens=2)
    whole.ended, whole.trace_id, whole.client = whole.came + 0.1344, "tr-1", "10.0.0.7"
    bare = Record("GET", "/health", client="127.0.0.1", status=200)
    bare.ended = bare.came + 0.0004
    refused = Record(
        "POST", "/v1/chat/completions", status=400, error="`n` is 'two'; it must be a number", model="phi3"
    )

    tokens = len(TOKENS.encode_chat(body()["messages"]))
    assert plain(whole, bare, refused) == [
        f"POST /v1/chat/completions 200 134 ms phi3 {tokens}+4 tokens length from 10.0.0.7 key team-a trace tr-1",
        "GET /health 200 0 ms",
        "POST /v1/chat/completions 400 phi3 (`n` is [...])",
    ]


def test_a_line_for_a_person_has_texts_where_they_are_asked_for(service):
    (line,) = plain(answered(service), prompts=True)
    assert json.loads(line[line.index("{") :]) == {"body": body(), "answers": [["madrid yes"]]}


def test_no_client_writes_a_line_of_its_own():
    (line,) = plain(Record("GET", "/a\n2026-11-26 POST /\x1b[31m", status=404, error="there\r\nis nothing"))
    assert line == r"GET /a%0A2026-11-26%20POST%20/%1B%5B31m 404 (there\r\nis nothing)"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_loses_lines_and_nothing_else(caplog):
    with open("/dev/full", "w") as stream:
        log = AccessLog(stream)
        for _ in range(100):
            log.ended(Record("GET", "/health", status=200))
        log.close(PATIENCE)
        assert (log.lines.done, log.lines.lost) == (0, 100)
        with contextlib.suppress(OSError):
            stream.close()
    assert len(caplog.records) == 1
    assert "access log: 1 lost (OSError: [Errno 28] No space left on device)" in caplog.text


def test_a_closed_stream_loses_lines_and_nothing_else(caplog):
    stream = io.StringIO()
    log = AccessLog(stream)
    stream.close()
    log.ended(Record("GET", "/health", status=200))
    log.close(PATIENCE)
    assert log.lines.lost == 1
    assert "I/O operation on closed file" in caplog.text


def test_a_line_that_got_out_in_part_does_not_spoil_the_next():
    class Torn(io.StringIO):
        broken = True

        def write(self, text):
            if self.broken:
                self.broken = False
                super().write(text[:7])
                raise OSError("no room")
            return super().write(text)

    stream = Torn()
    log = AccessLog(stream)
    for _ in range(3):
        log.ended(Record("GET", "/health", status=200))
    log.close(PATIENCE)
    assert [line[:1] for line in stream.getvalue().splitlines()] == ["{"] * 3
    assert [json.loads(line)["status"] for line in stream.getvalue().splitlines()[1:]] == [200, 200]


def test_a_stream_that_takes_nothing_any_more_holds_up_nobody():
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    log = AccessLog(stream)
    for _ in range(20_000):
        log.ended(Record("GET", "/health", status=200))
    assert log.lines.lost > 0
    log.close(0.1)
    os.close(reader)  # what the thread is still writing fails, and it ends
    log.lines._thread.join(PATIENCE)
    assert not log.lines._thread.is_alive()
    with contextlib.suppress(OSError):
        stream.close()


def test_the_documentation_names_every_field_and_shows_a_line_as_it_is(service):
    page = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text("utf-8")
    (paragraph,) = [each for each in page.split("\n\n") if each.startswith("Where stderr is no terminal")]
    whole = answered(service)
    whole.trace_id, whole.error = "tr-1", "broken"
    assert set(fields_of(whole)) <= set(re.findall(r"`(\w+)`", paragraph))

    whole.error, whole.key, whole.trace_id = None, None, None
    shown = re.search(r"^```text\n\S+ \S+ (POST .*)$", page, re.MULTILINE)[1]
    assert [re.sub(r"\d+", "1", each) for each in [shown]] == [re.sub(r"\d+", "1", each) for each in plain(whole)]
