"""The access log: a line for each request, for a person or as JSON. It has no prompts and answers unless asked for."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO
from urllib.parse import quote

from phi3_mlflow.runtime.answers import finish_reason

from .background import Background, weigh
from .records import Record

# What may wait for a slow disk, in lines and in bytes; and how much of it the text of one request.
_LINES, _ROOM, _TEXT = 10_000, 32 << 20, 4 << 20
_LOOPBACK = ("127.0.0.1", "::1")
# Messages quote what a client sent. An apostrophe within a word begins no quotation.
_QUOTED = re.compile(r"(?<!\w)['\"].*", re.DOTALL)


class AccessLog:
    """Writes a line when a request has ended. A full disk, a closed stream or a slow one hold up nobody.

    Args:
        stream: where the lines go; written to by one thread alone.
        prompts: whether lines carry what was asked and answered.
        plain: whether lines are for a person to read; else they are JSON.

    Attributes:
        lines: what is done and lost.
    """

    def __init__(self, stream: TextIO, *, prompts: bool = False, plain: bool = False):
        self.lines: Background[dict[str, Any]] = Background("access log", self._write, items=_LINES, room=_ROOM)
        self._stream = stream
        self._prompts = prompts
        self._plain = plain
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
            fields |= text if weight <= _TEXT else {"body": f"more than {_TEXT >> 20} MiB"}
        elif record.error:
            fields["error"] = _QUOTED.sub("[...]", record.error)
        self.lines.put(fields, weight)

    def close(self, seconds: float = 5.0) -> None:
        """Writes what waits, for at most so long. The stream stays open."""
        self.lines.close(seconds)

    def _write(self, fields: dict[str, Any]) -> None:
        text = (sentence(fields) if self._plain else _json(fields)) + "\n"
        torn, self._torn = self._torn, True
        self._stream.write("\n" + text if torn else text)
        self._stream.flush()
        self._torn = False


def line(record: Record) -> dict[str, Any]:
    """What a line says of a request, texts aside; nothing of what is not known."""
    runs = record.runs
    answers = [run.answer for run in runs]
    choices = [choice for run in runs if run.ended and not run.error for choice in run.answer.choices]
    come = datetime.fromtimestamp(record.began, UTC).isoformat(timespec="milliseconds")

    def seconds(first: Callable[[Any], float], last: Callable[[Any], float]) -> float | None:
        """The longest of the runs' times from one moment to another."""
        times = [last(run) - first(run) for run in runs if first(run) and last(run)]
        return round(max(times), 6) if times else None

    found = {
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
    return {name: value for name, value in found.items() if value not in (None, [])}


def sentence(fields: Mapping[str, Any]) -> str:
    """The line for a person: when, what, the status, how long it took, the model, tokens of prompt and answer, why it
    ended; then the client where that is another machine, the key's name, the trace, and what was wrong.
    """
    at = datetime.fromisoformat(fields["time"]).astimezone()
    words = [f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03}", fields["method"], quote(fields["route"])]
    words.append(str(fields["status"]))
    if "seconds" in fields:
        words.append(f"{fields['seconds'] * 1000:.0f} ms")
    if "model" in fields:
        words.append(fields["model"])
    if "prompt_tokens" in fields:
        words.append(f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens")
    words += dict.fromkeys(fields.get("finish_reasons", ()))
    if fields.get("client") not in (None, *_LOOPBACK):
        words.append(f"from {fields['client']}")
    words += [f"{name} {fields[name]}" for name in ("key", "trace") if name in fields]
    if "error" in fields:
        words.append(f"({fields['error']})")
    texts = {name: fields[name] for name in ("body", "answers") if name in fields}
    # What a client sends may not begin a line of its own.
    return " ".join(words).encode("unicode_escape").decode() + (f" {_json(texts)}" if texts else "")


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, default=str)
