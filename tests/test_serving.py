"""Both models behind `mlflow models serve`: the same body gets the same shape, also eight at once.

Run: pytest tests/test_serving.py
"""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from phi3_mlflow.builders import onnx
from phi3_mlflow.serving import ServerError, served

CAPITALS = {
    "Spain": "Madrid",
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Norway": "Oslo",
}


def post(address: str, body: dict) -> list[dict]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def ask(address: str, country: str) -> str:
    body = {"messages": [{"role": "user", "content": f"What is the capital of {country}?"}], "temperature": 0}
    return post(address, body)[0]["choices"][0]["message"]["content"]


def shape(value):
    """The keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


def test_the_same_body_gets_responses_of_the_same_shape(servers):
    body = {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of Spain?"},
        ],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 7,
        "max_tokens": 32,
        "stop": ["\n"],
        "n": 2,
    }

    answers = {builder: post(address, body) for builder, address in servers.items()}

    assert shape(answers["transformers"]) == shape(answers["onnx"])
    assert len(answers["onnx"][0]["choices"]) == 2


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_a_question_is_answered(servers, builder):
    assert ask(servers[builder], "Spain") == "The capital of Spain is Madrid."


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_eight_requests_at_once_get_their_own_right_answers(servers, builder):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda country: ask(servers[builder], country), CAPITALS))

    for (country, capital), answer in zip(CAPITALS.items(), answers, strict=True):
        assert capital in answer, (country, answer)


def test_onnx_models_are_served_from_a_copy_in_an_environment_of_their_own_requirements(onnx_model, tmp_path):
    elsewhere = tmp_path / "working directory"
    elsewhere.mkdir()
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"

    def serve(model):
        """What is installed once the model's requirements are, and the answer that it gives there."""
        copy = shutil.copytree(model, tmp_path / "elsewhere" / model.name)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(copy / "requirements.txt")], check=True, timeout=600)
        listed = subprocess.run([str(python), "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
        packages = {line.split()[0].lower() for line in listed.splitlines()[2:]}
        assert not {"torch", "transformers", "phi3-mlflow"} & packages
        body = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}], "show_engine": True}
        with served(str(copy), python=python, cwd=elsewhere) as address:
            (answer,) = post(address, body)
        assert answer["choices"][0]["message"]["content"] == "The capital of Spain is Madrid."
        return packages, answer["custom_outputs"]["engine"]

    packages, engine = serve(onnx_model)
    assert engine == "onnxruntime-genai" in packages
    openvino = tmp_path / "openvino"
    onnx.save_model(openvino, model_config={"engine": "openvino"})
    more, engine = serve(openvino)
    assert engine == "openvino" in more
    # So it is what a fresh environment would have.
    assert more - packages <= {"openvino", "openvino-telemetry"}


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ServerError, match="ended with code"), served(str(tmp_path / "nothing"), start_timeout=60):
        pass
