"""The command line: results on stdout, everything else on stderr, exit codes 0, 1 and 2.

Run: pytest tests/test_cli.py
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.models import Model

from phi3_mlflow.builders import onnx
from phi3_mlflow.cli import cli
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder

VERBS = [["pull"], ["quantize"], ["log", "transformers"], ["log", "onnx"], ["log", "both"], ["chat"], ["bench"]]
REGEX = 'response_format={"type": "regex", "regex": "€"}'
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **options):
    return CliRunner().invoke(cli, list(arguments), **options)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(verb):
    result = run(*verb, "--help")

    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"phi3-mlflow {' '.join(verb)}" in result.stdout


def test_the_module_is_the_same_as_the_command():
    done = subprocess.run([sys.executable, "-m", "phi3_mlflow", "--version"], capture_output=True, text=True)

    assert done.returncode == 0
    assert done.stdout.startswith("phi3-mlflow, version ")


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_log_prints_the_model_uri_and_nothing_else_on_stdout(builder):
    result = run("log", builder, "-c", "temperature=0.5", "-c", "max_tokens=", "--name", f"cli-{builder}")

    assert result.exit_code == 0, result.stderr
    uri = result.stdout.strip()
    assert uri.startswith("models:/m-")
    model = Model.load(mlflow.artifacts.download_artifacts(uri))
    config = model.flavors["python_function"]["config"]
    assert config["temperature"] == 0.5
    assert config["max_tokens"] is None
    assert f"mlflow models serve -m {uri}" in result.stderr


def test_log_both_registers_each_under_its_own_name():
    result = run("log", "both", "--register", "cli-pair", "--alias", "new", "--json")

    assert result.exit_code == 0, result.stderr
    logged = json.loads(result.stdout)
    assert [model["registered"] for model in logged] == ["models:/cli-pair-transformers/1", "models:/cli-pair-onnx/1"]
    assert [model["alias"] for model in logged] == ["models:/cli-pair-transformers@new", "models:/cli-pair-onnx@new"]
    client = mlflow.MlflowClient()
    assert client.get_model_version_by_alias("cli-pair-onnx", "new").version in (1, "1")


def test_log_says_the_alias_of_what_it_registers():
    result = run("log", "onnx", "--register", "cli-named", "--alias", "new")

    assert result.exit_code == 0, result.stderr
    assert "Registered as models:/cli-named/1, which is models:/cli-named@new" in result.stderr.splitlines()


def test_ctrl_c_while_models_are_checked_says_that_nothing_stands(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_mlflow.builders.destination.check_stores", interrupted)
    result = run("log", "both")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "What stands: nothing was logged or registered\nAborted!\n"


def test_ctrl_c_while_the_second_of_two_is_registered_leaves_the_first_and_says_so(monkeypatch):
    name, alias = mlflow.MlflowClient.set_registered_model_alias, []

    def interrupted(*arguments):
        alias.append(arguments)
        if len(alias) == 2:
            raise KeyboardInterrupt
        name(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", interrupted)
    result = run("log", "both", "--register", "cli-cut", "--alias", "new")

    assert (result.exit_code, result.stdout) == (1, "")
    told, aborted = result.stderr.splitlines()
    assert re.fullmatch(
        r"What stands: models:/m-\w+ \(transformers, registered as models:/cli-cut-transformers/1, which is "
        r"models:/cli-cut-transformers@new\), models:/m-\w+ \(onnx, logged and not registered\)",
        told,
    )
    assert aborted == "Aborted!"
    assert mlflow.MlflowClient().search_model_versions("name = 'cli-cut-onnx'") == []


@pytest.mark.parametrize(
    ("handler", "status"), [(signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 0)], ids=["", "ignored"]
)
def test_ctrl_c_while_the_interpreter_ends_is_quiet(handler, status):
    code = "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT)\n"
    code += "from phi3_mlflow.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        timeout=120,
        check=False,
    )

    assert done.stdout.startswith("phi3-mlflow, version ")
    assert (done.returncode, done.stderr) == (status, "")


OUTPUTS = {
    "a full disk": (">/dev/full", "No space left on device"),
    "a reader that is gone": ("| true", "Broken pipe"),
    "a closed one": (">&-", "Bad file descriptor"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("what", OUTPUTS)
def test_a_result_that_the_output_does_not_take_is_on_stderr(what):
    output, problem = OUTPUTS[what]
    # Slower than the reader of the pipe is to end.
    command = f"{{ sleep 1; {sys.executable} -m phi3_mlflow pull embedded; echo $? >&2; }} {output}"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)

    folder, error, status = done.stderr.splitlines()
    assert Path(folder, "model.safetensors").is_file()
    assert error == f"Error: the output takes nothing ({problem}); the result stands above"
    assert status == "1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("verb", "result"),
    [
        (["chat", "{model}", "-p", "What is the capital of Spain?", "--json"], "The capital of Spain is Madrid."),
        (["azure", "check", "{model}"], "(--mode container): will load"),
        (["containerize", "{model}", "{folder}", "--memory", "1GiB"], "{folder}"),
    ],
)
def test_no_verb_loses_its_result_in_a_full_disk(saved, tmp_path, verb, result):
    names = {"model": saved["onnx"], "folder": tmp_path / "image"}
    command = shlex.join([sys.executable, "-m", "phi3_mlflow", *(part.format(**names) for part in verb)])

    done = subprocess.run(
        ["sh", "-c", f"{command} >/dev/full"], capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 1
    assert result.format(**names) in done.stderr
    told = "Error: the output takes nothing (No space left on device); the result stands above"
    assert done.stderr.splitlines()[-1] == told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_the_output_does_not_take_ends_with_one_line(option):
    command = f"{sys.executable} -m phi3_mlflow {option} >/dev/full"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (1, "Error: the output takes nothing (No space left on device)\n")


def test_an_answer_without_an_output_is_not_computed():
    command = f"{sys.executable} -m phi3_mlflow chat -p x >&-"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 2
    assert done.stderr.endswith("Error: there is no standard output for the answer\n")


def test_a_folder_whose_name_is_no_text_is_printed_as_it_is(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xffweights"
    shutil.copytree(os.fsencode(ROOT / "artifacts" / "onnx"), folder)

    done = subprocess.run(
        [sys.executable, "-m", "phi3_mlflow", "pull", folder],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        timeout=120,
    )

    assert (done.returncode, done.stdout) == (0, folder + b"\n"), done.stderr


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_chat_prints_the_answer_of_either_model(saved, builder):
    result = run("chat", str(saved[builder]), "-p", "What is the capital of Spain?")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == "The capital of Spain is Madrid.\n"


def test_chat_without_a_model_uses_the_embedded_one():
    result = run("chat", "-p", "What is the capital of Spain?", "--json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["choices"][0]["finish_reason"] == "stop"


def test_a_conversation_goes_on_until_the_input_ends(saved):
    lines = "What is the capital of Spain?\nAnd of France?\n/system You are brief.\n/clear\n/help\nHello\n"

    result = run("chat", str(saved["onnx"]), input=lines)

    assert result.exit_code == 0, result.stderr
    assert "Madrid" in result.stdout
    assert "Paris" in result.stdout
    assert "/clear" in result.stderr


def test_a_command_that_does_not_exist_is_one_line_and_shows_in_the_exit_code(saved):
    result = run("chat", str(saved["onnx"]), input="/what\nWhat is the capital of Spain?\n")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no command /what; /help lists them")
    assert result.stdout == "The capital of Spain is Madrid.\n"


def test_a_bad_message_in_a_pipe_is_one_line_and_shows_in_the_exit_code_and_the_conversation_goes_on(saved):
    result = run("chat", str(saved["onnx"]), input="a\x00b\nWhat is the capital of Spain?\n")

    assert result.exit_code == 1
    assert "Error: `message` has the character U+0000" in result.stderr
    assert result.stdout == "The capital of Spain is Madrid.\n"
    assert "Traceback" not in result.output


def test_bytes_that_are_no_text_are_one_line_and_the_conversation_goes_on(saved):
    result = run("chat", str(saved["onnx"]), input=b"\xff\xfe\nWhat is the capital of Spain?\n")

    assert result.exit_code == 1
    assert result.stderr == "Error: the input is not valid UTF-8: byte 0xff at place 1\n"
    assert result.stdout == "The capital of Spain is Madrid.\n"


def test_a_model_that_fails_is_a_few_lines_without_a_traceback_and_the_conversation_goes_on(saved, monkeypatch):
    step, failures = GenaiDecoder.step, [RuntimeError("boom\nand more")]

    def failing(self, parts):
        if failures and len(parts[0].ids) > 1:  # of a prompt, and not what loading computes
            raise failures.pop()
        return step(self, parts)

    monkeypatch.setattr(GenaiDecoder, "step", failing)
    result = run("chat", str(saved["onnx"]), input="What is the capital of Spain?\n" * 2)

    assert result.exit_code == 1
    assert result.stdout == "The capital of Spain is Madrid.\n"
    assert result.stderr.splitlines() == [
        r"the decoder failed: RuntimeError('boom\nand more')",
        r"the model failed on a request: RuntimeError('boom\nand more')",
        "Error: the model failed while it answered; the server's log says why",
    ]


def test_what_the_outputs_encoding_lacks_is_written_out(saved):
    command = [sys.executable, "-m", "phi3_mlflow", "chat", str(saved["onnx"]), "-p", "Hi", "-o", REGEX]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert (done.stdout, done.returncode) == ("\\u20ac\n", 0), done.stderr


def test_a_chat_without_standard_input_says_so(saved, tmp_path):
    command = f"{sys.executable} -m phi3_mlflow chat {saved['onnx']} <&-"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 2
    assert done.stderr.endswith("Error: there is no standard input; give a question with -p\n")


def test_a_pipe_gets_no_hints_about_keys(saved):
    result = run("chat", str(saved["onnx"]), input="What is the capital of Spain?\n")

    assert result.exit_code == 0
    assert result.stderr == ""


def test_a_prompt_can_come_from_standard_input(saved):
    result = run("chat", str(saved["onnx"]), "-p", "-", input="What is the capital\nof Spain?\n")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == "The capital of Spain is Madrid.\n"


def test_the_command_line_takes_no_bytes_that_are_no_text(tmp_path):
    command = [sys.executable, "-m", "phi3_mlflow", "chat", "-p", b"\xffhello"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert done.stderr.endswith("Error: the prompt is not valid UTF-8\n")


@pytest.mark.parametrize(
    "command", [["log", "transformers", "--json"], ["chat", "MODEL", "-p", "Hello", "--json"]], ids=" ".join
)
def test_a_script_that_asks_for_json_gets_no_bars(saved, tmp_path, command):
    command = [str(saved["transformers"]) if word == "MODEL" else word for word in command]

    done = subprocess.run(
        [sys.executable, "-m", "phi3_mlflow", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert done.stderr == ""


def test_logging_shows_no_bars_of_transformers(tmp_path):
    command = [sys.executable, "-m", "phi3_mlflow", "log", "transformers"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0].split()[0] for line in done.stderr.splitlines()] == ["Logged", "Serve"]


def test_a_conversation_that_fills_the_context_goes_on_without_its_oldest_messages(tmp_path):
    onnx.save_model(tmp_path / "model", model_config={"context_length": 64})

    result = run("chat", str(tmp_path / "model"), input="What is the capital of Spain?\n" * 6)

    assert result.exit_code == 0
    assert result.stdout.count("Madrid") == 6
    assert "the context is full: answered without the oldest 2 messages" in result.stderr


def test_chat_takes_every_option_that_the_contract_has(saved):
    options = ["temperature=2", "frequency_penalty=-1", "stop=Madrid", 'logit_bias={"5": -100}', "seed=3", "top_k=1"]
    flags = [part for option in options for part in ("-o", option)]

    result = run("chat", str(saved["onnx"]), "-p", "What is the capital of Spain?", *flags)

    assert result.exit_code == 0, result.stderr
    assert "Madrid" not in result.stdout


def test_chat_with_a_model_of_another_task_says_so(tmp_path):
    onnx.save_model(tmp_path / "model", task="flat")

    result = run("chat", str(tmp_path / "model"), "-p", "Hello")

    assert result.exit_code == 1
    assert "is a model for the task flat" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["log", "onnx", "-c", "temperature=9"], 2, "`temperature` is 9; it must be a number from 0 to 2"),
        (["log", "onnx", "-c", "temperature"], 2, "'temperature' is not of the form NAME=VALUE"),
        (["log", "onnx", "-c", "heat=9"], 2, "`heat` is not a setting of the model"),
        (["log", "onnx", "--task", "chat"], 2, "'chat' is not one of"),
        (["log", "onnx", "--alias", "x"], 2, "--alias needs --register"),
        (["log", "onnx", "--weights", "no/such/place/at-all"], 1, "no/such"),
        (["log", "onnx", "--weights", "./nowhere"], 1, "nowhere"),
        (["log", "transformers", "--weights", str(ROOT / "artifacts" / "onnx")], 1, "holds an ONNX model"),
        (["quantize", "./nowhere", "./out"], 1, "nowhere"),
        (["chat", "models:/nothing@here", "-p", "x"], 1, "name=nothing not found (looked for in sqlite:///"),
        (["chat", "models:/phi3", "-p", "x"], 1, "models:/phi3 says no version: give one, such as models:/phi3/1, or"),
        (["serve", "models:/phi3", "-p", "0"], 1, "`phi3` cannot be loaded: models:/phi3 says no version"),
        (["verify", "models:/phi3"], 1, "models:/phi3 says no version"),
        (["quantize", "models:/phi3", "out"], 1, "models:/phi3 says no version"),
        (["verify", "models:/nothing/1"], 1, "name=nothing not found (looked for in sqlite:///"),
        (["azure", "check", "models:/nothing@here"], 1, "name=nothing not found (looked for in sqlite:///"),
        (["chat", "models:/m-0", "-p", "x"], 1, "MLFLOW_TRACKING_URI names another store"),
        (
            ["chat", "./nowhere", "-p", "x"],
            1,
            f"there is no folder {Path('nowhere').absolute()}; a model is given as a",
        ),
        (
            ["chat", __file__, "-p", "x"],
            1,
            f"{__file__} is a file, and a model is a folder; a model is given as a folder",
        ),
        (["chat", "phi3:1", "-p", "x"], 1, "; a model is given as a folder, models:/NAME@ALIAS, models:/NAME/VERSION"),
        (["verify", "./nowhere"], 1, f"there is no folder {Path('nowhere').absolute()}; a model is given as a folder"),
        (
            ["serve", "nowhere", "-p", "0"],
            1,
            f"`nowhere` cannot be loaded: there is no folder {Path('nowhere').absolute()};",
        ),
        (
            ["verify", "http://127.0.0.1:1"],
            1,
            "http://127.0.0.1:1 is no address of a model's files; a model is given as",
        ),
        (["chat", "http://a:b@127.0.0.1:1/v1", "-p", "x"], 1, "http://127.0.0.1:1/v1 is no address of a model's files"),
        (["serve", "https://127.0.0.1:1", "-p", "0"], 1, "`chat --url` talks to a server"),
        (["bench", "nowhere"], 1, f"there is no folder {Path('nowhere').absolute()}; a model is given as a folder"),
        (
            ["containerize", "nowhere", "out"],
            1,
            f"there is no folder {Path('nowhere').absolute()}; a model is given as",
        ),
        (["serve", "-p", "0", "--host", ""], 1, "the host '' is no address: give one of this machine's"),
        (["serve", "--timeout", "nan"], 2, "nan is not a valid number"),
        (["chat", "--timeout", "nan"], 2, "nan is not a valid number"),
        (["azure", "check", "x", "--uplink", "nan"], 2, "nan is not a valid number"),
        (["chat", "-p", "-"], 2, "the prompt is empty"),
        (["log", "onnx", "--raw"], 2, "--raw needs --task"),
        (["log", "both", "--raw", "--task", "llm/v1/chat"], 2, "--raw needs --task"),
        (["log", "onnx", "-c", "task=flat"], 2, "-c task: it is no setting of a model; --task chooses it"),
        (["log", "onnx", "-c", "template=false"], 2, "-c template: it is no setting of a model; --raw leaves it out"),
        (["log", "onnx", "--raw", "--task", "flat", "--chat-template", __file__], 2, "--raw takes prompts as they are"),
        (["log", "onnx", "--reference", "--chat-template", __file__], 2, "--reference and --chat-template: "),
        (["log", "onnx", "--reference"], 1, "no other machine finds phi3_mlflow embedded model, so that no model can"),
        (["log", "onnx", "--register", "a/b"], 1, "the name 'a/b' of the registered model is not allowed"),
        (["log", "onnx", "--register", "a", "--alias", "v1"], 1, "the alias 'v1' is not allowed"),
        (["chat", "--json"], 2, "--json needs -p"),
        (["chat", "-p", ""], 2, "the prompt is empty"),
        (["chat", "-p", "x", "-o", "temperature=9"], 2, "`temperature` is 9; it must be a number from 0 to 2"),
        (["chat", "-p", "x", "-o", "temprature=1"], 2, "`temprature` is not an option"),
        (["chat", "-p", "x", "-o", "stream=true"], 2, "`stream` is not an option"),
        (["chat", "-p", "x", "-o", "n=2"], 2, "n above 1 needs -p and --json"),
        (["chat", "--model", "phi3"], 2, "--model needs --url"),
        (["chat", "./model", "--url", "http://127.0.0.1:1"], 2, "with --url give --model"),
        (["chat", "--url", "127.0.0.1:1", "-p", "x"], 1, "there is no server at http://127.0.0.1:1/v1"),
        (["chat", "--url", "localhost:1/v1/", "-p", "x"], 1, "there is no server at http://localhost:1/v1"),
        (
            ["chat", "--url", "models.example:1", "-p", "x"],
            1,
            "one begins with http:// or https://, such as http://127",
        ),
        (["chat", "--url", "http://a:secret@127.0.0.1:1", "-p", "x"], 1, "the address holds a password"),
        (["chat", "--url", "http://127.0.0.1:1", "-p", "x"], 1, "there is no server at http://127.0.0.1:1/v1"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(arguments, code, message):
    result = run(*arguments)

    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_ctrl_c_leaves_no_blank_line(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_mlflow.weights.resolve", interrupted)
    result = run("pull", "embedded")

    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Aborted!\n")


@pytest.fixture
def stores():
    """Sets the tracking store for one test."""
    before = mlflow.get_tracking_uri()
    yield mlflow.set_tracking_uri
    mlflow.set_tracking_uri(before)


LOOK_UPS = [["verify"], ["containerize"], ["azure", "check"], ["serve", "-p", "0"], ["chat", "-p", "Hello"]]


@pytest.mark.parametrize("verb", LOOK_UPS, ids=" ".join)
def test_a_store_that_cannot_be_made_is_told_at_once(verb, stores, tmp_path):
    file = tmp_path / "file"
    file.touch()
    stores(f"sqlite:///{file / 'mlflow.db'}")
    result = run(*verb, "models:/phi3/1", *([str(tmp_path / "image")] if verb == ["containerize"] else []))

    assert result.exit_code == 1
    assert "there is no tracking store" in result.stderr, result.stderr
    assert "Operation will be retried" not in result.stderr


@pytest.mark.parametrize("verb", LOOK_UPS, ids=" ".join)
def test_a_store_that_only_fails_is_not_asked_for_minutes(verb, stores, tmp_path, monkeypatch):
    asked = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")  # MLflow's own waits make the minutes
    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            stores(f"http://127.0.0.1:{server.server_port}")
            result = run(*verb, "models:/phi3/1", *([str(tmp_path / "image")] if verb == ["containerize"] else []))
        finally:
            server.shutdown()
            thread.join()

    assert result.exit_code == 1, result.stderr
    assert 1 <= len(asked) <= 3, asked


@pytest.mark.parametrize("verb", [["log", "onnx", "-c"], ["chat", "-p", "x", "-o"], ["serve", "-p", "0", "-c"]])
def test_a_value_that_is_nested_too_deeply_to_be_read_is_text(verb):
    result = run(*verb, "temperature=" + "[" * 100_000)

    assert result.exit_code == 2, result.output[-500:]
    assert result.stderr.splitlines()[-1] == (
        f"Error: `temperature` is '{'[' * 59}...; it must be a number from 0 to 2"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["log", "onnx", "--register"], "the name {!r} is not allowed: it is not valid UTF-8"),
        (["log", "onnx", "--name"], "the name {!r} is not allowed: it is not valid UTF-8"),
        (["serve", "-p", "0", "--host"], "the host {!r} is no address"),
    ],
)
def test_bytes_that_are_no_text_are_refused_before_anything_is_done(arguments, told):
    result = run(*arguments, "\udcff")

    assert result.exit_code == 1
    assert told.format("\udcff") in result.stderr
    assert "What stands" not in result.stderr


def test_a_store_in_a_cloud_that_lets_nobody_in_is_told_in_one_line(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    for verb in (["verify"], ["chat", "-p", "x"]):
        result = run(*verb, "s3://phi3-models/one")

        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        assert result.stderr == "Error: the store of the files was not reached: Unable to locate credentials\n"
