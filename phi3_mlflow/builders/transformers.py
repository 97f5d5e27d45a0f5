"""The transformers builder: a text-generation pipeline in MLflow's transformers flavor.

The native flavor stays as MLflow writes it; its python_function side is pointed at the runtime floor.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models import Model
from mlflow.models.model import ModelInfo

from phi3_mlflow.runtime import manifest, trust
from phi3_mlflow.runtime.chat import Task
from phi3_mlflow.runtime.settings import refuse_batching
from phi3_mlflow.runtime.signatures import input_example, signature
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.weights import Weights, resolve

from . import common

if TYPE_CHECKING:
    import transformers


def save_model(
    path: str | Path,
    weights: "str | Path | transformers.Pipeline" = "embedded",
    *,
    revision: str | None = None,
    task: Task | None = None,
    template: bool = True,
    model_config: Mapping[str, Any] | None = None,
    target: common.Target = "mlflow",
    mlflow_model: Model | None = None,
    validate_serving_input: bool = False,
) -> None:
    """Saves an MLflow model of the transformers kind.

    Args:
        path: the folder to write; it must not exist, or be empty.
        weights: `embedded`, a folder of transformers, a Hugging Face id, or a text-generation pipeline.
        revision: of the Hugging Face repository; None for the pinned one.
        task: `llm/v1/chat`, `llm/v1/completions`, or `flat` (text columns in, text out); None for the target's own.
        template: for the other tasks, whether a prompt is put into the chat template as a user's message.
        model_config: defaults of the options, `context_length`, `threads` and `queue_limit`.
        target: `azure` makes a model that Azure ML's no-code image can load: the flat task, and what that image
            needs in the requirements.
        mlflow_model: filled in by MLflow when the model is logged.
        validate_serving_input: MLflow's, which hands all arguments of log on; it means nothing here.

    Raises:
        WeightsError: the weights are missing or of another kind.
        InvalidRequest: a setting in model_config is not allowed.
        BuildError: torch or transformers is not installed.
    """
    task, needed = common.for_target(target, task, common.requirements("torch", "transformers"))
    refuse_batching(model_config or {})
    import mlflow.transformers

    pipeline, found = _load(weights, revision)
    config = common.full_config(task, found.source, model_config, template)
    path, model = Path(path), mlflow_model or Model()
    with common.staged_code() as code, common.quiet_mlflow(), _no_network(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.transformers.save_model(
            pipeline,
            str(path),
            task="text-generation" if task == "flat" else task,
            signature=signature(task) if task == "flat" else None,
            input_example=input_example(task),
            code_paths=[code],
            pip_requirements=needed,
            mlflow_model=model,
        )
    _write_licence(path, found)
    trust.check_transformers(path)
    Tokens.from_folder(path / "components" / "tokenizer")
    manifest.write(path, trust.TRANSFORMERS_PARTS)
    model.metadata = common.metadata(task, found, manifest.digest(path))
    model.signature = signature(task)
    model.flavors["python_function"] |= {
        "loader_module": "phi3_mlflow.runtime.model",
        "config": config,
        "streamable": True,
    }
    native = model.flavors["transformers"]
    native |= {key: found.source for key in ("source_model_name", "tokenizer_name") if key in native}
    common.finish(model, path)


def log_model(
    weights: "str | Path | transformers.Pipeline" = "embedded",
    *,
    name: str = "phi3-transformers",
    registered_model_name: str | None = None,
    alias: str | None = None,
    **save_arguments: Any,
) -> ModelInfo:
    """Logs, and on request registers, an MLflow model of the transformers kind.

    Args:
        weights: as for save_model.
        name: of the logged model.
        registered_model_name: registers a version under this name.
        alias: for that version.
        save_arguments: further arguments of save_model.

    Returns:
        MLflow's description; `model_uri` is what everything else takes.
    """
    import phi3_mlflow.builders.transformers as flavor

    return common.log(
        flavor,
        name=name,
        registered_model_name=registered_model_name,
        alias=alias,
        weights=weights,
        **save_arguments,
    )


def _load(
    weights: "str | Path | transformers.Pipeline", revision: str | None
) -> "tuple[transformers.Pipeline, Weights]":
    import transformers

    if not isinstance(weights, (str, Path)):
        source = weights.model.name_or_path or "a pipeline in memory"
        if Path(source).exists():
            source = Path(source).name
        return weights, Weights(Path(), source, None, "unknown")
    found = resolve(weights, "transformers", revision=revision)
    folder = str(found.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype="auto"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer), found


@contextmanager
def _no_network() -> Iterator[None]:
    """MLflow looks for a model card and a licence on the hub while it saves; what is needed is already here."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _write_licence(path: Path, weights: Weights) -> None:
    """Replaces the note in which MLflow says that it found no licence."""
    files = [file for file in weights.folder.glob("LICENSE*") if weights.folder != Path()]
    note = path / "LICENSE.txt"
    if files:
        note.write_text(files[0].read_text("utf-8"), "utf-8")
    else:
        note.write_text(f"Licence of the weights ({weights.source}): {weights.license}\n", "utf-8")
