"""`phi3-mlflow chat` on a terminal: what the keys do, what is kept, what the terminal is spared.

Most of it is asked of a server that says what it is told to, because that starts in a second.

Run: pytest tests/test_terminal.py
"""

import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripted_server import ScriptedServer, running

pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

from keyboard import CTRL_C, CTRL_D, ENTER, NEW_LINE, UP, Terminal, paste

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def server():
    with running(ScriptedServer()) as scripted:
        yield scripted


@contextmanager
def chatting(*arguments, folder, **more):
    terminal = Terminal(*arguments, folder=folder, **more)
    try:
        terminal.see_prompt(after="Ctrl-D ends.")
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def chat(server, tmp_path):
    """A chat with the scripted server."""
    with chatting("--url", server.address, folder=tmp_path) as terminal:
        yield terminal


def asked(server) -> str:
    """The last question that came to the server."""
    return server.requests[-1]["messages"][-1]["content"]


def test_with_the_embedded_model_ctrl_c_stops_the_answer_and_the_conversation_goes_on(tmp_path):
    with chatting(folder=tmp_path) as chat:
        chat.say("What is the capital of Spain?", "The capital of Spain is Madrid.")
        chat.say('/set logit_bias {"2048": -100, "2049": -100, "2055": -100}', "logit_bias")
        chat.say("/set max_tokens 3000", "max_tokens 3000")
        chat.say("/set repetition_guard false", "repetition_guard false")
        chat.type("And of France?" + ENTER)
        chat.match(r"And of France\?\s+\w+")  # the answer has begun
        chat.type(CTRL_C)
        chat.see_prompt(after="(stopped)")
        chat.say("/set logit_bias default", "logit_bias")
        chat.say("/retry", "Paris")
        chat.say("/stats", "ended by eos")
        assert re.search(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, the first after [\d.]+ s", chat.text)
        chat.say("/model ./nowhere", "Error: there is no folder ")
        chat.say("And of Italy?", "Rome")
        chat.type(CTRL_D)

        assert chat.end() == 0
        assert b"Traceback" not in chat.shown


def test_ctrl_c_empties_the_line_and_at_the_empty_prompt_leaves(chat):
    chat.type("And what nonsense is")
    chat.see("nonsense is")
    chat.type(CTRL_C)
    chat.match(r"^>\Z")
    assert chat.process.poll() is None
    chat.type(CTRL_C)

    assert chat.end() == 0


def test_several_lines_are_typed_and_pasted_and_sent_as_one(chat, server):
    server.will_say("Yes.")
    chat.type("one" + NEW_LINE + "two " + paste("three\nfour\r\nfive\n") + "six")
    chat.see("six")
    chat.say("", "Yes.")

    assert asked(server) == "one\ntwo three\nfour\nfive\nsix"


def test_what_is_typed_during_an_answer_comes_to_the_next_prompt_and_is_not_shown_before(chat, server):
    server.will_say("One ", "moment ", "please.", delay=0.5)
    server.will_say("Done.")
    chat.type("Hello" + ENTER)
    chat.see("One")
    os.write(chat.keys, b"And then?\r")
    chat.see_prompt(after="Done.")

    assert chat.text == "> Hello\nOne moment please.\n> And then?\nDone.\n>"
    assert asked(server) == "And then?"


def test_the_history_is_kept_between_runs_in_a_private_file(server, tmp_path):
    arguments = ["--url", server.address]
    with chatting(*arguments, folder=tmp_path) as chat:
        server.will_say("Yes.")
        chat.say("Do you remember?", "Yes.")
        chat.type(CTRL_D)
        assert chat.end() == 0
    (file,) = tmp_path.glob("cache/**/chat_history")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    kept = file.read_bytes()

    with chatting(*arguments, "--no-history", folder=tmp_path) as chat:
        server.will_say("No.")
        chat.say("And this?", "No.")
    assert file.read_bytes() == kept

    with chatting(*arguments, folder=tmp_path) as chat:
        server.will_say("I do.")
        chat.type(UP)
        chat.see("Do you remember?")
        chat.say("", "I do.")
    assert asked(server) == "Do you remember?"


def test_without_a_place_for_the_history_there_is_a_chat_nevertheless(server, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")

    terminal = Terminal("--url", server.address, folder=tmp_path)
    try:
        terminal.see_prompt(after="What you type is not kept: ")
        server.will_say("Yes.")
        terminal.say("Hello", "Yes.")
    finally:
        terminal.close()


def test_the_models_control_sequences_do_not_reach_the_terminal(chat, server):
    server.will_say("\x1b[31mred \x1b", "]0;title\x07 \x9b2J\u202eleft\r\n", "end.")
    chat.say("Hello", "end.")

    assert r"\x1b[31mred \x1b]0;title\x07 \x9b2J\u202eleft" in chat.text
    for sequence in ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\u202e"):
        assert sequence.encode() not in chat.shown
    # What no request may have is not sent back.
    server.will_say("Yes.")
    chat.say("And?", "Yes.")
    assert server.requests[-1]["messages"][1]["content"] == "[31mred ]0;title \x9b2J\u202eleft\r\nend."


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            {"status": 400, "error": "`seed` is \x1b[31mbad;\nleave it out"},
            r"`seed` is \x1b[31mbad; leave it out",
        ),
        ({"status": 503, "error": "busy", "headers": {"retry-after": "7"}}, "(503): busy (try again in 7 s)"),
        ({"status": 307, "headers": {"location": "http://127.0.0.1:1/"}}, "it points to http://127.0.0.1:1/"),
        ({"error": "the model failed"}, "the server failed: the model failed"),
        ({"cut": True}, "the server broke the answer off"),
    ],
    ids=["refused", "busy", "moved", "failed in the middle", "gone in the middle"],
)
def test_an_error_of_the_server_is_one_line_and_the_chat_goes_on(chat, server, script, said):
    server.will_say("Half an answer", **script)
    chat.type("Hello" + ENTER)
    chat.see_prompt(after=said)
    assert len(re.findall("Error:", chat.text)) == 1
    assert b"\x1b[31mbad" not in chat.shown
    server.will_say("Here I am.")
    chat.say("/retry", "Here I am.")

    assert [message["content"] for message in server.requests[-1]["messages"]] == ["Hello"]


def test_a_server_that_says_nothing_any_more_is_given_up(server, tmp_path):
    with chatting("--url", server.address, "--timeout", "3", folder=tmp_path) as chat:
        server.will_say("Half", " an answer", delay=0, silent=60)
        chat.type("Hello" + ENTER)
        chat.see_prompt(after="an answer\nError: the server said nothing for 3 seconds")
        server.will_say("Here I am.")
        chat.say("/retry", "Here I am.")


def test_a_history_that_has_grown_too_long_forgets_its_older_half(server, tmp_path):
    file = tmp_path / "cache" / "phi3-mlflow" / "chat_history"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"\n# 2026-01-01\n+question {number}\n" for number in range(50_000)))
    file.chmod(0o644)
    assert file.stat().st_size > 2**20

    with chatting("--url", server.address, folder=tmp_path) as chat:
        assert 2**18 < file.stat().st_size < 2**20
        assert file.read_text().startswith("\n# 2026-01-01\n+question ")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        chat.type(UP)
        chat.see("> question 49999")


def test_bytes_that_are_no_text_are_one_line_and_the_conversation_stays_whole(chat, server):
    chat.type(b"caf\xe9" + ENTER.encode())
    chat.see_prompt(after="Error: the input is not valid UTF-8: byte 0xe9 at place 4")
    server.will_say("Yes.")
    chat.say("café", "Yes.")

    assert [message["content"] for message in server.requests[-1]["messages"]] == ["café"]


def test_tab_completes_commands_options_their_values_and_files(chat, tmp_path):
    (tmp_path / "a conversation.json").write_text(json.dumps({"messages": []}))
    for begun, whole in [
        ("/sta", "/stats"),
        ("/set temp", "/set temperature"),
        ("/set context_overflow d", "/set context_overflow drop_oldest"),
        ("/load a c", "/load a conversation.json"),
    ]:
        chat.type(begun)
        chat.see(begun[-1])
        chat.type("\t")
        chat.see(whole.removeprefix(begun))
        chat.type(CTRL_C)
        chat.match(r"^>\Z")


def test_a_key_of_the_environment_is_sent_and_never_shown(tmp_path):
    with running(ScriptedServer(key="a-secret-key")) as server:
        with chatting(
            "--url", server.address, folder=tmp_path, environment={"PHI3_MLFLOW_API_KEY": "a-secret-key"}
        ) as chat:
            server.will_say(status=400, error="the key a-secret-key is not welcome here")
            chat.say("Hello", "the key *** is not welcome here")
            assert b"secret" not in chat.shown

        terminal = Terminal("--url", server.address, folder=tmp_path)
        try:
            terminal.see("the environment variable PHI3_MLFLOW_API_KEY may hold a key")
            assert terminal.end() == 1
        finally:
            terminal.close()
    assert server.keys == ["Bearer a-secret-key"]


def same(text: str) -> list[str]:
    """The lines without space at their ends, and with one number for all times and rates."""
    lines = [re.sub(r"[\d.]+(?= s\b| tokens/s)", "1", line.rstrip()) for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_transcript_of_the_documentation_is_what_happens(tmp_path):
    """The numbers of time apart."""
    document = (ROOT / "docs" / "chat.md").read_text("utf-8")
    transcript = re.search(r"```text\n\$ phi3-mlflow chat\n(.*?)```", document, re.DOTALL)[1]
    begin, *exchanges = re.split(r"^> ", transcript, flags=re.MULTILINE)
    assert len(exchanges) > 5

    with chatting(folder=tmp_path) as chat:
        assert same(chat.text) == same(begin + "> ")
        for exchange in exchanges:
            line, _, answer = exchange.partition("\n")
            if line == "/quit":
                chat.type(line + ENTER)
                break
            assert same(chat.say(line)) == same(f"> {line}\n{answer}> ")
        assert chat.end() == 0
