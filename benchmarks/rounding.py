"""What each choice of `phi3-mlflow quantize` costs and gives, as two tables.

Quality is measured on the embedded model, in chats of the kind that it was trained on; speed and memory on weights of
Phi-3-mini's shape with random numbers. A choice of full size takes a minute and a half, with k-quant some fifty seconds
for each layer more.

    python benchmarks/rounding.py --quality-only
    python benchmarks/rounding.py --speed-only [--layers 32] [--only rtn-32] [--folder .bench/quantization]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from phi3_mlflow import machine
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


def speed(choices: dict[str, dict], room: Path, layers: int, rounds: int) -> str:
    """The table of what the weights of full size take; processes of their own quantize them, and run them in turn."""
    source = write_source(room / f"source-{layers}", layers)
    costs = {name: quantized(source, room / f"{name}-{layers}", options) for name, options in choices.items()}
    paces: dict[str, list[dict[str, float]]] = {name: [] for name in choices}
    for _ in range(rounds):
        for name, found in paces.items():
            found.append(child("--measure", room / f"{name}-{layers}"))
    rows = [
        [
            name,
            f"{cost['seconds']:.0f} s",
            size(int(cost["peak"])),
            size(sum(path.stat().st_size for path in (room / f"{name}-{layers}").iterdir())),
            size(int(median(found["memory"] for found in paces[name]))),
            f"{median(found['prompt'] for found in paces[name]):.1f}",
            f"{median(found['answer'] for found in paces[name]):.1f}",
        ]
        for name, cost in costs.items()
    ]
    costly = ["quantizing", "its memory", "size", "memory when loaded"]
    return markdown([f"{layers} layers of full size", *costly, "prompt tokens/s", "answer tokens/s"], rows)


def quantized(source: Path, folder: Path, options: dict) -> dict[str, float]:
    """What it took to make a folder: seconds and bytes. One that an earlier run has made stays."""
    record = folder.with_name(f"{folder.name}.json")
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        record.write_text(json.dumps(child("--quantize", source, folder, json.dumps(options))), "utf-8")
    return json.loads(record.read_text("utf-8"))


def child(*arguments: object) -> dict[str, float]:
    """What a process of its own finds."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def quantize(source: Path, folder: Path, options: dict) -> dict[str, float]:
    """Quantizes: the peak is that of the processes that it starts, mapped files included."""
    start = time.monotonic()
    export(source, folder, **options)
    seconds = time.monotonic() - start
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def measure(folder: Path) -> dict[str, float]:
    """Loads a folder, reads a prompt and answers, one request alone, through onnxruntime-genai."""
    decoder = loading.onnx_decoder(folder, {"context_length": 2 * PROMPT})
    ids = list(range(5, 5 + PROMPT))

    def prompt() -> float:
        decoder.rewind(0, 0)
        begun = time.monotonic()
        for at in range(0, PROMPT, decoder.chunk):
            decoder.step({0: Part(ids[at : at + decoder.chunk], 1)})
        return PROMPT / (time.monotonic() - begun)

    prompt()  # the first one is slower
    found = {"prompt": prompt()}
    begun = time.monotonic()
    for token in range(5, 5 + ANSWER):
        decoder.step({0: Part([token], 1)})
    found["answer"] = ANSWER / (time.monotonic() - begun)
    found["memory"] = machine.resident()
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
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS, help="Of the weights of full size.")
    parser.add_argument("--only", action="append", choices=CHOICES, help="A choice; repeatable. Default: all.")
    parser.add_argument("--rounds", type=int, default=3, help="Of speed, in alternation; the table has the medians.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / ".bench" / "quantization",
        help="For 7.6 GB of weights, and 2.5 GB for each choice; what is there already is not made again.",
    )
    parser.add_argument("--quantize", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.quantize:
        source, folder, options = asked.quantize
        print(json.dumps(quantize(Path(source), Path(folder), json.loads(options))))
        return
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        return
    chosen = {name: CHOICES[name] for name in asked.only or CHOICES}
    if not asked.speed_only:
        with tempfile.TemporaryDirectory() as room:
            print(quality(chosen, Path(room)) + "\n", flush=True)
    if not asked.quality_only:
        print(speed(chosen, asked.folder, asked.layers, asked.rounds))


if __name__ == "__main__":
    main()
