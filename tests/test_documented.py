"""Every command and every piece of code in README.md and docs/*.md: which test runs it, or why none does.

What no other test runs is run here, in an empty folder and without a network. Run: pytest tests/test_documented.py
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import PAGES, ROOT, Block, blocks, commands
from session import Session

MADRID = "The capital of Spain is Madrid."
SPAIN = "What is the capital of Spain?\n"
SERVE, MLFLOW = "http://127.0.0.1:8000/health", "http://127.0.0.1:5000/ping"

# Why a command is not run as it stands. test_docs.py reads those of phi3-mlflow all the same.
AZURE = "not run: needs a workspace of Azure; tests/azure runs the same verb against a stand-in and Azurite"
CLUSTER = "not run: needs a cluster"
DOCKER = "not run: needs Docker; tests/containers carries the Dockerfile's steps out"
GIGABYTES = "not run: downloads gigabytes; tests/test_published.py runs it on small weights of that name"
HARNESS = (
    "not run: downloads its data and takes hours; scripts/harness.py runs both kinds of model with tasks of its own"
)
INSTALLS = "not run: installs from a package index; what it installs is there when the tests run"
MEASURES = "not run: measures for minutes; tests/test_bench.py runs it with smaller numbers"

README = "tests/test_readme.py::test_five_commands_lead_to_both_models_registered_compared_and_served"
SHORTEST = "tests/test_readme.py::test_the_code_beside_them_gets_its_answers"
CANDIDATE = "tests/test_recipes.py::test_a_candidate_that_is_equal_gets_the_champions_alias"
CONTAINERIZE = "tests/containers/test_containers_documentation.py::test_every_command_that_writes_a_folder_does"
OTHERS = "tests/test_families.py::test_phi_2_takes_prompts_as_they_are_and_a_template_that_is_given"
PROJECT = "tests/test_mlproject.py::test_the_main_entry_point_logs_and_registers_both"
ENVIRONMENT = "tests/test_mlproject.py::test_mlflow_makes_the_environment_without_torch_until_an_entry_point_needs_it"
BOTH = "tests/test_recipes.py::test_both_builders_models_are_compared_on_the_command_line_and_in_python"
SERVED = "tests/serve/test_documentation.py::"
SPARK = "tests/test_spark.py::test_the_documents_code_runs_as_it_stands_there"
SOURCES = "tests/test_quantize_sources.py::"
ADAPTER = f"{SOURCES}test_an_adapter_is_merged_on_the_way_and_neither_it_nor_the_weights_are_touched"
HERE = "tests/test_documented.py::"
LOGGED, CHATS, SIGNED, CHECKED = (
    f"{HERE}test_{name}"
    for name in (
        "what_is_shown_of_a_logged_model_answers",
        "the_terminals_conversation_is_the_one_that_is_shown",
        "a_signed_model_is_verified",
        "azures_check_and_dry_run_need_no_workspace",
    )
)

# A page's commands and blocks of code by how they begin, in their order.
TABLE: dict[str, list[tuple[str, str]]] = {
    "README.md": [
        ("make demo", INSTALLS),
        ("make test", INSTALLS),
        ("python3.11 -m venv", README),
        ("pip install -c", README),
        ("phi3-mlflow log both", README),
        ("phi3-mlflow compare", README),
        ("phi3-mlflow serve", README),
        ("import mlflow", SHORTEST),
        ("mlflow models serve", SHORTEST),
        ("curl", SHORTEST),
        ("from openai import OpenAI", SHORTEST),
        ("phi3-mlflow azure register", AZURE),
        ("phi3-mlflow log onnx --weights microsoft/", GIGABYTES),
    ],
    "docs/azure.md": [
        ("pip install", INSTALLS),
        ("az login", AZURE),
        ("phi3-mlflow log onnx --target azure", CHECKED),
        ("phi3-mlflow azure check", CHECKED),
        ("phi3-mlflow azure register", AZURE),
        ("phi3-mlflow azure deploy phi3:1 --mode ncd --endpoint phi3-demo --dry-run", CHECKED),
        ("phi3-mlflow azure deploy", AZURE),
        ("export AZURE_ENDPOINT_KEY", AZURE),
        ("curl", AZURE),
    ],
    "docs/chat.md": [("phi3-mlflow chat", CHATS)] * 3,
    "docs/compare.md": [
        ("phi3-mlflow log both", README),
        ("phi3-mlflow compare", README),
        ("from phi3_mlflow.compare", BOTH),
        ("phi3-mlflow log onnx", LOGGED),
        ("phi3-mlflow log onnx", CANDIDATE),
        ("phi3-mlflow compare", CANDIDATE),
    ],
    "docs/containers.md": [
        *[("phi3-mlflow containerize", CONTAINERIZE)] * 3,
        *[("docker", DOCKER)] * 2,
        ("PHI3_MLFLOW_API_KEYS=app=KEY docker compose", DOCKER),
        *[("kubectl", CLUSTER)] * 2,
        (
            "mlflow models generate-dockerfile",
            "tests/containers/test_mlflow_image.py::test_its_command_answers_with_the_documents_settings",
        ),
        *[("docker", DOCKER)] * 2,
    ],
    "docs/how-it-works.md": [
        ("from pathlib import Path", "tests/test_recipes.py::test_an_answer_streams_without_mlflow_and_pandas")
    ],
    "docs/index.md": [("", README)] * 5,
    "docs/log.md": [
        ("phi3-mlflow chat -p", LOGGED),
        ("phi3-mlflow log onnx --register", LOGGED),
        ("phi3-mlflow chat models:/", LOGGED),
        ("mlflow models serve", LOGGED),
        ("curl", LOGGED),
        ("phi3-mlflow serve", CHATS),
        ("curl", CHATS),
        ("import mlflow", LOGGED),
        ("mlflow run . --env-manager local", PROJECT),
        ("mlflow run . -e onnx", ENVIRONMENT),
        ("mlflow run . -e transformers", GIGABYTES),
        *[("phi3-mlflow log", GIGABYTES)] * 3,
        ("phi3-mlflow quantize", "tests/test_notebooks.py::test_the_plots_are_pictures"),
        ("phi3-mlflow quantize", ADAPTER),
        ("phi3-mlflow quantize", f"{SOURCES}test_a_logged_transformers_model_is_quantized_as_its_folder_is"),
        ("phi3-mlflow log onnx --weights microsoft/Phi-3-mini-4k-instruct-onnx --reference", GIGABYTES),
        ("phi3-mlflow pull", GIGABYTES),
        *[("phi3-mlflow log transformers --weights microsoft/phi-2", OTHERS)] * 2,
        ("MLFLOW_PYFUNC_INFERENCE_CONFIG=", LOGGED),
        ("mlflow.pyfunc.load_model", LOGGED),
    ],
    "docs/recipes.md": [
        ("phi3-mlflow log onnx --register phi3 --alias champion", LOGGED),
        ("import mlflow", "tests/test_recipes.py::test_evaluation_scores_the_models_answers"),
        ("phi3-mlflow log onnx", CANDIDATE),
        ("phi3-mlflow compare", CANDIDATE),
        ("import mlflow", "tests/test_recipes.py::test_tracing_shows_the_tokens_on_the_models_page"),
    ],
    "docs/serve.md": [
        *[("phi3-mlflow serve", f"{SERVED}test_every_command_that_starts_a_server_is_one")] * 4,
        *[("curl", f"{SERVED}test_curl_gets_what_the_document_says")] * 2,
        ("from openai import OpenAI", f"{SERVED}test_the_python_client_prints_the_answer"),
        ("import OpenAI", f"{SERVED}test_the_javascript_client_prints_the_answer"),
        ("from langchain_openai", f"{SERVED}test_langchain_prints_the_answer_and_gives_structures"),
        ("MLFLOW_GATEWAY", f"{SERVED}test_mlflows_ai_gateway_hands_chats_and_streams_on"),
        ("import requests", f"{SERVED}test_mlflows_ai_gateway_hands_chats_and_streams_on"),
        ("python -m venv .harness", INSTALLS),
        *[(".harness/bin/lm_eval", HARNESS)] * 2,
        ("HF_ALLOW_CODE_EVAL=1 .harness/bin/lm_eval", HARNESS),
        ("server {", f"{SERVED}test_nginx_with_tls_passes_a_stream_on_as_it_comes"),
        ("phi3-mlflow serve --keys", f"{SERVED}test_every_command_that_starts_a_server_is_one"),
    ],
    "docs/spark.md": [
        ("pip install", INSTALLS),
        ("from pyspark.sql", SPARK),
        ("spark.udf.register", SPARK),
        ("chat = udf", SPARK),
        ("venv-pack", CLUSTER),
        ("PYSPARK_PYTHON=", CLUSTER),
    ],
    "docs/speed.md": [("phi3-mlflow bench", MEASURES)] * 3,
    "docs/trust.md": [
        ("pip install", INSTALLS),
        *[("openssl", SIGNED)] * 2,
        ("model_signing sign", SIGNED),
        ("phi3-mlflow verify", SIGNED),
    ],
}  # fmt: skip


def pieces(page: str) -> Iterator[str]:
    """The commands of a page's shell blocks, and its other blocks of code, that something could run."""
    for block in blocks(page):
        if block.language == "bash":
            yield from commands(block.code)
        elif block.language in ("javascript", "nginx", "python"):
            yield block.code


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test_or_has_a_reason(page):
    found, listed = list(pieces(page)), TABLE.get(page, [])

    assert len(found) == len(listed)
    for piece, (start, where) in zip(found, listed, strict=True):
        assert piece.startswith(start), (piece, start)
        if not where.startswith("not run: "):
            file, _, test = where.partition("::")
            assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8"), where


def shell(folder: Path) -> Session:
    """An empty folder, and in its PATH the programs of this environment."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (make programs)")
    return Session(folder / "empty")


def play(session: Session) -> None:
    """Runs a session with the environment of the tests."""
    path = ":".join([str(Path(sys.executable).parent), str(Path(sys.base_prefix) / "bin")])
    session.play(path=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")


def python(*found: Block) -> str:
    """A command that runs blocks as one program."""
    return f"python -c {shlex.quote(chr(10).join(block.code for block in found))}"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """What docs/log.md shows of the embedded model, and docs/chat.md beside it."""
    first, ask, serve = blocks("docs/log.md", "Use", "bash")[:3]
    (use,), (load,), (again,) = (
        blocks("docs/log.md", heading, language)
        for heading, language in (("Use", "python"), ("Settings", "python"), ("Settings", "bash"))
    )
    (chats,) = blocks("docs/chat.md", language="bash")
    session = shell(tmp_path_factory.mktemp("logged"))
    alone, log, chat, mlflow = commands(first.code)
    session.run("alone", alone)
    session.run("log", log)
    session.run("chat", chat, SPAIN)
    session.start("mlflow", mlflow, MLFLOW)
    session.run("ask", ask.code)
    session.end(MLFLOW)
    server, stream = commands(serve.code)
    session.start("serve", server, SERVE)
    session.run("stream", stream)
    embedded, registered, served = commands(chats.code)
    session.run("served", served, SPAIN)
    session.end(SERVE)
    assert registered == chat
    # Some of what is typed there is wrong on purpose, which the exit code tells.
    session.run("conversation", f"! {embedded}", "".join(f"{line}\n" for line in typed()))
    session.run("python", python(use, load))
    session.start("again", again.code, MLFLOW)
    session.run("ask-again", ask.code)
    session.end(MLFLOW)
    play(session)
    return session


def transcript() -> str:
    (block,) = blocks("docs/chat.md", language="text")
    return block.code


def typed() -> list[str]:
    """What is typed in the conversation that docs/chat.md shows."""
    return re.findall(r"^> (.*)$", transcript(), re.M)


def test_what_is_shown_of_a_logged_model_answers(logged):
    assert logged.output("alone").strip() == MADRID
    assert re.fullmatch(r"models:/m-\w+", logged.output("log").strip())
    assert logged.output("chat").strip() == MADRID
    assert logged.output("python").strip() == MADRID
    for step in ("ask", "ask-again"):
        (completion,) = json.loads(logged.output(step))
        assert completion["choices"][0]["finish_reason"] == "stop"


def test_the_terminals_conversation_is_the_one_that_is_shown(logged):
    deltas = [json.loads(line)["choices"] for line in re.findall(r"^data: ({.*)$", logged.output("stream"), re.M)]
    assert "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices) == MADRID
    assert logged.output("served").strip() == MADRID
    answers = [line for line in transcript().splitlines() if line.startswith("The capital of")]
    assert [line for line in logged.output("conversation").splitlines() if line.startswith("The capital")] == answers
    said = logged.error("conversation")
    for line in transcript().splitlines():
        if line.startswith(("Error: ", "Saved ", "/", "(cut off")):
            assert line in said
    messages = json.loads((logged.folder / "capitals.json").read_text("utf-8"))["messages"]
    assert len(messages) == 4


def test_a_signed_model_is_verified(onnx_model, tmp_path):
    (block,) = blocks("docs/trust.md", language="bash")
    install, *rest = commands(block.code)
    assert install.startswith("pip install")
    session = shell(tmp_path)
    shutil.copytree(onnx_model, session.folder / "MODEL")
    for number, command in enumerate(rest):
        session.run(str(number), command)
    play(session)

    assert "MODEL" in rest[-1]
    assert re.search(r"^ok +signature", session.output(str(len(rest) - 1)), re.M)


def test_azures_check_and_dry_run_need_no_workspace(tmp_path):
    (check,) = blocks("docs/azure.md", "1. Log and check", "bash")
    dry = commands(blocks("docs/azure.md", "3. Deploy", "bash")[0].code)[0]
    assert dry.endswith("--dry-run")
    session = shell(tmp_path)
    session.run("check", check.code)
    session.run("dry", dry)
    play(session)

    assert "no-code" in session.output("check") or "ncd" in session.output("check")
    assert "az ml online-deployment create" in session.output("dry")
    assert {path.name for path in session.folder.glob("azure-phi3-demo/*")} == {
        "deployment.yml",
        "endpoint.yml",
        "request.json",
    }
