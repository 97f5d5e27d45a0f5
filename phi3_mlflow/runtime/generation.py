"""One answer in the making: logits in, a token or the end out. Pure: no model, no thread, no clock."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from .answers import CallPiece, Piece, StopReason, TokenLogprob
from .calls import Calling, CallReader
from .drafts import Drafts, worth
from .grammar import Grammar
from .options import Options
from .sampling import Sampler, logprob
from .stops import Stops
from .tokens import TextDecoder


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
        grammar: what the answer must conform to, or where it may call tools.
        calls: reads the calls of tools, where there may be some.
        choice: which of the request's n choices this is.
        echo: the prompt's own incremental decoder, where the log probabilities of its tokens are wanted.
        echoed: whether the answer begins with the prompt. Who reads it counts the prompt's tokens from both ends, so
            that with log probabilities the end token has one too.

    Attributes:
        next: the token to be decoded next; None before the first one was sampled, and once the answer has ended.
        sampled: how many tokens were sampled, the end token and trimmed stop tokens included.
        most_tokens: how many tokens the model has to read at most: the last one is only sampled.
        prompt_logprobs: where they are wanted, of the prompt's tokens that were read.
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
        grammar: Grammar | Calling | None = None,
        calls: CallReader | None = None,
        choice: int = 0,
        echo: TextDecoder | None = None,
        echoed: bool = False,
    ):
        self.prompt = prompt
        self.choice = choice
        self.next: int | None = None
        self.sampled = 0
        self.most_tokens = len(prompt) + max_tokens - 1
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self._max_tokens = max_tokens
        self._limit = limit
        self._vocab_size = vocab_size
        self._eos = frozenset(eos)
        self._text = text
        self._stops = stops
        self._grammar = grammar
        self._calls = calls
        self._called: Sequence[CallPiece] = ()
        self._sampler = Sampler(options, prompt, choice)
        self._drafts = Drafts(prompt)
        self._top = options.top_logprobs if options.logprobs else None
        self._written = self._shown = 0  # characters
        self._likely: deque[TokenLogprob] = deque()  # of tokens whose text is not shown yet
        self._ends = echoed and self._top is not None
        self._echo = echo
        self._echoed = 0  # characters
        if echo is not None:
            self.prompt_logprobs = []
            self._read(None)

    @property
    def reads_prompt(self) -> bool:
        """Whether the logits of all the prompt's positions are wanted, and not of the last one alone."""
        return self._echo is not None

    def read(self, logits: np.ndarray) -> None:
        """Takes the logits of a part of the prompt, of which `reads_prompt` says that they are wanted.

        Args:
            logits: (positions, vocabulary) float32, from the position behind the last part on.
        """
        for row in logits:
            self._read(row[: self._vocab_size])

    def _read(self, logits: np.ndarray | None) -> None:
        """The logits for the place of the prompt's next token; None before the first."""
        assert self._echo is not None
        assert self.prompt_logprobs is not None
        place = len(self.prompt_logprobs)
        if place == len(self.prompt):
            return  # the place of the answer's first token
        token = self.prompt[place]
        start, written = self._echoed, self._echo.step(token)
        if logits is None:
            self.prompt_logprobs.append(TokenLogprob(start + self._echo.carried, self._echo.shown(token), None))
        else:
            self.prompt_logprobs.append(self._likelihood(start, logits, token, self._echo))
        self._echoed += len(written)

    def accept(self, logits: np.ndarray) -> Piece:
        """Samples the next token.

        Args:
            logits: (vocabulary,) float32, for the position after the last token.

        Raises:
            ArithmeticError: the model gave a logit that is not a number.
            InvalidRequest: the grammar cannot be followed any further.
        """
        raw = logits = logits[: self._vocab_size]
        if self._grammar is not None:
            logits = self._grammar.mask(logits)
        token = self._sampler(logits)
        self.sampled += 1
        if token in self._eos:
            ended = self.end("eos")
            if not self._ends:
                return ended
            last = replace(self._likelihood(0, raw, token, self._text), start=self._written)
            return replace(ended, logprobs=[*(ended.logprobs or ()), last])
        if self._grammar is not None:
            self._grammar.accept(token)
        self._drafts.append(token)
        written = self._text.step(token)
        spoken = True
        if self._calls is not None:
            written, self._called = self._calls.step(token, written)
            spoken = bool(written)
        if self._top is not None and spoken:
            self._likely.append(self._likelihood(self._written, raw, token, self._text))
            self._written += len(written)
        text, stopped = self._stops.step(written)
        if stopped is not None:
            return self._piece(None, text, stopped)
        if self._grammar is not None and self._grammar.finished:
            return self._after(text, "eos")
        if self.sampled >= self._max_tokens:
            return self._after(text, self._limit)
        return self._piece(token, text)

    def propose(self, most: int, cost: float) -> list[int]:
        """Tokens that are likely to follow `next`: those that the grammar forces, or those of a prompt lookup if more.

        They may be computed in one step with `next`. Nothing of the answer depends on them: it goes on with what
        `accept` samples, and what was computed behind a token that is another one counts for nothing.

        Args:
            most: how many at most.
            cost: what one token more takes in a step, as a share of a step of one token.
        """
        most = min(most, self._max_tokens - self.sampled - 1)
        proposed = self._drafts.propose(most, cost)
        if self._grammar is not None:
            # What the grammar allows begins with what it forces.
            del proposed[self._grammar.following(proposed) :]
            forced = self._grammar.forced()[: worth(1.0, cost, most)]
            proposed = max(forced, proposed, key=len)
        end = next((place for place, token in enumerate(proposed) if token in self._eos), len(proposed))
        return proposed[:end]

    def end(self, reason: StopReason) -> Piece:
        """Ends the answer here and releases what was held back."""
        return self._after("", reason)

    def _after(self, text: str, reason: StopReason) -> Piece:
        rest, stopped = self._stops.step(self._text.flush())
        text += rest
        if stopped is None:
            text += self._stops.flush()
            _, stopped = self._stops.step("")  # a guard may have found a stop in what was held back
        if reason == "eos" and self._calls is not None and self._calls.complete:
            reason = "tool_calls"
        return self._piece(None, text, stopped or reason)

    def _piece(self, token: int | None, text: str, reason: StopReason | None = None) -> Piece:
        self.next = token
        called, self._called = self._called, ()
        if self._top is None:
            return Piece(self.choice, text, reason, calls=called)
        self._shown += len(text)
        shown = []
        while self._likely and self._likely[0].start < self._shown:
            shown.append(self._likely.popleft())
        return Piece(self.choice, text, reason, shown, called)

    def _likelihood(self, start: int, logits: np.ndarray, token: int, text: TextDecoder) -> TokenLogprob:
        found = logprob(logits, token, self._top or 0)
        top = tuple((text.shown(each), value) for each, value in found.top)
        return TokenLogprob(start + text.carried, text.shown(token), found.logprob, top)
