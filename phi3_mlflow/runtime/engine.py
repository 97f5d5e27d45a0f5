"""One loaded model: checked requests in, answers out. Ties tokens, generations and the scheduler together.

Knows nothing of MLflow, HTTP or JSON.
"""

import queue
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .chat import Answer, Choice, Message, Piece, Request, TokenLogprob
from .decoders.base import Decoder
from .errors import InvalidRequest
from .generation import Generation, Step
from .grammar import Grammar, Grammars
from .jobs import Job
from .options import Options
from .sampling import Logprob
from .scheduler import Scheduler
from .stops import Stops
from .tokens import Tokens

# What an answer may take where the request sets no max_tokens.
DEFAULT_MAX_TOKENS = 512


class Run:
    """A request under way. Iterating it gives its pieces as they come.

    Closing the iterator early, or `cancel`, frees what the request holds within one step.

    Attributes:
        answer: what has come so far, of the pieces that were taken.
        jobs: one for each choice.
        on_end: called in the scheduler's thread when all jobs have ended, or the first one failed.
    """

    def __init__(self, answer: Answer, generations: Sequence[Generation], tokens: Tokens, deadline: float | None):
        self.answer = answer
        self._generations = generations
        self._tokens = tokens
        self._events: queue.SimpleQueue[tuple[int, Step | Exception]] = queue.SimpleQueue()
        self._running = len(generations)
        self.on_end: Callable[[], object] = lambda: None
        self.jobs = [Job(g, partial(self._deliver, g.choice), deadline) for g in generations]

    def _deliver(self, choice: int, event: Step | Exception) -> None:
        self._events.put((choice, event))
        failed = isinstance(event, Exception)
        if failed or event.reason is not None:  # type: ignore[union-attr]
            self._running = 0 if failed and self._running > 0 else self._running - 1
            if self._running == 0:
                self.on_end()

    def __iter__(self) -> Iterator[Piece]:
        running = len(self.jobs)
        try:
            while running:
                index, event = self._events.get()
                if isinstance(event, Exception):
                    raise event.with_traceback(None)  # other requests may have been given the same one
                self.answer.cached_tokens = self.jobs[0].reused
                choice = self.answer.choices[index]
                piece = Piece(index, event.text, event.reason, None)
                if choice.logprobs is not None:
                    told = [self._told(start, logprob) for start, logprob in event.logprobs]
                    choice.logprobs += told
                    piece = replace(piece, logprobs=told)
                choice.text += event.text
                choice.tokens = self._generations[index].sampled
                if event.reason is not None:
                    choice.reason = event.reason
                    running -= 1
                if event.text or event.reason is not None:
                    yield piece
        finally:
            self.cancel()

    def _told(self, start: int, told: Logprob) -> TokenLogprob:
        piece = self._tokens.piece
        return TokenLogprob(start, piece(told.token), told.logprob, tuple((piece(i), each) for i, each in told.top))

    def cancel(self) -> None:
        """Ends what is still going on. Harmless where nothing is."""
        for job in self.jobs:
            job.cancel()

    def wait(self) -> Answer:
        """The whole answer.

        Raises:
            Exception: what the decoder raised, where it failed.
        """
        for _ in self:
            pass
        return self.answer


class Engine:
    """A tokenizer and a decoder at work.

    Args:
        tokens: the tokenizer that came with the weights.
        decoder: the backend; the engine closes it.
        scheduling: what Scheduler takes besides.
    """

    def __init__(self, tokens: Tokens, decoder: Decoder, **scheduling: Any):
        self.tokens = tokens
        self.context_length = decoder.context_length
        self._eos = decoder.eos
        self._grammars = Grammars(tokens.tokenizer_json, tokens.vocab_size, decoder.eos)
        self._scheduler = Scheduler(decoder, **scheduling)

    def prepare(self, request: Request, deadline: float | None = None) -> Run:
        """Checks all that depends on the model, without starting anything.

        Args:
            request: what is asked for.
            deadline: on time.monotonic()'s clock; the answer ends there at the latest.

        Raises:
            InvalidRequest: the prompt does not fit, or an option means nothing to this model.
        """
        options = request.options
        ids, dropped = self._encode(request)
        room = self.context_length - len(ids)
        wanted = options.max_tokens or DEFAULT_MAX_TOKENS
        grammar = self.check(options)
        if options.max_time is not None:
            own = time.monotonic() + options.max_time
            deadline = own if deadline is None else min(own, deadline)
        chat = not isinstance(request.prompt, str)
        generations = [
            Generation(
                ids,
                options,
                max_tokens=min(wanted, room),
                limit="max_tokens" if wanted <= room else "context",
                vocab_size=self.tokens.vocab_size,
                eos=self._eos,
                text=self.tokens.decoder(strip=chat),
                stops=self._stops(request, guarded=grammar is None),
                grammar=grammar and grammar.copy(),
                choice=choice,
            )
            for choice in range(options.n)
        ]
        choices = [Choice(logprobs=[] if options.logprobs else None) for _ in generations]
        return Run(Answer(len(ids), choices, dropped), generations, self.tokens, deadline)

    def check(self, options: Options) -> Grammar | None:
        """Checks what of the options depends on the model.

        Returns:
            What answers must conform to, to be copied for each.

        Raises:
            InvalidRequest: an option means nothing to this model.
        """
        for token in options.logit_bias:
            if token >= self.tokens.vocab_size:
                problem = f"is beyond this model's vocabulary; token ids are below {self.tokens.vocab_size}"
                raise InvalidRequest(f"logit_bias[{token}]", problem)
        return self._grammars.compile(options.response_format)

    def start(self, run: Run) -> Run:
        """Hands a prepared run to the scheduler.

        Raises:
            Busy: too many requests are waiting already.
        """
        self.start_all([run])
        return run

    def start_all(self, runs: Sequence[Run]) -> Iterator[int]:
        """Hands prepared runs to the scheduler, as one request in its queue.

        Returns:
            An iterator that gives the index of each run when it has ended, in that order.

        Raises:
            Busy: too many requests are waiting already.
        """
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, run in enumerate(runs):
            run.on_end = partial(ended.put, index)
        self._scheduler.submit(*(job for run in runs for job in run.jobs))
        return (ended.get() for _ in runs)

    def close(self) -> None:
        """Ends everything that is under way, with an error, and frees the weights."""
        self._scheduler.close()

    def _stops(self, request: Request, *, guarded: bool) -> Stops:
        # A guard must not cut an answer that has to conform to a grammar.
        options = request.options
        asked = request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]
        return Stops(
            options.stop,
            repetition=guarded and options.repetition_guard,
            self_talk=guarded and options.self_talk_guard,
            prompt=asked,
        )

    def _encode(self, request: Request) -> tuple[list[int], int]:
        """The prompt's ids, and how many messages had to be dropped to make it fit."""
        prompt, options = request.prompt, request.options
        if isinstance(prompt, str) or len(prompt) == 1:
            ids = self._encode_if_possible(prompt)
            if not isinstance(ids, list):
                raise self._too_long(request.field, ids, "shorten it")
            return ids, 0
        reserve = min(options.max_tokens or DEFAULT_MAX_TOKENS, self.context_length // 2)
        drop = options.context_overflow == "drop_oldest"
        starts = _turn_starts(prompt) if drop else [0]

        def fits(start: int) -> bool:
            ids = self._encode_if_possible(_kept(prompt, start))
            return isinstance(ids, list) and len(ids) + reserve <= self.context_length

        # The later the start, the fewer the tokens; the last start is taken in any case.
        kept = _kept(prompt, starts[bisect_left(starts, True, hi=len(starts) - 1, key=fits)])
        ids = self._encode_if_possible(kept)
        if not isinstance(ids, list):
            asked = 'shorten them, or set `context_overflow` to "drop_oldest"'
            raise self._too_long(request.field, ids, "shorten them: no older turn is left to drop" if drop else asked)
        return ids, len(prompt) - len(kept)

    def _encode_if_possible(self, prompt: Sequence[Message] | str) -> "list[int] | str":
        """The ids, or in words how many they are where they do not fit."""
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        least = -(-len(text.encode("utf-8")) // self.tokens.longest_piece)
        least += 0 if isinstance(prompt, str) else len(prompt)  # each message has its role's token
        if least >= self.context_length:
            return f"at least {least}"  # not worth encoding: this may be megabytes
        ids = self.tokens.encode_text(prompt) if isinstance(prompt, str) else self.tokens.encode_chat(prompt)
        return ids if len(ids) < self.context_length else str(len(ids))

    def _too_long(self, name: str, count: Any, remedy: str) -> InvalidRequest:
        verb = "is" if name == "prompt" else "are"
        return InvalidRequest(
            name,
            f"{verb} {count} tokens long as the model reads it, and the context holds {self.context_length} "
            f"with at least one token of the answer; {remedy}",
        )


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where the kept part of a conversation may begin: with any turn, at the latest with the last message."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages) - 1)
    last = len(messages) - 1
    turns = [i for i in range(first + 1, last) if messages[i]["role"] == "user"]
    return sorted({0, *turns, last})


def _kept(messages: Sequence[Message], start: int) -> list[Message]:
    """The messages from a start on, and the system messages before it."""
    return [message for message in messages[:start] if message["role"] == "system"] + list(messages[start:])
