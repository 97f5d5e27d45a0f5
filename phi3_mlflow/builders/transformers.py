"""The transformers builder: a text-generation pipeline in MLflow's transformers flavor.

The native flavor stays as MLflow writes it; its python_function side is pointed at the runtime floor.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from mlflow.entities.model_registry import PromptVersion
from mlflow.models import Model
from mlflow.models.model import ModelInfo

from phi3_mlflow.bars import no_bars
from phi3_mlflow.runtime import manifest, pretrained, trust
from phi3_mlflow.runtime.chat import Task
from phi3_mlflow.runtime.loading import pipeline_in
from phi3_mlflow.runtime.settings import refuse_batching
from phi3_mlflow.runtime.signatures import input_example, signature
from phi3_mlflow.runtime.snapshots import WEIGHTS
from phi3_mlflow.weights import Source, Weights, find

from . import common
from .plan import Entry, Plan, Write, log, refuse, save

if TYPE_CHECKING:
    import transformers


def save_model(
    path: str | Path,
    weights: "str | Path | transformers.Pipeline" = "embedded",
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
    """Saves an MLflow model of the transformers kind.

    Args:
        path: the folder to write; it must not exist, or be empty. It is removed again when that fails.
        weights: `embedded`, a folder of transformers, a Hugging Face id, or a text-generation pipeline.
        revision: of the Hugging Face repository; None for the pinned one.
        task: `llm/v1/chat`, `llm/v1/completions`, or `flat` (text columns in, text out); None for the target's own.
        template: for the other tasks, whether a prompt is put into the chat template as a user's message.
        chat_template: the text of a Jinja template that takes the place of the weights' own, or that they lack.
        model_config: defaults of the options, `context_length`, `threads` and `queue_limit`.
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
    weights: "str | Path | transformers.Pipeline" = "embedded",
    *,
    name: str = "phi3-transformers",
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
    """Logs, and on request registers, an MLflow model of the transformers kind.

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
    weights: "str | Path | transformers.Pipeline" = "embedded",
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
    task, needed = common.for_target(target, task, common.requirements("torch", "transformers"), extra_pip_requirements)
    own = common.own_metadata(metadata)
    common.check_config(task, template, chat_template, model_config)
    refuse_batching(model_config or {})
    if isinstance(weights, (str, Path)):
        source = find(weights, "transformers", revision=revision)
    else:
        source = _in_memory(weights, revision)
    common.check_reference(reference, source, chat_template)
    if reference and source.name.count("/") > 1:
        raise common.BuildError(
            f"MLflow's flavor takes no folder of a repository, so that no model can refer to {source.name}: leave the "
            "reference out"
        )
    config = common.full_config(task, source.name, model_config, template)

    def prepare_reference(found: Weights) -> Write:
        pretrained.check(found.folder)
        common.check_tokenizer(found.folder, template, None)
        native = _native(found, task)

        def write(room: common.Room, model: Model) -> Path:
            path = room.folder
            _refer(path, model, found, config, needed)
            model.add_flavor("transformers", code=model.flavors["python_function"]["code"], **native)
            model.metadata = common.metadata(task, found, manifest.digest(path / WEIGHTS), own, reference=True)
            common.finish(model, room)
            return path

        return write

    def prepare(found: Weights) -> Write:
        with no_bars():
            pipeline = pipeline_in(found.folder) if isinstance(weights, (str, Path)) else weights
            pretrained.check_numbers(pipeline.model, found.source)
            if chat_template is not None:
                pipeline = _with_template(pipeline, chat_template)
            with tempfile.TemporaryDirectory() as temporary:
                pipeline.tokenizer.save_pretrained(temporary)  # type: ignore[union-attr]
                common.check_tokenizer(Path(temporary), template, chat_template)

        def write(room: common.Room, model: Model) -> Path:
            _write(room.folder, model, pipeline, found, config, needed)
            model.metadata = common.metadata(task, found, manifest.digest(room.folder), own)
            common.finish(model, room)
            return room.folder

        return write

    prepare = prepare_reference if reference else prepare
    return Plan(source, prepare, links=False, reference=reference, model_config=model_config)


def _in_memory(pipeline: "transformers.Pipeline", revision: str | None) -> Source:
    import transformers

    if not isinstance(pipeline, transformers.TextGenerationPipeline):
        raise common.BuildError(
            f"weights is a {type(pipeline).__name__}; it must be `embedded`, a folder, a Hugging Face id or a "
            "text-generation pipeline"
        )
    if revision is not None:
        raise common.BuildError(f"a revision ({revision!r}) goes with a Hugging Face id, not with a pipeline")
    name = pipeline.model.name_or_path or "a pipeline in memory"
    if Path(name).exists():
        name = Path(name).name
    size = sum(parameter.nbytes for parameter in pipeline.model.parameters())
    return Source(name, Path(), size, 0, lambda: Weights(Path(), name, None, "unknown"))


def _with_template(pipeline: "transformers.Pipeline", chat_template: str) -> "transformers.Pipeline":
    """The same model with a tokenizer of its own, which has the template."""
    import transformers

    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.chat_template = chat_template  # type: ignore[union-attr]
    return transformers.pipeline("text-generation", model=pipeline.model, tokenizer=tokenizer)


def _write(
    path: Path,
    model: Model,
    pipeline: "transformers.Pipeline",
    found: Weights,
    config: Mapping[str, Any],
    needed: list[str],
) -> None:
    import mlflow.transformers

    task = config["task"]
    with common.staged_code() as code, common.quiet_mlflow(), no_bars(), _no_network(), warnings.catch_warnings():
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
    manifest.write(path, trust.TRANSFORMERS_PARTS)
    model.signature = signature(task)
    model.flavors["python_function"] |= {
        "loader_module": "phi3_mlflow.runtime.model",
        "config": dict(config),
        "streamable": True,
    }
    native = model.flavors["transformers"]
    native |= {key: found.source for key in ("source_model_name", "tokenizer_name") if key in native}


def _refer(path: Path, model: Model, found: Weights, config: Mapping[str, Any], needed: list[str]) -> None:
    """Writes all of a model but its weights, and their manifest."""
    import mlflow.pyfunc

    task = config["task"]
    with common.staged_code() as code, common.quiet_mlflow():
        mlflow.pyfunc.save_model(
            path=str(path),
            loader_module="phi3_mlflow.runtime.model",
            code_paths=[code],
            model_config=dict(config),
            signature=signature(task),
            input_example=input_example(task),
            pip_requirements=needed,
            mlflow_model=model,
            streamable=True,
        )
    _write_licence(path, found)
    (path / WEIGHTS).mkdir(parents=True)
    manifest.write(path / WEIGHTS, elsewhere=trust.read_transformers(found.folder))


def _native(found: Weights, task: Task) -> dict[str, Any]:
    """MLflow's transformers flavor as with `save_pretrained=False`, for which it loads the model and asks the hub.

    `mlflow.transformers.load_model` gives the pipeline back by the hub's client, from its cache or else the network.
    """
    import transformers

    config = json.loads((found.folder / "config.json").read_text("utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(found.folder), local_files_only=True, trust_remote_code=False
    )
    kind = config.get("dtype") or config.get("torch_dtype")
    return {
        "transformers_version": transformers.__version__,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": trust.MODELS[config["model_type"]],
        "source_model_name": found.source,
        "source_model_revision": found.revision,
        "components": ["tokenizer"],
        "tokenizer_type": type(tokenizer).__name__,
        "tokenizer_name": found.source,
        "tokenizer_revision": found.revision,
        **({"torch_dtype": f"torch.{kind}"} if kind else {}),
        **({} if task == "flat" else {"inference_task": task}),
    }


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
    files = [file for file in weights.folder.glob("LICENSE*") if weights.folder != Path() and file.is_file()]
    note = path / "LICENSE.txt"
    if files:
        note.write_text(files[0].read_text("utf-8", errors="replace"), "utf-8")
    else:
        note.write_text(f"Licence of the weights ({weights.source}): {weights.license}\n", "utf-8")
