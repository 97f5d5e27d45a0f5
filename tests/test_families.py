"""Both builders on small random models of the whole family, and of others: logits, answers, the contract, LongRope.

Run with: python -m pytest tests/test_families.py
"""

import json
import shutil
from functools import cache

import mlflow
import numpy as np
import pandas as pd
import pytest
from families import PHI2, SMALL, SWITCH
from scoring import HELLO, App, clean_error, serving_apart, shape
from test_contract import ANSWERED, REFUSED

from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.quantize import export
from phi3_mlflow.runtime import loading
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.longrope import Switching, switch_in, switch_of
from phi3_mlflow.runtime.decoders.pipeline import PipelineDecoder
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.tokens import Tokens

BUILDERS = {"onnx": onnx, "transformers": transformers}
# Of logits, as shares of their spread: fp32 on both sides (Phi-2's GELU is not quite the same); 8-bit keys and values.
CLOSE, ROUNDED = 3e-3, 0.3
LONGROPE = ("Phi-3-mini-128k", "Phi-4-mini")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name: a model's folder as transformers has it, and its fp32 export. Made when they are asked for."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def get(name):
        source = SMALL[name].write(root / name / "source")
        return source, export(source, root / name / "onnx", precision="fp32")

    return get


@pytest.fixture(scope="module")
def reference(folders):
    """By name: the model in transformers."""
    from transformers import AutoModelForCausalLM

    return cache(lambda name: AutoModelForCausalLM.from_pretrained(folders(name)[0]))


@pytest.fixture(scope="module")
def loaded(folders, tmp_path_factory):
    """By name and builder: the saved chat model, loaded with mlflow.pyfunc."""

    @cache
    def get(name, builder):
        path = tmp_path_factory.mktemp("models") / "model"
        folder = folders(name)[builder == "onnx"]
        BUILDERS[builder].save_model(path, folder, chat_template=SMALL[name].template)
        return mlflow.pyfunc.load_model(str(path))

    return get


def logits_of(model, ids):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(5, 250, count).tolist()


def fill(decoder, slot, prompt, wanted=1):
    """Prefills in chunks, and gives the last positions' logits."""
    for at in range(0, len(prompt), decoder.chunk):
        part = prompt[at : at + decoder.chunk]
        logits = decoder.step({slot: Part(part, min(wanted, len(part)))})[slot].copy()
    return logits


def close(found, expected, tolerance=CLOSE):
    assert np.abs(found - expected).max() <= tolerance * np.std(expected)


ENGINES = {
    "auto": {},
    "genai": {"engine": "genai"},
    "onnxruntime": {"parallel": 2, "engine": "onnxruntime"},
    "openvino": {"parallel": 2, "engine": "openvino"},  # or what follows it, where it does not know the graph
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_transformers(folders, reference, name, engine):
    decoder = loading.onnx_decoder(folders(name)[1], {"context_length": 512, "threads": 1, **ENGINES[engine]})
    for length in (20, SWITCH, SWITCH + 1, 150):
        prompt = ids(length)
        decoder.rewind(0, 0)
        expected = logits_of(reference(name), prompt)[-1]
        close(fill(decoder, 0, prompt)[-1], expected, ROUNDED if engine == "openvino" else CLOSE)
    decoder.close()


def test_one_request_at_a_time_of_longrope_does_not_hold_pythons_lock(folders):
    for name in LONGROPE:
        decoder = loading.onnx_decoder(folders(name)[1], {"context_length": 128})
        assert isinstance(decoder._decoder, BatchedDecoder)
        decoder.close()


@pytest.fixture(params=["genai", "onnxruntime", "pipeline"])
def switching(request, folders):
    """A decoder of two tables, over each backend."""
    source, folder = folders("Phi-4-mini")
    if request.param == "pipeline":
        import transformers as library

        decoder = Switching(PipelineDecoder(library.pipeline("text-generation", str(source))), SWITCH)
    else:
        decoder = loading.onnx_decoder(folder, {"context_length": 256, **ENGINES[request.param]})
    yield decoder
    decoder.close()


def test_a_sequence_is_computed_with_the_table_for_its_length_all_of_it(switching, reference):
    prompt = ids(SWITCH + 20)
    expected = {n: logits_of(reference("Phi-4-mini"), prompt[:n])[-1] for n in range(SWITCH - 2, len(prompt) + 1)}
    fill(switching, 0, prompt[: SWITCH - 3])
    for length in range(SWITCH - 2, SWITCH + 4):  # token by token over the switch, as an answer grows
        close(switching.step({0: Part([prompt[length - 1]], 1)})[0][-1], expected[length])
    close(fill(switching, 0, prompt[SWITCH + 3 :])[-1], expected[len(prompt)])
    switching.rewind(0, SWITCH - 3)  # a next prompt begins with what was computed for a longer one
    close(switching.step({0: Part([prompt[SWITCH - 3]], 1)})[0][-1], expected[SWITCH - 2])
    close(fill(switching, 0, prompt[SWITCH - 2 :])[-1], expected[len(prompt)])


def test_slots_on_both_sides_of_the_switch_are_decoded_together_and_copied(folders, reference):
    model = reference("Phi-4-mini")
    decoder = loading.onnx_decoder(folders("Phi-4-mini")[1], {"context_length": 256, **ENGINES["onnxruntime"]})
    prompt = ids(SWITCH + 10)
    fill(decoder, 0, prompt)
    decoder.copy(0, 1, 30)
    both = decoder.step({0: Part([7], 1), 1: Part([8], 1)})
    close(both[0][-1], logits_of(model, [*prompt, 7])[-1])
    close(both[1][-1], logits_of(model, [*prompt[:30], 8])[-1])
    decoder.rewind(0, 5)
    both = decoder.step({0: Part([9], 1), 1: Part([10], 1)})
    close(both[0][-1], logits_of(model, [*prompt[:5], 9])[-1])
    close(both[1][-1], logits_of(model, [*prompt[:30], 8, 10])[-1])
    decoder.close()


def test_a_step_that_fails_in_the_middle_of_a_turn_can_be_tried_again(folders, reference, monkeypatch):
    decoder = loading.onnx_decoder(folders("Phi-4-mini")[1], {"context_length": 256})
    prompt = ids(SWITCH + 1)
    fill(decoder, 0, prompt[:SWITCH])
    inner, calls = decoder._decoder.step, []

    def fails(parts):
        calls.append(parts)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return inner(parts)

    monkeypatch.setattr(decoder._decoder, "step", fails)
    with pytest.raises(RuntimeError):
        decoder.step({0: Part(prompt[SWITCH:], 1)})
    decoder.rewind(0, SWITCH)
    close(decoder.step({0: Part(prompt[SWITCH:], 1)})[0][-1], logits_of(reference("Phi-4-mini"), prompt)[-1])
    decoder.close()


def test_the_switch_is_read_from_the_graph_or_from_the_configuration(folders, tmp_path):
    folder = folders("Phi-4-mini")[1]
    assert switch_of(folder) == SWITCH
    assert switch_of(folders("Phi-3-medium")[1]) is None
    for name in ("config.json", "genai_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    assert switch_of(tmp_path) == SWITCH
    assert switch_in({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}) == 4096
    assert switch_in({"rope_scaling": None, "original_max_position_embeddings": 4096}) is None


MOST = 90  # tokens of an answer
UNGUARDED = {"repetition_guard": False, "self_talk_guard": False}


def answer(model, messages):
    (found,) = model.predict({"messages": messages, "max_tokens": MOST}, params=UNGUARDED)
    return found


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", SMALL)
def test_answers_are_those_of_transformers_generate(folders, reference, loaded, name, builder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders(name)[0])
    template = {"chat_template": SMALL[name].template} if SMALL[name].template else {}
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt", **template)
    model = reference(name)
    padding = list(range(len(tokenizer), model.config.vocab_size))  # logits of no token, which are never chosen here
    whole = model.generate(
        **prompt,
        max_new_tokens=MOST,
        do_sample=False,
        suppress_tokens=padding,
        # Its cache keeps what was computed with LongRope's first table when the second one is due.
        use_cache=name not in LONGROPE,
    )[0]
    expected = whole[prompt["input_ids"].shape[1] :].tolist()

    found = answer(loaded(name, builder), HELLO)

    assert found["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]
    assert found["usage"]["completion_tokens"] == len(expected)
    ours = Tokens.from_folder(folders(name)[0], chat_template=SMALL[name].template)
    assert found["choices"][0]["message"]["content"] == ours.decode(expected)


@pytest.mark.parametrize("builder", BUILDERS)
def test_prompts_that_share_a_beginning_get_the_same_answers_on_both_sides_of_the_switch(loaded, builder):
    model = loaded("Phi-4-mini", builder)
    start = "hello world " * 20
    asked = [[{"role": "user", "content": start + more}] for more in ("", "one two " * 40, "one")]
    fresh = []
    for messages in asked:
        answer(model, [{"role": "user", "content": "Spain"}])  # shares nothing
        fresh.append(answer(model, messages)["choices"])
    again = [answer(model, messages) for messages in (*asked, *asked)]
    assert [each["choices"] for each in again] == fresh * 2
    if builder == "onnx":
        assert all(each["custom_outputs"].get("cached_tokens") for each in again[1:])


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_contract_holds(loaded, builder):
    with serving_apart():
        app = App(loaded("Phi-4-mini", builder))
        for name, (body, field, fragment) in REFUSED.items():
            if "tool" in name:  # Phi-4-mini calls some: serve/test_tools.py
                continue
            status, text = app.post(body)
            error = clean_error(text)
            assert (status, fragment in error["message"]) == (400, True), (name, text)
            assert field is None or error["field"] == field, name
        for name, body in ANSWERED.items():
            status, text = app.post(body)
            assert status == 200, (name, text)


@pytest.mark.parametrize("name", ["Phi-3-mini-128k", "Phi-3-medium", "Phi-2", "Llama 3", "Qwen 2", "Qwen 3"])
def test_both_builders_give_the_same_shapes(loaded, name):
    cases = ["control tokens as text", "noncharacters", "sixteen choices", "a schema", "a regex", "null options"]
    with serving_apart():
        for case in cases:
            answers = [App(loaded(name, builder)).post(ANSWERED[case]) for builder in BUILDERS]
            assert [status for status, _ in answers] == [200, 200], answers
            shapes = [shape(json.loads(text)) for _, text in answers]
            for each in shapes[0] + shapes[1]:
                each["custom_outputs"].pop("cached_tokens", None)  # chunks are larger for transformers
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize("builder", BUILDERS)
def test_phi_2_takes_prompts_as_they_are_and_a_template_that_is_given(folders, tmp_path, builder):
    weights, save = folders("Phi-2")[builder == "onnx"], BUILDERS[builder].save_model
    with pytest.raises(WeightsError, match=r"no chat_template.*; give another one as `chat_template`"):
        save(tmp_path / "chat", weights)
    save(tmp_path / "raw", weights, task="flat", template=False)
    save(tmp_path / "given", weights, task="flat", chat_template=PHI2)
    raw, given = (mlflow.pyfunc.load_model(str(tmp_path / name)) for name in ("raw", "given"))
    options = {"max_tokens": 12, **UNGUARDED}
    expected = raw.predict(pd.DataFrame({"prompt": ["Instruct: hello world\nOutput:"]}), params=options)
    assert list(given.predict(pd.DataFrame({"prompt": ["hello world"]}), params=options)) == list(expected)
    with pytest.raises(mlflow.MlflowException, match="answers no chats"):
        raw.predict(pd.DataFrame({"messages": [json.dumps(HELLO)]}))
    save(tmp_path / "completions", weights, task="llm/v1/completions", template=False)
    model = mlflow.pyfunc.load_model(str(tmp_path / "completions"))
    (found,) = model.predict({"prompt": "Instruct: hello world\nOutput:", "max_tokens": 12}, params=UNGUARDED)
    assert found["choices"][0]["text"] == next(iter(expected))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize("builder", BUILDERS)
def test_what_cannot_be_used_is_refused_when_it_is_logged(folders, tmp_path, builder):
    weights = shutil.copytree(folders("Phi-2")[builder == "onnx"], tmp_path / "weights")
    save = BUILDERS[builder].save_model
    change(weights / "tokenizer_config.json", chat_template=PHI2)
    with pytest.raises(WeightsError, match="marks who speaks with text alone, which a user's text can imitate"):
        save(tmp_path / "model", weights)
    change(weights / "tokenizer_config.json", chat_template="{{ messages[0]['content'] | upper }}")
    with pytest.raises(WeightsError, match="changes the text of messages"):
        save(tmp_path / "model", weights)
    name, key = ("genai_config.json", "model") if builder == "onnx" else ("config.json", "model_type")
    change(weights / name, **{key: {"type": "gemma"} if builder == "onnx" else "gemma"})
    with pytest.raises(WeightsError, match=r"'gemma'.*it must be"):
        save(tmp_path / "model", weights)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["Phi-4-mini", "Phi-2"])
def test_mlflows_own_pipeline_has_the_same_tokens(folders, tmp_path, name):
    transformers.save_model(tmp_path / "model", folders(name)[0], chat_template=SMALL[name].template)
    native = mlflow.transformers.load_model(str(tmp_path / "model"))
    ours = Tokens.from_folder(tmp_path / "model" / "components" / "tokenizer")
    messages = [{"role": "user", "content": "\nDon't  say   12345 DON'T\n\n \u00e9\U0001f999"}]
    theirs = native.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages) == theirs


def test_int4_with_embeddings_that_are_tied_is_known(folders, tmp_path):
    folder = export(folders("Phi-4-mini")[0], tmp_path / "onnx")
    onnx.save_model(tmp_path / "model", folder)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert answer(model, HELLO)["usage"]["completion_tokens"] > 0
