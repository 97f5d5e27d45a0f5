"""How `compare` reads answers token by token: other templates, dropped turns, a full context.

Run: pytest tests/test_agreement.py
"""

import pytest
from spoiled import spoil

from phi3_mlflow.builders import onnx
from phi3_mlflow.compare import comparison
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error

SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def test_answers_to_a_template_without_control_tokens_are_read_too(tmp_path):
    onnx.save_model(tmp_path / "plain", chat_template=PLAIN)
    onnx.save_model(tmp_path / "spoiled", spoil(tmp_path / "weights", "layers.1."), chat_template=PLAIN)
    uris = [str(tmp_path / name) for name in ("plain", "plain", "spoiled")]

    result = comparison.compare(uris, [{"inputs": {"messages": SPAIN, "max_tokens": 8}}])

    _, same, spoiled = (model["agreement"] for model in result["models"])
    assert (same["drift"]["value"], same["same"]["value"]) == (0, 1)
    assert spoiled["drift"]["value"] > 0.01


def test_turns_that_do_not_fit_are_dropped_where_the_question_says_so(tmp_path):
    onnx.save_model(tmp_path / "small", model_config={"context_length": 48})
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "1 + 1 = 2."}] * 8
    inputs = {"messages": [*turns, *SPAIN], "max_tokens": 16}

    with pytest.raises(InvalidRequest, match="the context holds 48"):
        comparison.compare([str(tmp_path / "small")] * 2, [{"inputs": inputs}])
    result = comparison.compare(
        [str(tmp_path / "small")] * 2,
        [{"inputs": {**inputs, "context_overflow": "drop_oldest"}, "expectations": {"contains": "Madrid"}}],
    )

    assert [model["right"]["value"] for model in result["models"]] == [1, 1]
    assert result["models"][1]["agreement"]["drift"]["value"] == 0


def test_an_answer_that_the_context_has_no_room_to_read_is_told(tmp_path):
    onnx.save_model(tmp_path / "small", model_config={"context_length": 16})
    asked = [{"role": "user", "content": "What is the capital of Spain??"}]  # 15 tokens with the template

    with pytest.raises(Phi3Error, match=r"small failed on questions\[0\]: the prompt takes 15 tokens, and .* no room"):
        comparison.compare([str(tmp_path / "small")] * 2, [{"inputs": {"messages": asked}}])
