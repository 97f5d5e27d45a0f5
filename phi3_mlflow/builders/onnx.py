"""The ONNX builder: an onnxruntime-genai folder as an MLflow PythonModel, in models-from-code form."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.models import Model
from mlflow.models.model import ModelInfo

from phi3_mlflow import runtime
from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.chat import Task
from phi3_mlflow.runtime.settings import SETTINGS, check_batching
from phi3_mlflow.runtime.signatures import input_example, signature
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.weights import onnx_files, resolve

from . import common

_WEIGHTS = "artifacts/weights"
_CODE = Path(runtime.__file__).parent / "onnx_model.py"


def save_model(
    path: str | Path,
    weights: str | Path = "embedded",
    *,
    revision: str | None = None,
    task: Task | None = None,
    template: bool = True,
    model_config: Mapping[str, Any] | None = None,
    target: common.Target = "mlflow",
    mlflow_model: Model | None = None,
    validate_serving_input: bool = False,
) -> None:
    """Saves an MLflow model of the ONNX kind.

    Args:
        path: the folder to write; it must not exist, or be empty.
        weights: `embedded`, a folder of onnxruntime-genai, or a Hugging Face id.
        revision: of the Hugging Face repository; None for the pinned one.
        task: `llm/v1/chat`, `llm/v1/completions`, or `flat` (text columns in, text out); None for the target's own.
        template: for the other tasks, whether a prompt is put into the chat template as a user's message.
        model_config: defaults of the options, `context_length`, `threads`, `queue_limit`, `parallel` (how many
            requests are answered at once) and `kv_budget` (bytes, or text such as "4GiB", for their KV caches).
        target: `azure` makes a model that Azure ML's no-code image can load: the flat task, and what that image
            needs in the requirements.
        mlflow_model: filled in by MLflow when the model is logged.
        validate_serving_input: MLflow's, which hands all arguments of log on; it means nothing here.

    Raises:
        WeightsError: the weights are missing or of another kind.
        InvalidRequest: a setting in model_config is not allowed.
    """
    task, needed = common.for_target(target, task, common.requirements("onnxruntime", "onnxruntime-genai"))
    found = resolve(weights, "onnx", revision=revision)
    config = common.full_config(task, found.source, model_config, template)
    check_batching(config)
    if config["kv_budget"] is not None:
        from phi3_mlflow.runtime.decoders.batched import CannotBatch, check_budget

        budget = SETTINGS["kv_budget"].check("kv_budget", config["kv_budget"])
        with suppress(CannotBatch):  # the model falls back when it is loaded, and says why
            check_budget(found.folder, config["context_length"], int(budget))
    Tokens.from_folder(found.folder)
    path, model = Path(path), mlflow_model or Model()
    with common.staged_code() as code, common.quiet_mlflow():
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(_CODE),
            code_paths=[code],
            model_config=config,
            signature=signature(task),
            input_example=input_example(task),
            pip_requirements=needed,
            mlflow_model=model,
        )
    # Not through MLflow's `artifacts`: it refuses the links that the hub's cache is made of, and copies once more.
    destination = path / _WEIGHTS
    common.copy_weights(onnx_files(found.folder), destination, link=mlflow_model is not None)
    manifest.write(destination)
    model.flavors["python_function"] |= {
        "artifacts": {"weights": {"path": _WEIGHTS, "uri": found.source}},
        "model_code_path": _CODE.name,
    }
    model.metadata = common.metadata(task, found, manifest.digest(destination))
    common.finish(model, path)


def log_model(
    weights: str | Path = "embedded",
    *,
    name: str = "phi3-onnx",
    registered_model_name: str | None = None,
    alias: str | None = None,
    **save_arguments: Any,
) -> ModelInfo:
    """Logs, and on request registers, an MLflow model of the ONNX kind.

    Args:
        weights: as for save_model.
        name: of the logged model.
        registered_model_name: registers a version under this name.
        alias: for that version.
        save_arguments: further arguments of save_model.

    Returns:
        MLflow's description; `model_uri` is what everything else takes.
    """
    import phi3_mlflow.builders.onnx as flavor

    return common.log(
        flavor,
        name=name,
        registered_model_name=registered_model_name,
        alias=alias,
        weights=weights,
        **save_arguments,
    )
