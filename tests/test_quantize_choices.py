"""The choices of quantization: what the graph holds then, that it is the builder's own, and who can read it.

Run with: python -m pytest tests/test_quantize_choices.py
"""

import hashlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from families import SMALL

from phi3_mlflow.quantize import Choices, export, memory
from phi3_mlflow.quantize.exporter import _stand_in
from phi3_mlflow.quantize.process import run
from phi3_mlflow.quantize.sources import Source, read_json
from phi3_mlflow.runtime import loading
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.errors import Phi3Error

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"
CHOICES = {
    "rtn": {},
    "asymmetric with an output of 8 bits": {"symmetric": False, "output_bits": 8, "block_size": 64},
    "k_quant_mixed": {"method": "k_quant_mixed", "accuracy_level": 1, "block_size": 16},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """By the names of choices and of a model: the folder that it was quantized from, and the one that was written."""
    root = tmp_path_factory.mktemp("quantized")

    @cache
    def get(choice, model):
        source = EMBEDDED if model == "embedded" else SMALL[model].write(root / model / choice / "source")
        return source, export(source, root / model / choice / "onnx", **CHOICES[choice])

    return get


def products(folder):
    """Of each quantized matrix: its name, bits, block size, accuracy level and whether it has zero points."""
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            found = {entry.name: entry.i for entry in node.attribute}
            yield node.name, found["bits"], found["block_size"], found.get("accuracy_level", 0), len(node.input) > 3


@pytest.mark.parametrize(
    ("choice", "expected", "last"),
    [
        ("rtn", {(4, 32, 4, False)}, 4),
        ("asymmetric with an output of 8 bits", {(4, 64, 4, True), (8, 64, 4, True)}, 8),
        ("k_quant_mixed", {(4, 16, 1, True), (8, 16, 1, True)}, 8),
    ],
)
def test_the_matrices_are_as_chosen(quantized, choice, expected, last):
    found = list(products(quantized(choice, "embedded")[1]))
    assert {tuple(rest) for _, *rest in found} == expected
    assert next(bits for name, bits, *_ in found if "lm_head" in name) == last
    small = [name for name, bits, *_ in found if bits == 8 and "lm_head" not in name]
    assert bool(small) == (choice == "k_quant_mixed")


@pytest.mark.parametrize("choice", CHOICES)
def test_matrix_by_matrix_is_bit_by_bit_what_the_builder_does_at_once(quantized, choice, tmp_path):
    source, folder = quantized(choice, "embedded")
    _stand_in(Source(source, source, ""), read_json(source / "config.json"), tmp_path / "source")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", str(tmp_path / "source"), "-o", str(tmp_path / "onnx"), "-c", str(tmp_path / "cache")]
    run(
        [*command, "--extra_options", "windowed_kv_cache=false", *Choices(**CHOICES[choice]).options(tied=False)],
        "the builder",
    )
    ours, theirs = (onnx.load(place / "model.onnx").graph for place in (folder, tmp_path / "onnx"))
    assert tensors(ours) == tensors(theirs)
    assert nodes(ours) == nodes(theirs)


def nodes(graph):
    return sorted(node.SerializeToString() for node in graph.node)


def tensors(graph):
    return {
        each.name: (each.data_type, tuple(each.dims), hashlib.sha256(each.raw_data).digest())
        for each in graph.initializer
    }


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", ["embedded", "Phi-4-mini"])
def test_plain_onnxruntime_genai_reads_the_folder_and_finds_the_decoders_logits(quantized, choice, model):
    """Phi-4-mini shares its embeddings with the output matrix, whatever that is rounded to."""
    folder = quantized(choice, model)[1]
    prompt = np.random.default_rng(0).integers(5, 250, 40).tolist()
    loaded = og.Model(str(folder))
    assert og.Tokenizer(loaded).encode("Hello world").size
    params = og.GeneratorParams(loaded)
    params.set_search_options(max_length=60, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(prompt)
    logits = generator.get_output("logits")[0, -1]
    generator.generate_next_token()
    assert int(generator.get_next_tokens()[0]) == int(logits.argmax())

    decoder = loading.onnx_decoder(folder, {"context_length": 64})
    for at in range(0, len(prompt), decoder.chunk):
        found = decoder.step({0: Part(prompt[at : at + decoder.chunk], 1)})[0][-1]
    decoder.close()
    assert np.abs(found - logits).max() < 0.1 * logits.std()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "gptq"}, "`method` is 'gptq'; it must be one of rtn, k_quant, k_quant_mixed"),
        ({"block_size": True}, "`block_size` is True; it must be one of 16, 32, 64, 128, 256"),
        ({"output_bits": 6}, "`output_bits` is 6; it must be one of 4, 8"),
        ({"symmetric": "no"}, "`symmetric` is 'no'; it must be one of True, False"),
        ({"method": "k_quant", "symmetric": True}, "k_quant always has zero points"),
        ({"method": "k_quant_mixed", "output_bits": 4}, "k_quant_mixed keeps the output matrix in 8"),
        ({"precision": "fp32", "block_size": 16}, "which rounds nothing: leave the other choices out"),
    ],
)
def test_choices_that_do_not_exist_or_do_not_go_together_are_refused(choices, message):
    with pytest.raises(Phi3Error, match=message):
        Choices(**choices)


def test_blocks_that_cannot_be_packed_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(
        Phi3Error, match=r"`block_size` is 64, which makes 3 blocks of this model's hidden_size \(192\)"
    ):
        export(EMBEDDED, tmp_path / "onnx", method="k_quant", block_size=64)


def test_too_little_memory_is_told_with_both_numbers():
    with pytest.raises(Phi3Error, match=r"takes about 1048576\.0 GiB of memory, and [\d.]+ [GM]iB are available"):
        memory.check(2**50)
    memory.check(2**20)


def test_the_memory_that_is_needed_grows_with_what_is_asked():
    config = read_json(EMBEDDED / "config.json")

    def of(choices, **others):
        return memory.needed(EMBEDDED, config, choices, **{"merged": False, "tokens": 0, **others})

    assert of(Choices()) < of(Choices(method="k_quant"))
    assert of(Choices()) < of(Choices(), tokens=2304)
    assert of(Choices("fp32")) < of(Choices("fp32"), merged=True)
