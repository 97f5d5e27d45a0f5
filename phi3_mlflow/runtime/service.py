"""The public seam: one loaded model that answers requests. A body in; pieces, an answer and statistics out.

Knows nothing of MLflow, tables of pandas, or HTTP. All methods may be called from any thread.
"""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import prompts
from .answers import StopReason
from .calls import Calling, CallReader
from .chat import Request, Task, parse
from .decoders.base import Decoder
from .errors import InvalidRequest, WeightsError, shorten
from .generation import Generation
from .grammar import Grammar, Grammars
from .options import Options
from .runs import Event, Run, Table
from .scheduler import Scheduler
from .statistics import Counts, Statistics
from .stops import Stops
from .tokens import Tokens
from .tools import Offer


@dataclass(frozen=True)
class Prepared:
    """A request of which everything was checked that can be before it is started.

    Attributes:
        request: what is asked for.
        ids: the prompt's.
        dropped: messages that did not fit.
        max_tokens: how many tokens may be sampled.
        limit: the stop reason when that many were.
        deadline: where the request's own `max_time` ends, on time.monotonic()'s clock.
        stops: where the answers' text has to end, to be copied for each.
        grammar: what the answers must conform to, or where they may call tools, to be copied for each.
    """

    request: Request
    ids: "array[int]"
    dropped: int
    max_tokens: int
    limit: StopReason
    deadline: float | None
    stops: Stops
    grammar: Grammar | Calling | None

    @property
    def most_tokens(self) -> int:
        """How many tokens the prompt and one answer may take."""
        return len(self.ids) + self.max_tokens


class Service:
    """A tokenizer and a decoder at work.

        service = loading.load(folder)
        for piece in service.start({"messages": [{"role": "user", "content": "Hello"}]}):
            print(piece.text, end="", flush=True)

    Args:
        tokens: the tokenizer that came with the weights.
        decoder: the backend; the service closes it, also where it cannot be made.
        task: what bodies are where a call does not say.
        name: what responses name as the model.
        template: for the tasks other than chat, whether a prompt is put into the chat template.
        defaults: the model's own options.
        scheduling: what Scheduler takes besides.

    Raises:
        InvalidRequest: a default means nothing to this model.
        WeightsError: the tokenizer and the decoder do not fit together.
    """

    def __init__(
        self,
        tokens: Tokens,
        decoder: Decoder,
        *,
        task: Task = "llm/v1/chat",
        name: str = "phi3",
        template: bool = True,
        defaults: Options | None = None,
        **scheduling: Any,
    ):
        self.tokens = tokens
        self.task = task
        self.name = name
        self.template = template
        self.context_length = decoder.context_length
        self.slots = decoder.slots
        self.engine = decoder.engine
        self.defaults = defaults or Options()
        self._eos = decoder.eos
        try:
            self._grammars = Grammars(tokens.tokenizer_json, tokens.vocab_size, decoder.eos)
            self._check(self.defaults, None)
            self._scheduler = Scheduler(decoder, **scheduling)
        except BaseException as error:
            decoder.close()
            if isinstance(error, ValueError):
                raise WeightsError(f"the tokenizer does not fit the weights: {error}") from error
            raise

    def start(
        self,
        body: Mapping[str, Any],
        *,
        task: Task | None = None,
        deliver: Callable[[Event], object] | None = None,
        deadline: float | None = None,
    ) -> Run:
        """Starts a request. All that can be told before its first token is raised here.

        Args:
            body: the request's fields, as the task has them; None means not given.
            task: what the body is; None for the model's own.
            deliver: called with each piece, see Run; None where the run is iterated.
            deadline: on time.monotonic()'s clock; the answer ends there at the latest.

        Raises:
            InvalidRequest: names the field, the value and what is allowed.
            Busy: too many requests are waiting already.
            Unavailable: the model takes no requests any more.
        """
        return self.run(self.prepare(self.parse(body, task=task)), deliver=deliver, deadline=deadline)

    def parse(self, body: Mapping[str, Any], *, task: Task | None = None, stream: bool = True) -> Request:
        """Checks a body as far as it can be without the model.

        Args:
            body: see `start`.
            task: see `start`.
            stream: whether `stream: true` can be honoured.

        Raises:
            InvalidRequest: names the field, the value and what is allowed.
        """
        task = task or self.task
        return parse(body, task, self.defaults, template=self.template, stream=stream, tools=self.calls_tools)

    def prepare(self, request: Request) -> Prepared:
        """Checks all that depends on the model, without starting anything.

        Raises:
            InvalidRequest: the prompt does not fit, or an option means nothing to this model.
        """
        ids, dropped = prompts.encode(self.tokens, request, self.context_length)
        room = self.context_length - len(ids)
        wanted = request.options.max_tokens or prompts.DEFAULT_MAX_TOKENS
        limit: StopReason = "max_tokens" if wanted <= room else "context"
        grammar = self._check(request.options, request.tools)
        max_time = request.options.max_time
        deadline = None if max_time is None else time.monotonic() + max_time
        stops = _stops(request, guarded=not isinstance(grammar, Grammar))
        return Prepared(request, array("i", ids), dropped, min(wanted, room), limit, deadline, stops, grammar)

    def run(
        self,
        prepared: Prepared,
        *,
        deliver: Callable[[Event], object] | None = None,
        deadline: float | None = None,
    ) -> Run:
        """Starts a prepared request; see `start`.

        Raises:
            Busy: too many requests are waiting already.
            Unavailable: the model takes no requests any more.
        """
        run = self._run(prepared, deadline, deliver, renew=True)
        self._scheduler.submit(run.jobs, run.fail)
        return run

    def run_table(
        self,
        rows: Sequence[Prepared],
        *,
        deadline: float | None = None,
        begun: Callable[[Run], object] = lambda run: None,
    ) -> Table:
        """Starts prepared requests that came together; others take turns with them.

        With several slots the longest are begun first, so that the last ones to end together are short; with one slot,
        those whose prompts begin alike follow each other, because the slot keeps what the last one began with.

        Args:
            rows: what to answer.
            deadline: on time.monotonic()'s clock; what is not begun by then gets no answer.
            begun: called with each run before it is begun, in any thread; what it raises ends all rows that are left.

        Raises:
            Busy: too many requests are waiting already.
            Unavailable: the model takes no requests any more.
        """
        came = time.monotonic()

        def make(row: int) -> Run:
            run = self._run(rows[row], deadline, lambda event: None, renew=len(rows) == 1)
            run.came = came
            begun(run)
            return run

        key = (lambda row: rows[row].ids) if self.slots == 1 else (lambda row: -rows[row].most_tokens)
        table = Table(sorted(range(len(rows)), key=key), make, deadline)
        if rows:
            self._scheduler.submit(table.jobs(), table.fail)
        return table

    @property
    def calls_tools(self) -> bool:
        """Whether chats may offer tools."""
        return self.tokens.calls is not None

    def statistics(self) -> Statistics:
        """What goes on, all of one moment."""
        return self._scheduler.statistics()

    @property
    def counts(self) -> Counts:
        """What has been done so far. It goes on counting, and may be kept when the service is gone."""
        return self._scheduler.counts

    def close(self, *, wait: bool = True) -> None:
        """Ends everything that is under way, with `Unavailable`, and frees the weights. Harmless the second time.

        Args:
            wait: whether to return when it is done; else it is within one step.
        """
        self._scheduler.close(wait=wait)

    def _run(
        self, prepared: Prepared, deadline: float | None, deliver: Callable[[Event], object] | None, *, renew: bool
    ) -> Run:
        request, options, ids = prepared.request, prepared.request.options, prepared.ids.tolist()
        grammar = prepared.grammar
        deadlines = [each for each in (deadline, prepared.deadline) if each is not None]
        generations = [
            Generation(
                ids,
                options,
                max_tokens=prepared.max_tokens,
                limit=prepared.limit,
                vocab_size=self.tokens.vocab_size,
                eos=self._eos,
                text=self.tokens.decoder(strip=isinstance(request.prompt, tuple)),
                stops=prepared.stops.copy(),
                grammar=grammar and grammar.copy(),
                calls=CallReader(self.tokens.calls) if request.tools and self.tokens.calls else None,
                choice=choice,
                echo=self.tokens.decoder() if request.echo and options.logprobs and choice == 0 else None,
                echoed=request.echo,
            )
            for choice in range(options.n)
        ]
        return Run(
            len(ids),
            prepared.dropped,
            generations,
            deadline=min(deadlines, default=None),
            deliver=deliver,
            renew=renew and request.field == "messages",  # nothing else has a next turn
            logprobs=options.logprobs,
            engine=self.engine if options.show_engine else None,
        )

    def _check(self, options: Options, offer: Offer | None) -> Grammar | Calling | None:
        """What answers must conform to; InvalidRequest where an option means nothing to this model."""
        for token in options.logit_bias:
            if token >= self.tokens.vocab_size:
                problem = f"is beyond this model's vocabulary; token ids are below {self.tokens.vocab_size}"
                raise InvalidRequest(f"logit_bias[{token}]", problem)
        grammar = self._grammars.compile(options.response_format)
        form = self.tokens.calls
        if offer is None or form is None:
            return grammar
        if grammar is not None:
            problem = f"is {shorten(options.response_format)}, and `tools` may be called; give one of them"
            raise InvalidRequest("response_format", problem)
        return Calling(
            self._grammars.calls(offer, listed=form.listed),
            form,
            required=offer.required,
            parallel=offer.parallel,
            newlines=self.tokens.encode_text("\n", bos=False),
            eos=self._grammars.eos,
        )


def _stops(request: Request, *, guarded: bool) -> Stops:
    """Where the answers' text has to end. A guard must not cut one that has to conform to a grammar."""
    options = request.options
    asked = request.prompt[-1]["content"] if isinstance(request.prompt, tuple) else request.prompt
    return Stops(
        options.stop,
        repetition=guarded and options.repetition_guard,
        self_talk=guarded and options.self_talk_guard,
        prompt=asked if isinstance(asked, str) else "",
    )
