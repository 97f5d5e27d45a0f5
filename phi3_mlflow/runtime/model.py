"""The MLflow side of a logged model, the same for both builders: loading, predict and predict_stream.

DataFrames and params in, what the task's output schema says out. Errors become clean answers of the scoring server.
"""

import json
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_EXHAUSTED,
    TEMPORARILY_UNAVAILABLE,
)
from tqdm.auto import tqdm

from . import manifest
from .chat import Request, Task, chunk, completion, last_chunk, parse_chat, parse_completion, parse_flat
from .decoders.base import Decoder
from .engine import Engine, Run
from .errors import Busy, InvalidRequest, Picklable
from .settings import check_batching, default_options, refuse_batching, settings_of
from .signatures import RESPONSE_FORMAT_OMITTED
from .tokens import Tokens

_logger = logging.getLogger(__name__)

# How many requests may wait where the model_config does not say.
DEFAULT_QUEUE_LIMIT = 64
# Seconds after which `predict` shows how many rows it has answered.
PROGRESS_AFTER = 2.0

# Set by mlflow.pyfunc.scoring_server when it serves a model.
_SERVING_FLAG = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"


class RequestRefused(Picklable, MlflowException):
    """A request that cannot be answered, as a 400 without the request's body and without a traceback in it."""

    def __init__(self, error: InvalidRequest, where: str = ""):
        self._text = f"{where}{error}"
        self._field = error.field
        super().__init__(self._text, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """What the scoring server sends; it puts the body before `message`, so that is not used here."""
        return json.dumps({"error_code": self.error_code, "message": self._text, "field": self._field})


class TryLater(Picklable, MlflowException):
    """A good request that came while too many others were waiting: a 429 that says how long to wait."""

    def __init__(self, error: Busy):
        self._text = str(error)
        self.retry_after = error.seconds
        super().__init__(self._text, error_code=RESOURCE_EXHAUSTED)

    def serialize_as_json(self) -> str:
        """What the scoring server sends."""
        return json.dumps(
            {"error_code": self.error_code, "message": self._text, "retry_after_seconds": self.retry_after}
        )


class OutOfTime(Picklable, MlflowException):
    """Time was over before an answer was begun: a 503, since an empty answer would pass for one."""

    def __init__(self, place: str):
        self._text = (
            f"{place}the time was over before the answer was begun; send fewer rows at once, or raise `max_time` or "
            f"the server's {MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name}"
        )
        super().__init__(self._text, error_code=TEMPORARILY_UNAVAILABLE)

    def serialize_as_json(self) -> str:
        """What the scoring server sends."""
        return json.dumps({"error_code": self.error_code, "message": self._text})


class AnswerFailed(Picklable, MlflowException):
    """The model failed on a good request: a 500 that says so; the cause is in the server's log alone."""

    def __init__(self) -> None:
        self._text = "the model failed while it answered; the server's log says why"
        super().__init__(self._text, error_code=INTERNAL_ERROR)

    def serialize_as_json(self) -> str:
        """What the scoring server sends."""
        return json.dumps({"error_code": self.error_code, "message": self._text})


class Predictor:
    """`predict` and `predict_stream` of a loaded model, safe to call from several threads.

    Args:
        engine: the loaded model; closed when the predictor is no longer used.
        config: the model_config: defaults of options, and what `settings` lists.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any]):
        self._engine = engine
        self._task: Task = config.get("task", "llm/v1/chat")
        self._name: str = config.get("name", "phi3")
        self._template: bool = config.get("template", True)
        self._defaults = default_options(config)
        weakref.finalize(self, engine.close)

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[Any]:
        """One answer for each row.

        Args:
            data: the rows, after MLflow's schema enforcement.
            params: options that hold for every row.

        Returns:
            A list of completion objects, or of strings for the flat task, in the order of the rows.

        Raises:
            RequestRefused: a row is not a good request; nothing was started then.
            TryLater: too many requests are waiting.
            OutOfTime: the server's time was over before every row was begun.
            AnswerFailed: the model failed.
        """
        deadline = _server_deadline()
        rows = data.to_dict(orient="records")
        places = [f"row {index}: " if len(rows) > 1 else "" for index in range(len(rows))]
        runs: list[Run] = []
        for row, place in zip(rows, places, strict=True):
            with _clean_errors(place):
                runs.append(self._engine.prepare(self._parse(_clean_row(row), params), deadline))
        try:
            answers: list[Any] = [None] * len(runs)
            with _clean_errors():
                ended = self._engine.start_all(runs)
            for index in _progress(ended, len(runs)):
                with _clean_errors(places[index]):
                    answers[index] = self._response(runs[index], deadline, places[index])
            return answers
        finally:
            for run in runs:
                run.cancel()

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
            AnswerFailed: the model failed.
        """
        with _clean_errors():
            run = self._engine.prepare(self._parse(_single_row(data), params, stream=True))
        return self._stream(run)

    def close(self) -> None:
        """Frees the weights. No call follows."""
        self._engine.close()

    def _parse(self, row: dict[str, Any], params: Mapping[str, Any] | None, *, stream: bool = False) -> Request:
        body = {**row, **{name: _plain(value) for name, value in (params or {}).items() if value is not None}}
        if body.get("response_format") == RESPONSE_FORMAT_OMITTED:
            del body["response_format"]
        if self._task == "llm/v1/chat":
            return parse_chat(body, self._defaults, stream=stream)
        if self._task == "llm/v1/completions":
            return parse_completion(body, self._defaults, template=self._template, stream=stream)
        return parse_flat(body, self._defaults, template=self._template)

    def _response(self, run: Run, deadline: float | None, place: str) -> Any:
        answer = run.wait()
        begun = any(choice.tokens or choice.reason != "max_time" for choice in answer.choices)
        if not begun and (self._task == "flat" or (deadline is not None and time.monotonic() >= deadline)):
            raise OutOfTime(place)
        return answer.choices[0].text if self._task == "flat" else completion(answer, self._task, self._name)

    def _stream(self, run: Run) -> Iterator[Any]:
        opened: set[int] = set()
        ended = 0
        try:
            with _clean_errors():
                for piece in self._engine.start(run):
                    if self._task == "flat":
                        if piece.text:
                            yield piece.text
                        continue
                    first = piece.choice not in opened
                    if piece.text or first:
                        yield chunk(run.answer, self._task, self._name, piece, first=first)
                        opened.add(piece.choice)
                    if piece.reason is not None:
                        ended += 1
                        whole = ended == len(run.answer.choices)
                        yield last_chunk(run.answer, self._task, self._name, piece, whole=whole)
        finally:
            run.cancel()


@contextmanager
def _clean_errors(place: str = "") -> Iterator[None]:
    """Turns what goes wrong inside into the errors of this module."""
    try:
        yield
    except InvalidRequest as error:
        raise RequestRefused(error, place) from None
    except RecursionError:
        raise RequestRefused(InvalidRequest("request", "is nested too deeply to be read"), place) from None
    except Busy as error:
        raise TryLater(error) from None
    except MlflowException:
        raise
    except Exception as error:
        _logger.exception("the model failed on a request")
        raise AnswerFailed from error


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """MLflow's hook for the transformers builder: the model's folder in, what answers `predict` out."""
    return load_pipeline(Path(path), model_config or {})


def load_onnx(folder: Path, config: Mapping[str, Any]) -> Predictor:
    """Checks and loads an onnxruntime-genai folder.

    Raises:
        FormatError, WeightsError: this runtime cannot read the model, or a file is missing or damaged.
        InvalidRequest: a setting is not allowed.
    """
    settings = settings_of(config)
    check_batching(config)
    manifest.verify(folder)
    return _predictor(Tokens.from_folder(folder), _onnx_decoder(folder, settings), settings, config)


def _predictor(tokens: Tokens, decoder: Decoder, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Predictor:
    engine = Engine(
        tokens,
        decoder,
        queue_limit=settings.get("queue_limit", DEFAULT_QUEUE_LIMIT),
        queue_timeout=settings.get("queue_timeout"),
        reuse=settings.get("prefix_reuse", "exact"),
    )
    try:
        engine.check(default_options(config))
    except InvalidRequest:
        engine.close()
        raise
    return Predictor(engine, config)


def _onnx_decoder(folder: Path, settings: Mapping[str, Any]) -> Decoder:
    shared = {"context_length": settings.get("context_length"), "threads": settings.get("threads")}
    if settings.get("parallel", 1) > 1:
        from .decoders.batched import BatchedDecoder, CannotBatch

        try:
            return BatchedDecoder(folder, slots=settings["parallel"], kv_budget=settings.get("kv_budget"), **shared)
        except CannotBatch as error:
            _logger.warning("`parallel` has no effect, requests are answered one by one: %s", error)
    from .decoders.genai import GenaiDecoder

    return GenaiDecoder(folder, **shared)


def load_pipeline(folder: Path, config: Mapping[str, Any]) -> Predictor:
    """Checks and loads a model folder of MLflow's transformers flavor.

    Raises:
        FormatError, WeightsError: this runtime cannot read the model, or a file is missing or damaged.
        InvalidRequest: a setting is not allowed.
    """
    settings = settings_of(config)
    refuse_batching(config)
    manifest.verify(folder)
    import mlflow.transformers
    import torch

    from .decoders.pipeline import PipelineDecoder

    if threads := settings.get("threads"):
        torch.set_num_threads(threads)
    pipeline = mlflow.transformers.load_model(str(folder))
    decoder = PipelineDecoder(pipeline, context_length=settings.get("context_length"))
    return _predictor(Tokens.from_folder(folder / "components" / "tokenizer"), decoder, settings, config)


def _progress(ended: Iterator[int], total: int) -> Iterable[int]:
    """Shows how many rows have been answered where that takes long, and not in a server's log."""
    quiet = total < 2 or os.environ.get(_SERVING_FLAG) == "true"
    return tqdm(ended, total=total, unit=" rows", delay=PROGRESS_AFTER, mininterval=1, leave=False, disable=quiet)


def _server_deadline() -> float | None:
    """When the scoring server would give up: a tenth of its timeout (at most 2 s) earlier the answer must end."""
    if os.environ.get(_SERVING_FLAG) != "true":
        return None
    timeout = float(MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get())
    return time.monotonic() + timeout - min(2.0, timeout / 10)


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


def _plain(value: Any) -> Any:
    """Numpy's containers and numbers as Python's own."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
