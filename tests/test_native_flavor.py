"""The transformers model as MLflow's own flavor loads it.

Run: pytest tests/test_native_flavor.py
"""

import mlflow.transformers
from mlflow.models import Model

from phi3_mlflow.builders import transformers
from phi3_mlflow.runtime.tokens import Tokens


def test_mlflow_gives_the_native_pipeline_back(transformers_model):
    native = mlflow.transformers.load_model(str(transformers_model))

    (answer,) = native([{"role": "user", "content": "What is the capital of Spain?"}], do_sample=False)
    assert "Madrid" in answer["generated_text"][-1]["content"]


def test_the_native_tokenizer_gives_the_same_ids_as_ours(transformers_model):
    native = mlflow.transformers.load_model(str(transformers_model))
    ours = Tokens.from_folder(transformers_model / "components" / "tokenizer")
    messages = [{"role": "system", "content": " Be  brief. "}, {"role": "user", "content": "\nHow are you?\n\n é🦙"}]

    theirs = native.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert ours.encode_chat(messages) == theirs


def test_a_pipeline_that_is_already_loaded_can_be_saved(transformers_model, tmp_path):
    native = mlflow.transformers.load_model(str(transformers_model))

    transformers.save_model(tmp_path / "again", native)

    model = Model.load(str(tmp_path / "again"))
    assert model.flavors["python_function"]["loader_module"] == "phi3_mlflow.runtime.model"
    (completion,) = mlflow.pyfunc.load_model(str(tmp_path / "again")).predict(
        {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    )
    assert "Madrid" in completion["choices"][0]["message"]["content"]
