"""One answer in the making: logits in, a token or the end out. Pure: no model, no thread, no clock."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .grammar import Grammar
from .options import Options
from .sampling import Logprob, Sampler, logprob
from .stops import Stops
from .tokens import TextDecoder

StopReason = Literal[
    "eos", "stop_sequence", "repetition", "self_talk", "max_tokens", "context", "max_time", "cancelled"
]
FinishReason = Literal["stop", "length"]

_FINISH: dict[StopReason, FinishReason] = {
    "eos": "stop",
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
class Step:
    """What one sampled token brought.

    Attributes:
        token: the id to be decoded next; None once the answer has ended.
        text: text that is final and may be shown.
        reason: why the answer ended; None while it goes on.
        logprobs: where they are asked for, of each token whose text begins in `text`, with the character of the
            whole answer at which it begins.
    """

    token: int | None
    text: str
    reason: StopReason | None = None
    logprobs: Sequence[tuple[int, Logprob]] = ()


class Generation:
    """The state of one answer.

    Args:
        prompt: the prompt's ids.
        options: the request's options.
        max_tokens: how many tokens may be sampled, at least 1.
        limit: the reason to give when that many were sampled: `max_tokens`, or `context` where its end came first.
        vocab_size: logits beyond it are padding.
        eos: ids that end the answer.
        text: the answer's incremental decoder.
        stops: the answer's stop sequences and guards.
        grammar: what the answer must conform to.
        choice: which of the request's n choices this is.
    """

    def __init__(
        self,
        prompt: list[int],
        options: Options,
        *,
        max_tokens: int,
        limit: StopReason,
        vocab_size: int,
        eos: Collection[int],
        text: TextDecoder,
        stops: Stops,
        grammar: Grammar | None = None,
        choice: int = 0,
    ):
        self.prompt = prompt
        self.choice = choice
        self.sampled = 0  # tokens, the end token and trimmed stop tokens included
        self.most_tokens = len(prompt) + max_tokens - 1  # that the model has to read: the last one is only sampled
        self._max_tokens = max_tokens
        self._limit = limit
        self._vocab_size = vocab_size
        self._eos = frozenset(eos)
        self._text = text
        self._stops = stops
        self._grammar = grammar
        self._sampler = Sampler(options, prompt, choice)
        self._top = options.top_logprobs if options.logprobs else None
        self._written = self._shown = 0  # characters
        self._told: deque[tuple[int, Logprob]] = deque()  # of tokens whose text is not shown yet

    def accept(self, logits: np.ndarray) -> Step:
        """Samples the next token.

        Args:
            logits: (vocabulary,) float32, for the position after the last token.
        """
        raw = logits = logits[: self._vocab_size]
        if self._grammar is not None:
            logits = self._grammar.mask(logits)
        token = self._sampler(logits)
        self.sampled += 1
        if token in self._eos:
            return self.end("eos")
        if self._grammar is not None:
            self._grammar.accept(token)
        written = self._text.step(token)
        if self._top is not None:
            self._told.append((self._written, logprob(raw, token, self._top)))
            self._written += len(written)
        text, stopped = self._stops.step(written)
        if stopped is not None:
            return self._step(None, text, stopped)
        if self._grammar is not None and self._grammar.finished:
            return self._after(text, "eos")
        if self.sampled >= self._max_tokens:
            return self._after(text, self._limit)
        return self._step(token, text)

    def end(self, reason: StopReason) -> Step:
        """Ends the answer here and releases what was held back."""
        return self._after("", reason)

    def _after(self, text: str, reason: StopReason) -> Step:
        rest, stopped = self._stops.step(self._text.flush())
        text += rest
        if stopped is None:
            text += self._stops.flush()
            _, stopped = self._stops.step("")  # a guard may have found a stop in what was held back
        return self._step(None, text, stopped or reason)

    def _step(self, token: int | None, text: str, reason: StopReason | None = None) -> Step:
        self._shown += len(text)
        told = []
        while self._told and self._told[0][0] < self._shown:
            told.append(self._told.popleft())
        return Step(token, text, reason, told)
