"""OpenVINO GenAI's continuous batching, on a Llama of Phi-3-mini-4k's sizes at Q4_0 with random weights.

    .venv/bin/pip install --no-deps openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 gguf
    python benchmarks/openvino_genai_peer.py     alone: prints a table with the machine; writes 2.2 GB on first use

Its GGUF reader knows no Phi-3; a Llama with the same sizes has the same matrix products. decoders.py measures it in
alternation with this toolkit's decoders, where it is installed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from full_size import ROOT, Shape
from llama_cpp_peer import CONCURRENCIES, gguf, weight

from phi3_mlflow import machine

# This one's import is what keeps `import openvino` from reporting itself.
from phi3_mlflow.runtime.decoders.openvino_graph import ov

try:
    import openvino_genai
except ModuleNotFoundError as error:
    if error.name != "openvino_genai":
        raise
    openvino_genai = None

FILE = ROOT / ".bench" / "full-size-llama-q4_0.gguf"
INSTALL = "pip install --no-deps openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 gguf"


def available() -> bool:
    """Whether openvino-genai and gguf are installed."""
    return openvino_genai is not None and gguf is not None


def make(file: Path = FILE, shape: Shape | None = None, seed: int = 0) -> Path:
    """Writes a GGUF of arch llama; it appears under its name when it is complete.

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
    writer = gguf.GGUFWriter(unfinished, "llama")
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
    # The reader wants a tokenizer, and that one wants a token that it can put before a text.
    pieces = ["<unk>", "<s>", "</s>", *(f"piece{index}" for index in range(3, shape.vocabulary))]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([control] * 3 + [normal] * (len(pieces) - 3))
    writer.add_token_merges(["p i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
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


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Name, rows and columns, and type of each."""
    q4, f32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
    hidden, wide = shape.hidden, shape.intermediate
    yield "token_embd.weight", (shape.vocabulary, hidden), q4
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (hidden,), f32
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}{name}.weight", (hidden, hidden), q4
        yield f"{block}ffn_norm.weight", (hidden,), f32
        yield f"{block}ffn_gate.weight", (wide, hidden), q4
        yield f"{block}ffn_up.weight", (wide, hidden), q4
        yield f"{block}ffn_down.weight", (hidden, wide), q4
    yield "output_norm.weight", (hidden,), f32
    yield "output.weight", (shape.vocabulary, hidden), q4


class OpenVinoGenai:
    """A model loaded by OpenVINO GenAI.

    Args:
        file: a GGUF.
        threads: its own choice where left out.
        batch: the most tokens of a step.
        prefix_caching: whether prompts that begin alike share what was computed.
    """

    def __init__(
        self, file: Path = FILE, threads: int | None = None, batch: int = 256, *, prefix_caching: bool = False
    ):
        config = openvino_genai.SchedulerConfig()
        config.cache_size = 4  # GB
        config.max_num_batched_tokens = batch
        config.enable_prefix_caching = prefix_caching
        # bf16, its default where the CPU has it, is slower in short steps; the decoders here take f32 too.
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(file), config, "CPU", properties)
        self._random = np.random.default_rng(0)
        self._requests = 0
        self.rate(1, 4, 2)  # compiles

    def add(self, prompt: list[int], tokens: int) -> Any:
        """Begins a greedy answer of so many tokens; what `tokens` takes."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        self._requests += 1
        return self._pipeline.add_request(self._requests, ov.Tensor(np.array([prompt], np.int64)), config)

    def step(self) -> None:
        """Computes one step of all answers that are under way."""
        self._pipeline.step()

    def tokens(self, handle: Any) -> int:
        """How many tokens an answer got since it was asked last."""
        if not handle.can_read():
            return 0
        return sum(len(output.generated_ids) for output in handle.read().values())

    def prefill_rate(self, prompt: int) -> float:
        """Tokens per second of one prompt, until its first token is there."""
        start = time.perf_counter()
        handle = self.add(self._ids(prompt), 1)
        while not handle.can_read():
            self.step()
        rate = prompt / (time.perf_counter() - start)
        while self._pipeline.has_non_finished_requests():
            self.step()
        return rate

    def rate(self, sequences: int, prompt: int, tokens: int) -> float:
        """Tokens per second in all, while some sequences decode together, greedily.

        Args:
            sequences: that decode in one batch.
            prompt: random tokens in each, prefilled before the time is taken.
            tokens: that each decodes, at least 2.
        """
        handles = [self.add(self._ids(prompt), tokens) for _ in range(sequences)]
        ends: list[float] = []
        while self._pipeline.has_non_finished_requests():
            self.step()
            counts = [self.tokens(handle) for handle in handles]
            if all(counts):
                ends.append(time.perf_counter())
        return sequences * (len(ends) - 1) / (ends[-1] - ends[0])

    def _ids(self, count: int) -> list[int]:
        return self._random.integers(100, 1000, count).tolist()


def main() -> None:
    """Measures OpenVINO GenAI alone, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="a GGUF; made where it is missing")
    parser.add_argument("--rounds", type=int, default=3, help="the table has the medians")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each sequence")
    parser.add_argument("--tokens", type=int, default=16, help="that each sequence decodes")
    parser.add_argument("--threads", type=int, help="its own choice where left out")
    asked = parser.parse_args()
    if not available():
        sys.exit(f"openvino-genai and gguf are needed: {INSTALL}")
    if not asked.file.exists():
        print(f"writing {asked.file}", file=sys.stderr)
        make(asked.file)
    model = OpenVinoGenai(asked.file, asked.threads)
    found: dict[str, list[float]] = {}
    for index in range(asked.rounds):
        print(f"round {index + 1} of {asked.rounds}", file=sys.stderr)
        found.setdefault("prefill", []).append(model.prefill_rate(asked.prompt))
        for count in CONCURRENCIES:
            found.setdefault(f"decode, {count}", []).append(model.rate(count, asked.prompt, asked.tokens))
    print(f"{machine.line()}; {asked.file.name}, medians of {asked.rounds}\n")
    print("| | tokens/s in all |\n|---|---:|")
    print("\n".join(f"| {name} | {median(rates):.1f} |" for name, rates in found.items()))


if __name__ == "__main__":
    main()
