"""What comes of a request: its answer with one or several choices, and the pieces in which a choice arrives.

Knows no tokens' ids, no model and no wire format.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

StopReason = Literal[
    "eos", "tool_calls", "stop_sequence", "repetition", "self_talk", "max_tokens", "context", "max_time", "cancelled"
]
FinishReason = Literal["stop", "length", "tool_calls"]

_FINISH: dict[StopReason, FinishReason] = {
    "eos": "stop",
    "tool_calls": "tool_calls",
    "stop_sequence": "stop",
    "repetition": "stop",
    "self_talk": "stop",
    "max_tokens": "length",
    "context": "length",
    "max_time": "length",
    "cancelled": "length",
}


def finish_reason(reason: StopReason) -> FinishReason:
    """OpenAI's word for why an answer ended."""
    return _FINISH[reason]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, and the likeliest tokens for its place.

    Attributes:
        start: the character of the text at which the token's own begins.
        token: UTF-8 bytes, part of a character maybe.
        logprob: natural logarithm; None for the first token of a prompt, which nothing comes before.
        top: the likeliest tokens, the first of them first.
    """

    start: int
    token: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class CallPiece:
    """What one step brought to one call of a tool.

    Attributes:
        index: which of the choice's calls, from 0.
        name: the function's, with the call's first piece; None with the others.
        arguments: more of the JSON text.
    """

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Piece:
    """What one step brought to one choice.

    Attributes:
        choice: which of the request's choices, from 0.
        text: text that is final and may be shown.
        reason: why the choice ended; None while it goes on.
        logprobs: of each token whose text begins in `text`; None where they were not asked for.
        calls: of tools.
        last: whether it ends the whole answer.
    """

    choice: int
    text: str
    reason: StopReason | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    calls: Sequence[CallPiece] = ()
    last: bool = False


@dataclass
class Call:
    """A call of a tool, as far as it has come: the function's name, and JSON text of an object."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class Choice:
    """One answer to a prompt, as far as it has come."""

    text: str = ""
    reason: StopReason = "max_tokens"  # once it has ended
    tokens: int = 0  # sampled, the end token and trimmed stop tokens included
    logprobs: list[TokenLogprob] | None = None
    calls: list[Call] = field(default_factory=list)

    def take(self, piece: CallPiece) -> None:
        """Adds to the calls."""
        if piece.name is not None:
            self.calls.append(Call(piece.name))
        self.calls[piece.index].arguments += piece.arguments


@dataclass
class Answer:
    """All that one request got, as far as it has come."""

    prompt_tokens: int
    choices: list[Choice]
    dropped: int = 0  # messages that context_overflow "drop_oldest" left out
    cached_tokens: int = 0  # of the prompt, that were in the KV cache already
    engine: str | None = None  # what computed it, where that was asked for
    prompt_logprobs: list[TokenLogprob] | None = None  # where they were asked for
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time in seconds
