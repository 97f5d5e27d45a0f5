"""What each choice of `phi3-mlflow quantize` costs and gives, as two tables.

Quality is measured on the embedded model, in chats of the kind that it was trained on; speed and memory on weights of
Phi-3-mini's shape with random numbers. A choice of full size takes minutes, with k-quant more than an hour.

    python benchmarks/rounding.py --quality-only
    python benchmarks/rounding.py [--layers 32] [--only rtn-32] [--folder .bench/quantization]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from phi3_mlflow.layout import markdown, size
from phi3_mlflow.quantize import check, export
from phi3_mlflow.runtime import loading
from phi3_mlflow.runtime.decoders.base import Part

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "artifacts" / "transformers"
CHOICES = {
    "rtn-16": {"block_size": 16},
    "rtn-32": {},
    "rtn-64": {"block_size": 64},
    "rtn-128": {"block_size": 128},
    "rtn-32, level 1": {"accuracy_level": 1},
    "rtn-32, asymmetric": {"symmetric": False},
    "rtn-32, output in 8 bits": {"output_bits": 8},
    "k_quant-32": {"method": "k_quant"},
    "k_quant_mixed-32": {"method": "k_quant_mixed"},
}
# Phi-3-mini-4k's, by its config.json.
HIDDEN, WIDE, VOCABULARY, LAYERS = 3072, 8192, 32064, 32
PROMPT, ANSWER = 128, 32
# Chats that the embedded model was not trained on: more than the tokens that are read.
SEED, CHATS = 2026, 200


def quality(choices: dict[str, dict], room: Path) -> str:
    """The table of what rounding does to the embedded model."""
    sys.path.insert(0, str(ROOT / "artifacts"))
    import text
    import vocabulary

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    chats = "".join(vocabulary.render(chat.messages) for chat in text.corpus(SEED, CHATS))
    ids = tokenizer.encode(chats, add_special_tokens=False).ids
    rows = []
    for name, options in choices.items():
        folder = export(EMBEDDED, room / name, **options)
        (found,) = check.compare(EMBEDDED, folder, {"long": ids[: check.LONG]})
        rows.append(
            [
                name,
                f"{found.rise:+.2f} %",
                f"{found.same_token:.1%}",
                f"{found.divergence:.2g}",
                f"{found.logit_error:.1%}",
                size(sum(path.stat().st_size for path in folder.iterdir())),
            ]
        )
    return markdown(["embedded model", "perplexity", "same token", "divergence", "logit error", "size"], rows)


def speed(choices: dict[str, dict], room: Path, layers: int) -> str:
    """The table of what the weights of full size take, each choice in a process of its own."""
    source = write_source(room / f"source-{layers}", layers)
    rows = []
    for name, options in choices.items():
        folder = room / f"{name}-{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, __file__, "--measure", str(source), str(folder), json.dumps(options)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append(
            [
                name,
                f"{found['seconds']:.0f} s",
                size(found["peak"]),
                size(found["size"]),
                f"{found['prompt']:.1f}",
                f"{found['answer']:.1f}",
            ]
        )
        shutil.rmtree(folder)
    header = [f"{layers} layers of full size", "quantizing", "memory", "size", "prompt tokens/s", "answer tokens/s"]
    return markdown(header, rows)


def measure(source: Path, folder: Path, options: dict) -> dict[str, float]:
    """Quantizes and runs one choice: the peak is that of the processes that quantize it, mapped files included."""
    import resource

    start = time.monotonic()
    export(source, folder, **options)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    decoder = loading.onnx_decoder(folder, {"context_length": 2 * PROMPT})
    ids = list(range(5, 5 + PROMPT))

    def prompt() -> float:
        decoder.rewind(0, 0)
        begun = time.monotonic()
        for at in range(0, PROMPT, decoder.chunk):
            decoder.step({0: Part(ids[at : at + decoder.chunk], 1)})
        return PROMPT / (time.monotonic() - begun)

    prompt()  # the first one is slower
    found = {"seconds": seconds, "peak": peak, "prompt": prompt()}
    begun = time.monotonic()
    for token in range(5, 5 + ANSWER):
        decoder.step({0: Part([token], 1)})
    found["answer"] = ANSWER / (time.monotonic() - begun)
    found["size"] = sum(path.stat().st_size for path in folder.iterdir())
    decoder.close()
    return found


def write_source(folder: Path, layers: int) -> Path:
    """Random weights of Phi-3-mini's shape in bfloat16, a shard for each layer, with the embedded tokenizer."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    import torch
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    config = json.loads((EMBEDDED / "config.json").read_text("utf-8")) | {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    places = {}

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}.safetensors"
        tensors = {key: torch.randn(*shape, dtype=torch.bfloat16) * 0.02 for key, shape in shapes.items()}
        for key in (key for key in tensors if key.endswith("norm.weight")):
            tensors[key] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shapes, name))

    save(1, {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)})
    for layer in range(layers):
        matrices = {
            "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_up_proj": (2 * WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        save(layer + 2, {f"model.layers.{layer}.{key}.weight": shape for key, shape in matrices.items()})
    save(layers + 2, {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def main() -> None:
    """Prints the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality-only", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS, help="Of the weights of full size.")
    parser.add_argument("--only", action="append", choices=CHOICES, help="A choice; repeatable. Default: all.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / "quantization", help="For 7.6 GB of weights.")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        source, folder, options = asked.measure
        print(json.dumps(measure(Path(source), Path(folder), json.loads(options))))
        return
    chosen = {name: CHOICES[name] for name in asked.only or CHOICES}
    with tempfile.TemporaryDirectory() as room:
        print(quality(chosen, Path(room)), flush=True)
    if not asked.quality_only:
        print("\n" + speed(chosen, asked.folder, asked.layers))


if __name__ == "__main__":
    main()
