"""The access log: one line of JSON for each request, without the text of prompts and answers unless asked for."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from phi3_mlflow.runtime.answers import finish_reason

from .background import Background, weigh
from .records import Record

# What may wait for a slow disk, in lines and in bytes; and how much of it the text of one request.
_LINES, _ROOM, _TEXT = 10_000, 32 << 20, 4 << 20
# Messages quote what a client sent. An apostrophe within a word begins no quotation.
_QUOTED = re.compile(r"(?<!\w)['\"].*", re.DOTALL)


class AccessLog:
    """Writes a line when a request has ended. A full disk, a closed stream or a slow one hold up nobody.

    Args:
        stream: where the lines go; written to by one thread alone.
        prompts: whether lines carry what was asked and answered.

    Attributes:
        lines: what is done and lost.
    """

    def __init__(self, stream: TextIO, *, prompts: bool = False):
        self.lines: Background[dict[str, Any]] = Background("access log", self._write, items=_LINES, room=_ROOM)
        self._stream = stream
        self._prompts = prompts
        self._torn = False  # whether the last line may not have got out whole

    def begun(self, record: Record) -> None:
        """Nothing is to be said yet."""

    def ended(self, record: Record) -> None:
        """Queues the request's line."""
        fields = line(record)
        weight = 1000
        if self._prompts:
            text = {"body": record.body, "answers": [[c.text for c in run.answer.choices] for run in record.runs]}
            weight += weigh(text, _TEXT)
            fields |= text if weight <= _TEXT else {"body": f"more than {_TEXT >> 20} MiB", "answers": None}
        elif record.error:
            fields["error"] = _QUOTED.sub("[...]", record.error)
        self.lines.put(fields, weight)

    def close(self, seconds: float = 5.0) -> None:
        """Writes what waits, for at most so long. The stream stays open."""
        self.lines.close(seconds)

    def _write(self, fields: dict[str, Any]) -> None:
        text = json.dumps(fields, default=str) + "\n"
        torn, self._torn = self._torn, True
        self._stream.write("\n" + text if torn else text)
        self._stream.flush()
        self._torn = False


def line(record: Record) -> dict[str, Any]:
    """What a line says of a request, texts aside. Numbers are None where there is nothing to count."""
    runs = record.runs
    answers = [run.answer for run in runs]
    choices = [choice for run in runs if run.ended and not run.error for choice in run.answer.choices]
    come = datetime.fromtimestamp(record.began, UTC).isoformat(timespec="milliseconds")

    def seconds(first: Callable[[Any], float], last: Callable[[Any], float]) -> float | None:
        """The longest of the runs' times from one moment to another."""
        times = [last(run) - first(run) for run in runs if first(run) and last(run)]
        return round(max(times), 6) if times else None

    return {
        "time": come.replace("+00:00", "Z"),
        "id": record.id,
        "client": record.client,
        "key": record.key,
        "method": record.method,
        "route": record.route,
        "model": record.model,
        "stream": record.stream,
        "status": record.status,
        "error": record.error,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers) if runs else None,
        "completion_tokens": sum(c.tokens for answer in answers for c in answer.choices) if runs else None,
        "cached_tokens": sum(answer.cached_tokens for answer in answers) if runs else None,
        "finish_reasons": ["abort" if c.reason == "cancelled" else finish_reason(c.reason) for c in choices],
        "queue_seconds": seconds(lambda run: run.came, lambda run: run.begun),
        "first_token_seconds": seconds(lambda run: record.came, lambda run: run.first_token),
        "seconds": round(record.ended - record.came, 6) if record.ended else None,
        "trace": record.trace_id,
    }
