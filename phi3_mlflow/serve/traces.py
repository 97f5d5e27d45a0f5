"""Which requests are traced, the queue in which their traces wait to be written, and feedback on them.

All that is said to a tracking server is said by one thread. Requests never wait for it. Knows no span.
"""

import asyncio
import logging
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import mlflow
from mlflow.entities import AssessmentSource, AssessmentSourceType
from mlflow.exceptions import MlflowException

from phi3_mlflow.runtime.answers import Answer
from phi3_mlflow.runtime.errors import without_passwords

from .background import Background, weigh
from .errors import HttpError
from .records import Record
from .spans import Spans, TracesError

_logger = logging.getLogger(__name__)

# What may wait for a slow tracking server, in traces and in bytes; and how much of it one request.
_TRACES, _ROOM, _REQUEST = 1000, 64 << 20, 1 << 20
# So many of the last traces take feedback.
_REMEMBERED = 10_000


class Traces:
    """Traces a part of the requests; see Spans for where they go.

    A trace's id is known when its request begins, so that the answer's header can name it. The trace is written after
    the request's end; where the tracking server is slow or gone, it is dropped and counted.

    Args:
        rate: the part of requests that are traced, from 0 to 1.

    Attributes:
        queue: what waits, is done and is lost; feedback counts too.

    Raises:
        TracesError: the rate is none, or MLflow cannot trace as it is set.
    """

    def __init__(self, rate: float):
        if not 0 <= rate <= 1:
            raise TracesError(f"the rate of traces is {rate:g}; it must be from 0 to 1")
        self._rate = rate
        self._spans = Spans()
        # Traces that were begun here, and whether they have ended; the oldest are forgotten.
        self._known: OrderedDict[str, bool] = OrderedDict()
        self._unwritten: set[str] = set()
        self.queue: Background[Callable[[], None]] = Background(
            "traces", lambda work: work(), items=_TRACES, room=_ROOM
        )

    def begun(self, record: Record) -> None:
        """Decides whether the request is traced, and gives it a trace id if it is."""
        if random.random() >= self._rate:
            return
        record.trace_id = f"tr-{os.urandom(16).hex()}"
        self._known[record.trace_id] = False
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def ended(self, record: Record) -> None:
        """Queues the trace of a request that has one."""
        trace_id = record.trace_id
        if trace_id is None:
            return
        weight = weigh(record.body, _REQUEST)
        body = record.body if weight <= _REQUEST else {"omitted": f"more than {_REQUEST >> 20} MiB"}
        answers = [_without_logprobs(run.answer) for run in record.runs]
        weight = min(weight, _REQUEST) + sum(len(choice.text) for answer in answers for choice in answer.choices)
        # What was started for the request is not kept: it is large.
        work = partial(self._write, replace(record, body=body, runs=[], service=None), answers)
        self._unwritten.add(trace_id)
        if self.queue.put(work, weight):
            self._known[trace_id] = True
        else:
            self._forget(trace_id)

    async def feedback(self, trace_id: str, value: bool, *, seconds: float = 10.0) -> None:
        """Writes what somebody thinks of an answer to its trace.

        Args:
            trace_id: of a request that this server has answered.
            value: whether it is good.
            seconds: how long it may take.

        Raises:
            HttpError: 404 for a trace that this server did not make or did not keep, 409 for one that has not ended,
                503 where the tracking server did not take it in time.
        """
        ended = self._known.get(trace_id)
        if ended is None:
            problem = f"this server has no trace {trace_id[:60]!r}; it may be too old, or was dropped"
            raise HttpError(404, problem, param="trace_id", code="trace_not_found")
        if not ended:
            raise HttpError(409, f"the answer of {trace_id} has not ended; try again then", param="trace_id")
        work = partial(self._judge, trace_id, value)
        future: Future[None] = Future()
        # Behind its trace where that waits, or else before all traces that do.
        if not self.queue.put(partial(_settle, future, work), first=trace_id not in self._unwritten):
            raise _not_taken("too much waits for it already")
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            raise _not_taken(f"it gave no answer for {seconds:g} seconds") from None
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                problem = f"the tracking server has no trace {trace_id}"
                raise HttpError(404, problem, param="trace_id", code="trace_not_found") from None
            _logger.warning("feedback was not taken: %s", without_passwords(str(error).partition("\n")[0])[:300])
            raise _not_taken("the server's log says why") from None

    def close(self, seconds: float = 5.0) -> None:
        """Writes what waits, for at most so long; the rest is dropped."""
        self.queue.close(seconds)
        self._spans.close()

    def _write(self, record: Record, answers: Sequence[Answer]) -> None:
        assert record.trace_id is not None
        try:
            self._spans.write(record, answers)
        except BaseException:
            self._forget(record.trace_id)
            raise
        self._unwritten.discard(record.trace_id)

    def _judge(self, trace_id: str, value: bool) -> None:
        self._spans.knock()
        source = AssessmentSource(AssessmentSourceType.HUMAN, "anonymous")
        mlflow.log_feedback(trace_id=trace_id, name="user_feedback", value=value, source=source)

    def _forget(self, trace_id: str) -> None:
        self._known.pop(trace_id, None)
        self._unwritten.discard(trace_id)


def _without_logprobs(answer: Answer) -> Answer:
    choices = [replace(choice, logprobs=None) for choice in answer.choices]
    return replace(answer, choices=choices, prompt_logprobs=None)


def _not_taken(why: str) -> HttpError:
    problem = f"the tracking server did not take the feedback: {why}"
    return HttpError(503, problem, kind="server_error", code="unavailable", retry_after=5)


def _settle(future: "Future[None]", work: Callable[[], object]) -> None:
    """Does the work, unless nobody waits for it any more, and tells how it went."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
