"""The one sequence of onnxruntime-genai. Run with: python -m pytest tests/test_genai_decoder.py"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens

FOLDER = Path(__file__).resolve().parent.parent / "artifacts" / "onnx"


@pytest.fixture
def decoder():
    return GenaiDecoder(FOLDER, threads=1)


def logits(decoder, ids):
    for start in range(0, len(ids), decoder.chunk):
        last = decoder.step({0: Part(ids[start : start + decoder.chunk], 1)})[0]
    return last.copy()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 2048])
def test_a_reserved_sequence_takes_so_many_tokens(decoder, length):
    ids = np.random.default_rng(length).integers(3, 2000, length).tolist()
    assert not decoder.reserve(0, length)
    found = logits(decoder, ids)
    assert np.array_equal(found, logits(GenaiDecoder(FOLDER, threads=1), ids))


@pytest.mark.parametrize(
    "search", [{"num_beams": 64}, {"num_return_sequences": 2}, {"batch_size": 9}, {"max_length": 0}]
)
def test_settings_of_the_runtimes_own_search_change_nothing(decoder, tmp_path, search):
    folder = shutil.copytree(FOLDER, tmp_path / "weights")
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"] |= search
    (folder / "genai_config.json").write_text(json.dumps(config))
    trust.check(folder)
    ids = np.random.default_rng(0).integers(3, 2000, 40).tolist()
    assert np.array_equal(logits(GenaiDecoder(folder, threads=1), ids), logits(decoder, ids))


def test_room_is_taken_as_it_is_needed_and_never_beyond_the_context(decoder):
    """At full size the keys and values of 4,096 tokens take 6 s and 3.2 GB as soon as there is a generator."""
    assert not decoder.reserve(0, 100)
    with pytest.raises(Exception, match="exceeds max length"):
        logits(decoder, [5] * 300)
    assert not decoder.reserve(0, 257)
    assert decoder.reserve(0, 1024)
    assert not decoder.reserve(0, decoder.context_length)
    assert decoder.reserve(0, decoder.context_length)
    logits(decoder, [5] * decoder.context_length)


def test_a_conversation_that_outgrows_its_room_is_read_again_and_answered_alike(decoder):
    tokens = Tokens.from_folder(FOLDER)

    def ask(service, length):
        body = {"messages": [{"role": "user", "content": "What is the capital of Spain? " + "yes " * length}]}
        run = service.start(body | {"max_tokens": 20})
        return run.wait().choices[0].text, run.answer.cached_tokens

    service, fresh = Service(tokens, decoder), []
    for length in (50, 100, 500):
        alone = Service(tokens, GenaiDecoder(FOLDER, threads=1))
        fresh.append(ask(alone, length)[0])
        alone.close()
    found = [ask(service, length) for length in (50, 100, 500, 500)]
    service.close()
    assert [text for text, _ in found] == [*fresh, fresh[-1]]
    cached = [count for _, count in found]
    assert cached[1] > 0, "within the room the prefix is used again"
    assert cached[2] == 0
    assert cached[3] > 0
