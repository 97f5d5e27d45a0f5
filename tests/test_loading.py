"""A folder becomes a service: what is refused at load, what settings do, and what is closed where it fails.

Run with: python -m pytest tests/test_loading.py
"""

import copy
import gc
import pickle
import subprocess
import sys
import time
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from fakes import TOKENS, FakeDecoder, spell

from phi3_mlflow.runtime import loading
from phi3_mlflow.runtime import service as service_module
from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.decoders.base import CannotBatch, Part
from phi3_mlflow.runtime.errors import InvalidRequest, WeightsError
from phi3_mlflow.runtime.model import AnswerFailed, OutOfTime, Predictor, RequestRefused, TryLater
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.statistics import Counts
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
ONNX = ROOT / "artifacts" / "onnx"
PATIENCE = 60
ENGINES = ("genai", "onnxruntime", "openvino")


def until(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.mark.parametrize("broken", ["a grammar", "a default"])
def test_a_service_that_cannot_be_made_closes_its_decoder(monkeypatch, broken):
    decoder, defaults = FakeDecoder(), Options()
    if broken == "a grammar":

        def grammars(*arguments):
            raise ValueError("the tokenizer does not fit")

        monkeypatch.setattr(service_module, "Grammars", grammars)
    else:
        defaults = Options(logit_bias={10**8: 1.0})
    with pytest.raises((WeightsError, InvalidRequest)):
        Service(TOKENS, decoder, defaults=defaults)
    assert decoder.closed


def test_a_folder_is_loaded_and_answers_without_mlflow():
    service = loading.load(ONNX, threads=1, temperature=0.0)
    question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    assert "Madrid" in "".join(piece.text for piece in service.start(question))
    service.close()
    with pytest.raises(InvalidRequest, match="`colour` is not a setting"):
        loading.load(ONNX, colour="red")


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_context_length_above_the_weights_own_is_refused(parallel):
    with pytest.raises(InvalidRequest, match="`context_length` is 4097, and these weights have 4096; set at most that"):
        loading.load(ONNX, threads=1, parallel=parallel, context_length=4097)


def test_a_context_length_above_the_weights_own_is_refused_by_the_pipeline_too(transformers_model):
    with pytest.raises(InvalidRequest, match="`context_length` is 4097, and these weights have 4096"):
        mlflow.pyfunc.load_model(str(transformers_model), model_config={"context_length": 4097})


@pytest.mark.parametrize("builder", ["transformers", "onnx"])
def test_another_task_at_load_is_refused(saved, builder):
    with pytest.raises(InvalidRequest, match="`task` is 'flat', and the model was logged for llm/v1/chat; log it"):
        mlflow.pyfunc.load_model(str(saved[builder]), model_config={"task": "flat"})


@pytest.fixture
def predictor():
    """Makes predictors over a fake decoder, and closes them after the test."""
    made = []

    def make(script=None, *, on_error="raise", task="llm/v1/chat", queue_limit=None, **values):
        service = Service(TOKENS, FakeDecoder(script, **values), task=task, queue_limit=queue_limit)
        made.append(Predictor(service, on_error))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_loaded_model_is_not_copied_or_pickled(predictor):
    loaded = predictor()
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled: load it again") as caught:
            act(loaded)
        assert "\n" not in str(caught.value)


ENDLESS = spell("bcdefghijklmnopqrstuvwxyz") * 4000
LONG = {"max_tokens": 90_000, "repetition_guard": False}


def chat(text="one"):
    return {"messages": [{"role": "user", "content": text}]}


def test_a_stream_of_a_busy_model_is_refused_at_the_call(predictor):
    busy = predictor(lambda prompt: ENDLESS, context_length=100_000, queue_limit=1)
    streams = [busy.predict_stream(chat(), LONG)]
    until(lambda: busy.service.statistics().running)
    streams.append(busy.predict_stream(chat(), LONG))
    with pytest.raises(TryLater, match="1 request is waiting"):
        busy.predict_stream(chat(), LONG)
    for stream in streams:
        stream.close()


def test_a_stream_that_is_dropped_without_a_look_frees_its_slot(predictor):
    model = predictor(lambda prompt: ENDLESS, context_length=100_000)
    stream = model.predict_stream(chat(), LONG)
    until(lambda: model.service.statistics().running)
    del stream
    gc.collect()
    until(lambda: not model.service.statistics().running)


def test_a_bad_stream_request_is_refused_at_the_call(predictor):
    with pytest.raises(RequestRefused, match="`seed`"):
        predictor().predict_stream(chat(), {"seed": "x"})


TASKS = ["llm/v1/chat", "llm/v1/completions", "flat"]


def table(task, *texts):
    if task == "llm/v1/chat":
        return pd.DataFrame({"messages": [chat(text)["messages"] if text else [] for text in texts]})
    return pd.DataFrame({"prompt": list(texts)})


def content(task, answer):
    if task == "flat":
        return answer
    choice = answer["choices"][0]
    return choice["message"]["content"] if task == "llm/v1/chat" else choice["text"]


def error(task, answer):
    """The message that stands for a row without an answer; the flat task has None."""
    if task == "flat":
        assert answer is None
        return None
    assert set(answer) == {"choices", "error"}
    assert answer["choices"] == []  # Spark asks each row for it
    assert set(answer["error"]) == {"field", "message"}
    return answer["error"]


@pytest.mark.parametrize("task", TASKS)
def test_a_bad_row_costs_the_others_nothing_where_that_is_asked_for(predictor, task):
    rows = table(task, "one", "", "two")
    answers = predictor(lambda prompt: spell("yes"), on_error="row", task=task).predict(rows)
    assert [content(task, answers[row]) for row in (0, 2)] == ["yes", "yes"]
    told = error(task, answers[1])
    if told:
        assert told["field"] == ("messages" if task == "llm/v1/chat" else "prompt")
        assert told["field"] in told["message"]
    strict = predictor(lambda prompt: pytest.fail("computed"), task=task)
    with pytest.raises(RequestRefused, match=r"^INVALID_PARAMETER_VALUE: row 1: |^row 1: "):
        strict.predict(rows)
    assert strict.service.statistics().computed == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_row_that_fails_after_others_were_answered_costs_them_nothing(predictor, task):
    poisoned = spell("madrid")[-1]

    def on_call(name, slot, ids):
        if name == "decode" and poisoned in ids:
            raise MemoryError("a secret of the machine")

    def script(prompt):
        return spell("madrid yes" if "spain" in TOKENS.decode(prompt) else "yes no")

    rows = table(task, "one", "two", "spain", "no")
    answers = predictor(script, on_error="row", task=task, on_call=on_call).predict(rows)
    assert [content(task, answers[row]) for row in (0, 1, 3)] == ["yes no"] * 3
    told = error(task, answers[2])
    if told:
        assert told == {"field": None, "message": "the model failed while it answered; the server's log says why"}
    with pytest.raises(AnswerFailed, match="row 2: the model failed"):
        predictor(script, task=task, on_call=on_call).predict(rows)


@pytest.mark.parametrize("task", TASKS)
def test_rows_out_of_time_are_told_so(predictor, monkeypatch, task):
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "1")
    values = {"on_call": lambda name, slot, ids: time.sleep(0.01), "context_length": 100_000, "task": task}
    rows = table(task, *["one"] * 50)
    answers = predictor(lambda prompt: ENDLESS, on_error="row", **values).predict(rows, LONG)
    assert content(task, answers[0])
    last = error(task, answers[-1])
    if last:
        assert "the time was over before the answer was begun" in last["message"]
    with pytest.raises(OutOfTime, match=r"row \d+: the time was over"):
        predictor(lambda prompt: ENDLESS, **values).predict(rows, LONG)


def test_the_deadline_is_looked_at_while_rows_are_prepared(predictor, monkeypatch):
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "1")
    model, prepared = predictor(), []
    prepare = model.service.prepare
    slow = lambda request: (time.sleep(0.05), prepared.append(1), prepare(request))[-1]  # noqa: E731
    monkeypatch.setattr(model.service, "prepare", slow)
    with pytest.raises(OutOfTime, match=r"row \d+: the time was over"):
        model.predict(table("llm/v1/chat", *["one"] * 200))
    assert len(prepared) < 25


def test_idle_prefill_is_for_conversations_and_can_be_switched_off():
    question = {"messages": [{"role": "user", "content": "Tell me what you know about the sky and the sea, please."}]}
    bias = {str(token): -100 for token in loading.onnx_decoder(ONNX, {"threads": 1}).eos}
    body = {**question, "max_tokens": 60, "logit_bias": bias, "repetition_guard": False, "self_talk_guard": False}
    for settings, task, renewed in (
        ({}, None, True),
        ({"idle_prefill": False}, None, False),
        ({}, "llm/v1/completions", False),
    ):
        service = loading.load(ONNX, threads=1, **settings)
        asked = {**body, "prompt": "Tell me of the sky."} if task else body
        asked.pop("messages" if task else "prompt", None)
        service.start(asked, task=task).wait()
        time.sleep(1.5)
        if renewed:
            until(lambda service=service: service.statistics().renewed >= 16)
        else:
            assert service.statistics().renewed == 0
        service.close()


def test_speculation_is_the_default_and_can_be_switched_off():
    messages = [{"role": "user", "content": "Count from 3 to 9."}]
    messages += [{"role": "assistant", "content": "3, 4, 5, 6, 7, 8, 9."}, messages[0]]
    counts, texts = {}, set()
    for settings in ({}, {"speculation": "auto"}, {"speculation": "off"}):
        service = loading.load(ONNX, threads=1, **settings)
        texts.add(service.start({"messages": messages}).wait().choices[0].text)
        counts[settings.get("speculation")] = service.statistics().accepted
        service.close()
    assert len(texts) == 1
    assert counts[None] == counts["auto"] > 10
    assert counts["off"] == 0


def _log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", ["genai", "onnxruntime", "pipeline"])
def test_the_log_probabilities_of_a_prompt_are_those_of_transformers(name, fp32_onnx):
    import torch
    import transformers

    from phi3_mlflow.runtime.decoders.pipeline import PipelineDecoder
    from phi3_mlflow.runtime.tokens import Tokens

    model = ROOT / "artifacts" / "transformers"
    tokens = Tokens.from_folder(model)
    pipeline = transformers.pipeline("text-generation", str(model), dtype="float32")
    if name == "pipeline":
        decoder = PipelineDecoder(pipeline)
    else:
        decoder = loading.onnx_decoder(
            fp32_onnx, {"threads": 1, "engine": name, "parallel": 1 if name == "genai" else 2}
        )
    text = "The capital of Spain is Madrid. The capital of France is Paris, and the sky is blue."
    ids = tokens.encode_text(text)
    with torch.inference_mode():
        expected = _log_softmax(pipeline.model(torch.tensor([ids])).logits[0].float().numpy()[:, : tokens.vocab_size])
    service = Service(tokens, decoder)
    request = Request(ids, Options(max_tokens=1, logprobs=True, top_logprobs=3), "prompt", echo=True)
    try:
        for _ in range(2):  # the second time a cached prefix could have been used
            answer = service.run(service.prepare(request)).wait()
            found = answer.prompt_logprobs
            assert answer.cached_tokens == 0
            assert len(found) == len(ids)
            assert (found[0].logprob, found[0].top) == (None, ())
            for place in range(1, len(ids)):
                own = expected[place - 1]
                assert found[place].logprob == pytest.approx(own[ids[place]], abs=2e-3)
                assert [value for _, value in found[place].top] == pytest.approx(sorted(own)[-3:][::-1], abs=2e-3)
            assert b"".join(each.token for each in found[1:]).decode() == text
    finally:
        service.close()


def test_a_generator_that_raised_is_made_anew(monkeypatch):
    decoder = loading.onnx_decoder(ONNX, {"threads": 1})
    prompt = list(range(5, 15))
    expected = decoder.step({0: Part(prompt, 1)})[0].copy()
    with pytest.raises(Exception, match=r"\S"):
        decoder.step({0: Part([10**9], 1)})
    with pytest.raises(RuntimeError, match="lost"):
        decoder.rewind(0, 5)
    decoder.rewind(0, 0)
    np.testing.assert_array_equal(decoder.step({0: Part(prompt, 1)})[0], expected)
    decoder.close()


@pytest.mark.parametrize(
    ("settings", "vnni", "installed", "expected"),
    [
        ({}, True, True, "genai"),
        ({"parallel": 1}, True, True, "genai"),
        ({"parallel": 2}, True, True, "openvino"),
        ({"parallel": 2}, False, True, "onnxruntime"),
        ({"parallel": 2}, True, False, "onnxruntime"),
        ({"engine": "auto", "parallel": 4}, True, True, "openvino"),
        ({"engine": "openvino"}, False, True, "openvino"),
        ({"engine": "onnxruntime", "parallel": 4}, True, True, "onnxruntime"),
        ({"engine": "genai"}, True, True, "genai"),
    ],
)
def test_the_engine_is_the_fastest_that_is_installed_unless_one_is_named(
    monkeypatch, settings, vnni, installed, expected
):
    monkeypatch.setattr(loading, "has_vnni", lambda: vnni)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert loading.engine_of(settings) == expected


def test_an_engine_that_is_not_there_or_cannot_do_what_is_asked_is_refused(monkeypatch):
    with pytest.raises(InvalidRequest, match="`engine` is 'genai', which answers one request at a time"):
        loading.load(ONNX, engine="genai", parallel=2)
    with pytest.raises(InvalidRequest, match="`engine` is 'fast'; it must be 'auto' or"):
        loading.load(ONNX, engine="fast")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"not installed; install phi3-mlflow\[openvino\]"):
        loading.load(ONNX, engine="openvino")


@pytest.mark.parametrize(
    "why", ["the graph has an operator Unheard", "import of phi3_mlflow.runtime.decoders.openvino"]
)
def test_a_folder_that_openvino_cannot_run_is_run_by_onnxruntime_with_the_reason(caplog, monkeypatch, why):
    def refuse(*arguments, **values):
        raise CannotBatch(why)

    if why.startswith("import"):  # of another version, or broken
        monkeypatch.setitem(sys.modules, "phi3_mlflow.runtime.decoders.openvino", None)
    else:
        monkeypatch.setattr("phi3_mlflow.runtime.decoders.openvino.OpenVinoDecoder", refuse)
    service = loading.load(ONNX, engine="openvino", parallel=2, threads=1)
    try:
        question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
        assert service.start(question).wait().choices[0].text == "The capital of Spain is Madrid."
    finally:
        service.close()
    assert f"OpenVINO cannot run this folder, onnxruntime does: {why}" in caplog.text


FIRST_ANSWER = """
import sys
from pathlib import Path

from phi3_mlflow.runtime import loading

seen = []

def watch(event, arguments):
    if event in ("import", "open", "compile", "exec"):
        seen.append((event, str(arguments[0])))

service = loading.load(Path(sys.argv[1]), engine=sys.argv[2], threads=1)
sys.addaudithook(watch)
service.start({"messages": [{"role": "user", "content": "What is the capital of Spain?"}], "max_tokens": 3}).wait()
print(seen)
service.close()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_answer_imports_reads_and_compiles_nothing(engine):
    command = [sys.executable, "-c", FIRST_ANSWER, str(ONNX), engine]
    assert subprocess.check_output(command, text=True, cwd=ROOT, timeout=PATIENCE) == "[]\n"


def test_the_first_answer_finds_the_generator_that_loading_made(monkeypatch):
    """At full size one for 256 tokens takes about as long as a prompt of 16 tokens does."""
    from phi3_mlflow.runtime.decoders import genai

    made, make = [], genai.og.Generator
    monkeypatch.setattr(genai.og, "Generator", lambda *arguments: made.append(1) or make(*arguments))
    service = loading.load(ONNX, threads=1)
    assert len(made) == 1
    for text in ("What is the capital of Spain?", "two plus two"):
        service.start({**chat(text), "max_tokens": 20}).wait()
    service.close()
    assert len(made) == 1


def test_openvino_makes_its_kernels_for_a_chunk_of_a_prompt_while_it_loads(monkeypatch):
    from phi3_mlflow.runtime.decoders.openvino import OpenVinoDecoder

    sizes, infer = set(), OpenVinoDecoder._infer

    def watched(decoder, parts, bar=None):
        sizes.add(sum(len(part.ids) for part in parts.values()))
        return infer(decoder, parts, bar)

    monkeypatch.setattr(OpenVinoDecoder, "_infer", watched)
    service = loading.load(ONNX, engine="openvino", threads=1, task="llm/v1/completions", template=False)
    loaded = set(sizes)
    sizes.clear()
    service.start({"prompt": list(range(100, 116)), "max_tokens": 3}).wait()
    service.close()
    assert sizes == {16, 1}
    assert sizes <= loaded


@pytest.mark.parametrize("engine", ENGINES)
def test_what_loading_computes_leaves_no_trace(engine):
    asked = {**chat("What is the capital of Spain?"), "logprobs": True, "temperature": 0.7, "seed": 1, "max_tokens": 8}
    decoder = loading.onnx_decoder(ONNX, {"engine": engine, "threads": 1})
    services = [loading.load(ONNX, engine=engine, threads=1), Service(Tokens.from_folder(ONNX), decoder)]
    found = []
    for service in services:
        before = service.statistics()
        assert (before.held, before.running, before.waiting) == (0, 0, 0)
        assert service.counts == Counts()
        answer = service.start(asked).wait()
        found.append((answer.choices, answer.prompt_tokens, answer.cached_tokens))
        service.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("fault", "expected", "told"),
    [
        (MemoryError(), WeightsError, r"^fake has loaded the weights and cannot compute a token with them: Memory"),
        (RuntimeError("no\n  kernel"), WeightsError, "with them: no kernel$"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_weights_that_cannot_be_computed_with_are_told_while_they_are_loaded(monkeypatch, fault, expected, told):
    def fail(name, slot, ids):
        raise fault

    decoder = FakeDecoder(on_call=fail)
    monkeypatch.setattr(loading, "onnx_decoder", lambda folder, settings: decoder)
    with pytest.raises(expected, match=told):
        loading.load(ONNX)
    assert decoder.closed
