"""The two ways to run the weights give the same answers: fp32 ONNX and transformers, token for token.

Run: pytest tests/test_identity.py
"""

import json
from pathlib import Path

import mlflow.pyfunc
import pytest

from phi3_mlflow.builders import onnx

ROOT = Path(__file__).resolve().parent.parent
LONG = "The sky is blue. " * 700  # more tokens than the sliding window's 2047


@pytest.fixture(scope="module")
def exact(fp32_onnx, tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "model"
    onnx.save_model(path, fp32_onnx)
    return mlflow.pyfunc.load_model(str(path))


def questions(count: int) -> list[list[dict[str, str]]]:
    lines = (ROOT / "artifacts" / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines[:: len(lines) // count][:count]]


def stable(completion: dict) -> dict:
    """A completion without its id, its time, its model's name and how much of its prompt was in the KV cache."""
    rest = {key: value for key, value in completion.items() if key not in ("id", "created", "model")}
    custom = {key: value for key, value in completion["custom_outputs"].items() if key != "cached_tokens"}
    return rest | {"custom_outputs": custom}


def test_greedy_answers_are_equal_in_text_usage_and_reason(exact, loaded):
    for messages in questions(60):
        body = {"messages": messages, "temperature": 0.0}

        ours, reference = exact.predict(body), loaded["transformers"].predict(body)

        assert [stable(answer) for answer in ours] == [stable(answer) for answer in reference]


def test_answers_behind_the_sliding_window_are_equal(exact, loaded):
    body = {"messages": [{"role": "user", "content": LONG + "What is the capital of Spain?"}], "max_tokens": 40}

    (ours,), (reference,) = exact.predict(body), loaded["transformers"].predict(body)

    assert ours["usage"]["prompt_tokens"] > 2047
    assert stable(ours) == stable(reference)


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_a_seed_gives_the_same_text_twice_and_another_seed_another(loaded, builder):
    def answer(seed: int) -> str:
        body = {"messages": [{"role": "user", "content": "Tell me something."}], "temperature": 2.0, "max_tokens": 40}
        return loaded[builder].predict(body, params={"seed": seed})[0]["choices"][0]["message"]["content"]

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_the_streamed_pieces_are_the_whole_answer(loaded, builder):
    body = {"messages": [{"role": "user", "content": "Count from 1 to 9."}]}
    chunks = list(loaded[builder].predict_stream(body))
    (whole,) = loaded[builder].predict(body)

    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(chunks) > 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert stable(chunks[-1])["custom_outputs"] == stable(whole)["custom_outputs"]


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_each_row_gets_its_own_completion_in_order(loaded, builder):
    import pandas as pd

    asked = questions(8)
    alone = [loaded[builder].predict({"messages": messages})[0] for messages in asked]

    together = loaded[builder].predict(pd.DataFrame({"messages": asked}))

    assert [stable(answer) for answer in together] == [stable(answer) for answer in alone]
