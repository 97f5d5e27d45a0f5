"""The two other tasks, llm/v1/completions and the flat one, from both builders: DataFrames, CSV, options, errors.

Run: pytest tests/test_tasks.py
"""

import json

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from scoring import App, clean_error, serving_apart, shape

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.runtime.tokens import Tokens

BUILDERS = {"transformers": transformers, "onnx": onnx}
QUESTION = "What is the capital of Spain?"
OTHER = "What is the opposite of hot?"
MESSAGES = [{"role": "user", "content": QUESTION}]

builders = pytest.mark.parametrize("builder", BUILDERS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict:
    """(builder, task, template) -> the loaded model."""
    folder = tmp_path_factory.mktemp("tasks")
    models = {}
    for builder, module in BUILDERS.items():
        for task in ("llm/v1/completions", "flat"):
            for template in (True, False):
                path = folder / f"{builder}-{task.rpartition('/')[2]}-{template}"
                module.save_model(path, task=task, template=template)
                models[builder, task, template] = mlflow.pyfunc.load_model(str(path))
    return models


@pytest.fixture
def completions(tasks, builder):
    return tasks[builder, "llm/v1/completions", True]


@pytest.fixture
def flat(tasks, builder):
    return tasks[builder, "flat", True]


@pytest.fixture
def serve():
    with serving_apart():
        yield App


@builders
def test_a_completion_is_what_a_chat_of_one_message_gets(loaded, completions, builder):
    (chat,) = loaded[builder].predict({"messages": MESSAGES, "max_tokens": 12})

    (answer,) = completions.predict({"prompt": QUESTION, "max_tokens": 12})

    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == chat["choices"][0]["finish_reason"]
    assert answer["usage"] == chat["usage"]


@builders
def test_a_raw_prompt_is_encoded_as_it_is_with_one_bos(tasks, saved, builder):
    folder = {"onnx": saved["onnx"] / "artifacts" / "weights"}.get(builder, saved[builder] / "components" / "tokenizer")
    tokens = Tokens.from_folder(folder)
    prompt = f"<|user|>\n{QUESTION}<|end|>"

    (raw,) = tasks[builder, "llm/v1/completions", False].predict({"prompt": prompt, "max_tokens": 2})
    (applied,) = tasks[builder, "llm/v1/completions", True].predict({"prompt": prompt, "max_tokens": 2})

    ids = tokens.encode_text(prompt)
    assert raw["usage"]["prompt_tokens"] == len(ids)
    assert ids.count(tokens.control["<s>"]) == 1
    assert not set(ids[1:]) & set(tokens.control.values())
    assert applied["usage"]["prompt_tokens"] == len(tokens.encode_chat([{"role": "user", "content": prompt}]))


@builders
def test_each_row_of_a_dataframe_gets_its_own_text(completions, flat, builder):
    prompts = pd.DataFrame({"prompt": [QUESTION, OTHER, QUESTION]})

    rows = completions.predict(prompts, params={"seed": 1})
    texts = flat.predict(prompts, params={"max_tokens": 24})

    assert [row["choices"][0]["text"] for row in rows] == texts
    assert texts[0] == texts[2] != texts[1]
    assert all(isinstance(text, str) for text in texts)


@builders
def test_an_empty_dataframe_gets_an_empty_list(completions, flat, builder):
    nothing = pd.DataFrame({"prompt": pd.Series([], dtype=str)})

    assert completions.predict(nothing) == []
    assert flat.predict(nothing) == []


@builders
def test_options_hold_for_every_row(completions, flat, builder):
    prompts = pd.DataFrame({"prompt": [QUESTION, OTHER]})

    short = completions.predict(prompts.assign(max_tokens=3), params={"temperature": None, "min_p": 0.1})
    # Words that the model would say are banned, so that even a sure model varies.
    banned = json.dumps(dict.fromkeys(map(str, range(1000, 2000)), -50))
    drawn = [
        flat.predict(prompts, params={"temperature": 2.0, "max_tokens": 12, "seed": seed, "logit_bias": banned})
        for seed in (1, 1, 2)
    ]

    assert [row["usage"]["completion_tokens"] for row in short] == [3, 3]
    assert drawn[0] == drawn[1] != drawn[2]


@builders
def test_several_choices_and_stops_of_a_completion(completions, builder):
    (whole,) = completions.predict({"prompt": QUESTION})
    stop = whole["choices"][0]["text"][4:7]

    (answer,) = completions.predict({"prompt": QUESTION, "stop": [stop], "n": 2})

    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["text"] == whole["choices"][0]["text"].partition(stop)[0]
    assert answer["choices"][0]["finish_reason"] == "stop"


@builders
def test_flat_options_come_as_text_where_they_are_no_scalars(flat, builder):
    (whole,) = flat.predict({"prompt": QUESTION})
    stop = whole[4:7]

    assert flat.predict({"prompt": QUESTION}, params={"stop": stop}) == [whole.partition(stop)[0]]
    listed = json.dumps(["never said", stop])
    assert flat.predict({"prompt": QUESTION}, params={"stop": listed}) == [whole.partition(stop)[0]]
    held = json.dumps({"type": "regex", "regex": "[0-9]{3}"})
    (number,) = flat.predict({"prompt": QUESTION}, params={"response_format": held})
    assert number.isdigit()
    banned = flat.predict({"prompt": QUESTION}, params={"logit_bias": '{"100": 100}', "max_tokens": 6})
    assert banned != [whole]


@builders
def test_flat_messages_are_json_text(flat, builder):
    system = [{"role": "system", "content": "Answer in one word."}, *MESSAGES]
    rows = pd.DataFrame(
        {"prompt": [QUESTION, None, None], "messages": [None, json.dumps(MESSAGES), json.dumps(system)]}, dtype=object
    )

    texts = flat.predict(rows)

    assert texts[0] == texts[1]
    assert texts == flat.predict(pd.DataFrame({"messages": [json.dumps(MESSAGES)] * 2 + [json.dumps(system)]}))


@builders
def test_csv_over_http(flat, completions, serve, builder):
    csv = pd.DataFrame({"prompt": [QUESTION, OTHER]}).to_csv(index=False)

    status, text = serve(flat).post(csv, "text/csv")

    assert status == 200
    assert json.loads(text) == {"predictions": flat.predict(pd.DataFrame({"prompt": [QUESTION, OTHER]}))}
    # MLflow knows no pandas type for a list: its own answer.
    assert serve(completions).post(csv, "text/csv")[0] == 400


@builders
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": QUESTION, "max_tokens": 4, "min_p": 0.2},
        {"dataframe_split": {"columns": ["prompt"], "data": [[QUESTION], [OTHER]]}, "params": {"max_tokens": 4}},
        {"inputs": {"prompt": QUESTION}, "params": {"max_tokens": 4}},
        {"messages": json.dumps(MESSAGES), "max_tokens": 4},
    ],
    ids=["unwrapped", "dataframe_split", "inputs", "messages"],
)
def test_flat_bodies_over_http(flat, serve, builder, body):
    status, text = serve(flat).post(body)

    assert status == 200
    answer = json.loads(text)
    texts = answer if isinstance(answer, list) else answer["predictions"]
    assert texts
    assert all(isinstance(item, str) and item for item in texts)


@builders
@pytest.mark.parametrize(
    ("body", "field", "fragment"),
    [
        ({"prompt": ""}, "prompt", "is ''; it must be a string of at least one character"),
        ({"prompt": "a\0b"}, "prompt", "U+0000 at position 1"),
        ({"prompt": "hello " * 5000}, "prompt", "the context holds 4096"),
        ({"prompt": "x" * 2_000_000}, "prompt", "the context holds 4096"),
        ({"prompt": "hi", "temperature": 3.5}, "temperature", "from 0 to 2"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "hi", "stop": [""]}, "stop[0]", "1 to 256 characters"),
        ({"prompt": "hi", "n": 17}, "n", "from 1 to 16"),
        ({"prompt": "hi", "stream": True}, "stream", "returns whole answers"),
        ({"prompt": "hi", "response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object"),
        ({"dataframe_records": [{"prompt": "hi"}, {"prompt": ""}]}, "prompt", "row 1: `prompt`"),
    ],
)
def test_a_bad_completion_request_is_a_clean_400(completions, serve, builder, body, field, fragment):
    status, text = serve(completions).post(body)

    assert status == 400
    error = clean_error(text)
    assert error["field"] == field
    assert fragment in error["message"]


@builders
@pytest.mark.parametrize(
    ("body", "field", "fragment"),
    [
        ({"prompt": ""}, "prompt", "is ''"),
        ({"prompt": "hi", "messages": json.dumps(MESSAGES)}, "prompt", "together with `messages`"),
        ({"messages": "hello"}, "messages", "is not valid JSON"),
        ({"messages": "[" * 5000}, "messages", "is not valid JSON"),
        ({"messages": "[]"}, "messages", "at least one message"),
        ({"messages": "{}"}, "messages", "must be a list"),
        ({"messages": "[1]"}, "messages[0]", "must be an object with `role` and `content`"),
        ({"messages": '[{"role": "user", "content": ["hi"]}]'}, "messages[0].content", "must be a string"),
        ({"messages": '[{"role": ["user"], "content": "hi"}]'}, "messages[0].role", "must be one of"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages[0].content", "U+D800 at position 0"),
        ({"messages": '[{"role": "user", "content": "hi", "mood": 1}]'}, "messages[0].mood", "is not known"),
        ({"messages": '[{"role": "user", "content": "hi", "name": "Bob"}]'}, "messages[0].name", "no place for it"),
        ({"prompt": "hi", "stop": '["a", 1]'}, "stop[1]", "1 to 256 characters"),
        ({"prompt": "hi", "stop": "[a"}, "stop", "is not valid JSON"),
        ({"prompt": "hi", "response_format": "json"}, "response_format", "is not valid JSON"),
        ({"prompt": "hi", "response_format": "[]"}, "response_format", "must be an object"),
        ({"prompt": "hi", "logit_bias": '{"5": 1e999}'}, "logit_bias[5]", "from -100 to 100"),
        ({"prompt": "hi", "logit_bias": "[]"}, "logit_bias", "must be an object"),
        ({"prompt": "hi", "logit_bias": '{"5": 1' + "0" * 5000 + "}"}, "logit_bias", "is not valid JSON"),
        ({"prompt": "hi", "min_p": 7.0}, "min_p", "from 0 to 1"),
        ({"dataframe_records": [{"prompt": None, "messages": None}]}, "prompt", "is None"),
    ],
)
def test_a_bad_flat_request_is_a_clean_400(flat, serve, builder, body, field, fragment):
    status, text = serve(flat).post(body)

    assert status == 400, text
    error = clean_error(text)
    assert error["field"] == field
    assert fragment in error["message"]


@builders
def test_streams_join_to_the_whole(completions, flat, builder):
    (whole,) = completions.predict({"prompt": QUESTION})

    chunks = list(completions.predict_stream({"prompt": QUESTION}))

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert "".join(flat.predict_stream({"prompt": QUESTION})) == flat.predict({"prompt": QUESTION})[0]


@builders
def test_a_stream_answers_one_row(flat, builder):
    # MLflow's own answer.
    with pytest.raises(MlflowException, match="requires single input"):
        list(flat.predict_stream(pd.DataFrame({"prompt": [QUESTION, OTHER]})))


@pytest.mark.parametrize("template", [True, False])
def test_both_builders_answer_in_the_same_shape(tasks, template):
    body = {"prompt": QUESTION, "max_tokens": 4, "n": 2}

    shapes = [shape(tasks[builder, "llm/v1/completions", template].predict(body)) for builder in BUILDERS]

    assert shapes[0] == shapes[1]


@builders
def test_rows_that_were_never_begun_are_an_error_and_no_empty_answers(flat, builder):
    rows = pd.DataFrame({"prompt": ["Count from 1 to 20."] * 50})

    with pytest.raises(MlflowException, match=r"row \d+: the time was over before the answer was begun"):
        flat.predict(rows, params={"max_time": 0.01})
