"""What /metrics shows: vLLM's names where they exist, `phi3_mlflow_*` for the rest. Knows no HTTP framework.

Requests are counted when they end; what engines do is read from their statistics when somebody asks.
"""

import threading
import weakref
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from phi3_mlflow.runtime.answers import finish_reason
from phi3_mlflow.runtime.runs import Run
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.statistics import Counts, Statistics

from .background import Background
from .records import Record
from .served import Loaded

# vllm/v1/metrics/buckets.py, so that dashboards made for vLLM fit.
_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# vLLM goes on to the model's context length; there are several models here, and 128k is the longest.
_TOKENS = tuple(float(digit * 10**zeros) for zeros in range(6) for digit in (1, 2, 5) if digit * 10**zeros <= 131072)

_HISTOGRAMS: dict[str, tuple[Sequence[float], str]] = {
    "vllm:time_to_first_token_seconds": (_TO_FIRST_TOKEN, "Seconds from a request's arrival to its first token."),
    "vllm:inter_token_latency_seconds": (_BETWEEN_TOKENS, "Seconds between an answer's tokens."),
    "vllm:e2e_request_latency_seconds": (_LATENCY, "Seconds from a request's arrival to its last token."),
    "vllm:request_queue_time_seconds": (_LATENCY, "Seconds that a request waited for a slot."),
    "vllm:request_prefill_time_seconds": (_LATENCY, "Seconds from a request's slot to its first token."),
    "vllm:request_decode_time_seconds": (_LATENCY, "Seconds from a request's first token to its last."),
    "vllm:request_prompt_tokens": (_TOKENS, "Tokens of a request's prompt."),
    "vllm:request_generation_tokens": (_TOKENS, "Tokens that were sampled for a request, over all its choices."),
}

# Paths that are a label's value as they are; what else clients may think of is not.
_ROUTES = frozenset(
    (
        *("/", "/invocations", "/ping", "/health", "/ready", "/version", "/metrics", "/feedback"),
        *(
            "/tokenize",
            "/detokenize",
            "/tokenizer_info",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/models",
        ),
    )
)
_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS"))

# Counters and gauges that the statistics of a model's services add up to.
_ENGINE_COUNTERS = {
    "vllm:prompt_tokens": "Tokens of prompts, computed or cached, for each choice of an answer.",
    "vllm:prompt_tokens_cached": "Tokens of prompts that were in the KV cache already.",
    "vllm:generation_tokens": "Tokens that were sampled.",
    "vllm:prefix_cache_queries": "Tokens of prompts that were looked for in the KV cache.",
    "vllm:prefix_cache_hits": "Tokens of prompts that were found in the KV cache.",
    "vllm:spec_decode_num_drafts": "Times that tokens were proposed to follow an answer's last one.",
    "vllm:spec_decode_num_draft_tokens": "Tokens that were proposed.",
    "vllm:spec_decode_num_accepted_tokens": "Tokens that were proposed and came.",
    "phi3_mlflow_decoder_steps": "Steps of the decoder, those of idle time not counted.",
    "phi3_mlflow_answers_ended": "Answers (choices) that left their slot with a reason.",
    "phi3_mlflow_answers_failed": "Answers (choices) that left their slot with an error.",
    "phi3_mlflow_renewed_tokens": "Tokens of answers that idle time computed again.",
}
_ENGINE_GAUGES = {
    "vllm:num_requests_running": "Answers (choices) that have a slot.",
    "vllm:num_requests_waiting": "Requests that wait for a slot.",
    "vllm:kv_cache_usage_perc": "Part of the KV cache that running answers use, from 0 to 1.",
    "phi3_mlflow_slots": "How many answers can be computed at once.",
    "phi3_mlflow_kv_cache_capacity_tokens": "Tokens that the KV cache has room for.",
    "phi3_mlflow_kv_cache_held_tokens": "Tokens that the KV cache holds, those kept for later prompts included.",
    "phi3_mlflow_decoder_step_seconds": "How long the present step of the decoder has been going on; 0 between steps.",
    "phi3_mlflow_scheduler_alive": "Whether the model takes requests, 1 or 0.",
}


@dataclass
class _Served:
    """A service that answers under a model's name. Its counts stay when it is gone."""

    name: str
    service: "weakref.ref[Service]"
    counts: Counts


@dataclass(eq=False)
class _Families:
    """Metrics of one moment, for a registry."""

    metrics: list[Metric]

    def describe(self) -> list[Metric]:
        return self.metrics

    def collect(self) -> list[Metric]:
        return self.metrics


class _Histogram:
    """How many values fell into which bucket."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        """Adds values; a bucket's bound belongs to it."""
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def sample(self) -> tuple[list[tuple[str, float]], float]:
        """What HistogramMetricFamily takes."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class Metrics:
    """Counts requests, and shows the counts. Safe from any thread.

    An engine's counters go on where the engine is replaced: a model that was evicted, loaded again or swapped by its
    alias counts on under its name.

    Args:
        backgrounds: queues whose losses are shown, by what they hold: `traces`, `access log`.
    """

    def __init__(self, **backgrounds: Background):
        self._backgrounds = backgrounds
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, str, str]] = Counter()
        self._finished: Counter[tuple[str, str]] = Counter()
        self._histograms: dict[tuple[str, str], _Histogram] = {}
        self._open: set[int] = set()  # of records that have begun and not ended
        # Runs whose client has left, with the model's name and when they came: they end within one step.
        self._ending: list[tuple[str, float, Run]] = []
        self._served: list[_Served] = []
        self._gone: defaultdict[str, Counter[str]] = defaultdict(Counter)  # counts of services that are gone
        self._process = ProcessCollector(registry=None)

    def begun(self, record: Record) -> None:
        """Counts a request as one under way, and its service as one to be watched."""
        with self._lock:
            self._open.add(id(record))
            self._watch(record.model, record.service)

    def ended(self, record: Record) -> None:
        """Counts a request."""
        model = record.model or ""
        with self._lock:
            self._open.discard(id(record))
            self._watch(record.model, record.service)  # not everything that asks a model has a beginning
            method = record.method if record.method in _METHODS else "other"
            route = record.route if record.route in _ROUTES else "other"
            self._requests[method, route, str(record.status), model] += 1
            for run in record.runs:
                if run.ended:
                    self._count(model, record.came, run)
                else:
                    self._ending.append((model, record.came, run))
            self._settle()

    def render(self, loaded: Sequence[Loaded]) -> bytes:
        """All metrics in Prometheus' text format; see `CONTENT_TYPE_LATEST` of prometheus_client.

        Args:
            loaded: the models in memory.
        """
        registry = CollectorRegistry()
        with self._lock:
            for each in loaded:
                self._watch(each.name, each.service)
            self._settle()
            registry.register(_Families([*self._families(loaded), *self._process.collect()]))
        return generate_latest(registry)  # what takes longest holds up nobody

    def _families(self, loaded: Sequence[Loaded]) -> Iterator[Metric]:
        """All that is counted here. The lock is held."""
        yield from self._engine_metrics()
        for name, (_, text) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            for (metric, model), histogram in self._histograms.items():
                if metric == name:
                    buckets, total = histogram.sample()
                    family.add_metric([model], buckets, total)
            yield family
        finished = CounterMetricFamily(
            "vllm:request_success", "Answers (choices) by why they ended.", labels=["model_name", "finished_reason"]
        )
        for labels, count in self._finished.items():
            finished.add_metric(labels, count)
        yield finished
        requests = CounterMetricFamily(
            "phi3_mlflow_requests",
            "Requests by HTTP status; 499 where the client left before the end.",
            labels=["method", "route", "status", "model_name"],
        )
        for names, count in self._requests.items():
            requests.add_metric(names, count)
        yield requests
        yield GaugeMetricFamily("phi3_mlflow_requests_open", "Requests under way.", value=len(self._open))
        info = GaugeMetricFamily(
            "phi3_mlflow_model_info", "Models in memory.", labels=["model_name", "uri", "model_id", "version", "engine"]
        )
        for each in loaded:
            values = [each.name, each.root, each.model_id or "", each.version or "", each.service.engine]
            info.add_metric(values, 1)
        yield info
        waiting = GaugeMetricFamily("phi3_mlflow_background_waiting", "Traces or lines that wait.", labels=["kind"])
        done = CounterMetricFamily("phi3_mlflow_background_done", "Traces or lines that were written.", labels=["kind"])
        lost = CounterMetricFamily("phi3_mlflow_background_lost", "Traces or lines that were dropped.", labels=["kind"])
        for kind, background in self._backgrounds.items():
            waiting.add_metric([kind], background.waiting)
            done.add_metric([kind], background.done)
            lost.add_metric([kind], background.lost)
        yield from (waiting, done, lost)

    def _engine_metrics(self) -> Iterator[Metric]:
        totals = defaultdict(Counter, {name: Counter(counts) for name, counts in self._gone.items()})
        present: defaultdict[str, list[Statistics]] = defaultdict(list)
        for served in self._served:
            service = served.service()
            now = None if service is None else service.statistics()
            totals[served.name].update({name: getattr(now or served.counts, name) for name in vars(served.counts)})
            present[served.name] += [now] if now is not None and now.alive else []
        for name, text in _ENGINE_COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=["model_name"])
            for model, counts in totals.items():
                family.add_metric([model], _engine_counts(counts)[name])
            yield family
        for name, text in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            for model in totals:
                gauge.add_metric([model], _engine_state(present[model])[name])
            yield gauge

    def _watch(self, name: str | None, service: Service | None) -> None:
        """Counts what the service does under the name, now that it is known. The lock is held."""
        if name is None or service is None or any(each.service() is service for each in self._served):
            return
        gone = [each for each in self._served if each.service() is None]
        for each in gone:
            self._gone[each.name].update(vars(each.counts))
            self._served.remove(each)
        self._served.append(_Served(name, weakref.ref(service), service.counts))

    def _settle(self) -> None:
        """Counts runs that ended after their request. The lock is held."""
        if not self._ending:
            return
        waiting, self._ending = self._ending, []
        for model, came, run in waiting:
            if run.ended:  # looked at once: it may end at any moment
                self._count(model, came, run)
            else:
                self._ending.append((model, came, run))

    def _count(self, model: str, came: float, run: Run) -> None:
        """Counts a run that has ended. Times of what did not happen are not counted. The lock is held."""
        choices = run.answer.choices
        reasons = ["error" if run.error else _reason(choice.reason) for choice in choices]
        for reason in reasons:
            self._finished[model, reason] += 1
        self._observe("vllm:request_prompt_tokens", model, run.answer.prompt_tokens)
        self._observe("vllm:request_generation_tokens", model, sum(choice.tokens for choice in choices))
        self._observe("vllm:inter_token_latency_seconds", model, *run.gaps)
        if run.begun:
            self._observe("vllm:request_queue_time_seconds", model, run.begun - run.came)
        if run.first_token:
            self._observe("vllm:time_to_first_token_seconds", model, run.first_token - came)
            self._observe("vllm:request_prefill_time_seconds", model, run.first_token - run.begun)
        if not {"error", "abort"}.intersection(reasons):
            self._observe("vllm:e2e_request_latency_seconds", model, run.ended - came)
            if run.first_token:
                self._observe("vllm:request_decode_time_seconds", model, run.ended - run.first_token)

    def _observe(self, name: str, model: str, *values: float) -> None:
        histogram = self._histograms.get((name, model))
        if histogram is None:
            histogram = self._histograms[name, model] = _Histogram(_HISTOGRAMS[name][0])
        histogram.observe(values)


def _reason(reason: str) -> str:
    """vLLM's `finished_reason`."""
    return "abort" if reason == "cancelled" else finish_reason(reason)  # type: ignore[arg-type]


def _engine_counts(counts: Counter[str]) -> dict[str, float]:
    """The metrics of _ENGINE_COUNTERS, from sums over Counts."""
    prompts = counts["computed"] + counts["cached"]
    return {
        "vllm:prompt_tokens": prompts,
        "vllm:prompt_tokens_cached": counts["cached"],
        "vllm:generation_tokens": counts["generated"],
        "vllm:prefix_cache_queries": prompts,
        "vllm:prefix_cache_hits": counts["cached"],
        "vllm:spec_decode_num_drafts": counts["drafts"],
        "vllm:spec_decode_num_draft_tokens": counts["proposed"],
        "vllm:spec_decode_num_accepted_tokens": counts["accepted"],
        "phi3_mlflow_decoder_steps": counts["steps"],
        "phi3_mlflow_answers_ended": counts["ended"],
        "phi3_mlflow_answers_failed": counts["failed"],
        "phi3_mlflow_renewed_tokens": counts["renewed"],
    }


def _engine_state(services: Sequence[Statistics]) -> dict[str, float]:
    """The metrics of _ENGINE_GAUGES, over the services that answer under one name; all 0 where none does."""
    capacity = sum(each.capacity for each in services)
    return {
        "vllm:num_requests_running": sum(each.running for each in services),
        "vllm:num_requests_waiting": sum(each.waiting for each in services),
        "vllm:kv_cache_usage_perc": sum(each.used for each in services) / capacity if capacity else 0.0,
        "phi3_mlflow_slots": sum(each.slots for each in services),
        "phi3_mlflow_kv_cache_capacity_tokens": capacity,
        "phi3_mlflow_kv_cache_held_tokens": sum(each.held for each in services),
        "phi3_mlflow_decoder_step_seconds": max((each.step_seconds for each in services), default=0.0),
        "phi3_mlflow_scheduler_alive": float(bool(services)),
    }
