"""The int4 ONNX model through onnxruntime-genai: one sequence, on any execution provider that the weights name."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import InvalidRequest, WeightsError
from .base import Decoder, Part, context_within
from .processor import ONNXRUNTIME_COST

# The telemetry of onnxruntime and onnxruntime-genai is on by default and is read when they are first imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og

# The runtime holds Python's global lock while it works. After a call of so many seconds or more the other threads get
# this share of its time; without it, an answer to /ping, which takes the lock several times, waits for as many calls.
_LONG, _REST = 0.01, 0.01
# A generator fills the keys and values of its whole length with zeros when it is made, at full size 6 s for 4,096
# tokens. So it gets the length of what is asked for: at first so many tokens, and this many times more where they do
# not do, because what it held is then lost.
_ROOM, _GROWTH = 256, 4


class GenaiDecoder(Decoder):
    """One Generator of onnxruntime-genai, driven token by token.

    Args:
        folder: holds genai_config.json, the ONNX file with its data, and tokenizer.json.
        context_length: at most this many tokens; None for all that the model has.
        threads: for the matrix products; None leaves it to onnxruntime (one for each physical core).

    Raises:
        WeightsError: the folder cannot be loaded.
        InvalidRequest: the context_length is more than the weights have.
    """

    engine = "onnxruntime-genai"
    slots = 1
    mixed = False
    cost = ONNXRUNTIME_COST
    switch = 0
    # A chunk is how long /ping and cancellation may wait, 0.5 to 0.7 s at full size on two cores. Chunks of 16 to 256
    # tokens were measured to be equally fast.
    chunk = 16

    def __init__(self, folder: Path, *, context_length: int | None = None, threads: int | None = None):
        try:
            model = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
            self.context_length = self.capacity = context_within(context_length, model["context_length"])
            config = og.Config(str(folder))
            # 0 is onnxruntime's own default. onnxruntime-genai's takes one thread on two cores.
            options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads or 0}}}}
            config.overlay(json.dumps(options))
            self._model = og.Model(config)
        except InvalidRequest:
            raise
        except Exception as error:  # onnxruntime-genai raises whatever its C++ side throws
            raise WeightsError(f"onnxruntime-genai cannot load {folder}: {' '.join(str(error).split())}") from error
        eos = model["eos_token_id"]
        self.eos = frozenset(eos if isinstance(eos, list) else [eos])
        self._generator: og.Generator | None = None
        self._room = 0  # tokens that were asked for; 0 before, when a generator has room for all

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        part = parts[0]
        try:
            self._append(part.ids)
            return {0: self._logits(part.logits)} if part.logits else {}
        except Exception:
            self._generator = None  # nobody knows what it holds
            raise

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        if self._generator is None:
            if length:
                raise RuntimeError("the sequence was lost when a step failed")
            return
        try:
            self._generator.rewind_to(length)
        except Exception:
            self._generator = None
            raise

    def reserve(self, slot: int, length: int) -> bool:
        """See Decoder."""
        if length <= self._room:
            return True
        while self._room < min(length, self.context_length):
            self._room = min(self._room * _GROWTH or _ROOM, self.context_length)
        self._generator = None
        return False

    def close(self) -> None:
        """See Decoder."""
        self._generator = None
        del self._model

    def _append(self, ids: Sequence[int]) -> None:
        if self._generator is None:
            params = og.GeneratorParams(self._model)
            params.set_search_options(
                max_length=self._room or self.context_length,
                # Whatever genai_config.json has for its own search: here it is one row, and chosen elsewhere.
                batch_size=1,
                num_beams=1,
                num_return_sequences=1,
                do_sample=False,
            )
            self._generator = og.Generator(self._model, params)
        start = time.perf_counter()
        self._generator.append_tokens(np.asarray([ids], dtype=np.int32))
        took = time.perf_counter() - start
        if took >= _LONG:
            time.sleep(took * _REST)

    def _logits(self, count: int) -> np.ndarray:
        assert self._generator is not None
        # The one gives the last position alone, the other those of all tokens that were appended together.
        logits = self._generator.get_logits() if count == 1 else self._generator.get_output("logits")
        return logits[0, -count:]
