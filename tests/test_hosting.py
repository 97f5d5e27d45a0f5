"""A loaded model in MLflow's scoring server: what is abandoned costs nothing, and the server ends when it is told to.

Run with: python -m pytest tests/test_hosting.py
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import TOKENS, FakeDecoder, spell
from scoring import post

from phi3_mlflow.runtime import hosting
from phi3_mlflow.runtime.errors import Unavailable
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serving import served

ROOT = Path(__file__).resolve().parent.parent
EOS = json.loads((ROOT / "artifacts" / "onnx" / "genai_config.json").read_text("utf-8"))["model"]["eos_token_id"]
PATIENCE = 60

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds a server's processes in /proc")


def ask(tokens):
    """A request whose answer has so many tokens."""
    return {
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": tokens,
        "repetition_guard": False,
        "self_talk_guard": False,
        "custom_inputs": {"logit_bias": {str(token): -100 for token in EOS}},
    }


def processes(mark):
    """The processes that were started with a word in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_does_not_wait_for_long_answers(onnx_model, tmp_path, number):
    mark = uuid.uuid4().hex
    environment = {"PHI3_TEST": mark, "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "300"}
    with (
        ThreadPoolExecutor(6) as clients,
        served(str(onnx_model), cwd=tmp_path, environment=environment) as address,
    ):

        def client():
            with contextlib.suppress(OSError):
                return post(address, ask(4000))
            return None

        assert post(address, ask(1))[0] == 200
        asked = [clients.submit(client) for _ in range(6)]
        time.sleep(1.0)
        assert not all(each.done() for each in asked)
        began = time.monotonic()
        for process in processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while processes(mark):
            assert time.monotonic() < began + PATIENCE, "the server lives on"
            time.sleep(0.05)
        answers = [each.result(PATIENCE) for each in asked]
        assert any(answer is None or answer[0] == 503 for answer in answers)


def test_seventy_requests_that_nobody_waits_for_any_more_cost_nothing(onnx_model, tmp_path):
    environment = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "20"}
    with served(str(onnx_model), cwd=tmp_path, environment=environment) as address:
        with ThreadPoolExecutor(70) as clients:
            statuses = [status for status, _ in clients.map(lambda _: post(address, ask(4000)), range(70))]
        # Were those still computed, this one would wait for a slot until it is refused.
        status, text = post(address, ask(1))
        assert status == 200, text
        assert set(statuses) <= {200, 429, 503, 504}
        assert statuses.count(504) < 35  # those that waited were told so before the server gave them up


def test_time_is_counted_from_when_a_call_was_handed_over(monkeypatch):
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60")
    before = time.monotonic()
    assert before + 58 <= hosting.deadline() <= time.monotonic() + 58
    with hosting.RequestExecutor(1) as executor:
        hold = threading.Event()
        executor.submit(hold.wait, PATIENCE)
        handed = time.monotonic()
        waits = executor.submit(hosting.deadline)
        until = time.monotonic()
        time.sleep(0.3)
        hold.set()
        assert handed + 58 <= waits.result(PATIENCE) <= until + 58
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT")
    assert hosting.deadline() is None


def test_elsewhere_than_in_a_server_nothing_is_touched(monkeypatch):
    monkeypatch.delenv("__pyfunc_model_path__", raising=False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hosting.attend(lambda: None)
    monkeypatch.setenv("__pyfunc_model_path__", "model")
    hosting.attend(lambda: None)  # no event loop runs here
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_nothing_begins_for_a_client_that_has_left():
    service = Service(TOKENS, FakeDecoder(lambda prompt: spell("madrid yes")))
    row = service.prepare(service.parse({"messages": [{"role": "user", "content": "hello"}]}))
    with hosting.hosted() as hosted:
        begun = hosting.watch()
        answered = dict(service.run_table([row], begun=begun))
        hosted.leave()
        refused = dict(service.run_table([row], begun=begun))

    assert answered[0].choices[0].text == "madrid yes"
    assert isinstance(refused[0], Unavailable)
    assert "the client has left" in str(refused[0])
    assert len(hosted.runs) == service.statistics().ended == 1
    service.close()
