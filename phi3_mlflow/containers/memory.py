"""How much memory a container needs: what the loaded model was measured to hold, and room for its KV cache."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_mlflow.runtime.decoders.kv import position_bytes

from .errors import ContainerError

# Seconds that loading the model and one answer may take.
_MEASURING = 1800.0
# Tokens of KV cache for each answer that is computed at once, where nobody says: a question and a long answer.
_TOKENS = 1024
# The limit's part above what is asked for, and MiB at least: prompts as they are computed, bodies as they are read.
_ROOM, _ROOM_MIB = 1.2, 256
# The limit's part above the peak that was measured.
_ABOVE_PEAK = 1.05
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """What one copy of the server holds, in bytes.

    Attributes:
        loaded: the process with the loaded model.
        peak: the most that it held until then.
        kv: room for keys and values.
        measured: whether the first two were measured here, or given.
    """

    loaded: int
    peak: int
    kv: int
    measured: bool

    @property
    def request(self) -> int:
        """MiB to ask for: the loaded model and its KV cache when it is full."""
        return -(-(self.loaded + self.kv) // MIB)

    @property
    def limit(self) -> int:
        """MiB beyond which the container is ended: a fifth or 256 MiB above the request, and above the peak."""
        return max(int(_ROOM * self.request), self.request + _ROOM_MIB, int(_ABOVE_PEAK * self.peak) // MIB + 1)


@dataclass(frozen=True)
class Shape:
    """What the size of a KV cache follows from.

    Attributes:
        position: bytes that one token of one sequence takes, in float32.
        context_length: tokens of the longest sequence.
    """

    position: int
    context_length: int


def shape(weights: Path) -> Shape:
    """Reads genai_config.json or config.json.

    Raises:
        ContainerError: neither says how large the cache is.
    """
    genai = weights / "genai_config.json"
    path = genai if genai.is_file() else weights / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        if path == genai:
            decoder, context = config["model"]["decoder"], config["model"]["context_length"]
            sizes = decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]
        else:
            heads, context = config["num_attention_heads"], config["max_position_embeddings"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            sizes = config["num_hidden_layers"], config.get("num_key_value_heads") or heads, size
        return Shape(position_bytes(*sizes), int(context))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContainerError(f"{path} does not say how large the KV cache is: {error!r}") from error


def kv_budget(found: Shape, context_length: int | None, parallel: int) -> int:
    """Bytes for the KV cache where nobody says: 1,024 tokens for each answer at once, at least one whole sequence."""
    return found.position * max(_TOKENS * parallel if parallel > 1 else 0, context_length or found.context_length)


def measure(folder: Path, parallel: int | None, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Loads the model in a process of its own; what that holds then, and the most that it held, in bytes.

    Raises:
        ContainerError: it cannot be loaded with these settings, not in time, or this system does not tell.
    """
    asked = json.dumps({"parallel": parallel, "settings": dict(settings)})
    command = [sys.executable, "-m", "phi3_mlflow.containers.measure", str(folder)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_MEASURING, check=False)
    except subprocess.TimeoutExpired:
        raise ContainerError(f"the model was not loaded within {_MEASURING:g} seconds; give --memory") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise ContainerError(f"the model cannot be loaded to measure its memory: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["resident"] is None or found["peak"] is None:
        raise ContainerError("this system does not tell how much memory a process holds; give --memory")
    return int(found["resident"]), int(found["peak"])
