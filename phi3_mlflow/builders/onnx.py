"""The ONNX builder: an onnxruntime-genai folder as an MLflow PythonModel, in models-from-code form."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Never

import mlflow.pyfunc
from mlflow.entities.model_registry import PromptVersion
from mlflow.models import Model
from mlflow.models.model import ModelInfo

from phi3_mlflow import runtime
from phi3_mlflow.quantize import evidence
from phi3_mlflow.runtime import manifest, trust
from phi3_mlflow.runtime.chat import Task
from phi3_mlflow.runtime.decoders.base import context_within
from phi3_mlflow.runtime.settings import SETTINGS, check_batching
from phi3_mlflow.runtime.signatures import input_example, signature
from phi3_mlflow.runtime.snapshots import WEIGHTS
from phi3_mlflow.runtime.trust import genai_config
from phi3_mlflow.weights import Weights, find, onnx_files

from . import common
from .plan import Entry, Plan, Write, log, refuse, save

_CODE = Path(runtime.__file__).parent / "onnx_model.py"


def save_model(
    path: str | Path,
    weights: str | Path = "embedded",
    *,
    revision: str | None = None,
    task: Task | None = None,
    template: bool = True,
    chat_template: str | None = None,
    model_config: Mapping[str, Any] | None = None,
    target: common.Target = "mlflow",
    reference: bool = False,
    metadata: Mapping[str, Any] | None = None,
    extra_pip_requirements: Sequence[str] | None = None,
    **others: Never,
) -> None:
    """Saves an MLflow model of the ONNX kind.

    Args:
        path: the folder to write; it must not exist, or be empty. It is removed again when that fails.
        weights: `embedded`, a folder of onnxruntime-genai, or a Hugging Face id.
        revision: of the Hugging Face repository; None for the pinned one.
        task: `llm/v1/chat`, `llm/v1/completions`, or `flat` (text columns in, text out); None for the target's own.
        template: for the other tasks, whether a prompt is put into the chat template as a user's message.
        chat_template: the text of a Jinja template that takes the place of the weights' own, or that they lack.
        model_config: defaults of the options, `context_length`, `threads`, `queue_limit`, `parallel` (how many
            requests are answered at once) and `kv_budget` (bytes, or text such as "4GiB", for their KV caches).
        target: `azure` makes a model that Azure ML's no-code image can load: the flat task, and what that image
            needs in the requirements.
        reference: the model names the hub's commit and the sha256 of each file, and holds no weights: whoever loads it
            needs them in the hub's cache (`phi3-mlflow pull`). For a Hugging Face id only.
        metadata: further keys for the MLmodel file's metadata; what the builder writes there cannot be given.
        extra_pip_requirements: further requirement lines, such as `["six==1.17"]`.
        others: nothing; an argument of MLflow's own function is refused with what to use in its place.

    Raises:
        WeightsError: the weights are missing or of another kind.
        InvalidRequest: a setting in model_config is not allowed.
        BuildError: another argument is not allowed, a package is missing, or the disk is full.
    """
    refuse(others)
    planned = plan(
        weights,
        revision=revision,
        task=task,
        template=template,
        chat_template=chat_template,
        model_config=model_config,
        target=target,
        reference=reference,
        metadata=metadata,
        extra_pip_requirements=extra_pip_requirements,
    )
    save(planned, path)


def log_model(
    weights: str | Path = "embedded",
    *,
    name: str = "phi3-onnx",
    registered_model_name: str | None = None,
    alias: str | None = None,
    revision: str | None = None,
    task: Task | None = None,
    template: bool = True,
    chat_template: str | None = None,
    model_config: Mapping[str, Any] | None = None,
    target: common.Target = "mlflow",
    reference: bool = False,
    metadata: Mapping[str, Any] | None = None,
    extra_pip_requirements: Sequence[str] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    run_id: str | None = None,
    prompts: Sequence[str | PromptVersion] | None = None,
    await_registration_for: int | None = 300,
    **others: Never,
) -> ModelInfo:
    """Logs, and on request registers, an MLflow model of the ONNX kind.

    Everything is checked before anything is downloaded, and the weights before a model is made.

    Args:
        weights: as for save_model, like all that are not described here.
        name: of the logged model.
        registered_model_name: registers a version under this name.
        alias: for that version.
        revision: see save_model.
        task: see save_model.
        template: see save_model.
        chat_template: see save_model.
        model_config: see save_model; noted as params of the run too, where there is one.
        target: see save_model.
        reference: see save_model.
        metadata: see save_model.
        extra_pip_requirements: see save_model.
        params: of the logged model.
        tags: of the logged model, and of the registered version.
        model_type: any word by which to find the model.
        step: of the run, for this model.
        run_id: the run that the model belongs to; None for the active run, or the one that `mlflow run` made.
        prompts: MLflow prompts, or their URIs, to link with the model.
        await_registration_for: seconds to wait for the registered version; None or 0 not to wait.
        others: nothing; an argument of MLflow's own function is refused with what to use in its place.

    Returns:
        MLflow's description; `model_uri` is what everything else takes.

    Raises:
        WeightsError, InvalidRequest: as for save_model.
        BuildError: another argument is not allowed, a store cannot be written, or the disk is full.
    """
    refuse(others)
    planned = plan(
        weights,
        revision=revision,
        task=task,
        template=template,
        chat_template=chat_template,
        model_config=model_config,
        target=target,
        reference=reference,
        metadata=metadata,
        extra_pip_requirements=extra_pip_requirements,
    )
    entry = Entry(
        name=name,
        registered_model_name=registered_model_name,
        alias=alias,
        params=params,
        tags=tags,
        model_type=model_type,
        step=step,
        run_id=run_id,
        prompts=prompts,
        await_registration_for=await_registration_for,
    )
    return log(planned, entry)


def plan(
    weights: str | Path = "embedded",
    *,
    revision: str | None = None,
    task: Task | None = None,
    template: bool = True,
    chat_template: str | None = None,
    model_config: Mapping[str, Any] | None = None,
    target: common.Target = "mlflow",
    reference: bool = False,
    metadata: Mapping[str, Any] | None = None,
    extra_pip_requirements: Sequence[str] | None = None,
) -> Plan:
    """Checks the arguments of save_model and finds the weights. Downloads and writes nothing.

    Raises:
        WeightsError, InvalidRequest, BuildError: as for save_model.
    """
    # What is no mapping is refused below.
    chosen = model_config.get("engine") if isinstance(model_config, Mapping) else None
    openvino = ("openvino",) if chosen == "openvino" else ()
    # What finds the weights of a reference.
    hub = ("huggingface-hub",) if reference else ()
    packages = common.requirements("onnxruntime", "onnxruntime-genai", *openvino, *hub)
    task, needed = common.for_target(target, task, packages, extra_pip_requirements)
    own = common.own_metadata(metadata)
    common.check_config(task, template, chat_template, model_config)
    check_batching(model_config or {})
    source = find(weights, "onnx", revision=revision)
    common.check_reference(reference, source, chat_template)
    config = common.full_config(task, source.name, model_config, template)

    def prepare(found: Weights) -> Write:
        evidence.read(found.folder)  # refused before anything is written
        context_within(config["context_length"], genai_config.read(found.folder)["model"]["context_length"])
        if config["kv_budget"] is not None:
            from phi3_mlflow.runtime.decoders.batched import CannotBatch, check_budget

            budget = SETTINGS["kv_budget"].check("kv_budget", config["kv_budget"])
            with suppress(CannotBatch):  # the model falls back when it is loaded, and says why
                check_budget(found.folder, config["context_length"], int(budget))
        common.check_tokenizer(found.folder, template, chat_template)

        def write(room: common.Room, model: Model) -> Path:
            _write(room.folder, model, found, config, needed)
            held = room.folder if reference else room.weights
            place = held / WEIGHTS
            if reference:
                place.mkdir(parents=True)
                manifest.write(place, elsewhere=trust.read_onnx(found.folder))
            else:
                hashes = _copy(found, place, chat_template, links=room.links)
                manifest.write(place, hashes=hashes)
            model.metadata = common.metadata(task, found, manifest.digest(place), own, reference=reference)
            common.finish(model, room)
            return held

        return write

    return Plan(source, prepare, links=True, reference=reference, model_config=model_config)


def _write(path: Path, model: Model, found: Weights, config: Mapping[str, Any], needed: list[str]) -> None:
    with common.staged_code() as code, common.quiet_mlflow():
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(_CODE),
            code_paths=[code],
            model_config=dict(config),
            signature=signature(config["task"]),
            input_example=input_example(config["task"]),
            pip_requirements=needed,
            mlflow_model=model,
        )
    # Not through MLflow's `artifacts`: it refuses the links that the hub's cache is made of, and copies once more.
    model.flavors["python_function"] |= {
        "artifacts": {"weights": {"path": WEIGHTS, "uri": found.source}},
        "model_code_path": _CODE.name,
    }


def _copy(found: Weights, destination: Path, chat_template: str | None, *, links: bool) -> dict[str, str]:
    files = onnx_files(found.folder)
    if chat_template is not None:
        files = [file for file in files if file.name != "chat_template.jinja"]
    hashes = common.copy_weights(files, destination, link=links)
    if chat_template is not None:
        (destination / "chat_template.jinja").write_text(chat_template, "utf-8")
    return hashes
