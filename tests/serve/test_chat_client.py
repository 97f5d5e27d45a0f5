"""`phi3-mlflow chat --url` with `phi3-mlflow serve` at the other end.

Run: pytest tests/serve/test_chat_client.py
"""

import json
import signal
import subprocess
import sys

import pytest
from process import MADRID, PATIENCE, serving, until

pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

from keyboard import CTRL_C, ENTER, Terminal

QUESTION = "What is the capital of Spain?"


def run(*arguments, typed=""):
    command = [sys.executable, "-m", "phi3_mlflow", "chat", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=PATIENCE, check=False)


def begin_endless(chat):
    """Asks for an answer of thousands of tokens, and waits for its beginning."""
    chat.type("Go on." + ENTER)
    chat.match(r"Go on\.\n\S+")


def be_endless(chat):
    """Forbids the model its end tokens."""
    for line in ('logit_bias {"2048": -100, "2049": -100, "2055": -100}', "repetition_guard false", "max_tokens 3500"):
        chat.say(f"/set {line}", line.split()[0])


def test_a_conversation_over_a_server_and_both_of_its_models(server, tmp_path):
    chat = Terminal("--url", server.address, "--model", "onnx", folder=tmp_path)
    try:
        chat.see_prompt(after="Model: onnx.")
        chat.say(QUESTION, MADRID)
        chat.say("/model", "The server has onnx, transformers")
        chat.say("/model transformers", "Model: transformers")
        chat.say("And of France?", "Paris")
        chat.say("/stats", "ended by eos")
        assert "prompt of " in chat.text
        chat.say("/model nobody", "Model: nobody")
        chat.say("Hello", "Error: the server refuses (404): ")
        chat.say("/model onnx", "Model: onnx")
        chat.say("/set temperature 3", "Error: `temperature` is 3; it must be a number from 0 to 2")
        chat.say("/save it.json", "Saved 4 messages")
        be_endless(chat)
        begin_endless(chat)
        chat.type(CTRL_C)
        chat.see_prompt(after="(stopped)")
        until(lambda: server.running() == 0)  # the server has noticed
        chat.say("/clear", "forgotten")
        chat.say("/load it.json", "Loaded 4 messages")
        chat.say("And of Italy?", "Rome")
    finally:
        chat.close()


def test_our_own_server_answers_without_the_oldest_turns_where_the_context_is_full(server):
    long = f"{QUESTION} {'1' * 1500}\n"

    done = run("--url", server.address, "--model", "onnx", typed=long * 3 + "/set context_overflow error\n/retry\n")

    assert len(done.stdout.splitlines()) == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert "`messages` " in line
    assert "4096" in line


def test_a_server_is_asked_from_a_pipe_and_from_a_script(server):
    address = ["--url", f"{server.address}/v1/", "--model", "onnx"]

    piped = run(*address, typed=f"{QUESTION}\n/set heat 1\nAnd of France?\n")
    assert piped.returncode == 1
    assert piped.stdout == f"{MADRID}\nThe capital of France is Paris.\n"
    assert piped.stderr.startswith("Error: `heat` is not an option; the options are ")
    assert len(piped.stderr.splitlines()) == 1

    asked = run(*address, "-p", QUESTION, "-o", "n=2", "--json")
    assert [choice["message"]["content"] for choice in json.loads(asked.stdout)["choices"]] == [MADRID] * 2

    unnamed = run("--url", server.address, "-p", QUESTION)
    assert unnamed.returncode == 1
    assert unnamed.stderr == "Error: name a model of the server with --model; it has onnx, transformers\n"


def test_a_server_that_hangs_or_dies_in_the_middle_costs_one_line(onnx_model, tmp_path):
    with serving(f"--name=phi3={onnx_model}", "--preload", "--access-log", "none") as own:
        chat = Terminal("--url", own.address, "--timeout", "5", folder=tmp_path)
        try:
            chat.see_prompt(after="Model: phi3.")
            be_endless(chat)
            begin_endless(chat)
            own.process.send_signal(signal.SIGSTOP)
            chat.see_prompt(after="Error: the server said nothing for 5 seconds")
            own.process.send_signal(signal.SIGCONT)
            begin_endless(chat)
            own.process.kill()
            chat.match(r"Error: the (connection to the server broke|server broke the answer off)(?s:.*)^>\Z")
            chat.say("Hello", "Error: there is no server at ")
        finally:
            own.process.send_signal(signal.SIGCONT)
            chat.close()
