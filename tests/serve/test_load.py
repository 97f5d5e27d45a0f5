"""Many clients at once, most of whom leave: nothing leaks, and those who stay get what they would get alone.

Run: pytest tests/serve/test_load.py
"""

import sys
from pathlib import Path

import pytest
from process import MADRID, chat, post, serving, until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import serve_soak


@pytest.fixture(scope="module")
def busy(onnx_model):
    with serving(f"--name=phi3={onnx_model}", "--preload", "--access-log", "none") as running:
        yield running


def test_clients_that_come_and_leave_at_random_leave_nothing_behind(busy):
    serve_soak.churn(busy.address, busy.process.pid, clients=40, requests=120, seed=1)  # until all is warm
    found = serve_soak.churn(busy.address, busy.process.pid, clients=40, requests=300, seed=2)

    assert found["wrong"] == []
    assert found["answered"] + found["left"] == 300
    assert found["answered"] > 30
    assert found["left"] > 30
    until(lambda: busy.running() == busy.waiting() == 0)
    assert found["threads"][1] <= found["threads"][0] + 10  # the pool grows to what was needed at once
    assert found["files"][1] <= found["files"][0]
    assert found["memory"][1] < found["memory"][0] + 64
    assert post(busy, "/v1/chat/completions", chat()).json()["choices"][0]["message"]["content"] == MADRID
