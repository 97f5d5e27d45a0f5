"""llama.cpp's decoding speed at Q4_0, on a model of Phi-3-mini-4k's shape with random weights.

    CMAKE_BUILD_PARALLEL_LEVEL=2 .venv/bin/pip install --no-deps llama-cpp-python diskcache gguf    about 10 minutes
    python benchmarks/llama_cpp_peer.py      alone: prints a table with the machine; writes 2.2 GB on first use

engine.py measures it in alternation with this toolkit's engine, where it is installed.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from full_size import ROOT, Shape

from phi3_mlflow import machine

try:
    import gguf
except ModuleNotFoundError:
    gguf = None
try:
    import llama_cpp
except ModuleNotFoundError as error:
    if error.name != "llama_cpp":
        raise
    llama_cpp = None

FILE = ROOT / ".bench" / "full-size-q4_0.gguf"
CONCURRENCIES = (1, 2, 4, 8)
INSTALL = "CMAKE_BUILD_PARALLEL_LEVEL=2 pip install --no-deps llama-cpp-python diskcache gguf"

# Blocks as ggml-common.h has them. A Q4_0 weight is d * (q - 8), a Q6_K weight is d * scale * (q - 32).
_Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])  # 32 weights
_Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])  # 256 weights


def available() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    return llama_cpp is not None and gguf is not None


def make(file: Path = FILE, shape: Shape | None = None, seed: int = 0) -> Path:
    """Writes a GGUF of arch phi3; it appears under its name when it is complete.

    The types are those that llama.cpp's own quantizer chooses for Q4_0 (llama-quant.cpp): the output is Q6_K, the
    norms are F32, everything else is Q4_0. There is no tokenizer in it.

    Args:
        file: replaced if it is there.
        shape: of the model; hidden and intermediate in multiples of 256.
        seed: of the weights.

    Returns:
        The file.
    """
    shape = shape or Shape()
    random = np.random.default_rng(seed)
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(unfinished, "phi3")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for name, size, kind in _tensors(shape):
        rows = size if kind == gguf.GGMLQuantizationType.F32 else gguf.quant_shape_to_byte_shape(size, kind)
        dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.uint8)
        writer.add_tensor_info(name, rows, dtype, int(np.prod(rows)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, size, kind in _tensors(shape):
        writer.write_tensor_data(weight(size, kind, random))
    writer.close()
    return unfinished.rename(file)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], "gguf.GGMLQuantizationType"]]:
    """Name, rows and columns, and type of each."""
    kinds = gguf.GGMLQuantizationType
    hidden, wide = shape.hidden, shape.intermediate
    yield "token_embd.weight", (shape.vocabulary, hidden), kinds.Q4_0
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,), kinds.F32
        yield f"blk.{layer}.attn_qkv.weight", (3 * hidden, hidden), kinds.Q4_0
        yield f"blk.{layer}.attn_output.weight", (hidden, hidden), kinds.Q4_0
        yield f"blk.{layer}.ffn_norm.weight", (hidden,), kinds.F32
        yield f"blk.{layer}.ffn_up.weight", (2 * wide, hidden), kinds.Q4_0  # gate and up
        yield f"blk.{layer}.ffn_down.weight", (hidden, wide), kinds.Q4_0
    yield "output_norm.weight", (hidden,), kinds.F32
    yield "output.weight", (shape.vocabulary, hidden), kinds.Q6_K


def weight(size: tuple[int, ...], kind: "gguf.GGMLQuantizationType", random: np.random.Generator) -> np.ndarray:
    """Norms of one; the others spread by about 0.02, like untrained ones and like full_size.py's."""
    if kind == gguf.GGMLQuantizationType.F32:
        return np.ones(size, np.float32)
    count = int(np.prod(size))
    if kind == gguf.GGMLQuantizationType.Q4_0:
        blocks = np.empty(count // 32, _Q4_0)
        blocks["d"] = random.uniform(0.003, 0.006, blocks.size)
        blocks["qs"] = _bytes(random, blocks["qs"].shape)
    else:
        blocks = np.empty(count // 256, _Q6_K)
        blocks["d"] = random.uniform(1e-4, 2e-4, blocks.size)
        blocks["scales"] = random.integers(4, 12, blocks["scales"].shape)
        blocks["ql"] = _bytes(random, blocks["ql"].shape)
        blocks["qh"] = _bytes(random, blocks["qh"].shape)
    return blocks.view(np.uint8)


def _bytes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(random.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


class LlamaCpp:
    """A model loaded by llama.cpp, with its defaults: flash attention where it can, an f16 KV cache, weights repacked.

    Args:
        file: a GGUF.
        threads: as many as there are logical cores where left out.
    """

    def __init__(self, file: Path = FILE, threads: int | None = None):
        self.threads = threads or os.cpu_count() or 1
        self._random = np.random.default_rng(0)
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}: is it a complete GGUF? Remove it to have it made anew")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Gives the weights' memory back."""
        llama_cpp.llama_model_free(self._model)

    def rate(self, sequences: int, prompt: int, tokens: int) -> float:
        """Tokens per second in all, while some sequences decode together, greedily.

        Args:
            sequences: that decode in one batch.
            prompt: random tokens in each, prefilled before the time is taken.
            tokens: that each decodes, at least 2; the time runs from the end of the first step to that of the last.
        """
        context = _Context(self._model, sequences, prompt + tokens, self.threads)
        try:
            last = []
            for sequence in range(sequences):
                ids = self._random.integers(100, min(1000, self.vocabulary), prompt)
                rows = [(int(token), at, sequence) for at, token in enumerate(ids)]
                for start in range(0, prompt, context.batch):
                    logits = context.decode(rows[start : start + context.batch], self.vocabulary, every=False)
                last.append(int(logits[0].argmax()))
            ends = []
            for step in range(tokens):
                rows = [(token, prompt + step, sequence) for sequence, token in enumerate(last)]
                last = [int(row.argmax()) for row in context.decode(rows, self.vocabulary, every=True)]
                ends.append(time.perf_counter())
        finally:
            context.close()
        return sequences * (tokens - 1) / (ends[-1] - ends[0])


class _Context:
    """llama.cpp's KV cache and buffers for some sequences; empty at first."""

    def __init__(self, model: "llama_cpp.llama_model_p", sequences: int, length: int, threads: int):
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * (-(-length // 256) * 256)  # each sequence's part is a multiple of 256
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {sequences} sequences of {length} tokens")
        self.batch = llama_cpp.llama_n_ubatch(self._context)
        self._batch = llama_cpp.llama_batch_init(self.batch, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def decode(self, rows: list[tuple[int, int, int]], vocabulary: int, *, every: bool) -> list[np.ndarray]:
        """Appends tokens, each with its position and sequence; logits of all of them or of the last.

        The logits are llama.cpp's own memory, good until the next call.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = every or index == len(rows) - 1
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(rows)} tokens failed with {code}")
        wanted = range(len(rows)) if every else [len(rows) - 1]
        pointers = [llama_cpp.llama_get_logits_ith(self._context, index) for index in wanted]
        return [np.ctypeslib.as_array(pointer, (vocabulary,)) for pointer in pointers]


if llama_cpp is not None:

    @llama_cpp.llama_log_callback
    def _silent(level: int, text: bytes, data: int) -> None:
        """Drops llama.cpp's log."""


def main() -> None:
    """Measures llama.cpp alone, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="a GGUF; made where it is missing")
    parser.add_argument("--rounds", type=int, default=3, help="the table has the medians")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each sequence")
    parser.add_argument("--tokens", type=int, default=64, help="that each sequence decodes")
    parser.add_argument("--threads", type=int, help="one for each core where left out")
    asked = parser.parse_args()
    for name, least in (("rounds", 1), ("prompt", 1), ("tokens", 2), ("threads", 1)):
        value = getattr(asked, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be {least} or more")
    if not available():
        sys.exit(f"llama-cpp-python and gguf are needed: {INSTALL}")
    try:
        print(_alone(asked.file, asked.rounds, asked.prompt, asked.tokens, asked.threads))
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))


def _alone(file: Path, rounds: int, prompt: int, tokens: int, threads: int | None) -> str:
    """The machine, and the rates in a table."""
    if not file.exists():
        print(f"writing {file}", file=sys.stderr)
        make(file)
    model = LlamaCpp(file, threads)
    model.rate(1, prompt, 2)
    found: dict[int, list[float]] = {count: [] for count in CONCURRENCIES}
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr)
        for count, rates in found.items():
            rates.append(model.rate(count, prompt, tokens))
    model.close()
    lines = [
        f"{machine.line()}; llama-cpp-python {llama_cpp.__version__}, {file.name}, {model.threads} threads, "
        f"medians of {rounds}",
        "",
        "| sequences | tokens/s in all |",
        "|---|---|",
    ]
    return "\n".join(lines + [f"| {count} | {median(rates):.1f} |" for count, rates in found.items()])


if __name__ == "__main__":
    main()
