"""How much memory quantizing takes, and whether there is so much: told before it starts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_mlflow.layout import size
from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.decoders.kv import machine_memory, position_bytes
from phi3_mlflow.runtime.errors import Phi3Error

from .choices import Choices

_GiB = 2**30
# What torch, transformers and the builder hold before the first matrix.
_BASE = 0.8 * _GiB
# Bytes for each number of the matrix that is quantized, by the function that does it: measured on matrices of
# Phi-3-mini's size (benchmarks/rounding.py).
_WORKING = {"default": 11, "rtn": 25, "k_quant": 47, "k_quant_mixed": 47}


def needed(folder: Path, config: Mapping[str, Any], choices: Choices, *, merged: bool, tokens: int) -> int:
    """Bytes that the largest step holds, from the shapes in the safetensors; none of their numbers are read.

    The files themselves are mapped, and stay in memory only for as long as nothing else needs it.

    Args:
        folder: holds the safetensors.
        config: of the model, as transformers has it.
        choices: how they are quantized.
        merged: whether an adapter is merged into them.
        tokens: of the longest passage that the result is checked with; 0 for no check.

    Raises:
        WeightsError: a file is no safetensors.
    """
    _, tensors = trust.tensors.read(folder)
    sizes = [math.prod(tensor.shape) for tensor in tensors.values()]
    numbers, largest = sum(sizes), max(sizes)
    vocabulary, hidden, heads = (int(config[name]) for name in ("vocab_size", "hidden_size", "num_attention_heads"))
    written = numbers * _bytes_each(choices) + 4 * vocabulary * hidden  # the embeddings stay in float32
    building = (
        _BASE
        + _WORKING.get(choices.algorithm(bool(config.get("tie_word_embeddings"))), 8) * largest
        + (choices.precision == "int4") * written
    )
    merging = (_BASE + sum(path.stat().st_size for path in folder.glob("*.safetensors"))) * merged
    kept = position_bytes(int(config["num_hidden_layers"]), heads, hidden // heads) + 3 * 4 * vocabulary
    checking = (_BASE + 1.15 * written + kept * tokens) * bool(tokens)
    return int(max(building, merging, checking))


def check(most: int) -> None:
    """Compares what is needed with what there is.

    Raises:
        Phi3Error: there is too little.
    """
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    available = min(free, machine_memory() or free)
    if most > available:
        raise Phi3Error(
            f"quantizing these weights takes about {size(most)} of memory, and {size(available)} are available: close "
            "other programs, or do it on a larger machine"
        )


def _bytes_each(choices: Choices) -> float:
    """Of a weight that is written, with its part of a scale and a zero point."""
    if choices.precision == "fp32":
        return 4
    return (6 if choices.method == "k_quant_mixed" else 4) / 8 + 4.5 / choices.block_size
