"""The embedded model through OpenVINO, against transformers, onnxruntime and itself.

Run with: python -m pytest tests/test_openvino.py
"""

import gc
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.decoders.base import CannotBatch, Growth, Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.blocks import OutOfBlocks
from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens

# Not importorskip: it would import openvino itself, which reports it.
if importlib.util.find_spec("openvino") is None:
    pytest.skip("needs the extra openvino", allow_module_level=True)
from phi3_mlflow.runtime.decoders import openvino, openvino_attention
from phi3_mlflow.runtime.decoders.openvino import OpenVinoDecoder, block_bytes, check_budget

ROOT = Path(__file__).resolve().parent.parent
ONNX = ROOT / "artifacts" / "onnx"
PATIENCE = 300  # seconds
BLOCK_BYTES = block_bytes(4, 6, 32, "u8")  # of the embedded model: 4 layers, 6 heads of 32 numbers
# A step of a single token goes through another kernel than a step of several, where weights are multiplied as floats.
# Its rounding shows in the logits, and in what 8 bits make of the keys and values; both as shares of the spread.
ROUNDING = {"u8": 0.01, "f32": 1e-4}


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, 2000, count).tolist()


def read(decoder, slot, prompt, start=0, chunk=16):
    """The logits behind a prompt that is read in chunks."""
    for at in range(start, len(prompt), chunk):
        part = prompt[at : at + chunk]
        found = decoder.step({slot: Part(part, int(at + len(part) == len(prompt)))})
    return found[slot][0]


def fresh(decoder, slot, prompt, chunk=16):
    decoder.rewind(slot, 0)
    return read(decoder, slot, prompt, chunk=chunk)


def same(found, expected, rounding):
    assert np.abs(found - expected).max() <= rounding * np.std(expected)


@pytest.fixture(scope="module", params=["u8", "f32"])
def kept(request):
    """A decoder of four slots, for each way to keep keys and values."""
    decoder = OpenVinoDecoder(ONNX, slots=4, context_length=1024, threads=1, kv_cache=request.param)
    decoder.rounding = ROUNDING[request.param]
    yield decoder
    decoder.close()


@pytest.fixture
def decoder(kept):
    """The same, with slots that hold nothing."""
    for slot in range(kept.slots):
        kept.rewind(slot, 0)
    return kept


@pytest.fixture(scope="module")
def exact(fp32_onnx):
    """The fp32 export with keys and values in fp32, whose logits are to be those of transformers."""
    decoder = OpenVinoDecoder(fp32_onnx, slots=2, threads=1, kv_cache="f32")
    yield decoder
    decoder.close()


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, to be changed."""
    return shutil.copytree(ONNX, tmp_path / "onnx")


def transformers_logits(folder, prompt):
    """(tokens, vocabulary) logits."""
    torch = pytest.importorskip("torch")
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()


def test_the_fp32_export_gives_transformers_logits_also_behind_the_sliding_window(exact):
    prompt = ids(3000, 0)  # the window is 2047 long
    expected = transformers_logits(ROOT / "artifacts" / "transformers", prompt)
    exact.rewind(0, 0)
    for start in range(0, 3000, 100):
        found = exact.step({0: Part(prompt[start : start + 100], 100)})[0]
        same(found, expected[start : start + 100], 1e-4)


def test_greedy_answers_of_the_fp32_export_are_those_of_transformers(exact):
    torch = pytest.importorskip("torch")
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(ROOT / "artifacts" / "transformers", dtype=torch.float32).eval()
    tokens = Tokens.from_folder(ONNX)
    lines = (ROOT / "artifacts" / "questions.jsonl").read_text("utf-8").splitlines()
    for line in lines[:: len(lines) // 10]:
        prompt = tokens.encode_chat(json.loads(line)["messages"])
        given = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        logits, answer = fresh(exact, 0, prompt), []
        while len(answer) < len(given):
            answer.append(int(logits.argmax()))
            logits = exact.step({0: Part([answer[-1]], 1)})[0][0]
        assert answer == given


def test_the_int4_model_gives_onnxruntimes_logits_but_for_what_it_rounds(decoder):
    # onnxruntime rounds the activations to 8 bits at accuracy level 4; it is 0.1 off transformers itself.
    batched = BatchedDecoder(ONNX, slots=1, threads=1)
    for seed in range(4):
        prompt = ids(50, seed)
        same(fresh(decoder, seed, prompt), fresh(batched, 0, prompt), 0.2)
    batched.close()


def test_rows_that_decode_together_get_what_each_gets_alone(decoder):
    prompts = [ids(length, length) for length in (5, 64, 130, 33)]
    for slot, prompt in enumerate(prompts):
        read(decoder, slot, prompt)
    together = decoder.step({slot: Part([7], 1) for slot in range(4)})
    for count in (2, 3):
        for slot, prompt in enumerate(prompts):
            decoder.rewind(slot, len(prompt))
        fewer = decoder.step({slot: Part([7], 1) for slot in range(count)})
        for slot, logits in fewer.items():
            np.testing.assert_array_equal(logits, together[slot])
    for slot, prompt in enumerate(prompts):
        decoder.rewind(slot, len(prompt))
        same(decoder.step({slot: Part([7], 1)})[slot], together[slot], decoder.rounding)


def test_prompts_and_rows_in_one_step_get_what_they_get_in_separate_ones(decoder):
    prompts = [ids(length, length) for length in (40, 90, 16, 70)]
    alone = [fresh(decoder, slot, prompt) for slot, prompt in enumerate(prompts)]
    parts = {0: Part([7], 1), 1: Part([8], 1)}
    rows = decoder.step(parts)
    for slot, length in ((0, 40), (1, 90), (2, 0), (3, 60)):
        decoder.rewind(slot, length)
    mixed = decoder.step(parts | {2: Part(prompts[2], 2), 3: Part(prompts[3][60:], 1)})
    assert {slot: len(logits) for slot, logits in mixed.items()} == {0: 1, 1: 1, 2: 2, 3: 1}
    for slot, expected in {0: rows[0][-1], 1: rows[1][-1], 2: alone[2], 3: alone[3]}.items():
        same(mixed[slot][-1], expected, 1e-4)


def test_logits_are_those_of_the_last_positions_and_only_of_the_slots_that_want_some(decoder):
    prompt = ids(20, 1)
    every = decoder.step({2: Part(prompt, 20)})[2]
    assert every.shape == (20, 2112)
    assert every.dtype == np.float32
    decoder.rewind(2, 0)
    found = decoder.step({0: Part(prompt[:3]), 2: Part(prompt, 5), 1: Part(prompt[:4], 4)})
    assert sorted(found) == [1, 2]
    same(found[2], every[-5:], 1e-4)
    same(found[1], every[:4], 1e-4)
    assert decoder.step({0: Part([7])}) == {}


def test_logits_stay_what_they_are_when_the_next_step_runs(decoder):
    first = decoder.step({0: Part([5], 1)})[0]
    before = first.copy()
    decoder.step({0: Part(ids(60, 0), 60)})
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("chunk", [2, 16, 33])
def test_the_size_of_the_chunks_does_not_show(decoder, chunk):
    prompt = ids(100, 2)
    same(fresh(decoder, 0, prompt, chunk), fresh(decoder, 1, prompt, 100), 1e-4)


def test_rewinding_gives_what_a_fresh_run_gives(decoder):
    prompt, other = ids(100, 0), ids(100, 1)
    expected = fresh(decoder, 0, prompt)
    for length in (96, 64, 48, 32, 16, 0):
        decoder.rewind(0, length)
        read(decoder, 0, [*prompt[:length], *other], length)
        decoder.rewind(0, length)
        np.testing.assert_array_equal(read(decoder, 0, prompt, length), expected)


def test_a_copied_prefix_gives_what_a_fresh_run_gives_and_both_go_on_alone(decoder):
    prompt, other = ids(100, 0), ids(100, 1)
    expected = fresh(decoder, 0, prompt)
    expected_other = {
        length: fresh(decoder, 1, [*prompt[:length], *other]).copy() for length in (16, 32, 48, 80, 96, 100)
    }
    for length, logits in expected_other.items():
        fresh(decoder, 0, prompt)
        decoder.copy(0, 1, length)
        decoder.copy(1, 2, length)
        # All three write to the block in which the prefix ends, in an order that lets each of them spoil the others.
        decoder.rewind(0, length)
        np.testing.assert_array_equal(read(decoder, 1, [*prompt[:length], *other], length), logits)
        if length < 100:
            np.testing.assert_array_equal(read(decoder, 0, prompt, length), expected)
        np.testing.assert_array_equal(read(decoder, 2, [*prompt[:length], *other], length), logits)


def test_any_mix_of_steps_copies_and_rewinds_equals_fresh_runs(decoder):
    rng = random.Random(3)
    sequences = [[] for _ in range(4)]
    for _ in range(60):
        action, slot = rng.random(), rng.randrange(4)
        if action < 0.2:
            length = rng.randint(0, len(sequences[slot]))
            decoder.rewind(slot, length)
            del sequences[slot][length:]
        elif action < 0.4 and (source := rng.randrange(4)) != slot:
            length = rng.randint(0, len(sequences[source]))
            decoder.copy(source, slot, length)
            sequences[slot] = sequences[source][:length]
        else:
            # Two tokens or more, which one kernel takes; single tokens have a test of their own.
            chosen = rng.sample(range(4), rng.randint(1, 4))
            parts = {each: Part(ids(rng.randint(2, 40), rng.randrange(10**6)), 1) for each in chosen}
            decoder.step(parts)
            for each, part in parts.items():
                sequences[each] += part.ids
    for slot, sequence in enumerate(sequences):
        held = decoder.step({slot: Part([50, 51], 1)})[slot][0]
        same(held, fresh(decoder, slot, [*sequence, 50, 51], 32), 1e-3)


def test_a_shared_prefix_takes_its_room_once():
    decoder = OpenVinoDecoder(ONNX, slots=4, context_length=256, threads=1, kv_budget=10 * BLOCK_BYTES)
    assert decoder.capacity == 320
    prefix = ids(192, 0)
    read(decoder, 0, prefix)
    assert decoder.room([Growth(0, 192, 256), Growth(1, 0, 64)]) == 320
    assert decoder.room([Growth(0, 192, 225), Growth(0, 192, 225)]) == 192 + 4 * 32
    for slot in (1, 2, 3):
        decoder.copy(0, slot, 192)
    assert decoder.room(Growth(slot, 192, 224) for slot in range(4)) == 320
    decoder.step({slot: Part(ids(32, slot)) for slot in range(4)})
    assert decoder.room(Growth(slot, 224, 224) for slot in range(4)) == 320
    with pytest.raises(OutOfBlocks):
        decoder.step({0: Part([7])})
    decoder.rewind(3, 192)
    decoder.step({0: Part([7])})
    decoder.close()


def test_the_budget_says_how_many_tokens_fit():
    decoder = OpenVinoDecoder(ONNX, slots=2, context_length=100, threads=1, kv_budget=5 * BLOCK_BYTES + 1)
    assert (decoder.capacity, decoder.context_length) == (160, 100)
    decoder.close()
    with pytest.raises(InvalidRequest, match="`kv_budget` is 1000 bytes, and one sequence of 100 tokens takes 245760"):
        OpenVinoDecoder(ONNX, slots=2, context_length=100, threads=1, kv_budget=1000)
    check_budget(ONNX, 100, 4 * BLOCK_BYTES)
    with pytest.raises(InvalidRequest, match="`kv_budget`"):
        check_budget(ONNX, 100, 4 * BLOCK_BYTES, "f32")


@pytest.mark.parametrize(("kv_cache", "most"), [("u8", 320), ("f32", 1024)])
def test_blocks_take_the_memory_that_is_counted_for_them(kv_cache, most):
    decoder = OpenVinoDecoder(ONNX, slots=2, context_length=64, threads=1, kv_cache=kv_cache)
    held = sum(cache.byte_size for cache in decoder._caches)
    assert held == decoder.capacity // 32 * block_bytes(4, 6, 32, kv_cache)
    assert held // decoder.capacity <= most * 4 * 6 * 2
    decoder.close()


def test_a_machine_that_keeps_keys_and_values_in_another_way_is_refused_for_the_sake_of_the_budget(monkeypatch):
    monkeypatch.setattr(openvino, "block_bytes", lambda *sizes: BLOCK_BYTES - 1)
    with pytest.raises(CannotBatch, match=r"takes 61440 bytes for a block .* and 61439 are reckoned with"):
        OpenVinoDecoder(ONNX, slots=1, context_length=64, threads=1)


def test_where_a_step_fails_the_sequences_are_what_they_were():
    decoder = OpenVinoDecoder(ONNX, slots=3, context_length=128, threads=1, kv_budget=5 * BLOCK_BYTES)
    prompts = [ids(70, 0), ids(40, 1)]
    expected = [fresh(decoder, slot, [*prompt, 7, 8]) for slot, prompt in enumerate(prompts)]
    for slot, prompt in enumerate(prompts):
        decoder.rewind(slot, len(prompt))
    good = {0: Part([7, 8], 1), 1: Part([7, 8], 1)}
    for wrong, error in (
        ({2: Part([5], 1)}, OutOfBlocks),
        ({0: Part(ids(59, 2), 1)}, ValueError),
        ({0: Part([[5, 6]], 1), 1: Part([[5, 6]], 1)}, RuntimeError),  # refused by OpenVINO
    ):
        with pytest.raises(error):
            decoder.step(good | wrong)
        assert [len(each) for each in decoder._ids] == [70, 40, 0]
    found = decoder.step(good)
    for slot, logits in enumerate(expected):
        same(found[slot][0], logits, 1e-4)
    decoder.close()


def test_weights_and_sequences_live_as_long_as_the_decoder_and_no_longer(folder):
    first = OpenVinoDecoder(folder, slots=1, context_length=64, threads=1)
    expected = first.step({0: Part([5, 6, 7], 1)})[0]
    for _ in range(3):
        other = OpenVinoDecoder(folder, slots=2, context_length=64, threads=1)
        gc.collect()
        np.testing.assert_array_equal(other.step({1: Part([5, 6, 7], 1)})[1], expected)
        other.close()
        del other
        gc.collect()
    first.rewind(0, 0)
    np.testing.assert_array_equal(first.step({0: Part([5, 6, 7], 1)})[0], expected)
    first.close()
    if Path("/proc/self/maps").exists():
        gc.collect()
        assert str(folder) not in Path("/proc/self/maps").read_text("utf-8")


def test_other_threads_run_while_a_step_is_computed(decoder):
    """Python's lock is given back: a thread gets on meanwhile."""
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    prompt = ids(900, 0)
    counts = []
    thread.start()
    try:
        for _ in range(3):
            decoder.rewind(0, 0)
            before = counted[0]
            decoder.step({0: Part(prompt)})
            counts.append(counted[0] - before)
    finally:
        done.set()
        thread.join(PATIENCE)
    assert max(counts) > 1000


def configure(folder, **values):
    path = folder / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["model"]["decoder"] |= values
    path.write_text(json.dumps(config), "utf-8")
    manifest.write(folder)


def test_six_requests_that_share_a_long_prefix_run_together_where_two_others_have_room():
    decoder = OpenVinoDecoder(ONNX, slots=6, context_length=1024, threads=1, kv_budget=2 * 32 * BLOCK_BYTES)
    service = Service(Tokens.from_folder(ONNX), decoder, renew_after=None)
    system = {"role": "system", "content": "You are a helpful assistant. " * 120}
    cities = {"Spain": "Madrid", "France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo", "Cuba": "Hav"}
    seen, step, asked = [], decoder.step, threading.Event()

    def watched(parts):
        assert asked.wait(PATIENCE)
        seen.append(service.statistics())
        return step(parts)

    decoder.step = watched
    questions = [{"role": "user", "content": f"What is the capital of {country}?"} for country in cities]
    bodies = [{"messages": [system, question], "max_tokens": 150} for question in questions]
    runs = [service.start(body) for body in bodies]
    asked.set()
    answers = [run.wait() for run in runs]
    assert all(3 * (answer.prompt_tokens + 149) > decoder.capacity for answer in answers)
    assert max(now.running for now in seen) == 6
    assert all(now.used <= now.held <= now.capacity == 2048 for now in seen)
    counts = service.statistics()
    assert counts.computed < 1200  # one prefix, and what is behind it
    assert counts.held == 32 * len({block for table in decoder._blocks.tables for block in table})
    together = [answer.choices[0].text for answer in answers]
    assert together == [service.start(body).wait().choices[0].text for body in bodies]
    service.close()


def test_a_service_over_it_gives_each_request_the_answer_it_gets_alone():
    decoder = OpenVinoDecoder(ONNX, slots=3, context_length=256, threads=1, kv_budget=12 * BLOCK_BYTES)
    service = Service(Tokens.from_folder(ONNX), decoder)
    countries = {"Spain": "Madrid", "France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo"}
    questions = [f"What is the capital of {country}?" for country in countries]
    system = {"role": "system", "content": "You are a helpful assistant. " * 4}
    requests = [
        Request((*before, {"role": "user", "content": question}), Options(max_tokens=12))
        for question in questions
        for before in ((), (system,))
    ]
    alone = [service.run(service.prepare(request)).wait().choices[0].text for request in requests]
    for city, text in zip(countries.values(), alone[::2], strict=True):
        assert city in text
    rows = dict(service.run_table([service.prepare(request) for request in requests]))
    assert [rows[place].choices[0].text for place in range(len(requests))] == alone
    service.close()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"session_options": {"provider_options": [{"cuda": {}}]}}, "asks for cuda"),
        ({"sliding_window": {"window_size": 2047}}, "has a section `sliding_window`"),
        ({"num_hidden_layers": 3}, "past_key_values.3.key, past_key_values.3.value are not"),
        ({"num_hidden_layers": 5}, "has 4 layers with 6 heads of 32 for keys, and genai_config.json says 5, 6 and 32"),
        ({"head_size": 16}, "genai_config.json says 4, 6 and 16"),
        ({"filename": "other.onnx"}, "cannot be read: FileNotFoundError"),
        ({"inputs": {}}, "is not as expected"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_the_reason(folder, values, reason):
    configure(folder, **values)
    with pytest.raises(CannotBatch, match=reason):
        OpenVinoDecoder(folder, slots=2)


def change(folder, edit):
    """Saves the graph with what `edit` does to it."""
    onnx = pytest.importorskip("onnx")
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(onnx, model.graph)
    onnx.save(model, path)


def attribute(operator, name, value):
    """An edit: the attribute of all nodes with this operator."""

    def edit(onnx, graph):
        for node in graph.node:
            if node.op_type == operator:
                kept = [each for each in node.attribute if each.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


def other_operator(old, new):
    def edit(onnx, graph):
        for node in graph.node:
            if node.op_type == old:
                node.op_type = new

    return edit


def one_less(onnx, graph):
    """The lengths less two, where they were less one."""
    (constant,) = (node for node in graph.node if node.output[0] == "/model/constants/INT64/[1]")
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "two"))
    for node in graph.node:
        if node.op_type == "Sub":
            node.input[1] = "two"
    assert constant is not None


def another_input(onnx, graph):
    next(node for node in graph.node if node.op_type == "GroupQueryAttention").input[10] = "cos_cache"


def fewer(place):
    """An edit: one number in the place of the first product's weights, of which OpenVINO would read on."""

    def edit(onnx, graph):
        node = next(node for node in graph.node if node.op_type == "MatMulNBits")
        if place == 3:
            node.input.append("zeros")
        kind = np.float32 if place == 2 else np.uint8
        node.input[place] = "too few"
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, kind), "too few"))

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (fewer(2), r"has weights of the shape \[1\] for \[576, 6, 1\] numbers"),
        (fewer(3), r"has weights of the shape \[1\] for \[576, 6, 1\] numbers"),
        (other_operator("Sigmoid", "Tanh"), "node /model/layers.0/mlp/act_fn/Sigmoid is a Tanh, which is not known"),
        (
            attribute("GroupQueryAttention", "softcap", 30.0),
            "GroupQueryAttention is a com.microsoft.GroupQuery.*softcap",
        ),
        (attribute("GroupQueryAttention", "rotary_interleaved", 1), "whose attribute rotary_interleaved is 1"),
        (attribute("GroupQueryAttention", "do_rotary", 0), "whose attribute do_rotary is 0"),
        (attribute("GroupQueryAttention", "num_heads", 3), "with 576 numbers for 3 and 6 heads"),
        (attribute("GroupQueryAttention", "new_in_2030", 1), "whose attribute new_in_2030 is 1"),
        (
            attribute("MatMulNBits", "bits", 8),
            "qkv_proj/MatMul_Q4 is a com.microsoft.MatMulNBits, whose attribute bits is 8",
        ),
        (attribute("SimplifiedLayerNormalization", "axis", 0), "whose attribute axis is 0"),
        (one_less, "are not the rows' lengths"),
        (another_input, "whose input cos_cache is not known here"),
    ],
)
def test_what_of_a_graph_is_not_known_is_refused_by_its_name(folder, edit, reason):
    change(folder, edit)
    with pytest.raises(CannotBatch, match=reason):
        OpenVinoDecoder(folder, slots=2)


def test_a_file_that_is_cut_off_or_is_something_else_is_refused(folder):
    whole = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(whole[:-1])
    with pytest.raises(CannotBatch, match=r"model\.onnx\.data is cut off"):
        OpenVinoDecoder(folder, slots=1)
    graph = (folder / "model.onnx").read_bytes()
    for content in (graph[:-1], b"", b"\x00\xff" * 50, graph[100:]):
        (folder / "model.onnx").write_bytes(content)
        with pytest.raises(CannotBatch, match=r"model\.onnx"):
            OpenVinoDecoder(folder, slots=1)


def test_weights_outside_the_folder_are_not_read(folder):
    def edit(onnx, graph):
        for entry in graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../onnx/model.onnx.data"

    change(folder, edit)
    with pytest.raises(CannotBatch, match="which is not a file beside it"):
        OpenVinoDecoder(folder, slots=1)


def test_weights_with_zero_points_are_read(folder):
    def edit(onnx, graph):
        random = np.random.default_rng(0)
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                values = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
                count = values["N"] * values["K"] // values["block_size"] // 2
                zeros = random.choice(np.array([0x88, 0x89, 0x98, 0x87, 0x78], np.uint8), count)
                graph.initializer.append(onnx.numpy_helper.from_array(zeros, f"{node.name}.zeros"))
                node.input.append(f"{node.name}.zeros")
        # So that onnxruntime does not round the activations.
        attribute("MatMulNBits", "accuracy_level", 0)(onnx, graph)

    change(folder, edit)
    decoder = OpenVinoDecoder(folder, slots=1, threads=1, kv_cache="f32")
    reference = BatchedDecoder(folder, slots=1, threads=1)
    expected = read(reference, 0, ids(16, 0))
    same(read(decoder, 0, ids(16, 0)), expected, 0.1)
    plain = BatchedDecoder(ONNX, slots=1, threads=1)
    assert np.abs(read(plain, 0, ids(16, 0)) - expected).max() > np.std(expected)
    for each in (decoder, reference, plain):
        each.close()


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A random Phi-3 with grouped heads, a window of 300 and LongRope's two tables, and its fp32 export."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx_ir")
    from transformers import Phi3Config, Phi3ForCausalLM

    from phi3_mlflow.quantize import export

    source, folder = ROOT / "artifacts" / "transformers", tmp_path_factory.mktemp("longrope")
    config = json.loads((source / "config.json").read_text("utf-8")) | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 96,
        "rope_parameters": {
            "long_factor": [1 + 0.5 * place for place in range(16)],
            "original_max_position_embeddings": 96,
            "rope_theta": 10000.0,
            "rope_type": "longrope",
            "short_factor": [1 + 0.02 * place for place in range(16)],
            "type": "longrope",
        },
        "sliding_window": 300,
    }
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**config)).save_pretrained(folder / "transformers")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / "transformers" / name)
    return folder / "transformers", export(folder / "transformers", folder / "onnx", precision="fp32")


def test_longrope_and_grouped_heads_give_transformers_logits_on_both_sides_of_the_switch(longrope):
    source, folder = longrope
    decoder = OpenVinoDecoder(folder, slots=2, threads=1, kv_cache="f32")
    prompt = ids(500, 0)
    for length in (90, 96, 97, 200, 310, 500):
        expected = transformers_logits(source, prompt[:length])
        same(fresh(decoder, 0, prompt[:length]), expected[-1], 1e-4)
    decoder.close()


def test_a_sequence_that_is_rewound_or_copied_over_the_switch_is_computed_anew(longrope):
    source, folder = longrope
    decoder = OpenVinoDecoder(folder, slots=2, threads=1, kv_cache="f32")
    prompt = ids(130, 1)
    short, long = (transformers_logits(source, prompt[:length]) for length in (96, 130))
    read(decoder, 0, prompt)
    decoder.copy(0, 1, 90)
    decoder.rewind(0, 90)
    # Both are shared as long as neither grows, and then computed anew.
    assert decoder.room([Growth(0, 90, 90), Growth(1, 90, 90)]) == 96
    assert decoder.room([Growth(0, 90, 96), Growth(1, 90, 96)]) == 192
    same(decoder.step({0: Part(prompt[90:96], 6)})[0], short[-6:], 1e-4)
    same(decoder.step({1: Part(prompt[90:96], 6), 0: Part(prompt[96:], 4)})[1], short[-6:], 1e-4)
    same(decoder.step({1: Part(prompt[96:], 4)})[1], long[-4:], 1e-4)
    decoder.close()


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_that_is_wrong_by_one_position_is_found_out(monkeypatch, off):
    model = openvino_attention.attention_model

    def wrong(heads):
        return model(replace(heads, window=heads.window + off))

    monkeypatch.setattr(openvino_attention, "attention_model", wrong)
    with pytest.raises(CannotBatch, match="attention is wrong for token 2086 with a window of 2047"):
        OpenVinoDecoder(ONNX, slots=1, threads=1)


@pytest.mark.parametrize("kind", ["positions", "block_indices", "past_lens"])
def test_a_graph_that_mixes_rows_or_positions_up_is_found_out(monkeypatch, kind):
    inputs = OpenVinoDecoder._inputs

    def spoilt(self, parts, starts):
        values = inputs(self, parts, starts)
        return values | ({kind: values[kind][::-1]} if len(parts) > 1 else {})

    monkeypatch.setattr(OpenVinoDecoder, "_inputs", spoilt)
    with pytest.raises(CannotBatch, match="gives other logits to rows that are computed in other company"):
        OpenVinoDecoder(ONNX, slots=2, threads=1)


def test_loading_shows_a_bar_where_it_takes_long_and_not_where_it_is_to_be_quiet(monkeypatch, capsys):
    monkeypatch.setattr(openvino, "_PROGRESS_AFTER", 1e-9)
    monkeypatch.setattr(openvino, "_PROGRESS_EVERY", 0)
    monkeypatch.setattr(openvino, "_POLL", 0)
    OpenVinoDecoder(ONNX, slots=1, context_length=64, quiet=True).close()
    assert capsys.readouterr().err == ""
    OpenVinoDecoder(ONNX, slots=1, context_length=64).close()
    assert "OpenVINO packs the weights: 00:0" in capsys.readouterr().err


WATCHED = """
import os, sys
from pathlib import Path

seen = []

def watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != "/dev/null":
            seen.append((event, path))
    elif event.startswith(("socket.", "subprocess.")) or event in (
        "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.mkdir", "os.rename"
    ):
        seen.append((event, arguments))

sys.addaudithook(watch)
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.openvino import OpenVinoDecoder

decoder = OpenVinoDecoder(Path(sys.argv[1]), slots=2, context_length=64, threads=1)
decoder.step({0: Part([5, 6], 1)})
decoder.close()
print(seen, "openvino_telemetry" in sys.modules, os.listdir(os.environ["HOME"]))
"""


def test_nobody_is_told_that_openvino_is_used(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, ONNX], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] False []\n"
