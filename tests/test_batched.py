"""Several sequences decoded together on the embedded model, against onnxruntime-genai.

Run with: python -m pytest tests/test_batched.py
"""

import json
import queue
import random
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from phi3_mlflow.runtime import FORMAT, loading, manifest
from phi3_mlflow.runtime import model as model_module
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder, CannotBatch
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder
from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.jobs import Job
from phi3_mlflow.runtime.model import Predictor, TryLater
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.scheduler import Scheduler
from phi3_mlflow.runtime.settings import check_batching, check_config, refuse_batching
from phi3_mlflow.runtime.stops import Stops
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
ONNX = ROOT / "artifacts" / "onnx"
PATIENCE = 300  # seconds; only a broken scheduler takes as long
TOKEN_BYTES = 2 * 4 * 6 * 32 * 4  # of the embedded model: 4 layers, 6 heads of 32 numbers
MOST = 16  # tokens of an answer
# Rows that decode together differ from rows alone by rounding. Where the two best logits are closer than this, the
# other one may be chosen.
TOLERANCE = 0.02
# Options under which an answer goes on.
FOREVER = {
    "logit_bias": dict.fromkeys(
        json.loads((ONNX / "genai_config.json").read_text("utf-8"))["model"]["eos_token_id"], -100
    ),
    "repetition_guard": False,
    "self_talk_guard": False,
}


@pytest.fixture(scope="module")
def tokens():
    return Tokens.from_folder(ONNX)


@pytest.fixture(scope="module")
def genai():
    decoder = GenaiDecoder(ONNX, threads=1)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def together():
    decoder = BatchedDecoder(ONNX, slots=4, threads=1, kv_budget=3 * 4096 * TOKEN_BYTES)
    yield decoder
    decoder.close()


@pytest.fixture
def batched(together):
    """A decoder of four slots that hold nothing."""
    for slot in range(together.slots):
        together.rewind(slot, 0)
    return together


def prefill(decoder, slot, prompt, start=0):
    """The logits behind the prompt."""
    for at in range(start, len(prompt), decoder.chunk):
        logits = decoder.step({slot: Part(prompt[at : at + decoder.chunk], int(at + decoder.chunk >= len(prompt)))})
    return logits[slot][0].copy()


def decode(decoder, tokens):
    """The logits behind one more token of each slot."""
    rows = decoder.step({slot: Part([token], 1) for slot, token in tokens.items()})
    assert all(row.shape[0] == 1 for row in rows.values())
    return {slot: row[0] for slot, row in rows.items()}


def submit(scheduler, *jobs):
    """Hands jobs over as one request."""
    scheduler.submit(jobs, lambda error: [job.deliver(error) for job in jobs])


def load_onnx(folder, config):
    return Predictor(loading.load_onnx(folder, config))


def greedy(decoder, prompt, count=MOST):
    """The greedy answer of a fresh run, the end token included, and by how much each token was the best."""
    decoder.rewind(0, 0)
    logits, answer, margins = prefill(decoder, 0, prompt), [], []
    while True:
        second, best = np.sort(logits)[-2:]
        answer.append(int(logits.argmax()))
        margins.append(float(best - second))
        if answer[-1] in decoder.eos or len(answer) == count:
            return answer, margins
        logits = decode(decoder, {0: answer[-1]})[0]


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, 2000, count).tolist()


class Differences:
    """Counts where an answer leaves the expected one, which it may only at a margin below the tolerance."""

    def __init__(self):
        self.answers, self.found = 0, []

    def compare(self, answer, expected, margins):
        self.answers += 1
        at = next((at for at, pair in enumerate(zip(answer, expected, strict=False)) if len(set(pair)) > 1), None)
        if at is None:
            assert len(answer) <= len(expected)
        else:
            self.found.append((at, answer[at], expected[at], margins[at]))
            assert margins[at] < TOLERANCE, f"token {at} is {answer[at]} instead of {expected[at]}"

    def show(self):
        """The differences, in pytest's summary."""
        if self.found:
            text = f"{len(self.found)} of {self.answers} answers differ from genai's"
            warnings.warn(f"{text}, first at (place, token, expected, margin): {self.found}", stacklevel=2)


class Recorded(Generation):
    """A greedy answer that remembers its tokens."""

    def __init__(self, prompt, tokens, eos, most=MOST):
        super().__init__(
            prompt,
            Options(),
            max_tokens=most,
            limit="max_tokens",
            vocab_size=tokens.vocab_size,
            eos=eos,
            text=tokens.decoder(strip=False),
            stops=Stops(repetition=False, self_talk=False),
        )
        self.tokens = []

    def accept(self, logits):
        self.tokens.append(int(logits.argmax()))
        return super().accept(logits)


def test_answers_of_random_mixes_of_requests_equal_those_of_genai(genai, tokens):
    """Prompts share beginnings; requests arrive and are cancelled at random steps; the cache is too small for all."""
    rng = random.Random(5)
    lines = (ROOT / "artifacts" / "questions.jsonl").read_text("utf-8").splitlines()
    prompts = [tokens.encode_chat(json.loads(line)["messages"]) for line in lines[:: len(lines) // 30]]
    prompts += [[*prompts[0][:-1], *ids(70, seed)] for seed in range(4)]
    prompts += [[*prompts[-1][: rng.randint(1, 90)], *ids(rng.randint(1, 60), seed)] for seed in range(6)]
    expected = [greedy(genai, prompt) for prompt in prompts]

    decoder = BatchedDecoder(ONNX, slots=4, context_length=192, threads=1, kv_budget=400 * TOKEN_BYTES)
    scheduler, differences, cancelled, reused, widths = Scheduler(decoder), Differences(), 0, 0, set()
    try:
        for _ in range(200):
            chosen = [rng.randrange(len(prompts)) for _ in range(rng.randint(2, 6))]
            answers = [Recorded(prompts[index], tokens, decoder.eos) for index in chosen]
            arrivals = sorted(rng.randint(0, 12) for _ in chosen)
            # Steps of the whole mix after which a job is cancelled; most are not.
            leaves = [rng.randint(1, 30) if rng.random() < 0.25 else None for _ in chosen]
            jobs, ends, steps = [], queue.SimpleQueue(), [0]

            def deliver(event, jobs=jobs, ends=ends, steps=steps, arrivals=arrivals, leaves=leaves):
                steps[0] += 1
                widths.add(len(decoder._decoded))
                for job, leave in zip(jobs, leaves, strict=True):
                    if leave is not None and steps[0] >= leave:
                        job.cancel()
                ended = isinstance(event, Exception) or event.reason is not None
                if ended:
                    ends.put(event)
                for place, job in enumerate(jobs):
                    if arrivals[place] >= 0 and (steps[0] >= arrivals[place] or ended):
                        arrivals[place] = -1
                        submit(scheduler, job)

            jobs += [Job(answer, deliver) for answer in answers]
            arrivals[0] = -1
            submit(scheduler, jobs[0])
            for _ in jobs:
                event = ends.get(timeout=PATIENCE)
                assert not isinstance(event, Exception), event
            for index, answer, job in zip(chosen, answers, jobs, strict=True):
                differences.compare(answer.tokens, *expected[index])
                cancelled += len(answer.tokens) < len(expected[index][0])
                reused += job.reused
    finally:
        scheduler.close()
    differences.show()
    assert cancelled > 30
    assert reused > 1000
    assert widths == {1, 2, 3, 4}
    assert len(differences.found) <= differences.answers // 100


def test_rows_of_different_lengths_decode_together_also_behind_the_sliding_window(genai, batched):
    prompts = [ids(length, length) for length in (2100, 5, 2030, 64)]  # the window is 2047 long
    expected = [greedy(genai, prompt, 24) for prompt in prompts]
    logits = [prefill(batched, slot, prompt) for slot, prompt in enumerate(prompts)]
    answers = [[int(row.argmax())] for row in logits]
    for _ in range(23):
        rows = decode(batched, {slot: answer[-1] for slot, answer in enumerate(answers)})
        for slot, row in rows.items():
            answers[slot].append(int(row.argmax()))
    differences = Differences()
    for answer, (tokens, margins) in zip(answers, expected, strict=True):
        differences.compare(answer[: len(tokens)], tokens, margins)
    differences.show()
    assert len(differences.found) <= 1


def test_any_rows_decode_together_and_the_others_keep_what_they_hold(batched):
    rng = random.Random(1)
    sequences = {slot: ids(rng.randint(1, 80), slot) for slot in range(4)}
    for slot, sequence in sequences.items():
        prefill(batched, slot, sequence)
    for step in range(12):
        chosen = rng.sample(range(4), rng.randint(1, 4))
        rows = decode(batched, dict.fromkeys(chosen, 100 + step))
        assert sorted(rows) == sorted(chosen)
        for slot in chosen:
            sequences[slot].append(100 + step)
    for slot, sequence in sequences.items():
        held = decode(batched, {slot: 50})[slot].copy()
        batched.rewind(slot, 0)
        prefill(batched, slot, sequence)
        np.testing.assert_allclose(decode(batched, {slot: 50})[slot], held, atol=0.2)


def test_rewinding_gives_what_a_fresh_run_gives(batched):
    prompt = ids(100, 0)
    expected = prefill(batched, 0, prompt)
    decode(batched, {0: 7})
    for length in (96, 64, 32, 0):
        batched.rewind(0, length)
        np.testing.assert_array_equal(prefill(batched, 0, prompt, length), expected)


def test_a_copied_prefix_gives_what_a_fresh_run_gives(batched):
    prompt = ids(100, 0)
    expected = prefill(batched, 2, prompt)
    prefill(batched, 1, ids(10, 1))
    for length in (32, 64, 96):
        batched.copy(2, 1, length)
        np.testing.assert_array_equal(prefill(batched, 1, prompt, length), expected)
    decode(batched, {2: 7})
    batched.rewind(2, 100)
    decode(batched, {1: 7, 2: 7})


def test_a_request_with_a_known_prefix_starts_from_a_copy_while_the_first_one_runs(genai, tokens):
    prefix = ids(100, 3)
    prompts = [[*prefix, *ids(9, seed)] for seed in range(3)]
    decoder = BatchedDecoder(ONNX, slots=3, context_length=256, threads=1)
    scheduler, ends = Scheduler(decoder), queue.SimpleQueue()
    try:
        answers = [Recorded(prompt, tokens, decoder.eos) for prompt in prompts]
        jobs = [Job(answer, lambda step: step.reason and ends.put(step)) for answer in answers]
        submit(scheduler, *jobs)
        for _ in jobs:
            ends.get(timeout=PATIENCE)
    finally:
        scheduler.close()
    assert [job.reused for job in jobs] == [0, 96, 96]
    differences = Differences()
    for answer, prompt in zip(answers, prompts, strict=True):
        differences.compare(answer.tokens, *greedy(genai, prompt))


def test_the_budget_says_how_many_tokens_fit():
    decoder = BatchedDecoder(ONNX, slots=2, context_length=100, threads=1, kv_budget=250 * TOKEN_BYTES + 1)
    assert (decoder.capacity, decoder.context_length) == (250, 100)
    decoder.close()
    with pytest.raises(InvalidRequest, match="`kv_budget` is 1000 bytes, and one sequence of 100 tokens takes 614400"):
        BatchedDecoder(ONNX, slots=2, context_length=100, threads=1, kv_budget=1000)


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, to be spoilt."""
    copy = shutil.copytree(ONNX, tmp_path / "onnx")
    manifest.write(copy)
    return copy


def change(folder, **values):
    path = folder / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["model"]["decoder"] |= values
    path.write_text(json.dumps(config), "utf-8")
    manifest.write(folder)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"session_options": {"provider_options": [{"cuda": {}}]}}, "asks for cuda"),
        ({"session_options": {"inter_op_num_threads": 1}}, "the session options inter_op_num_threads"),
        ({"sliding_window": {"window_size": 2047}}, "has a section `sliding_window`"),
        ({"num_hidden_layers": 3}, "past_key_values.3.key is tensor.float.; batching takes no such input"),
        ({"num_hidden_layers": 5}, "past_key_values.4.key is missing; batching takes tensor.float."),
        ({"head_size": 16}, "does not run with past and present in the same memory"),
        ({"filename": "other.onnx"}, "cannot load .*other.onnx"),
        ({"inputs": {}}, "is not as expected"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_the_reason(folder, values, reason):
    change(folder, **values)
    with pytest.raises(CannotBatch, match=reason):
        BatchedDecoder(folder, slots=2)


def test_a_graph_that_takes_all_rows_to_be_of_one_length_is_found_out(folder):
    onnx = pytest.importorskip("onnx")
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (lengths,) = {node.input[5] for node in model.graph.node if node.op_type == "GroupQueryAttention"}
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[5] = "longest_everywhere"
    helper = onnx.helper
    added = [
        helper.make_node("ReduceMax", [lengths], ["longest"], keepdims=1),
        helper.make_node("Shape", [lengths], ["shape"]),
        helper.make_node("Expand", ["longest", "shape"], ["longest_everywhere"]),
    ]
    place = next(i for i, node in enumerate(model.graph.node) if lengths in node.output) + 1
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *added, *nodes[place:]])
    onnx.save(model, path)
    with pytest.raises(CannotBatch, match="gives other logits to rows that are decoded together"):
        BatchedDecoder(folder, slots=2)
    BatchedDecoder(folder, slots=1).close()


def test_a_model_that_cannot_batch_falls_back_to_genai_and_says_why(folder, caplog):
    change(folder, session_options={"inter_op_num_threads": 1})
    predictor = load_onnx(folder, {"format": FORMAT, "engine": "onnxruntime", "parallel": 4, "threads": 1})
    assert "`parallel` has no effect" in caplog.text
    assert "inter_op_num_threads" in caplog.text
    assert isinstance(predictor.service._scheduler._decoder, GenaiDecoder)
    (answer,) = predictor.predict(capital("Spain"))
    assert "Madrid" in answer["choices"][0]["message"]["content"]
    predictor.close()


def capital(*countries):
    questions = [f"What is the capital of {country}?" for country in countries]
    return pd.DataFrame({"messages": [[{"role": "user", "content": question}] for question in questions]})


def test_threads_and_rows_get_their_own_answers_from_a_parallel_model(folder):
    countries = ["Spain", "France", "Italy", "Germany", "Portugal", "Norway", "Greece", "Japan"]

    def contents(predictor, *asked):
        return [answer["choices"][0]["message"]["content"] for answer in predictor.predict(capital(*asked))]

    alone = load_onnx(folder, {"format": FORMAT, "threads": 1})
    expected = {country: contents(alone, country)[0] for country in countries}
    alone.close()
    config = {"format": FORMAT, "engine": "onnxruntime", "parallel": 3, "kv_budget": "64MiB", "threads": 1}
    predictor = load_onnx(folder, config)
    assert predictor.service.statistics().capacity == 2**26 // TOKEN_BYTES
    found = {}
    threads = [
        threading.Thread(target=lambda country=country: found.update({country: contents(predictor, country)[0]}))
        for country in countries
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == expected
    assert contents(predictor, *countries) == list(expected.values())
    predictor.close()


def test_batching_is_refused_where_it_cannot_be():
    config = {"parallel": 8, "kv_budget": "4GiB", "queue_limit": 10}
    check_config("llm/v1/chat", config)
    check_batching(config)
    refuse_batching({"parallel": 1})
    with pytest.raises(InvalidRequest, match="`parallel` is 2, and a transformers model answers one request at a time"):
        refuse_batching({"parallel": 2})
    for values, reason in (
        ({"parallel": 0}, "`parallel` is 0"),
        ({"parallel": 65}, "`parallel` is 65"),
        ({"parallel": 4, "kv_budget": "lots"}, "`kv_budget` is 'lots'"),
        ({"queue_limit": 0}, "`queue_limit` is 0"),
        ({"token_gap": 0}, "`token_gap` is 0"),
        ({"speculation": "on"}, "`speculation` is 'on'; it must be 'auto' or 'off'"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            check_config("llm/v1/chat", values)
    with pytest.raises(InvalidRequest, match="`kv_budget` is given, and it needs `parallel` above 1"):
        check_batching({"kv_budget": "4GiB"})
    check_batching({"token_gap": 0.5, "engine": "openvino", "parallel": 2})
    with pytest.raises(InvalidRequest, match="`token_gap` is given, and onnxruntime reads no prompts in one step with"):
        check_batching({"token_gap": 0.5, "engine": "onnxruntime", "parallel": 2})
    with pytest.raises(
        InvalidRequest, match="`token_gap` is 1, and a transformers model answers one request at a time"
    ):
        refuse_batching({"token_gap": 1})


def test_more_requests_than_may_wait_are_told_to_come_back(folder):
    predictor = load_onnx(folder, {"format": FORMAT, "threads": 1, "queue_limit": 2})
    scheduler = predictor.service._scheduler
    entered, leave = threading.Event(), threading.Event()

    def hold(step):
        entered.set()
        leave.wait(PATIENCE)

    def job(deliver=lambda step: None, tokens=1):
        return Job(Recorded([5, 6], predictor.service.tokens, frozenset(), tokens), deliver)

    submit(scheduler, job(hold, 2))
    assert entered.wait(PATIENCE)
    submit(scheduler, job(), job(), job())  # one request of three answers
    submit(scheduler, job())
    with pytest.raises(TryLater, match=r"2 requests are waiting; try again in \d+ second") as refused:
        predictor.predict(capital("Spain"))
    assert refused.value.get_http_status_code() == 429
    assert json.loads(refused.value.serialize_as_json())["error_code"] == "RESOURCE_EXHAUSTED"
    with pytest.raises(TryLater):
        predictor.predict_stream(capital("Spain"))
    leave.set()
    while True:  # until the queue is empty
        try:
            answers = predictor.predict(capital("Spain", "France", "Italy"))
            break
        except TryLater:
            pass
    assert len(answers) == 3
    predictor.close()


def test_cached_tokens_are_reported(folder):
    predictor = load_onnx(folder, {"format": FORMAT, "engine": "onnxruntime", "threads": 1, "parallel": 2})
    rows = pd.DataFrame({"messages": [[{"role": "user", "content": "The sky is blue. " * 20}]]})
    first, second = predictor.predict(rows)[0], predictor.predict(rows)[0]
    assert "cached_tokens" not in first["custom_outputs"]
    assert second["custom_outputs"]["cached_tokens"] == (second["usage"]["prompt_tokens"] - 1) // 16 * 16 > 0
    assert second["usage"] == first["usage"]
    predictor.close()


@pytest.mark.parametrize("parallel", [1, 3])
def test_the_next_turn_of_a_conversation_begins_with_the_last_answer(folder, parallel):
    """In `exact` after some idle time, and then with the very answer of a fresh model; in `all` at once."""
    turns = [{"role": "user", "content": "Tell me what you know about the sky and the sea, please."}]
    config = {"format": FORMAT, "threads": 1, "parallel": parallel}

    def ask(predictor, messages):
        return predictor.predict(pd.DataFrame({"messages": [messages]}), {"max_tokens": 60, **FOREVER})[0]

    both = {}
    for reuse in ("exact", "all"):
        predictor = load_onnx(folder, {**config, "prefix_reuse": reuse})
        first = ask(predictor, turns)
        limit = time.monotonic() + PATIENCE
        while predictor.service._scheduler._prefixes.renewable() and reuse == "exact":
            assert time.monotonic() < limit
            time.sleep(0.05)
        second = [*turns, first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        both[reuse] = ask(predictor, second)
        known = first["usage"]["prompt_tokens"] + 40  # of 59 tokens that were decoded
        assert both[reuse]["custom_outputs"]["cached_tokens"] >= known
        predictor.close()
    fresh = load_onnx(folder, config)
    assert ask(fresh, second)["choices"] == both["exact"]["choices"]
    fresh.close()


def test_a_table_is_answered_in_the_order_of_its_rows_whatever_their_lengths(folder):
    questions = [f"What is {left} + {right}?" for left in range(1, 6) for right in range(1, 5)]
    rows = pd.DataFrame({"messages": [[{"role": "user", "content": text}] for text in questions]})
    batched, alone = (load_onnx(folder, {"format": FORMAT, "threads": 1, "parallel": many}) for many in (4, 1))
    expected = [answer["choices"] for answer in alone.predict(rows)]
    assert [answer["choices"] for answer in batched.predict(rows)] == expected
    assert len({json.dumps(choices) for choices in expected}) > 5
    batched.close()
    alone.close()


def test_a_long_table_shows_its_progress_in_a_terminal_and_not_in_a_server(folder, capsys, monkeypatch):
    predictor = load_onnx(folder, {"format": FORMAT, "threads": 1})
    rows = pd.DataFrame({"messages": [[{"role": "user", "content": "Count."}]] * 3})
    monkeypatch.setattr(model_module, "PROGRESS_AFTER", 0.0)
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", raising=False)  # MLflow leaves it set in tests that serve
    predictor.predict(rows)
    assert "0/3" in capsys.readouterr().err
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    predictor.predict(rows)
    assert capsys.readouterr().err == ""
    predictor.close()


def test_a_request_that_waits_too_long_is_a_429(folder):
    predictor = load_onnx(folder, {"format": FORMAT, "threads": 1, "queue_timeout": 0.05})
    stream = predictor.predict_stream(capital("Spain"), {"max_tokens": 4000, **FOREVER})
    next(stream)
    with pytest.raises(TryLater, match=r"waited for its turn for 0.05 seconds; try again in \d+ second"):
        predictor.predict(capital("France"))
    stream.close()
    assert len(predictor.predict(capital("France"))) == 1
    predictor.close()
