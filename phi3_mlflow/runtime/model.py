"""The MLflow side of a logged model, the same for both builders: loading, predict and predict_stream.

DataFrames and params in, what the task's output schema says out. Errors become clean answers of the scoring server.
"""

import json
import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_EXHAUSTED,
    TEMPORARILY_UNAVAILABLE,
)
from tqdm.auto import tqdm

from . import hosting, loading, manifest, mlmodel, pretrained, snapshots
from .answers import Answer
from .chat import chunks, completion
from .errors import Busy, FormatError, InvalidRequest, Picklable, Unavailable, shorten
from .runs import Run
from .service import Prepared, Service
from .settings import settings_of
from .signatures import RESPONSE_FORMAT_OMITTED
from .tracing import Span

_logger = logging.getLogger(__name__)

# Seconds after which `predict` shows how many rows it has answered.
PROGRESS_AFTER = 2.0


class CleanError(Picklable, MlflowException):
    """An error as the scoring server sends it: the server puts the request's body before `message`, but not here."""

    code: int
    text: str

    def __init__(self, text: str, **more: Any):
        self.text = text
        self._more = more
        super().__init__(text, error_code=self.code)

    def serialize_as_json(self) -> str:
        """What the scoring server sends."""
        return json.dumps({"error_code": self.error_code, "message": self.text, **self._more})


class RequestRefused(CleanError):
    """A request that cannot be answered, as a 400."""

    code = INVALID_PARAMETER_VALUE

    def __init__(self, error: InvalidRequest, place: str = ""):
        super().__init__(f"{place}{error}", field=error.field)


class TryLater(CleanError):
    """A good request that came while too many others were waiting: a 429 that says how long to wait."""

    code = RESOURCE_EXHAUSTED

    def __init__(self, error: Busy):
        self.retry_after = error.seconds
        super().__init__(str(error), retry_after_seconds=error.seconds)


class OutOfTime(CleanError):
    """Time was over before an answer was begun: a 503, since an empty answer would pass for one."""

    code = TEMPORARILY_UNAVAILABLE

    def __init__(self, place: str):
        super().__init__(
            f"{place}the time was over before the answer was begun; send fewer rows at once, or raise `max_time` or "
            f"the server's {MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name}"
        )


class ModelUnavailable(CleanError):
    """A model that takes no requests any more, as a 503."""

    code = TEMPORARILY_UNAVAILABLE

    def __init__(self, error: Unavailable):
        super().__init__(str(error))


class AnswerFailed(CleanError):
    """The model failed on a good request: a 500 that says so; the cause is in the server's log alone."""

    code = INTERNAL_ERROR

    def __init__(self, place: str = ""):
        super().__init__(f"{place}the model failed while it answered; the server's log says why")


# With its signature MLflow makes a table of every request.
_NO_SIGNATURE = "comes from a model without its signature; put the logged one back, or log the model again"


class Predictor:
    """`predict` and `predict_stream` of a loaded model, safe to call from several threads.

    Args:
        service: the loaded model; closed when the predictor is no longer used.
        on_error: what becomes of a table in which a row cannot be answered: `raise` refuses the whole table before
            anything is computed, `row` gives that row an error in its place.

    Attributes:
        service: the same, for those who want more of it than MLflow's two calls.
    """

    def __init__(self, service: Service, on_error: str = "raise", model_id: str | None = None):
        self.service = service
        self._on_error = on_error
        self._model_id = model_id
        weakref.finalize(self, service.close)

    def __reduce__(self) -> Any:
        """Refuses copies and pickles, in words."""
        raise TypeError("a loaded model holds memory and a thread, and cannot be copied or pickled: load it again")

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[Any]:
        """One answer for each row.

        Args:
            data: the rows, after MLflow's schema enforcement.
            params: options that hold for every row.

        Returns:
            A list of completion objects, or of strings for the flat task, in the order of the rows. With `on_error` at
            `row`, a row that has no answer gets `{"choices": [], "error": {"field", "message"}}`, or None in the flat
            task.

        Raises:
            RequestRefused: a row is not a good request; nothing was started then.
            TryLater: too many requests are waiting.
            OutOfTime: the server's time was over before every row was begun.
            ModelUnavailable: the model takes no requests any more.
            AnswerFailed: the model failed.
        """
        if not isinstance(data, pd.DataFrame):
            raise clean(InvalidRequest("data", f"is a {type(data).__name__}, which only {_NO_SIGNATURE}"))
        rows = data.to_dict(orient="records")
        with Span(self.service.name, self._model_id, {"rows": rows, "params": params}) as span:
            return self._answers(rows, params, span)

    def _answers(self, rows: list[dict[Any, Any]], params: Mapping[str, Any] | None, span: Span) -> list[Any]:
        deadline = hosting.deadline()
        places = [f"row {index}: " if len(rows) > 1 else "" for index in range(len(rows))]
        answers: list[Any] = [None] * len(rows)
        good: list[int] = []
        prepared: list[Prepared] = []
        for index, row in enumerate(rows):
            try:
                if deadline is not None and time.monotonic() >= deadline:
                    raise OutOfTime(places[index])
                prepared.append(self._prepare(row, params))
                good.append(index)
            except Exception as error:
                answers[index] = self._instead(error, places[index])
        try:
            table = self.service.run_table(prepared, deadline=deadline, begun=hosting.watch())
        except Exception as error:
            raise clean(error) from None
        hosting.call_when_left(table.cancel)
        try:
            for index, answer in _progress(table, len(prepared)):
                place = places[good[index]]
                try:
                    answers[good[index]] = self._response(answer, deadline, place)
                except Exception as error:
                    answers[good[index]] = self._instead(error, place)
                else:
                    span.answered(answer)
        finally:
            table.cancel()
        span.outputs = answers
        return answers

    def predict_stream(self, data: Any, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """One answer in pieces, as they come. Closing the iterator ends the work.

        Args:
            data: one request, as a dict or a DataFrame of one row.
            params: options.

        Yields:
            chat.completion.chunk dicts (text_completion for completions, strings for the flat task). The last one
            carries `usage` and `custom_outputs`.

        Raises:
            RequestRefused: the request is not a good one.
            TryLater: too many requests are waiting already.
            ModelUnavailable: the model takes no requests any more.
            AnswerFailed: the model failed; this one may come with any piece, the others come at the call.
        """
        try:
            row = _single_row(data)
            run = self.service.run(self._prepare(row, params, stream=True))
        except Exception as error:
            raise clean(error) from None
        pieces = self._stream(run, {"rows": [row], "params": params})
        run.cancel_with(pieces)
        return pieces

    def close(self) -> None:
        """Frees the weights. What is asked afterwards is refused."""
        self.service.close()

    def _prepare(self, row: Mapping[Any, Any], params: Mapping[str, Any] | None, *, stream: bool = False) -> Prepared:
        body = _clean_row(row) | {name: _plain(value) for name, value in (params or {}).items() if value is not None}
        if body.get("response_format") == RESPONSE_FORMAT_OMITTED:
            del body["response_format"]
        return self.service.prepare(self.service.parse(body, stream=stream))

    def _response(self, answer: Answer | Exception | None, deadline: float | None, place: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        flat = self.service.task == "flat"
        if answer is None or (
            not any(choice.tokens or choice.reason != "max_time" for choice in answer.choices)
            and (flat or (deadline is not None and time.monotonic() >= deadline))
        ):
            raise OutOfTime(place)
        return answer.choices[0].text if flat else completion(answer, self.service.task, self.service.name)

    def _instead(self, error: Exception, place: str) -> Any:
        """What stands for a row that has no answer; or raises the error, where that is the setting."""
        if self._on_error == "raise":
            raise clean(error, place) from None
        message = clean(error).text
        if self.service.task == "flat":
            return None
        # Spark's tables need every column that they declare, in each row.
        return {"choices": [], "error": {"field": getattr(error, "field", None), "message": message}}

    def _stream(self, run: Run, inputs: Any) -> Iterator[Any]:
        opened: set[int] = set()
        try:
            with Span(self.service.name, self._model_id, inputs) as span:
                span.answered(run.answer)  # counted at the end, however it comes
                for piece in run:
                    yield from chunks(run.answer, self.service.task, self.service.name, piece, opened)
                span.outputs = [choice.text for choice in run.answer.choices]
        except Exception as error:
            raise clean(error) from None
        finally:
            run.cancel()


def clean(error: Exception, place: str = "") -> CleanError:
    """What a client is told of an error: no traceback, no request's body; the cause of a failure is logged."""
    if isinstance(error, CleanError):
        return error
    if isinstance(error, RecursionError):
        error = InvalidRequest("request", "is nested too deeply to be read")
    if isinstance(error, InvalidRequest):
        return RequestRefused(error, place)
    if isinstance(error, Busy):
        return TryLater(error)
    if isinstance(error, Unavailable):
        return ModelUnavailable(error)
    _logger.error("the model failed on a request", exc_info=error)
    return AnswerFailed(place)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """MLflow's hook for the transformers builder: the model's folder in, what answers `predict` out."""
    return load(Path(path), model_config or {})


def load(folder: Path, config: Mapping[str, Any] | None = None) -> Predictor:
    """Checks and loads a logged model of either builder.

    Args:
        folder: the model's, with its MLmodel file.
        config: its model_config, changed as the caller likes; None for the one that was logged.

    Raises:
        FormatError, WeightsError: this runtime cannot read the model, or a file is missing or damaged.
        InvalidRequest: a setting is not allowed.
    """
    logged = mlmodel.load(folder)
    flavor = logged.flavors.get("python_function", {})
    metadata = logged.metadata or {}
    if "format" not in metadata:
        raise FormatError(f"{folder} was not logged by phi3_mlflow")
    if logged.signature is None:
        raise FormatError(f"{folder} {_NO_SIGNATURE.replace('comes from', 'is')}")
    config = flavor.get("config", {}) if config is None else config
    if config.get("task") != metadata.get("task"):
        problem = f"is {shorten(config.get('task'))}, and the model was logged for {metadata.get('task')}"
        raise InvalidRequest("task", f"{problem}; log it again for another")
    settings = settings_of(config)  # before gigabytes are downloaded or hashed
    place = snapshots.place(folder, logged.flavors, metadata)
    weights = place.find()
    if place.form == "onnx":
        service = loading.load_onnx(place.listed, config, weights if place.reference else None)
    else:
        files = weights if place.reference else None
        manifest.verify(place.listed, place.parts, full=settings.get("verify") == "full", files=files)
        place.check(weights)
        service = loading.load_pipeline(place.tokenizer(weights), _pipeline(folder, place, weights), config)
    hosting.attend(partial(service.close, wait=False))
    return Predictor(service, config.get("on_error") or "raise", logged.model_id)


def _pipeline(folder: Path, place: snapshots.Place, weights: Path) -> Any:
    """The checked weights as transformers' pipeline, on the device that MLflow would take."""
    if (configuration := place.configuration(weights)) != weights:
        pretrained.check(configuration)
        import mlflow.transformers

        try:
            return mlflow.transformers.load_model(str(folder))
        except Exception as error:  # of any kind, where somebody changed MLmodel by hand
            problem = " ".join(str(error).split())[:300] or type(error).__name__
            raise FormatError(
                f"MLflow cannot load {folder} ({problem}): copy the model again, or log it again"
            ) from error
    device = MLFLOW_DEFAULT_PREDICTION_DEVICE.get()
    return loading.pipeline_in(weights, int(device) if device else None)


def _progress(ended: Iterable[tuple[int, Any]], total: int) -> Iterable[tuple[int, Any]]:
    """Shows how many rows have been answered where that takes long, and not in a server's log."""
    quiet = total < 2 or hosting.serving()
    return tqdm(ended, total=total, unit=" rows", delay=PROGRESS_AFTER, mininterval=1, leave=False, disable=quiet)


def _single_row(data: Any) -> dict[str, Any]:
    if isinstance(data, pd.DataFrame):
        if len(data) != 1:
            raise InvalidRequest("data", f"has {len(data)} rows; predict_stream answers one request")
        data = data.to_dict(orient="records")[0]
    if not isinstance(data, Mapping):
        raise InvalidRequest("data", f"is a {type(data).__name__}; predict_stream takes one request")
    return _clean_row(data)


def _clean_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _plain(value) for name, value in row.items() if not _is_missing(value)}


def _is_missing(value: Any) -> bool:
    """Pandas fills the columns that a row lacks with NaN, NaT or NA."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _plain(value: Any, seen: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Numpy's containers and numbers as Python's own. What stands in several places is one object there too.

    Args:
        value: of a request.
        seen: the containers so far, and what became of them, by their ids.
    """
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, (np.ndarray, Mapping, list, tuple)):
        return value
    seen = {} if seen is None else seen
    if id(value) not in seen:
        found: Any = {} if isinstance(value, Mapping) else []
        seen[id(value)] = value, found
        if isinstance(value, Mapping):
            found.update((key, _plain(item, seen)) for key, item in value.items())
        else:
            found.extend(_plain(item, seen) for item in (value.tolist() if isinstance(value, np.ndarray) else value))
    return seen[id(value)][1]
