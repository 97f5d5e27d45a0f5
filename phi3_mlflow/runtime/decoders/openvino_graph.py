"""The exported ONNX graph as an OpenVINO model with paged attention, built from the file's own weights.

Knows the operators that the model builder of onnxruntime-genai writes for Phi-3 on the CPU, and refuses every other by
its name. The weights stay in the mapped file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import CannotBatch
from .exported import Exported
from .onnx_file import Graph, Node
from .onnx_lengths import Lengths
from .openvino_attention import Constant, Heads, attend, cache_inputs, number, ops, ov, paging_inputs, parameter

_DOMAINS = ("", "ai.onnx", "com.microsoft")
# What each attribute of GroupQueryAttention may be; None for anything.
_ATTENTION = {
    "num_heads": None,
    "kv_num_heads": None,
    "scale": None,
    "local_window_size": None,
    "do_rotary": 1,
    "rotary_interleaved": 0,
    "softcap": 0,
    "smooth_softmax": 0,
}
_REST = 2**63 - 1  # the end of a slice that goes on to the end


@dataclass(frozen=True)
class Built:
    """An OpenVINO model of the graph.

    Its inputs, all int32: `ids`, `positions` (rows of the rotary tables) and `wanted` (which of the ids' logits are
    given), and what OpenVINO's paged attention takes: `past_lens`, `subsequence_begins`, `block_indices`,
    `block_indices_begins`, `max_context_len`. Its other inputs are the caches, `key_cache.N` and `value_cache.N`. Its
    output is (wanted, 1, vocabulary) float32 logits.

    Attributes:
        model: not compiled.
        heads: see Heads.
        layers: how many caches for keys, and for values, there are.
        switch: a sequence of more positions than this takes the second of two rotary tables, which begins at this row;
            None where there is one table.
        weights: what the model points to, and has to outlive it and what is compiled of it.
    """

    model: Any
    heads: Heads
    layers: int
    switch: int | None
    weights: Sequence[np.ndarray]


def build(graph: Graph, exported: Exported) -> Built:
    """Builds the model.

    Args:
        graph: of the ONNX file.
        exported: names and sizes from genai_config.json.

    Raises:
        CannotBatch: the graph has something that is not known here; the message names it.
    """
    return _Builder(graph, exported).build()


class _Builder:
    """Goes through the nodes once and keeps the value that each one gives."""

    def __init__(self, graph: Graph, exported: Exported):
        self._graph = graph
        self._exported = exported
        self._values: dict[str, Any] = {}  # what nodes give
        self._weights: list[np.ndarray] = []
        self._paging = paging_inputs()
        self._ids, self._positions, self._wanted = (
            parameter(name, ov.Type.i32, [-1]) for name in ("ids", "positions", "wanted")
        )
        self._layers: list[tuple[Any, Any]] = []  # the caches
        self._heads: Heads | None = None
        self._tables: tuple[Any, Any] | None = None  # cosines and sines at the positions
        self._table_names: tuple[str, str] | None = None
        self._switch: int | None = None
        self._lengths = Lengths(graph, exported.attention_mask)

    def build(self) -> Built:
        for node in self._graph.nodes:
            if self._lengths.explains(node):
                continue
            translate = _TRANSLATIONS.get(node.op)
            if translate is None or node.domain not in _DOMAINS:
                raise self.refused(node, "which is not known here")
            translate(self, node)
        logits = self._values.get(self._exported.logits)
        if logits is None or self._heads is None:
            raise CannotBatch(f"the graph gives no {self._exported.logits}, or has no attention")
        caches = [cache for layer in self._layers for cache in layer]
        inputs = [self._ids, self._positions, self._wanted, *self._paging.values(), *caches]
        model = ov.Model([ops.result(logits)], inputs, "phi3")
        return Built(model, self._heads, len(self._layers), self._switch, self._weights)

    def refused(self, node: Node, why: str) -> CannotBatch:
        operator = f"{node.domain}.{node.op}" if node.domain else node.op
        return CannotBatch(f"the graph's node {node.name or node.outputs[0]} is a {operator}, {why}")

    def value(self, node: Node, index: int) -> Any:
        """What another node gives as this one's input."""
        if (found := self._values.get(node.input(index))) is None:
            raise self.refused(node, f"whose input {node.input(index)!r} is not known here")
        return found

    def array(self, node: Node, index: int) -> np.ndarray:
        """A weight that is this node's input."""
        if (found := self._graph.tensors.get(node.input(index))) is None:
            raise self.refused(node, f"whose input {node.input(index)!r} is not a weight")
        return found

    def constant(self, array: np.ndarray, shape: Sequence[int] | None = None, kind: Any = None) -> Any:
        """A weight, without a copy; a `kind` of its own is u4, two numbers to a byte."""
        shape = array.shape if shape is None else shape
        # OpenVINO takes any shape, and reads on behind the array.
        if array.size * (1 if kind is None else 2) < math.prod(shape):
            raise CannotBatch(f"the graph has weights of the shape {list(array.shape)} for {list(shape)} numbers")
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.require(array, requirements=["C", "A"])
        self._weights.append(array)
        tensor = ov.Tensor(array, ov.Shape(shape), kind or ov.Type(array.dtype))
        return Constant(tensor, shared_memory=True)

    def limit(self, node: Node, inputs: int, outputs: int = 1, **attributes: Any) -> None:
        """Refuses what the node has beyond so many inputs and outputs, and attributes that are not as given.

        Args:
            node: the node.
            inputs: how many are known.
            outputs: how many are known.
            attributes: what each may be; None for anything.
        """
        for name in node.inputs[inputs:]:
            if name:
                raise self.refused(node, f"whose input {name} is not known here")
        for name in node.outputs[outputs:]:
            if name:
                raise self.refused(node, f"whose output {name} is not known here")
        for name, value in node.attributes.items():
            if name not in attributes or attributes[name] not in (None, value):
                raise self.refused(node, f"whose attribute {name} is {value!r:.60}")

    # One method for each operator.

    def gather(self, node: Node) -> None:
        self.limit(node, 2, axis=0)
        if node.input(1) != self._exported.input_ids:
            raise self.refused(node, f"whose input {node.input(1)} is not {self._exported.input_ids}")
        table = self.array(node, 0)
        if table.dtype != np.float32:
            raise self.refused(node, f"whose weights are {table.dtype}")
        found = ops.gather(self.constant(table), self._ids, number(0, np.int32))
        self._values[node.outputs[0]] = ops.unsqueeze(found, number(1, np.int32))

    def norm(self, node: Node) -> None:
        self.limit(node, 2, epsilon=None, axis=-1, stash_type=1)
        self._values[node.outputs[0]] = self._normed(node, self.value(node, 0), self.array(node, 1))

    def skip_norm(self, node: Node) -> None:
        # Outputs 1 and 2 are for training.
        self.limit(node, 3, 4, epsilon=None)
        if any(node.outputs[1:3]):
            raise self.refused(node, "whose outputs 1 and 2 are not known here")
        both = ops.add(self.value(node, 0), self.value(node, 1))
        self._values[node.outputs[0]] = self._normed(node, both, self.array(node, 2))
        if len(node.outputs) > 3:
            self._values[node.outputs[3]] = both

    def _normed(self, node: Node, x: Any, scale: np.ndarray) -> Any:
        square = ops.power(x, number([[[2.0]]]))
        mean = ops.reduce_mean(square, number([-1], np.int64), True)
        root = ops.sqrt(ops.add(mean, number([[[node.attributes["epsilon"]]]])))
        inverse = ops.divide(number([[[1.0]]]), root)
        return ops.multiply(self.constant(scale, [1, 1, scale.size]), ops.multiply(x, inverse))

    def product(self, node: Node) -> None:
        self.limit(node, 2)
        weights = self.array(node, 1)
        if weights.dtype != np.float32 or weights.ndim != 2:
            raise self.refused(node, f"whose weights are {weights.dtype} of shape {list(weights.shape)}")
        x = self._wanted_only(node, self.value(node, 0))
        self._values[node.outputs[0]] = ops.matmul(x, self.constant(weights), False, False)

    def quantized_product(self, node: Node) -> None:
        # accuracy_level says how onnxruntime may round; OpenVINO has its own way, see DYNAMIC_QUANTIZATION_GROUP_SIZE.
        self.limit(node, 4, K=None, N=None, block_size=None, bits=4, accuracy_level=None)
        rows, columns, block = (node.attributes[name] for name in ("N", "K", "block_size"))
        packed, scales = self.array(node, 1), self.array(node, 2)
        if columns % block or scales.dtype != np.float32 or packed.size * 2 != rows * columns:
            raise self.refused(node, f"with blocks of {block} in {columns} columns and scales in {scales.dtype}")
        grouped = [rows, columns // block, block]
        zeros = self._zeros(node, rows, columns // block)
        weights = self.constant(packed.reshape(-1), grouped, ov.Type.u4)
        weights = ops.subtract(ops.convert(weights, ov.Type.f32), ops.convert(zeros, ov.Type.f32))
        weights = ops.multiply(weights, self.constant(scales, [rows, columns // block, 1]))
        weights = ops.reshape(weights, number([rows, columns], np.int64), False)
        x = self._wanted_only(node, self.value(node, 0))
        self._values[node.outputs[0]] = ops.matmul(x, weights, False, True)

    def _zeros(self, node: Node, rows: int, blocks: int) -> Any:
        """The 4-bit number that stands for 0, for each block; 8 where the node names none."""
        if not node.input(3):
            return self.constant(np.array([0x88], np.uint8), [1, 1, 1], ov.Type.u4)
        zeros = self.array(node, 3)
        # Rows begin at whole bytes there, and follow each other without gaps in OpenVINO.
        if zeros.dtype != np.uint8 or blocks % 2:
            raise self.refused(node, f"with zero points for {blocks} blocks in {zeros.dtype}")
        return self.constant(zeros.reshape(-1), [rows, blocks, 1], ov.Type.u4)

    def _wanted_only(self, node: Node, x: Any) -> Any:
        """Of the input of the last product only the rows whose logits are wanted."""
        if node.outputs[0] != self._exported.logits:
            return x
        return ops.gather(x, self._wanted, number(0, np.int32))

    def sigmoid(self, node: Node) -> None:
        self.limit(node, 1)
        self._values[node.outputs[0]] = ops.sigmoid(self.value(node, 0))

    def multiply(self, node: Node) -> None:
        self.limit(node, 2)
        self._values[node.outputs[0]] = ops.multiply(self.value(node, 0), self.value(node, 1))

    def attention(self, node: Node) -> None:
        self.limit(node, 9, 3, **_ATTENTION)
        layer = len(self._layers)
        past = self._exported.past[2 * layer : 2 * layer + 2]
        if list(node.inputs[3:5]) != list(past):
            raise self.refused(node, f"whose inputs {', '.join(node.inputs[3:5])} are not {', '.join(past)}")
        if not self._lengths.are(node.input(5), node.input(6)):
            raise self.refused(node, f"whose inputs {node.input(5)} and {node.input(6)} are not the rows' lengths")
        if not node.attributes.get("do_rotary"):
            raise self.refused(node, "without rotary embedding")
        heads, parts = self._split(node)
        if self._heads not in (None, heads):
            raise self.refused(node, f"with {heads}, and the layers before it have {self._heads}")
        self._heads = heads
        cosines, sines = self._rotary(node)
        turned = [
            _turn(part, count, heads.size, cosines, sines)
            for part, count in zip(parts, (heads.query, heads.key), strict=False)
        ]
        value = ops.reshape(parts[2], number([-1, heads.key * heads.size], np.int64), False)
        caches = cache_inputs(layer)
        self._layers.append(caches)
        seen = attend(heads, [*turned, value], caches, self._paging)
        self._values[node.outputs[0]] = ops.reshape(seen, number([-1, 1, heads.query * heads.size], np.int64), False)

    def _split(self, node: Node) -> tuple[Heads, list[Any]]:
        """What the attention is, and queries, keys and values of (tokens, 1, numbers)."""
        query, key = node.attributes["num_heads"], node.attributes["kv_num_heads"]
        parts = [self.value(node, 0)]
        if node.input(1):
            parts += [self.value(node, 1), self.value(node, 2)]
        width = sum(_width(part) for part in parts)
        size = width // (query + 2 * key)
        widths = [query * size, key * size, key * size]
        if query % key or sum(widths) != width or (len(parts) == 3 and [_width(part) for part in parts] != widths):
            raise self.refused(node, f"with {width} numbers for {query} and {key} heads")
        if len(parts) == 1:
            split = ops.variadic_split(parts[0], number(-1, np.int64), number(widths, np.int64))
            parts = split.outputs()
        window = node.attributes.get("local_window_size", -1)
        scale = node.attributes.get("scale", 0.0) or size**-0.5
        return Heads(query, key, size, scale, max(window, 0)), parts

    def _rotary(self, node: Node) -> tuple[Any, Any]:
        """Cosines and sines of (tokens, 1, 1, head size), of the same tables in all layers."""
        names = node.input(7), node.input(8)
        if self._tables is not None:
            if names != self._table_names:
                raise self.refused(node, f"whose tables {' and '.join(names)} are not those of the layers before it")
            return self._tables
        assert self._heads is not None
        rows = 0
        found = []
        for index, name in enumerate(names):
            tables = self._lengths.tables.get(name) or [self.array(node, 7 + index)]
            rows = len(tables[-1])
            for table in tables:
                if table.dtype != np.float32 or table.ndim != 2 or table.shape[1] * 2 != self._heads.size:
                    raise self.refused(node, f"whose table {name} is {table.dtype} of shape {list(table.shape)}")
            whole = self.constant(tables[0] if len(tables) == 1 else np.concatenate(tables))
            half = ops.gather(whole, self._positions, number(0, np.int32))
            found.append(ops.unsqueeze(ops.concat([half, half], -1), number([1, 2], np.int32)))
        if rows < self._exported.context_length:
            raise self.refused(node, f"whose tables have {rows} rows for a context of {self._exported.context_length}")
        self._table_names, self._switch = names, self._lengths.switch if names[0] in self._lengths.tables else None
        self._tables = found[0], found[1]
        return self._tables


_TRANSLATIONS: Mapping[str, Callable[[_Builder, Node], None]] = {
    "Gather": _Builder.gather,
    "GroupQueryAttention": _Builder.attention,
    "MatMul": _Builder.product,
    "MatMulNBits": _Builder.quantized_product,
    "Mul": _Builder.multiply,
    "Sigmoid": _Builder.sigmoid,
    "SimplifiedLayerNormalization": _Builder.norm,
    "SkipSimplifiedLayerNormalization": _Builder.skip_norm,
}


def _turn(x: Any, heads: int, size: int, cosines: Any, sines: Any) -> Any:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of (tokens, 1, heads * size); flat again."""
    x = ops.reshape(x, number([0, 0, heads, size], np.int64), True)
    x = ops.transpose(x, number([0, 2, 1, 3], np.int64))
    step, axis = number([1], np.int64), number([3], np.int64)
    first, second = (
        ops.slice(x, number([start], np.int64), number([end], np.int64), step, axis)
        for start, end in ((0, size // 2), (size // 2, _REST))
    )
    crossed = ops.concat([ops.multiply(second, number([[[[-1.0]]]])), first], -1)
    turned = ops.add(ops.multiply(x, cosines), ops.multiply(crossed, sines))
    return ops.reshape(turned, number([-1, heads * size], np.int64), False)


def _width(value: Any) -> int:
    """How many numbers a token has there."""
    output = value.output(0) if hasattr(value, "output") else value
    return output.get_partial_shape()[-1].get_length()
