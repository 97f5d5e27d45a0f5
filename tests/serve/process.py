"""`phi3-mlflow serve` as a process of its own, and what the tests ask it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx

PATIENCE = 120  # seconds; only what is broken takes as long
MADRID = "The capital of Spain is Madrid."
SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]
# The embedded model's end tokens, which an answer is kept from.
ENDLESS = {"logit_bias": {"2048": -100, "2049": -100, "2055": -100}, "repetition_guard": False}


class Serving:
    """A running server.

    Attributes:
        process: the process.
        address: such as http://127.0.0.1:54321; empty until it listens.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: BinaryIO):
        self.process = process
        self.address = ""
        self._log = log

    def output(self) -> str:
        """All that the process has written so far."""
        position = self._log.tell()
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        self._log.seek(position)
        return text

    def end(self, number: int = signal.SIGTERM) -> int:
        """Tells it to end; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def connect(self) -> socket.socket:
        """A bare connection."""
        url = urlsplit(self.address)
        return socket.create_connection((url.hostname, url.port), timeout=PATIENCE)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = httpx.get(f"{self.address}/metrics", timeout=PATIENCE).text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def running(self) -> float:
        """Answers in the making."""
        return self.metric("vllm:num_requests_running")

    def waiting(self) -> float:
        """Answers that wait for a slot."""
        return self.metric("vllm:num_requests_waiting")

    def generated(self) -> float:
        """Tokens that were sampled so far."""
        return self.metric("vllm:generation_tokens_total")


def start(*arguments: str, log: BinaryIO, environment: Mapping[str, str] | None = None) -> Serving:
    """Starts `phi3-mlflow serve` with these arguments on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "phi3_mlflow", "serve", "-p", "0", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    )
    return Serving(process, log)


@contextmanager
def serving(*arguments: str, environment: Mapping[str, str] | None = None, ready: bool = True) -> Iterator[Serving]:
    """A server for the length of a block; its output is shown where something in the block fails.

    Args:
        arguments: of `phi3-mlflow serve`, without the port.
        environment: variables to add.
        ready: whether to wait until a model is loaded; `arguments` then have `--preload`.
    """
    with tempfile.TemporaryFile() as log:
        server = start(*arguments, log=log, environment=environment)
        try:
            end = time.monotonic() + 3 * PATIENCE
            while not answers(server, "/ready" if ready else "/version"):
                assert server.process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server is not ready"
                time.sleep(0.05)
            yield server
        except BaseException:
            print(server.output()[-8000:])  # noqa: T201
            raise
        finally:
            server.process.terminate()
            try:
                server.process.wait(20)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def answers(server: Serving, path: str) -> bool:
    """Whether the server answers there with a 200."""
    if not server.address:
        found = re.search(r"Serving .* at (http://\S+)", server.output())
        if not found:
            return False
        server.address = found[1]
    try:
        return httpx.get(server.address + path, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Any, seconds: float = PATIENCE) -> None:
    """Waits for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def post(server: Serving, path: str, body: Any, **headers: str) -> httpx.Response:
    """The answer to a body: bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        server.address + path,
        content=content,
        headers={"content-type": "application/json", **headers},
        timeout=PATIENCE,
    )


def chat(**more: Any) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    return {"messages": SPAIN, **more}


def endless(tokens: int = 4000, **more: Any) -> dict[str, Any]:
    """A chat that the model goes on answering for so many tokens."""
    return {"messages": SPAIN, **ENDLESS, "max_tokens": tokens, **more}


def raw(method: str, path: str, body: Any = None, headers: Sequence[str] = (), version: str = "1.1") -> bytes:
    """A request as it goes over the wire."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last one, [DONE], left out."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said(text: str) -> str:
    """What a chat's stream says."""
    return "".join(each["choices"][0]["delta"].get("content", "") for each in events(text) if each["choices"])
