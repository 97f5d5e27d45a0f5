"""Run with: python -m pytest tests/serve/test_metrics.py"""

import asyncio
import gc
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import TOKENS, FakeDecoder, spell
from prometheus_client.parser import text_string_to_metric_families

import phi3_mlflow.serve.metrics
from phi3_mlflow.runtime.errors import Busy
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve.background import Background
from phi3_mlflow.serve.metrics import Metrics
from phi3_mlflow.serve.records import Record
from phi3_mlflow.serve.served import Spec

PATIENCE = 120  # seconds; only what is broken takes as long
LETTERS = spell("abcdefghijklmnopqrstuvwxyz")[1:]
DASHBOARD = Path(phi3_mlflow.serve.metrics.__file__).with_name("grafana.json")


@dataclass
class Loaded:
    name: str
    service: Service
    uri: str = "models:/phi3/1"
    model_id: str | None = "m-1"
    version: str | None = "1"

    @property
    def root(self):
        return Spec(self.name, self.uri).root


@pytest.fixture
def load():
    """Makes services on a fake decoder, and closes them after the test."""
    made = []

    def make(script=lambda prompt: LETTERS[:9], *, queue_limit=None, renew_after=None, **values):
        service = Service(TOKENS, FakeDecoder(script, **values), queue_limit=queue_limit, renew_after=renew_after)
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


def body(text="one", **options):
    return {"messages": [{"role": "user", "content": text}], "repetition_guard": False, **options}


def begin(metrics, service, name="phi3"):
    record = Record("POST", "/v1/chat/completions", model=name, service=service)
    metrics.begun(record)
    return record


def end(metrics, record, status=200):
    record.status, record.ended = status, time.monotonic()
    metrics.ended(record)


def ask(metrics, service, name="phi3", **options):
    """One request that is answered."""
    record = begin(metrics, service, name)
    record.runs = [service.start(body(**options))]
    answer = record.runs[0].wait()
    end(metrics, record)
    return answer


def read(metrics, *loaded):
    """Every sample: (name, labels without the model's name) -> value."""
    samples = {}
    for family in text_string_to_metric_families(metrics.render(loaded).decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            key = (sample.name, *sorted(labels.values()))
            samples[key] = samples.get(key, 0) + sample.value
    return samples


def test_a_request_shows_in_vllms_names(load):
    metrics, service = Metrics(), load()
    prompt = len(TOKENS.encode_chat(body()["messages"]))
    ask(metrics, service)
    seen = read(metrics, Loaded("phi3", service))
    assert seen["vllm:prompt_tokens_total",] == prompt
    assert seen["vllm:generation_tokens_total",] == 10
    assert seen["vllm:request_success_total", "stop"] == 1
    assert seen["vllm:num_requests_running",] == seen["vllm:num_requests_waiting",] == 0
    assert seen["vllm:kv_cache_usage_perc",] == 0
    assert seen["phi3_mlflow_kv_cache_held_tokens",] == prompt + 9
    assert seen["phi3_mlflow_kv_cache_capacity_tokens",] == 64
    assert seen["phi3_mlflow_requests_total", "/v1/chat/completions", "200", "POST"] == 1
    assert seen["phi3_mlflow_scheduler_alive",] == seen["phi3_mlflow_slots",] == 1
    assert seen["phi3_mlflow_model_info", "1", "fake", "m-1", "models:/phi3/1"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert seen[f"vllm:{name}_seconds_count",] == 1
    assert seen["vllm:request_decode_time_seconds_count",] == 1
    assert seen["vllm:inter_token_latency_seconds_count",] == 9
    assert seen["vllm:request_prompt_tokens_sum",] == prompt
    assert seen["vllm:request_generation_tokens_sum",] == 10
    assert seen["process_open_fds",] > 0


def test_where_a_model_lies_is_not_shown(load):
    text = Metrics().render([Loaded("phi3", load(), uri="/srv/models/phi3")]).decode()

    assert 'uri="phi3"' in text
    assert "/srv" not in text


def test_what_the_prefix_cache_gives_is_counted(load):
    metrics, service = Metrics(), load()
    for _ in range(2):
        answer = ask(metrics, service, text="one two three four")
    seen = read(metrics)
    assert answer.cached_tokens > 0
    for name in ("prompt_tokens_cached", "prefix_cache_hits"):
        assert seen[f"vllm:{name}_total",] == answer.cached_tokens
    for name in ("prompt_tokens", "prefix_cache_queries"):
        assert seen[f"vllm:{name}_total",] == 2 * answer.prompt_tokens


def test_what_was_proposed_to_follow_is_counted(load):
    metrics, service = Metrics(), load(lambda prompt: LETTERS[:4] * 6)
    ask(metrics, service)
    now, seen = service.statistics(), read(metrics)
    assert seen["vllm:spec_decode_num_drafts_total",] == now.drafts > 3
    assert seen["vllm:spec_decode_num_draft_tokens_total",] == now.proposed > now.drafts
    assert seen["vllm:spec_decode_num_accepted_tokens_total",] == now.accepted > 3
    assert seen["phi3_mlflow_decoder_steps_total",] == now.steps
    # Each step for a token of the answer gives one, and those that were accepted; the prompt takes a step for 4 tokens.
    prompt = -(-len(TOKENS.encode_chat(body()["messages"])) // 4)
    assert now.generated == now.steps - prompt + 1 + now.accepted


def test_the_gaps_between_tokens_are_those_of_the_scheduler_for_each_choice(load):
    pause = 0.02
    service = load(slots=2, on_call=lambda name, slot, ids: time.sleep(pause if name == "decode" else 0))
    run = service.start(body(n=2, max_tokens=5))
    run.wait()
    assert len(run.gaps) == 2 * 4
    assert min(run.gaps) >= pause * 0.9
    assert sum(run.gaps) <= 2 * (run.ended - run.first_token)
    assert run.came <= run.begun <= run.first_token <= run.ended


def test_an_answer_has_ended_when_its_last_piece_is_given_away(load):
    seen = []
    run = load().start(body(), deliver=lambda piece: seen.append((piece.last, run.ended > 0)))
    deadline = time.monotonic() + PATIENCE
    while not run.ended:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    while not seen[-1][0]:
        time.sleep(0.001)
    assert [last for last, _ in seen] == [ended for _, ended in seen]


def test_running_and_waiting_requests_show_while_they_do_and_the_cache_that_they_use(load):
    go, begun = threading.Event(), threading.Event()

    def wait(name, slot, ids):
        if name == "decode":
            begun.set()
            assert go.wait(PATIENCE)

    metrics, service = Metrics(), load(on_call=wait)
    records = [begin(metrics, service) for _ in range(3)]
    for record in records:
        record.runs = [service.start(body())]
    assert begun.wait(PATIENCE)
    seen = read(metrics)
    assert (seen["vllm:num_requests_running",], seen["vllm:num_requests_waiting",]) == (1, 2)
    assert seen["vllm:kv_cache_usage_perc",] == len(TOKENS.encode_chat(body()["messages"])) / 64
    assert seen["phi3_mlflow_requests_open",] == 3
    assert seen["phi3_mlflow_decoder_step_seconds",] > 0
    go.set()
    for record in records:
        record.runs[0].wait()
        end(metrics, record)
    seen = read(metrics)
    assert (seen["vllm:num_requests_running",], seen["vllm:num_requests_waiting",]) == (0, 0)
    assert seen["phi3_mlflow_requests_open",] == 0


def test_counters_go_on_where_a_model_is_evicted_loaded_again_or_swapped(load):
    metrics = Metrics()
    total = 0
    for turn in range(6):
        old = load()
        total += sum(choice.tokens for choice in ask(metrics, old).choices)
        if turn % 2:  # nobody looks between two loads
            assert read(metrics)["vllm:generation_tokens_total",] == total
        new = load()
        total += sum(choice.tokens for choice in ask(metrics, new).choices)
        last = begin(metrics, old)  # the old one drains
        last.runs = [old.start(body())]
        total += sum(choice.tokens for choice in last.runs[0].wait().choices)
        end(metrics, last)
        old.close()
        if turn % 3 == 0:
            seen = read(metrics, Loaded("phi3", new))
            assert seen["vllm:generation_tokens_total",] == total
            assert seen["phi3_mlflow_slots",] == 1
        new.close()
    seen = read(metrics)
    assert seen["vllm:generation_tokens_total",] == total
    assert seen["phi3_mlflow_answers_ended_total",] == 18
    assert seen["phi3_mlflow_slots",] == seen["phi3_mlflow_scheduler_alive",] == 0


def test_metrics_keep_no_service_alive():
    metrics = Metrics()
    service = Service(TOKENS, FakeDecoder(lambda prompt: LETTERS))
    answer = ask(metrics, service)
    decoder = service._scheduler._decoder
    service.close()
    del service
    gc.collect()
    assert read(metrics)["vllm:generation_tokens_total",] == answer.choices[0].tokens
    assert all(each.service() is None for each in metrics._served)
    assert decoder.closed


def test_what_a_model_does_for_requests_that_were_never_said_to_begin_is_counted_too():
    metrics = Metrics()
    service = Service(TOKENS, FakeDecoder(lambda prompt: LETTERS[:9]))
    record = Record("POST", "/invocations", model="phi3", service=service)
    for _, answer in service.run_table([service.prepare(service.parse(body()))]):
        assert answer.choices[0].tokens == 10
    end(metrics, record)
    service.close()
    del service, record
    gc.collect()
    seen = read(metrics)
    assert seen["vllm:generation_tokens_total",] == 10
    assert seen["phi3_mlflow_requests_open",] == 0


def test_models_are_told_apart(load):
    metrics, one, two = Metrics(), load(), load()
    ask(metrics, one, "one")
    for _ in range(2):
        ask(metrics, two, "two", max_tokens=3)
    text = metrics.render([Loaded("one", one), Loaded("two", two)]).decode()
    assert 'vllm:generation_tokens_total{model_name="one"} 10.0' in text
    assert 'vllm:generation_tokens_total{model_name="two"} 6.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="two"} 2.0' in text


def test_a_client_that_leaves_is_counted_once_its_answer_has_ended(load):
    go = threading.Event()
    metrics = Metrics()
    service = load(on_call=lambda name, slot, ids: name != "decode" or go.wait(PATIENCE))
    record = begin(metrics, service)
    record.runs = [service.start(body())]
    record.runs[0].cancel()
    end(metrics, record, status=499)
    assert ("vllm:request_success_total", "abort") not in read(metrics)
    go.set()
    record.runs[0].wait()
    seen = read(metrics)
    assert seen["vllm:request_success_total", "abort"] == 1
    assert seen["phi3_mlflow_requests_total", "/v1/chat/completions", "499", "POST"] == 1
    assert seen.get(("vllm:e2e_request_latency_seconds_count",), 0) == 0
    assert metrics._ending == []


def test_what_ends_while_others_are_counted_is_counted_too(load):
    go = threading.Event()
    busy, idle = load(on_call=lambda name, slot, ids: name != "decode" or go.wait(PATIENCE)), load()
    late, early = busy.start(body()), idle.start(body())

    class Slow(Metrics):
        def _count(self, model, came, run):
            super()._count(model, came, run)
            if run is early:
                go.set()
                late.wait()

    metrics = Slow()
    record = begin(metrics, busy)
    record.runs = [late]
    end(metrics, record, status=499)
    early.wait()
    record = begin(metrics, idle)
    record.runs = [early]
    metrics._ending.append(("phi3", record.came, early))  # as it was when the client left
    read(metrics)
    assert late.ended
    assert read(metrics)["vllm:request_success_total", "stop"] == 2


def test_whatever_paths_and_methods_clients_think_of_the_labels_are_few():
    metrics = Metrics()
    for number in range(500):
        end(metrics, Record(f"M{number}", f"/wp-admin/{number}"), status=404)
    end(metrics, Record("GET", "/health"))
    seen = read(metrics)
    requests = {key: value for key, value in seen.items() if key[0] == "phi3_mlflow_requests_total"}
    assert requests == {
        ("phi3_mlflow_requests_total", "404", "other", "other"): 500,
        ("phi3_mlflow_requests_total", "/health", "200", "GET"): 1,
    }


def test_what_background_work_lost_shows():
    go, begun = threading.Event(), threading.Event()
    queue = Background("traces", lambda item: begun.set() or go.wait(PATIENCE), items=1, room=10)
    queue.put("at work")
    assert begun.wait(PATIENCE)
    assert [queue.put("item") for _ in range(2)] == [True, False]
    seen = read(Metrics(traces=queue))
    assert seen["phi3_mlflow_background_lost_total", "traces"] == 1
    assert seen["phi3_mlflow_background_waiting", "traces"] == 1
    go.set()
    queue.close(PATIENCE)
    assert read(Metrics(traces=queue))["phi3_mlflow_background_done_total", "traces"] == 2


def test_buckets_count_what_is_not_above_their_bound():
    histogram = phi3_mlflow.serve.metrics._Histogram((1.0, 2.0))
    histogram.observe([0.5, 1.0, 1.5, 2.0, 2.5])
    assert histogram.sample() == ([("1.0", 2), ("2.0", 4), ("+Inf", 5)], 7.5)


def test_everything_adds_up_over_many_requests_that_are_answered_cancelled_failed_and_refused(load):
    """300 clients of an event loop at once; what each of them got is counted beside the metrics."""
    calls, left = threading.local(), threading.Event()

    def on_call(name, slot, ids):
        if name == "decode":
            assert left.wait(PATIENCE)
        calls.count = getattr(calls, "count", 0) + 1
        if name == "prefill" and calls.count % 17 == 0:
            raise RuntimeError("a broken step")

    metrics = Metrics()
    service = load(slots=4, queue_limit=40, on_call=on_call, context_length=128)
    told = Counter()

    async def client(number):
        await asyncio.sleep(number % 50 / 200)
        record = begin(metrics, service)
        status = 200
        try:
            record.runs = [service.start(body(f"{number} two", n=1 + number % 2, max_tokens=4 + number % 9))]
            if number == 0:  # others that leave may have their whole answer by then
                record.runs[0].cancel()
                left.set()
                status = 499
            async for piece in record.runs[0]:
                if number % 5 == 0 and piece.text:
                    status = 499
                    break
        except Busy:
            status = 429
        except RuntimeError:
            status = 500
        end(metrics, record, status)
        told[status] += 1
        return record

    async def clients():
        work = [asyncio.create_task(client(number)) for number in range(300)]
        before = {}
        while not all(each.done() for each in work):
            seen = read(metrics, Loaded("phi3", service))
            for key, value in before.items():
                if key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                    assert seen[key] >= value, key
            assert seen["vllm:num_requests_running",] <= 4
            before = seen
            await asyncio.sleep(0.01)
        return [await each for each in work]

    records = asyncio.run(clients())
    runs = [run for record in records for run in record.runs]
    deadline = time.monotonic() + PATIENCE
    while not all(run.ended for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    seen = read(metrics, Loaded("phi3", service))
    assert min(told[status] for status in (200, 429, 499, 500)) > 0, told
    for status, count in told.items():
        assert seen["phi3_mlflow_requests_total", "/v1/chat/completions", str(status), "POST"] == count
    assert seen["phi3_mlflow_requests_open",] == 0
    choices = [choice for run in runs for choice in run.answer.choices]
    finished = {key[1]: value for key, value in seen.items() if key[0] == "vllm:request_success_total"}
    reasons = [choice.reason for run in runs if not run.error for choice in run.answer.choices]
    assert finished == {
        "stop": reasons.count("eos"),
        "length": reasons.count("max_tokens"),
        "abort": reasons.count("cancelled"),
        "error": len(choices) - len(reasons),
    }
    assert min(finished.values()) > 0
    assert seen["phi3_mlflow_answers_failed_total",] == sum(run.error is not None for run in runs)
    ended, failed = (seen[f"phi3_mlflow_answers_{how}_total",] for how in ("ended", "failed"))
    assert ended + failed <= len(choices)  # some were given up while they waited
    sampled = sum(choice.tokens for choice in choices)
    assert seen["vllm:request_generation_tokens_sum",] == sampled
    # A step that a choice beside a failed one was in may have sampled a token that nobody was given.
    assert sampled <= seen["vllm:generation_tokens_total",] <= sampled + told[500]
    assert seen["vllm:request_generation_tokens_count",] == len(runs)
    whole = [run for run in runs if not run.error and all(c.reason != "cancelled" for c in run.answer.choices)]
    assert seen["vllm:e2e_request_latency_seconds_count",] == len(whole)
    assert seen["vllm:time_to_first_token_seconds_count",] == sum(run.first_token > 0 for run in runs)
    assert seen["vllm:inter_token_latency_seconds_count",] == sum(len(run.gaps) for run in runs)
    assert (seen["vllm:num_requests_running",], seen["vllm:num_requests_waiting",]) == (0, 0)


def test_the_dashboard_shows_only_what_there_is(load):
    """Every metric and every label of its expressions is one that /metrics has after a request."""
    queue = Background("traces", lambda item: None, items=1, room=1)
    metrics, service = Metrics(traces=queue), load()
    ask(metrics, service)
    labels = {}
    for family in text_string_to_metric_families(metrics.render([Loaded("phi3", service)]).decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    named = set()
    for expression in expressions:
        for metric, selector in re.findall(r"((?:vllm:|phi3_mlflow_|process_)\w+)(\{[^}]*\})?", expression):
            assert metric in labels, f"{metric} in {expression}"
            named.add(metric)
            assert set(re.findall(r"(\w+)\s*(?:=|!=|=~)", selector)) <= labels[metric], expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= set().union(*labels.values()), expression
    assert len(named) > 20
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_bucket"):
        assert f"vllm:{name}" in named
    queue.close(PATIENCE)
