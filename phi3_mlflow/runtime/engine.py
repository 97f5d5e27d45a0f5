"""One loaded model: checked requests in, answers out. Ties tokens, generations and the scheduler together.

Knows nothing of MLflow, HTTP or JSON.
"""

import queue
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from .chat import Answer, Choice, Message, Request
from .decoders.base import Decoder
from .errors import InvalidRequest
from .generation import Generation, Step, StopReason
from .grammar import Grammars
from .scheduler import Job, Scheduler
from .stops import Stops
from .tokens import Tokens

# What an answer may take where the request sets no max_tokens.
DEFAULT_MAX_TOKENS = 512


class Run:
    """A request under way. Iterating it gives (choice, text, reason) as they come; the reason ends a choice.

    Closing the iterator early, or `cancel`, frees what the request holds within one step.
    """

    def __init__(self, answer: Answer, generations: Sequence[Generation], deadline: float | None):
        self.answer = answer
        self._generations = generations
        self._events: queue.SimpleQueue[tuple[int, Step | Exception]] = queue.SimpleQueue()
        self.jobs = [Job(g, partial(self._deliver, g.choice), deadline) for g in generations]

    def _deliver(self, choice: int, event: Step | Exception) -> None:
        self._events.put((choice, event))

    def __iter__(self) -> Iterator[tuple[int, str, StopReason | None]]:
        running = len(self.jobs)
        try:
            while running:
                index, event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                self.answer.cached_tokens = self.jobs[0].reused
                choice = self.answer.choices[index]
                choice.text += event.text
                choice.tokens = self._generations[index].sampled
                if event.reason is not None:
                    choice.reason = event.reason
                    running -= 1
                if event.text or event.reason is not None:
                    yield index, event.text, event.reason
        finally:
            self.cancel()

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
        queue_limit: how many requests may wait; None for any number.
    """

    def __init__(self, tokens: Tokens, decoder: Decoder, queue_limit: int | None = None):
        self.tokens = tokens
        self.context_length = decoder.context_length
        self._eos = decoder.eos
        self._grammars = Grammars(tokens.tokenizer_json, tokens.vocab_size, decoder.eos)
        self._scheduler = Scheduler(decoder, queue_limit)

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
        grammar = self._grammars.compile(options.response_format)
        for token in options.logit_bias:
            if token >= self.tokens.vocab_size:
                problem = f"is beyond this model's vocabulary; token ids are below {self.tokens.vocab_size}"
                raise InvalidRequest(f"logit_bias[{token}]", problem)
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
        answer = Answer(len(ids), [Choice("", "max_tokens", 0) for _ in generations], dropped)
        return Run(answer, generations, deadline)

    def start(self, run: Run, *others: Run) -> Run:
        """Hands prepared runs to the scheduler, as one request in its queue.

        Returns:
            The first of them.

        Raises:
            Busy: too many requests are waiting already.
        """
        self._scheduler.submit(*(job for each in (run, *others) for job in each.jobs))
        return run

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
