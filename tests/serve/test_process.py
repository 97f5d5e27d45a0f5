"""The server's process: what it says, whom it lets in, and how it ends.

Run: pytest tests/serve/test_process.py
"""

import signal
import socket
import tempfile
import time

import httpx
import pytest
from click.testing import CliRunner
from logged import Slow
from process import MADRID, PATIENCE, answers, chat, endless, post, raw, serving, start, until

from phi3_mlflow.cli import cli
from phi3_mlflow.serve import server as server_module
from phi3_mlflow.serve.server import is_public

CHAT = "/v1/chat/completions"
KEYS = "# who may ask\nalice = alices-secret-key\n\nbob=bobs-secret-key-=\n  carol_2 = carols-secret-key  \n"


@pytest.fixture(scope="module")
def guarded(onnx_model, tmp_path_factory):
    """A server with keys, CORS and small limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEYS)
    log = keys.with_name("access")
    arguments = [
        f"--name=phi3={onnx_model}", "--preload", f"--keys={keys}", "--cors=https://page.example", "--max-body=2048",
        "--max-concurrent=2", f"--access-log={log}",
    ]  # fmt: skip
    with serving(*arguments, environment={"PHI3_MLFLOW_API_KEYS": "dave=daves-secret-key"}) as running:
        running.log = log
        yield running


def ask(server, key=None, **more):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return post(server, CHAT, chat(**more), **headers)


@pytest.mark.parametrize("key", ["alices-secret-key", "bobs-secret-key-=", "carols-secret-key", "daves-secret-key"])
def test_each_key_lets_in(guarded, key):
    assert ask(guarded, key).json()["choices"][0]["message"]["content"] == MADRID


@pytest.mark.parametrize("key", [None, "x", "wrong-key", "alices-secret-ke", "alice=alices-secret-key", "alice"])
def test_without_a_known_key_it_is_a_401_on_every_route_but_the_open_ones(guarded, key):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for path in (CHAT, "/v1/completions", "/v1/responses", "/invocations", "/tokenize", "/detokenize", "/feedback"):
        answer = post(guarded, path, chat(), **headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/models/phi3", "/metrics", "/nowhere", "//health", "/health/"):
        assert httpx.get(guarded.address + path, headers=headers, timeout=PATIENCE).status_code == 401
    for path in ("/health", "/ping", "/ready", "/version", "/"):
        assert httpx.get(guarded.address + path, timeout=PATIENCE).status_code == 200


def test_no_key_is_shown_in_any_log_and_names_are(guarded):
    ask(guarded, "alices-secret-key")
    ask(guarded, "nearly-alices-secret-key")
    until(lambda: '"alice"' in guarded.log.read_text())

    assert "secret-key" not in guarded.log.read_text() + guarded.output()
    assert "Spain" not in guarded.log.read_text() + guarded.output()


def test_a_key_in_the_place_of_its_files_path_is_not_shown(onnx_model):
    result = CliRunner().invoke(cli, ["serve", f"--name=a={onnx_model}", "-p", "0", "--keys=alice=alices-secret-key"])

    assert result.exit_code == 1
    assert "there is no such file" in result.stderr
    assert "secret" not in result.output


def test_the_password_of_a_tracking_server_is_not_shown():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    variables = {"MLFLOW_TRACKING_URI": f"http://me:the-p@ssword@{address}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with tempfile.TemporaryFile() as log:
        server = start("models:/phi3/1", log=log, environment=variables)

        assert server.process.wait(PATIENCE) == 1
        assert f"looked for in http://{address}" in server.output()
        assert "ssword" not in server.output()


def test_pages_of_other_origins_may_not_call_and_the_one_that_was_named_may(guarded):
    def preflight(origin):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return httpx.options(guarded.address + CHAT, headers=headers, timeout=PATIENCE)

    assert preflight("https://page.example").headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in preflight("https://other.example").headers


def test_without_cors_nothing_is_said_of_origins(server):
    headers = {"origin": "https://page.example"}
    answer = httpx.get(server.address + "/v1/models", headers=headers, timeout=PATIENCE)

    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_above_the_limit_is_told_with_it(guarded):
    answer = ask(guarded, "alices-secret-key", user="x" * 3000)

    assert answer.status_code == 413
    assert "2048 bytes" in answer.json()["error"]["message"]


def test_one_request_more_than_may_be_at_once_is_a_429(guarded):
    headers = ["Authorization: Bearer alices-secret-key"]
    busy = [guarded.connect() for _ in range(2)]
    for connection in busy:
        connection.sendall(raw("POST", CHAT, endless(stream=True), headers=headers))
        connection.recv(10)
    answer = ask(guarded, "alices-secret-key")
    health = httpx.get(guarded.address + "/health", timeout=PATIENCE)
    for connection in busy:
        connection.close()

    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1
    assert health.status_code == 200
    until(lambda: ask(guarded, "alices-secret-key").status_code == 200)


def test_told_to_end_it_lets_running_answers_finish_and_takes_no_more(onnx_model):
    with serving(f"--name=phi3={onnx_model}", "--preload", "--drain=60") as server, server.connect() as stream:
        stream.sendall(raw("POST", CHAT, endless(1500, stream=True), headers=["Connection: close"]))
        begun = stream.recv(10)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(server.address + "/ready", timeout=PATIENCE).status_code == 503)
        refused = post(server, CHAT, chat())
        text = (begun + b"".join(iter(lambda: stream.recv(65536), b""))).decode()

        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.output()
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert "[DONE]" in text
    assert '"finish_reason":"length"' in text


def test_answers_that_take_longer_than_the_drain_are_cut_with_a_word(onnx_model):
    with serving(f"--name=phi3={onnx_model}", "--preload", "--drain=0.2") as server, server.connect() as stream:
        stream.sendall(raw("POST", CHAT, endless(stream=True), headers=["Connection: close"]))
        begun = stream.recv(10)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        text = (begun + b"".join(iter(lambda: stream.recv(65536), b""))).decode()

        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - told < 30
        assert "Traceback" not in server.output()
    lines = [line for line in text.replace("\r", "").splitlines() if line.startswith("data: ")]
    assert '"error"' in lines[-1]
    assert "[DONE]" not in text


def test_a_body_that_has_not_arrived_at_the_end_gets_a_503_and_no_traceback(onnx_model):
    arguments = [f"--name=phi3={onnx_model}", "--preload", "--drain=0.2", "--max-concurrent=1"]
    with serving(*arguments) as server, server.connect() as connection:
        connection.sendall(raw("POST", CHAT, chat())[:-5])
        until(lambda: post(server, CHAT, chat()).status_code == 429)

        assert server.end() == 0
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        assert "Traceback" not in server.output()


def test_told_twice_it_ends_at_once(onnx_model):
    with serving(f"--name=phi3={onnx_model}", "--preload", "--drain=60") as server, server.connect() as stream:
        stream.sendall(raw("POST", CHAT, endless(stream=True)))
        stream.recv(10)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - told < 30


def test_while_models_are_loaded_it_is_alive_and_not_ready_and_ends_when_told(onnx_model, tmp_path):
    slow = Slow(onnx_model, tmp_path / "slow")
    with serving(f"--name=slow={slow.folder}", "--preload", ready=False) as server:
        assert answers(server, "/health")
        ready = httpx.get(server.address + "/ready", timeout=PATIENCE)
        assert ready.status_code == 503
        assert "is loading its models" in ready.json()["error"]["message"]

        assert server.end() == 0
        assert "Traceback" not in server.output()
        slow.finish()


def test_a_model_that_cannot_be_loaded_at_the_start_is_one_line_and_status_1(tmp_path):
    with tempfile.TemporaryFile() as log:
        server = start(f"--name=phi3={tmp_path}", "--preload", log=log)

        assert server.process.wait(PATIENCE) == 1
        assert "Traceback" not in server.output()
        assert "the model `phi3` cannot be loaded" in server.output().splitlines()[-1]


def test_a_port_in_use_is_one_line_and_status_1(onnx_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", f"--name=a={onnx_model}", "-p", str(port)])

    assert result.exit_code == 1
    other = port + 1 if port < 65535 else 8000
    problem = f"port {port} of 127.0.0.1 is in use: choose another one, such as --port {other}, or --port 0 for any"
    assert result.stderr == f"Error: {problem} that is free\n"


def test_an_access_log_that_cannot_be_written_is_one_line_before_anything_is_listened_at(monkeypatch, tmp_path):
    monkeypatch.setattr(server_module, "listen", lambda process: pytest.fail("it listens"))
    log = tmp_path / "nowhere" / "access.log"
    result = CliRunner().invoke(cli, ["serve", "--access-log", str(log)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: --access-log: {log} cannot be written (No such file or directory); name a file in a folder that can, "
        "- for stderr, or none\n"
    )


def test_an_address_of_another_machine_is_one_line_and_status_1(onnx_model):
    result = CliRunner().invoke(cli, ["serve", f"--name=a={onnx_model}", "-p", "0", "--host", "192.0.2.1"])

    assert result.exit_code == 1
    assert "cannot listen at 192.0.2.1:0" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds none"),
        (b"# nothing\n\n", "holds none"),
        (b"a=short\n", "at least 8 printable"),
        (b"# ours\nlong-enough-key\n", "line 2 of"),
        (b"bG9uZy1lbm91Z2gta2V5bG9uZw==\n", "is not NAME=KEY"),
        (b"sk-Long=long-enough-key\n", "is not NAME=KEY"),
        (b"a=long-enough-key\na=another-long-key\n", "'a' a second time"),
        (b"a=with a space in it\n", "without spaces"),
        ("a=schl\u00fcssel-schl\u00fcssel\n".encode(), "printable"),
        (b"\xff\xfe\x00secret", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_one_line_without_a_key(tmp_path, onnx_model, content, reason):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)

    result = CliRunner().invoke(cli, ["serve", f"--name=a={onnx_model}", "-p", "0", f"--keys={path}"])

    assert result.exit_code == 1
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not any(key in result.stderr for key in ("long-enough-key", "with a space", "secret", "bG9uZy1l", "sk-Long"))


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("127.5.5.5", False), ("::1", False), ("localhost", False), ("0.0.0.0", True),
     ("::", True), ("192.168.1.5", True), ("example.org", True)],
)  # fmt: skip
def test_which_addresses_others_can_reach(host, public):
    assert is_public(host) is public


@pytest.mark.parametrize(("keys", "warned"), [(None, True), ("name=long-enough-key", False)])
def test_an_address_that_others_can_reach_is_warned_of_where_no_key_is_asked_for(monkeypatch, onnx_model, keys, warned):
    async def nothing(*arguments):
        pass

    monkeypatch.setattr(server_module, "listen", lambda process: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr(server_module, "serve", nothing)
    if keys:
        monkeypatch.setenv("PHI3_MLFLOW_API_KEYS", keys)

    result = CliRunner().invoke(cli, ["serve", f"--name=a={onnx_model}", "--host", "0.0.0.0"])

    assert result.exit_code == 0
    assert ("other machines can reach this address" in result.stderr) is warned
