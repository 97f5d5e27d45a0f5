"""The benchmarks' generator of random weights, on a small shape. Run with: python -m pytest tests/test_full_size.py"""

import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.batched import BatchedDecoder
from phi3_mlflow.runtime.decoders.genai import GenaiDecoder

pytest.importorskip("onnx")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import full_size


def test_a_folder_of_another_shape_runs_alike_in_both_decoders(tmp_path):
    shape = full_size.Shape(hidden=128, layers=6, heads=2, intermediate=256, vocabulary=2560, context=512)
    folder = full_size.make(tmp_path / "random", shape)
    manifest.verify(folder)
    prompt = np.random.default_rng(0).integers(3, 2000, 16).tolist()
    logits = []
    for decoder in (BatchedDecoder(folder, slots=2, threads=1), GenaiDecoder(folder, threads=1)):
        assert decoder.context_length == 512
        logits.append(decoder.step({0: Part(prompt, 1)})[0][0].copy())
        decoder.close()
    assert logits[0].shape == (2560,)
    assert np.std(logits[0]) > 0.1
    np.testing.assert_array_equal(*logits)


def test_the_full_size_is_phi3_minis():
    # 3.8 billion weights, by the model's card.
    shape = full_size.Shape()
    products = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    weights = shape.layers * sum(columns * rows for columns, rows in map(shape.product, products))
    weights += 2 * shape.vocabulary * shape.hidden
    assert weights == pytest.approx(3.8e9, rel=0.02)
    assert shape.head_size == 96
