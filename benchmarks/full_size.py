"""Makes a folder of the size and shape of Phi-3-mini-4k int4 (block 32, accuracy level 4) with random weights.

It speaks nonsense and costs what the real one costs: for benchmarks without a download. The graph is the embedded
model's, which comes from the same model builder, with more and larger layers; the tokenizer is the embedded one.

    python benchmarks/full_size.py [FOLDER]      about 3 GB; the default folder is .bench/full-size
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from phi3_mlflow.runtime import manifest

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "artifacts" / "onnx"
FOLDER = ROOT / ".bench" / "full-size"
BLOCK = 32  # weights that share a scale
_LAYER = re.compile(r"\b(layers|past_key_values|present)\.(\d+)")
_COPIED = ("tokenizer.json", "tokenizer_config.json", "LICENSE")


@dataclass(frozen=True)
class Shape:
    """Phi-3-mini-4k's, by its config.json."""

    hidden: int = 3072
    layers: int = 32
    heads: int = 32
    intermediate: int = 8192
    vocabulary: int = 32064
    context: int = 4096

    @property
    def head_size(self) -> int:
        """Numbers in one head."""
        return self.hidden // self.heads

    def product(self, name: str) -> tuple[int, int]:
        """Columns and rows (K and N) of a matrix product's weights."""
        hidden, wide = self.hidden, self.intermediate
        sizes = {
            "qkv_proj": (hidden, 3 * hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
            "lm_head": (hidden, self.vocabulary),
        }
        return next(size for part, size in sizes.items() if part in name)


def make(folder: Path, shape: Shape | None = None, seed: int = 0) -> Path:
    """Writes the folder; it appears under its name when it is complete.

    Args:
        folder: must not exist.
        shape: of the model.
        seed: of the weights.

    Returns:
        The folder, as load_onnx takes it.
    """
    shape = shape or Shape()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / ".gitignore").write_text("*\n", "utf-8")
    _write_model(unfinished, shape, seed)
    _write_configs(unfinished, shape)
    for name in _COPIED:
        shutil.copyfile(TEMPLATE / name, unfinished / name)
    manifest.write(unfinished)
    unfinished.rename(folder)
    return folder


def options(description: str | None) -> argparse.ArgumentParser:
    """What the command lines of the benchmarks on such a folder begin with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    return parser


def _write_model(folder: Path, shape: Shape, seed: int) -> None:
    model = onnx.load(TEMPLATE / "model.onnx", load_external_data=False)
    graph = model.graph
    nodes = list(_nodes(list(graph.node), shape))
    del graph.node[:], graph.initializer[:], graph.value_info[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    random = np.random.default_rng(seed)
    with (folder / "model.onnx.data").open("wb") as data:
        for name, array in _weights(nodes, shape, random):
            onnx_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = onnx.TensorProto(name=name, data_type=onnx_type, dims=array.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            data.write(bytes(-data.tell() % 4096))
            for key, value in (
                ("location", "model.onnx.data"),
                ("offset", str(data.tell())),
                ("length", str(array.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
            data.write(array.data)
            graph.initializer.append(tensor)
    value, float32, int64 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph.input.append(value("input_ids", int64, ["batch_size", "sequence_length"]))
    graph.input.append(value("attention_mask", int64, ["batch_size", "total_sequence_length"]))
    graph.output.append(value("logits", float32, ["batch_size", "sequence_length", shape.vocabulary]))
    for layer in range(shape.layers):
        for part in ("key", "value"):
            for kind, names, length in (
                ("past_key_values", graph.input, "past_sequence_length"),
                ("present", graph.output, "total_sequence_length"),
            ):
                size = ["batch_size", shape.heads, length, shape.head_size]
                names.append(value(f"{kind}.{layer}.{part}", float32, size))
    onnx.save(model, folder / "model.onnx")


def _nodes(template: list[onnx.NodeProto], shape: Shape) -> Iterator[onnx.NodeProto]:
    """The template's nodes, with its second layer repeated and the sizes replaced."""
    last = max(int(found[2]) for node in template if (found := _LAYER.search(node.name)))  # the final norm's
    of_layer: dict[int, list[onnx.NodeProto]] = {}
    for node in template:
        found = _LAYER.search(node.name)
        of_layer.setdefault(int(found[2]) if found else (last if "lm_head" in node.name else -1), []).append(node)
    yield from (_resized(node, shape, 0) for node in of_layer[-1] + of_layer[0])
    for layer in range(1, shape.layers):
        yield from (_resized(node, shape, layer - 1) for node in of_layer[1])
    yield from (_resized(node, shape, shape.layers - last) for node in of_layer[last])


def _resized(template: onnx.NodeProto, shape: Shape, shift: int) -> onnx.NodeProto:
    def moved(name: str) -> str:
        return _LAYER.sub(lambda found: f"{found[1]}.{int(found[2]) + shift}", name)

    node = onnx.NodeProto()
    node.CopyFrom(template)
    node.name = moved(node.name)
    node.input[:] = [moved(name) for name in node.input]
    node.output[:] = [moved(name) for name in node.output]
    values: dict[str, float] = {}
    if node.op_type == "MatMulNBits":
        values["K"], values["N"] = shape.product(node.name)
    if node.op_type == "GroupQueryAttention":
        values = {"num_heads": shape.heads, "kv_num_heads": shape.heads, "scale": shape.head_size**-0.5}
    for attribute in node.attribute:
        if attribute.name in values:
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, values[attribute.name]))
    return node


def _weights(
    nodes: list[onnx.NodeProto], shape: Shape, random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """All weights of the graph, one at a time."""
    known = {"", "input_ids", "attention_mask"} | {name for node in nodes for name in node.output}
    for node in nodes:
        for name in node.input:
            if name in known or name.startswith("past_key_values"):
                continue
            known.add(name)
            yield name, _weight(name, shape, random)


def _weight(name: str, shape: Shape, random: np.random.Generator) -> np.ndarray:
    if name == "model.embed_tokens.weight":
        return random.standard_normal((shape.vocabulary, shape.hidden), np.float32) * np.float32(0.02)
    if name in ("cos_cache", "sin_cache"):
        # Rotary position embedding with theta 10000 (Su et al. 2021, arXiv:2104.09864).
        frequencies = 10000.0 ** (-np.arange(0, shape.head_size, 2) / shape.head_size)
        angles = np.outer(np.arange(shape.context), frequencies)
        return (np.cos(angles) if name == "cos_cache" else np.sin(angles)).astype(np.float32)
    if name.endswith("layernorm.weight"):
        return np.ones(shape.hidden, np.float32)
    columns, rows = shape.product(name)
    blocks = columns // BLOCK
    if name.endswith("weight_Q4"):
        return np.frombuffer(random.bytes(rows * blocks * BLOCK // 2), np.uint8).reshape(rows, blocks, BLOCK // 2)
    # The 4-bit numbers spread by 4.6 around their middle; so the weights spread by about 0.02, like untrained ones.
    return random.uniform(0.003, 0.006, (rows, blocks)).astype(np.float32)


def _write_configs(folder: Path, shape: Shape) -> None:
    genai = json.loads((TEMPLATE / "genai_config.json").read_text("utf-8"))
    model = genai["model"]
    model |= {"context_length": shape.context, "vocab_size": shape.vocabulary}
    model["decoder"] |= {
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
    }
    genai["search"]["max_length"] = shape.context
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=4) + "\n", "utf-8")
    config = json.loads((TEMPLATE / "config.json").read_text("utf-8")) | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
        "original_max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def main() -> None:
    """Makes the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there already")
        return
    start = time.monotonic()
    make(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
