"""Objects and chunks in OpenAI's shape.

Run: pytest tests/serve/test_openai.py
"""

from phi3_mlflow.runtime.answers import Answer, Choice, Piece, TokenLogprob
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.serve import openai


def likely(text, start=0):
    return TokenLogprob(start, text.encode(), -1.0)


def test_a_choice_that_comes_before_its_prompt_was_read_waits_for_the_prompts_log_probabilities():
    body = {"prompt": "one two", "n": 2, "echo": True, "logprobs": 0, "stream": True}
    answer = Answer(2, [Choice(logprobs=[]), Choice(logprobs=[])], prompt_logprobs=[likely("one")])
    shape = openai.Shape(openai.parse_completion(body, Options()), [answer], "phi3", ["one two"])

    early = shape.chunks(0, Piece(1, "a", None, [likely("a")]))
    answer.prompt_logprobs.append(likely(" two", 3))
    late = shape.chunks(0, Piece(0, "b", None, [likely("b")]))

    assert early == []
    choices = [choice for chunk in late for choice in chunk["choices"]]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(1, "one twoa"), (0, "one twob")]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["one", " two", "a"], ["one", " two", "b"]]


def test_a_prompt_that_was_not_read_in_time_holds_nothing_back_in_the_end():
    body = {"prompt": "one two", "n": 2, "echo": True, "logprobs": 0, "stream": True}
    answer = Answer(2, [Choice(logprobs=[]), Choice(logprobs=[])], prompt_logprobs=[likely("one")])
    shape = openai.Shape(openai.parse_completion(body, Options()), [answer], "phi3", ["one two"])

    assert shape.chunks(0, Piece(1, "", "max_time", [])) == []
    ended = shape.chunks(0, Piece(0, "", "max_time", [], last=True))

    reasons = [(each["index"], each["finish_reason"]) for chunk in ended for each in chunk["choices"]]
    assert reasons == [(1, None), (1, "length"), (0, None), (0, "length")]
