"""What `log ... --target azure` makes loads in the no-code image, and what the builders make by default does not.

Run: pytest tests/azure/test_azure_builders.py
"""

import pytest
from no_code import NoCodeImage

from phi3_mlflow.azure.check import check, passing
from phi3_mlflow.azure.model import opened
from phi3_mlflow.builders import common, onnx, transformers

BUILDERS = {"transformers": transformers, "onnx": onnx}


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_model_for_azure_passes_the_check_and_answers_in_the_no_code_image(builder, tmp_path):
    BUILDERS[builder].save_model(tmp_path / "model", target="azure")

    with opened(str(tmp_path / "model")) as model:
        assert set(passing(check(model))) == {"ncd", "container"}
    body = {
        "input_data": {"columns": ["prompt"], "index": [0], "data": [["What is the capital of Spain?"]]},
        "params": {"max_tokens": 64, "seed": 7},
    }
    assert NoCodeImage(tmp_path / "model").score(body) == ["The capital of Spain is Madrid."]


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_chat_model_passes_for_a_container_alone(builder, saved):
    with opened(str(saved[builder])) as model:
        assert set(passing(check(model))) == {"container"}


@pytest.mark.parametrize("builder", BUILDERS)
def test_another_task_for_azure_is_refused(builder, tmp_path):
    with pytest.raises(common.BuildError, match="cannot load the task llm/v1/chat"):
        BUILDERS[builder].save_model(tmp_path / "model", target="azure", task="llm/v1/chat")
