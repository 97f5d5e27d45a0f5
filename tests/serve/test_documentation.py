"""What docs/serve.md shows is run as it stands, with the addresses of the tests in it.

Run: pytest tests/serve/test_documentation.py
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import httpx
import openai
import pytest
from click.testing import CliRunner
from process import MADRID, PATIENCE, SPAIN, endless, post, said, serving, until
from pydantic import BaseModel

import phi3_mlflow.serve.cli as serve_cli
import phi3_mlflow.serve.server as server_module
from phi3_mlflow.cli import cli
from phi3_mlflow.serve.cli import serve

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "serve.md").read_text("utf-8")
NODE = ROOT / ".node" / "node_modules"
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a language below a heading."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert section, heading
    return re.findall(rf"```{language}\n(.*?)```", section[1], re.DOTALL)


@pytest.fixture(scope="module")
def phi3(onnx_model):
    """The server that the document speaks of."""
    with serving(f"--name=phi3={onnx_model}", "--preload", "--access-log", "none") as running:
        yield running


def here(code: str, server) -> str:
    """The code with the test's server in it."""
    return code.replace("http://127.0.0.1:8000", server.address)


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_command_that_starts_a_server_is_one(monkeypatch, tmp_path):
    """Up to where it would listen: the loading is tested elsewhere."""

    async def nothing(*arguments):
        pass

    monkeypatch.setattr(server_module, "listen", lambda process: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr(server_module, "serve", nothing)
    monkeypatch.setattr(serve_cli, "_look_up", lambda spec: None)  # the document's models are nobody's here
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.txt").write_text("name=long-enough-key\n")
    commands = [
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^phi3-mlflow serve.*$", DOCUMENT, re.MULTILINE)
    ]
    asked_for = set(re.findall(r'\bmodel(?:=|: |_name=)"?([a-z]\w*)', DOCUMENT))

    served = []
    for arguments in commands:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, (arguments, result.output)
        served.append(re.search(r"^Serving (.*) at ", result.stderr, re.MULTILINE)[1])

    assert served == ["phi3", "phi3", "phi3", "fast, exact", "phi3"]
    assert asked_for == {"phi3"}


def test_every_option_that_is_named_is_one():
    known = {name for parameter in serve.params if isinstance(parameter, click.Option) for name in parameter.opts}
    named = set(re.findall(r"`(--[a-z-]+|-c)\b", DOCUMENT))

    assert named <= known


def test_curl_gets_what_the_document_says(phi3):
    whole, stream = (run("bash", "-c", here(code, phi3)) for code in blocks("curl", "bash"))

    assert json.loads(whole)["choices"][0]["message"]["content"] == MADRID
    assert said(stream) == MADRID


def test_the_python_client_prints_the_answer(phi3):
    (code,) = blocks("Python", "python")

    assert run(sys.executable, "-c", here(code, phi3)) == MADRID


def test_langchain_prints_the_answer_and_gives_structures(phi3):
    pytest.importorskip("langchain_openai")
    from langchain_openai import ChatOpenAI

    class City(BaseModel):
        """A city."""

        city: str

    (code,) = blocks("LangChain", "python")
    assert run(sys.executable, "-c", here(code, phi3)) == MADRID

    model = ChatOpenAI(model="phi3", base_url=f"{phi3.address}/v1", api_key="none", max_tokens=100)
    assert isinstance(model.with_structured_output(City, method="json_schema").invoke("Name a city."), City)


@pytest.mark.skipif(not NODE.is_dir(), reason="the JavaScript client is not installed (make .node/.installed)")
def test_the_javascript_client_prints_the_answer(phi3, tmp_path):
    (code,) = blocks("JavaScript", "javascript")
    (tmp_path / "node_modules").symlink_to(NODE)
    (tmp_path / "ask.mjs").write_text(here(code, phi3))

    assert run("node", "ask.mjs", cwd=tmp_path) == MADRID


@pytest.mark.skipif(not NODE.is_dir(), reason="the JavaScript client is not installed (make .node/.installed)")
@pytest.mark.parametrize("model", ["onnx", "transformers"])
def test_the_javascript_client_passes_its_suite(server, model, tmp_path):
    (tmp_path / "node_modules").symlink_to(NODE)
    shutil.copy(Path(__file__).with_name("client.mjs"), tmp_path)

    found = json.loads(run("node", "client.mjs", f"{server.address}/v1", model, cwd=tmp_path))

    assert found["chat"] == found["stream"] == MADRID
    assert found["roles"][0] == "assistant"
    assert found["reason"] == "stop"
    assert found["usage"] == found["usageOfStream"]
    assert found["n"] == [0, 1, 2]
    assert found["stop"] == "The capital of Spain is "
    assert found["seed"][0] == found["seed"][1]
    assert found["logprobs"].lstrip().startswith(MADRID)
    assert isinstance(found["parsed"]["city"], str)
    assert found["completion"]
    assert found["response"] == found["responseStream"]
    assert found["models"] == ["onnx", "transformers"]
    assert found["errors"] == [
        ["BadRequestError", 400, "temperature"], ["NotFoundError", 404, "model"], ["BadRequestError", 400, "messages"],
    ]  # fmt: skip
    until(lambda: server.running() == 0)  # one stream was closed early


def test_mlflows_ai_gateway_hands_chats_and_streams_on(phi3, tmp_path):
    (start,) = blocks("MLflow's AI Gateway", "bash")
    (create,) = blocks("MLflow's AI Gateway", "python")
    port = free_port()
    variables = dict(pair.split("=", 1) for pair in shlex.split(start) if re.match("[A-Z_]+=", pair))
    environment = {
        **os.environ, **variables, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'gateway.db'}",
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": "only for this test",
    }  # fmt: skip
    command = [sys.executable, "-m", *shlex.split(start)[len(variables) :]]
    command[command.index("--port") + 1] = str(port)
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [*command, "--workers", "1", "--backend-store-uri", environment["MLFLOW_TRACKING_URI"]],
            env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert gateway.poll() is None, (tmp_path / "log").read_text()[-3000:]
        try:
            return httpx.get(f"{address}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(up, 300)
        run(sys.executable, "-c", here(create, phi3).replace("http://127.0.0.1:5000", address))
        client = openai.OpenAI(base_url=f"{address}/gateway/mlflow/v1", api_key="none", timeout=PATIENCE)
        whole = client.chat.completions.create(model="phi3", messages=SPAIN)
        chunks = client.chat.completions.create(model="phi3", messages=SPAIN, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    finally:
        os.killpg(gateway.pid, 15)
        gateway.wait(60)

    assert whole.choices[0].message.content == text == MADRID


def certificate(folder: Path) -> None:
    """A self-signed one for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*pem))


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian's nginx-light)")
def test_nginx_with_tls_passes_a_stream_on_as_it_comes(phi3, tmp_path):
    (block,) = blocks("nginx with TLS", "nginx")
    port = free_port()
    certificate(tmp_path)
    block = here(block, phi3).replace("listen 443", f"listen 127.0.0.1:{port}").replace("/etc/ssl/phi3", str(tmp_path))
    assert str(port) in block
    temporary = "".join(
        f"{kind}_temp_path {tmp_path / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"{user}daemon off; pid {tmp_path / 'pid'}; error_log {tmp_path / 'log'}; events {{}}\n"
        f"http {{ access_log off; {temporary} {block} }}\n"
    )
    nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
    address = f"https://localhost:{port}"
    try:
        with httpx.Client(verify=_trusting(tmp_path / "cert.pem"), timeout=PATIENCE) as client:

            def up() -> bool:
                assert nginx.poll() is None
                try:
                    return client.get(f"{address}/health").status_code == 200
                except httpx.HTTPError:
                    return False

            until(up, 30)
            arrivals = []
            text = ""
            with client.stream("POST", f"{address}/v1/chat/completions", json=endless(1000, stream=True)) as answer:
                for piece in answer.iter_text():
                    arrivals.append(time.monotonic())
                    text += piece
            # A client that leaves the proxy leaves the server.
            with client.stream("POST", f"{address}/v1/chat/completions", json=endless(stream=True)) as answer:
                next(answer.iter_raw())
            until(lambda: phi3.running() == 0)
    finally:
        nginx.terminate()
        nginx.wait(30)

    # A proxy that buffers would send everything in a few pieces, at the end.
    assert text.count("data: ") > 500
    assert len(arrivals) > 100
    assert arrivals[-1] - arrivals[0] > 5 * (arrivals[len(arrivals) // 2] - arrivals[len(arrivals) // 2 - 1])


def _trusting(path: Path):
    import ssl

    return ssl.create_default_context(cafile=str(path))


def test_what_is_accepted_and_means_nothing_is_named_in_the_document():
    from phi3_mlflow.serve.openai import MEANINGLESS

    section = re.search(r"## What is accepted and means nothing\n(.*?)\n## ", DOCUMENT, re.DOTALL)[1]
    assert set(re.findall(r"`([a-z_]+)`", section)) == MEANINGLESS


def test_what_the_document_says_is_refused_is(phi3):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for path, body in [
        ("/v1/chat/completions", {"messages": SPAIN, "tools": [tool]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}),
        ("/v1/chat/completions", {"messages": SPAIN, "store": True}),
        ("/v1/responses", {"input": "a", "store": True}),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"input": "a", "conversation": "c"}),
        ("/v1/responses", {"input": "a", "background": True}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/v1/completions", {"prompt": "a", "best_of": 2}),
    ]:
        assert post(phi3, path, body).status_code == 400, body
