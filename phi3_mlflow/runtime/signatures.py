"""The MLflow signature, the input example and the metadata of each task."""

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types.llm import (
    CHAT_MODEL_INPUT_SCHEMA,
    CHAT_MODEL_OUTPUT_SCHEMA,
    COMPLETIONS_MODEL_INPUT_SCHEMA,
    COMPLETIONS_MODEL_OUTPUT_SCHEMA,
)
from mlflow.types.schema import AnyType, ColSpec, DataType, Map, Object, ParamSchema, ParamSpec, Property, Schema

from .chat import Task

# The default of each parameter is None, so that omitted can be told from given.
_SCALARS = {
    "temperature": DataType.double,
    "max_tokens": DataType.long,
    "n": DataType.long,
    "top_p": DataType.double,
    "top_k": DataType.long,
    "frequency_penalty": DataType.double,
    "presence_penalty": DataType.double,
    "seed": DataType.long,
    "min_p": DataType.double,
    "repetition_penalty": DataType.double,
    "repeat_last_n": DataType.long,
    "max_time": DataType.double,
    "logprobs": DataType.boolean,
    "top_logprobs": DataType.long,
    "context_overflow": DataType.string,
    "repetition_guard": DataType.boolean,
    "self_talk_guard": DataType.boolean,
    "show_engine": DataType.boolean,
}
_FLAT_ONLY = {"stop": DataType.string, "response_format": DataType.string, "logit_bias": DataType.string}
# n answers do not fit into one string, nor does anything beside its text.
_NOT_FLAT = {"n", "logprobs", "top_logprobs", "show_engine"}

# MLflow allows no None for an Object: OpenAI's own default stands for "not given".
RESPONSE_FORMAT_OMITTED = {"type": "text"}
_RESPONSE_FORMAT = ParamSpec(
    "response_format",
    Object(
        [
            Property("type", DataType.string),
            Property("json_schema", Map(AnyType()), required=False),
            Property("regex", DataType.string, required=False),
        ]
    ),
    RESPONSE_FORMAT_OMITTED,
)
_FLAT_INPUT = Schema(
    [ColSpec(DataType.string, "prompt", required=False), ColSpec(DataType.string, "messages", required=False)]
)
_FLAT_OUTPUT = Schema([ColSpec(DataType.string)])


def signature(task: Task) -> ModelSignature:
    """MLflow's own schemas for the task, and a parameter for each option that they lack."""
    inputs, outputs = {
        "llm/v1/chat": (CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA),
        "llm/v1/completions": (COMPLETIONS_MODEL_INPUT_SCHEMA, COMPLETIONS_MODEL_OUTPUT_SCHEMA),
        "flat": (_FLAT_INPUT, _FLAT_OUTPUT),
    }[task]
    if task == "flat":
        scalars = {name: kind for name, kind in (_SCALARS | _FLAT_ONLY).items() if name not in _NOT_FLAT}
        params = [ParamSpec(name, kind, None) for name, kind in scalars.items()]
    else:
        present = inputs.input_names()
        scalars = {name: kind for name, kind in _SCALARS.items() if name not in present}
        if task == "llm/v1/completions":
            # In OpenAI's completions `logprobs` is a number and stands for both.
            scalars["logprobs"] = scalars.pop("top_logprobs")
        params = [ParamSpec(name, kind, None) for name, kind in scalars.items()]
        params.append(_RESPONSE_FORMAT)
    return ModelSignature(inputs=inputs, outputs=outputs, params=ParamSchema(params))


def input_example(task: Task) -> dict[str, Any] | Any:
    """A request that the logged model carries along."""
    question = "What is the capital of Spain?"
    if task == "llm/v1/chat":
        return {"messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": 64}
    if task == "llm/v1/completions":
        return {"prompt": question, "temperature": 0.0, "max_tokens": 64}
    import pandas as pd

    return pd.DataFrame({"prompt": [question]})
