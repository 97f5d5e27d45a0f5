"""A conversation and its commands, without a terminal: what is kept, what is asked, what is refused.

Run: pytest tests/test_conversation.py
"""

import json
import stat

import pytest

from phi3_mlflow.chat import texts
from phi3_mlflow.chat.commands import COMMANDS, Commands, Leave
from phi3_mlflow.chat.conversation import OPTIONS, Conversation
from phi3_mlflow.chat.models import ChatError, Logged
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error, shown


class Scripted:
    """A model that says what it is told to, and notes what it was asked."""

    drops_oldest = False
    defaults = None

    def __init__(self, name="scripted"):
        self.name = name
        self.answers = []
        self.asked = []
        self.closed = False

    def chunks(self, messages, options):
        self.asked.append((list(messages), dict(options)))
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece if isinstance(piece, dict) else {"choices": [{"index": 0, "delta": {"content": piece}}]}

    def whole(self, messages, options):
        return {}

    def other(self, name):
        if name == "nobody":
            raise ChatError("there is no nobody")
        return Scripted(name)

    def known(self):
        return ["scripted", "other"]

    def close(self):
        self.closed = True


class Chat:
    """Lines typed into a conversation with a scripted model."""

    def __init__(self):
        self.model = Scripted()
        self.conversation = Conversation(self.model)
        self.told = []
        self.commands = Commands(self.conversation, self.told.append)

    def type(self, line, *answer):
        """Types a line; the answer that was printed, or what was told."""
        self.told.clear()
        if answer:
            self.model.answers.append(answer)
        pieces = self.commands.take(line)
        return "\n".join(self.told) if pieces is None else "".join(pieces)

    @property
    def contents(self):
        return [message["content"] for message in self.conversation.messages]


@pytest.fixture
def chat():
    return Chat()


def test_a_conversation_grows_by_questions_and_answers_below_its_system_message(chat):
    chat.type("/system You are\nbrief.")
    assert chat.type("one", "1", ".") == "1."
    chat.type("two", "2.")

    assert chat.contents == ["You are\nbrief.", "one", "1.", "two", "2."]
    assert chat.model.asked[-1][0] == chat.conversation.messages[:-1]
    assert chat.type("/system") == "There is no system message."
    assert chat.contents[0] == "one"


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(chat):
    chat.model.answers.append(("to", "o long"))
    pieces = chat.commands.take("one")
    assert next(pieces) == "to"
    pieces.close()
    assert chat.contents == ["one", "to"]

    with pytest.raises(KeyboardInterrupt):
        chat.type("two", "also", KeyboardInterrupt())
    assert chat.contents == ["one", "to", "two", "also"]
    assert chat.type("/stats").endswith("ended by you")

    with pytest.raises(KeyboardInterrupt):
        chat.type("three", KeyboardInterrupt())
    assert chat.contents == ["one", "to", "two", "also"]


def test_an_answer_that_fails_is_forgotten_with_its_question_and_retry_asks_it_again(chat):
    chat.type("one", "1")
    with pytest.raises(ChatError, match="away"):
        chat.type("two", "half", ChatError("away"))
    assert chat.contents == ["one", "1"]

    assert chat.type("/retry", "2") == "2"
    assert chat.contents == ["one", "1", "two", "2"]


def test_retry_puts_another_answer_in_the_place_of_the_last_and_keeps_that_where_it_fails(chat):
    with pytest.raises(ChatError, match="no question"):
        chat.type("/retry")
    chat.type("one", "1")
    chat.type("one", "uno")
    chat.type("/retry", "eins")
    assert chat.contents == ["one", "1", "one", "eins"]
    with pytest.raises(ChatError):
        chat.type("/retry", ChatError("away"))
    assert chat.contents == ["one", "1", "one", "eins"]
    chat.type("two", "2")
    assert chat.contents == ["one", "1", "one", "eins", "two", "2"]


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": 1}, {"choices": ["text"]}, {"choices": [{"delta": "text"}]}, {"usage": "many"},
        {"custom_outputs": [1]}, {"choices": [{"finish_reason": "stop"}], "custom_outputs": {"stop_reason": 1}},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_has_not_the_shape_of_an_answer_is_an_error(chat, chunk):
    with pytest.raises(ChatError, match="has not the shape of a chat completion"):
        chat.type("one", chunk)

    assert chat.contents == []


def test_what_may_stand_in_a_chunk_is_no_error(chat):
    chunks = [
        {"choices": []},
        {"choices": [{"delta": {"role": "assistant", "content": None}, "finish_reason": None}], "usage": None},
        {"choices": [{"delta": {"content": "1"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length", "stop_reason": "max_time"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {}}},
    ]

    assert chat.type("one", *chunks) == "1"
    assert chat.conversation.facts.reason == "max_time"
    assert chat.type("/stats").endswith("prompt of 9 tokens; ended by max_time")


def test_set_lists_sets_and_takes_back_options_as_the_runtime_checks_them(chat):
    listed = chat.type("/set").splitlines()
    assert [line.split()[0] for line in listed] == list(OPTIONS)
    assert re_spaced(listed[0]) == "temperature (the server's own) a number from 0 to 2"

    assert chat.type("/set temperature 0.7") == "temperature 0.7"
    chat.type("/set stop stop here")
    chat.type('/set logit_bias {"5": -1}')
    chat.type("/set seed -1")
    chat.type("one", "1")
    assert chat.model.asked[-1][1] == {
        "temperature": 0.7, "stop": ("stop here",), "logit_bias": {5: -1.0}, "seed": -1,
    }  # fmt: skip
    assert chat.type("/set temperature default") == "temperature (the server's own)"
    assert "temperature" not in chat.conversation.options


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/set temperature 3", "`temperature` is 3; it must be a number from 0 to 2"),
        ("/set temperature warm", "`temperature` is 'warm'"),
        ("/set heat 3", "`heat` is not an option; the options are temperature, "),
        ("/set heat default", "`heat` is not an option"),
        ("/set temperature", "/set temperature needs a value"),
        ("/set n 2", "`n` has no use in a conversation"),
        ('/set stop "\\ud83d"', "`stop[0]` has the lone surrogate U+D83D"),
        ("/set response_format " + "[" * 100_000, "`response_format` is "),
        ("/stats often", "/stats takes on, off or nothing, not often"),
        ("/stats", "there is no answer to tell of"),
        ("/load", "the name of a file is missing"),
        ("/load nowhere.json", "there is no file nowhere.json"),
        ("/load /", "/ is no file"),
        ("/load ~nobody-of-this-name/a", "there is no file ~nobody-of-this-name/a"),
        ("/save -f /dev/null", "/dev/null is no file"),
        ("/save a\x00b", "`file` has the character U+0000"),
        ("/save /nowhere/at/all", "/save /nowhere/at/all: No such file or directory"),
        ("/save -f /nowhere/at/all", "/save -f /nowhere/at/all: No such file or directory"),
        ("/model nobody", "there is no nobody"),
        ("/x\x1b[31m", r"there is no command /x\x1b[31m; /help lists them"),
        ("/system a\x00b", "`system` has the character U+0000"),
        ("caf\udce9", "`message` has the character U+DCE9"),
        ("a\x1b[31mb", "`message` has the character U+001B"),
    ],
    ids=lambda value: value[:20].encode("ascii", "backslashreplace").decode(),
)
def test_a_line_that_cannot_be_done_says_why_and_changes_nothing(chat, line, problem):
    before = (chat.conversation.messages, chat.conversation.options)

    with pytest.raises(Phi3Error) as error:
        chat.type(line)

    assert problem in str(error.value)
    assert (chat.conversation.messages, chat.conversation.options) == before
    assert not chat.model.closed


def test_clear_forgets_the_turns_and_not_the_settings(chat):
    chat.type("/system Be brief.")
    chat.type("/set top_k 3")
    chat.type("one", "1")
    chat.type("/clear")

    assert chat.contents == ["Be brief."]
    assert chat.conversation.options == {"top_k": 3}


def test_model_tells_and_changes_who_answers(chat):
    assert chat.type("/model") == "Model: scripted\nThe server has scripted, other"
    chat.type("/model other")

    assert chat.conversation.model.name == "other"
    assert chat.model.closed


def test_help_names_every_command_and_two_slashes_are_a_message(chat):
    assert [line.split()[0] for line in chat.type("/help").splitlines()] == list(COMMANDS)
    assert chat.type("//usr is a folder", "It is.") == "It is."
    assert chat.contents[0] == "/usr is a folder"
    assert chat.type("  \n ") == ""
    with pytest.raises(Leave):
        chat.type("/quit")


def test_what_is_saved_is_private_not_overwritten_in_silence_and_loaded_as_it_was(chat, tmp_path):
    file = tmp_path / "a name with spaces.json"
    chat.type("/system Sei kurz.")
    chat.type("/set stop stop")
    chat.type('/set logit_bias {"5": -1}')
    chat.type("Größe?", "1 ½ €")
    chat.type(f"/save {file}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text("utf-8"))["messages"] == chat.conversation.messages

    first = file.read_bytes()
    chat.type("more", "yes")
    with pytest.raises(ChatError, match="exists already; `/save -f "):
        chat.type(f"/save {file}")
    assert file.read_bytes() == first
    assert chat.type(f"/save -f {file}") == f"Saved 5 messages to {file}."
    assert list(tmp_path.iterdir()) == [file]

    other = Chat()
    other.type("/set top_k 3")
    other.type("this", "is forgotten")
    assert other.type(f"/load {file}") == f"Loaded 5 messages from {file}."
    assert other.conversation.messages == chat.conversation.messages
    assert other.conversation.options == chat.conversation.options
    assert other.type("/retry", "no") == "no"
    assert other.contents[-2:] == ["more", "no"]


def test_a_save_that_fails_leaves_no_file(chat, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ChatError, match="No space"):
        chat.type(f"/save {tmp_path / 'file'}")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        ([], "it must be an object with `messages`"),
        ({"messages": "hello"}, "`messages` is 'hello'; it must be a list"),
        ({"messages": [{"role": "user"}]}, "`messages[0].content` is None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "`messages[0].role` is 'tool'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with a question"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "it must be 'user', in turns"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}, "U+D83D"),
        ({"messages": [], "options": {"temperature": 9}}, "`temperature` is 9"),
        ({"messages": [], "options": []}, "`options` is []; it must be an object"),
        ({"messages": [], "key": "secret"}, "`key` is not known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_holds_no_conversation_says_why_and_changes_nothing(chat, tmp_path, content, problem):
    file = tmp_path / "file.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat.type("one", "1")
    chat.type("/set top_k 3")

    with pytest.raises(Phi3Error) as error:
        chat.type(f"/load {file}")

    assert problem in str(error.value)
    assert chat.contents == ["one", "1"]
    assert chat.conversation.options == {"top_k": 3}


def test_a_logged_model_shows_its_own_defaults_and_checks_what_depends_on_it(saved):
    model = Logged(str(saved["onnx"]))
    conversation, told = Conversation(model), []
    commands = Commands(conversation, told.append)
    commands.take("/set")
    assert re_spaced(told[0]) == "temperature (0.0) a number from 0 to 2"

    commands.take('/set logit_bias {"999999": 1}')
    with pytest.raises(ChatError, match=r"`logit_bias\[999999\]` is beyond this model's vocabulary"):
        list(commands.take("What is the capital of Spain?"))
    commands.take("/set logit_bias default")
    commands.take('/set response_format {"type": "regex", "regex": "M[a-z]+"}')
    assert "".join(commands.take("What is the capital of Spain?")).startswith("M")
    commands.take(f"/model {saved['transformers']}")
    commands.take("/set response_format default")
    assert "".join(commands.take("What is the capital of Spain?")) == "The capital of Spain is Madrid."
    conversation.model.close()


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "\x9b31m", "\u202eabc", "\x07", "\ud83d", "\x08\x08"])
def test_nothing_that_a_terminal_obeys_is_shown(text):
    told = shown(text)

    assert told.isprintable()
    assert told.encode()


def test_text_is_shown_as_it_is():
    text = "Größe\t½ 👩‍👩‍👧 שלום\n"

    assert shown(text) == text
    assert shown("a\r\nb") == "a\nb"


def test_a_check_of_half_characters_names_the_option():
    with pytest.raises(InvalidRequest, match=r"`response_format` has half a character"):
        texts.check_whole("response_format", {"type": "regex", "regex": ["\udc00"]})


def re_spaced(text):
    return " ".join(text.split())
