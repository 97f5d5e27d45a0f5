"""The line on a terminal that says what `phi3-mlflow log` is doing.

Run: pytest tests/test_status_line.py
"""

import re

import pytest

pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

from keyboard import Terminal


def test_each_step_is_said_from_the_start_and_the_result_stands_alone(tmp_path):
    terminal = Terminal("onnx", "--register", "lined", folder=tmp_path, verb="log")
    try:
        assert terminal.end() == 0, terminal.text
    finally:
        terminal.close()

    assert list(dict.fromkeys(re.findall(r"log: (.*?) \.\.\.", terminal.shown.decode()))) == [
        "starting", "checking weights and stores", "fetching weights", "writing the onnx model",
        "registering the onnx model",
    ]  # fmt: skip
    beginnings = [line.split()[0].partition("-")[0] for line in terminal.text.splitlines()]
    assert beginnings == ["models:/m", "Registered", "Logged", "Serve"]
