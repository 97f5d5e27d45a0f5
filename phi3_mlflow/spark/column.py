"""The driver's side: finds the model, checks what can be checked before a job starts, makes the Spark function."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

import phi3_mlflow
from phi3_mlflow import weights
from phi3_mlflow.runtime.chat import TASKS, Task, parse
from phi3_mlflow.runtime.errors import FormatError, InvalidRequest, shorten
from phi3_mlflow.runtime.grammar import Grammars
from phi3_mlflow.runtime.options import Range
from phi3_mlflow.runtime.settings import (
    check_batching,
    check_config,
    default_options,
    refuse_batching,
    settings_of,
)
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.runtime.tools import FIELDS
from phi3_mlflow.serve import folders

from .node import Spec
from .worker import Patience, column_of, evaluate

# Of one answer they make several, or something that the column has no place for.
_NO_PLACE = {"n": 1, "logprobs": False, "top_logprobs": 0, "show_engine": False, **dict.fromkeys(FIELDS)}


def udf(
    model_uri: str,
    *,
    task: Task | None = None,
    params: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    linger: float = 30.0,
    start_timeout: float = 600.0,
    stall_timeout: float = 120.0,
) -> Any:
    """A Spark function that lets a logged model answer each row of a column.

        df.withColumn("answer", udf("models:/phi3@champion", task="flat", params={"max_tokens": 64})("text"))

    An alias is looked up once, here, so that all rows have the same version's answers. `spark.udf.register` takes the
    function for Spark SQL.

    Args:
        model_uri: any that MLflow knows.
        task: `flat`: text in, text out. `llm/v1/completions`: text in. `llm/v1/chat`: an array of structs with `role`
            and `content` in. The last two give a struct of `content`, `finish_reason`, `prompt_tokens`,
            `completion_tokens` and `error`. Any model can do all three; None is what the model was logged for. Null
            stays null. A row that cannot be answered is null in the flat task; else its `error` says why.
        params: options for every row, such as `max_tokens`, `temperature` or `seed`.
        model_config: the model's settings and defaults, where they are to differ from those that were logged;
            `parallel` is how many rows are decoded together.
        linger: seconds for which a node's process outlives its last task.
        start_timeout: seconds in which that process must have loaded the model, and fetched it where it has to.
        stall_timeout: seconds without any progress after which it is ended and started again.

    Returns:
        A function of one column. It counts as nondeterministic, so that Spark asks the model once for each row.

    Raises:
        InvalidRequest: an option, a setting or an argument is not allowed.
        FormatError: this is no model of phi3_mlflow, or not one that this version can read.
        MlflowException: there is no such model.
    """
    for name, seconds in (("linger", linger), ("start_timeout", start_timeout), ("stall_timeout", stall_timeout)):
        Range("number", 0, above=True).check(name, seconds)
    spec, task, options = plan(model_uri, task, params or {}, model_config or {}, linger)
    return _function(spec, task, options, Patience(start_timeout, stall_timeout))


def plan(
    model_uri: str, task: Task | None, params: Mapping[str, Any], model_config: Mapping[str, Any], linger: float = 30.0
) -> tuple[Spec, Task, dict[str, Any]]:
    """What a node's process is to serve, and what each row is asked with; see `udf`."""
    source, _ = folders.locate(model_uri)
    logged, digest = _read(source)
    metadata, flavor = logged.metadata or {}, logged.flavors.get("python_function", {})
    if "format" not in metadata:
        raise FormatError(f"{model_uri} was not logged by phi3_mlflow")
    check_config(metadata["task"], model_config)
    config = {**flavor.get("config", {}), **model_config}
    settings_of(config)
    (check_batching if "artifacts" in flavor else refuse_batching)(config)
    task = metadata["task"] if task is None else task
    if task not in TASKS:
        raise InvalidRequest("task", f"is {shorten(task)}; it must be one of {', '.join(TASKS)}")
    options = {name: value for name, value in params.items() if value is not None}
    _check(options, task, config)
    spec = Spec(
        source=str(Path(local_file_uri_to_path(source)).absolute()) if is_local_uri(source) else source,
        digest=digest,
        config=config,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
        linger=linger,
        version=phi3_mlflow.__version__,
    )
    return spec, task, options


def _function(spec: Spec, task: Task, options: dict[str, Any], patience: Patience) -> Any:
    import pyarrow
    from pyspark.sql.functions import arrow_udf
    from pyspark.sql.pandas.types import from_arrow_type

    # What Spark sends to the executors by value is no more than this.
    def answer(batches: Iterator[pyarrow.Array]) -> Iterator[pyarrow.Array]:
        return evaluate(batches, spec, task, options, patience)

    function = arrow_udf(answer, from_arrow_type(column_of(task)))  # type: ignore[call-overload]
    return function.asNondeterministic()


def _read(source: str) -> tuple[Model, str]:
    """A model's MLmodel file, and its sha256: the other files stay where they are.

    Raises:
        MlflowException: there is no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        if is_local_uri(source):
            path = Path(local_file_uri_to_path(source)).absolute() / "MLmodel"
        else:
            address = source.rstrip("/") + "/MLmodel"
            path = Path(mlflow.artifacts.download_artifacts(address, dst_path=folder))
        if not path.is_file():
            raise MlflowException.invalid_parameter_value(f"there is no model at {source}: it has no MLmodel file")
        return Model.load(str(path)), hashlib.sha256(path.read_bytes()).hexdigest()


def _check(options: Mapping[str, Any], task: Task, config: Mapping[str, Any]) -> None:
    """Refuses options that no row could be answered with."""
    for name, allowed in _NO_PLACE.items():
        if options.get(name, allowed) != allowed:
            problem = f"is {shorten(options[name])}, and a row has one answer and no place for more; leave it out"
            raise InvalidRequest(name, problem)
    if options.get("max_time"):
        problem = f"is {shorten(options['max_time'])}, and rows wait for each other, so that the last ones would get no"
        raise InvalidRequest("max_time", f"{problem} answer; limit answers by `max_tokens`")
    prompt = {"messages": [{"role": "user", "content": "-"}]} if task == "llm/v1/chat" else {"prompt": "-"}
    defaults = default_options(config)
    for name in ("prompt", "messages", "stream", "custom_inputs"):
        if name in options:
            raise InvalidRequest(name, "is no option: the column holds the prompts")
    request = parse({**prompt, **options}, task, defaults, template=config.get("template", True), stream=False)
    # What can be enforced does not depend on the vocabulary; the model's own may be far away.
    embedded = Tokens.from_folder(weights.resolve(weights.EMBEDDED, "onnx").folder)
    end = embedded.vocab_size - 1
    Grammars(embedded.tokenizer_json, embedded.vocab_size, [end]).compile(request.options.response_format)
