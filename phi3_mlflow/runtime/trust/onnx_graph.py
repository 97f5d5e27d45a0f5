"""What an ONNX graph may hold: operators that the decoders know, and weights in files beside it.

It reads what decides what will be opened or run, jumps over the rest, and refuses what another reader might understand
otherwise. What the operators may be given is in `onnx_values`.
"""

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import WeightsError, shorten
from . import files, onnx_values
from .onnx_values import WEIGHTS, Node, Value
from .protobuf import Reader

# What protobuf itself allows for a whole file, in bytes.
_MOST_BYTES = 2**31 - 1
_MOST_DEPTH = 1  # of graphs in nodes: an If for the rotary caches

_EXTERNAL = 1  # TensorProto.DataLocation
_INT64 = 8  # bytes


@dataclass
class _External:
    """A tensor whose numbers are in another file, before byte `end`; `node`: in a node, which so uses it."""

    tensor: str
    location: str
    end: int
    node: bool


# Of an input or output; None for what is not fixed.
Shape = tuple[int | None, ...]


@dataclass
class _Found:
    used: set[str] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)  # by their names
    external: list[_External] = field(default_factory=list)
    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)  # of attentions, by their outputs
    head_size: int | None = None
    windows: list[int | None] = field(default_factory=list)  # of attentions whose cache holds no more
    tables: set[str] = field(default_factory=set)  # of the angles of positions, by their names


@dataclass(frozen=True)
class Graph:
    """What a graph says of itself.

    Attributes:
        files: those beside it that hold its weights, sorted.
        inputs, outputs: their shapes, by their names.
        head_size: of its attention; None where the graph does not show it.
        positions: for how many its attention has angles; None where the graph does not show it.
        windows: of the attention in each layer whose cache holds no more; None in the others.
        mask: the input by which attention knows the rows' lengths; None where there is no attention.
    """

    files: list[Path]
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    head_size: int | None
    positions: int | None
    windows: Sequence[int | None]
    mask: str | None


def check(path: Path) -> Graph:
    """Checks a graph, and that its weights are where it says.

    Raises:
        WeightsError: it is no ONNX graph, uses an operator that no decoder here knows, has functions, training or
            sparse tensors, could make large tensors of small ones, does not tell attention how long the rows are, or
            takes a tensor from a file that is not beside it, that no node needs, or that is too short.
    """
    files.needed(path)
    if path.stat().st_size > _MOST_BYTES:
        raise WeightsError(f"{path} is larger than an ONNX graph can be: keep its weights in a file beside it")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _Found()
            reader = Reader(path, content)
            _model(reader, found)
            mask = onnx_values.check(reader, found.nodes, found.inputs, found.weights)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    sizes: dict[str, int] = {}
    wanted = {tensor.location for tensor in found.external if tensor.node or tensor.tensor in found.used}
    for tensor in found.external:
        if tensor.location not in wanted:
            raise WeightsError(
                f"{path} names {shorten(tensor.location)} for the tensor {shorten(tensor.tensor)}, which no node uses: "
                "do not use this copy"
            )
        if tensor.location not in sizes:
            sizes[tensor.location] = files.needed(files.beside(path, tensor.location)).stat().st_size
        if tensor.end > sizes[tensor.location]:
            raise WeightsError(
                f"{path} wants {tensor.end} bytes of {tensor.location}, which has {sizes[tensor.location]}: copy or "
                "download both again"
            )
    used = [path.parent / name for name in sorted(sizes)]
    tables = [found.weights[name].shape for name in found.tables if name in found.weights]
    positions = min((shape[0] for shape in tables if shape), default=None)
    return Graph(used, found.inputs, found.outputs, found.head_size, positions, found.windows, mask)


def _model(reader: Reader, found: _Found) -> None:
    graphs = 0
    for name, _, value in reader.fields("ModelProto", reader.whole()):
        assert isinstance(value, range)
        if name == "graph":
            graphs += 1
            _graph(reader, value, found, 0)
        else:
            key, _ = _entry(reader, value)
            # onnxruntime takes session options from here where an environment variable allows it.
            if key == "ort_config":
                raise reader.refused("has ort_config in its metadata")
    if not graphs:
        raise reader.broken("is no ONNX graph")


def _graph(reader: Reader, place: range, found: _Found, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise reader.refused(f"has graphs within graphs, more than {_MOST_DEPTH} deep")
    for name, _, value in reader.fields("GraphProto", place):
        assert isinstance(value, range)
        if name == "node":
            _node(reader, value, found, depth)
        elif name == "initializer":
            tensor, weights = _tensor(reader, value, found)
            if depth == 0:
                found.weights[tensor] = weights
        else:
            value_name, shape = _value(reader, value)
            if name == "output":
                found.used.add(value_name)
            if depth == 0:
                (found.inputs if name == "input" else found.outputs)[value_name] = shape


def _value(reader: Reader, place: range) -> tuple[str, Shape]:
    """Name and shape of an input or output; the shape is empty where it has none."""
    name, shape = "", list[int | None]()
    for _, kind, value in reader.fields("ValueInfoProto", place):
        assert isinstance(value, range)
        if kind == "text":
            name = reader.text(value)
        else:
            shape += _dimensions(reader, kind, value)
    return name, tuple(shape)


def _dimensions(reader: Reader, message: str, place: range) -> Iterator[int | None]:
    size = None
    for _, kind, value in reader.fields(message, place):
        if isinstance(value, range):
            yield from _dimensions(reader, kind, value)
        else:
            size = value
    if message == "TensorShapeProto.Dimension":
        yield size


def _node(reader: Reader, place: range, found: _Found, depth: int) -> None:
    node = Node()
    texts = {"domain": "", "op_type": "", "name": ""}
    for name, kind, value in reader.fields("NodeProto", place):
        assert isinstance(value, range)
        if kind == "texts":
            (node.inputs if name == "input" else node.outputs).append(reader.text(value))
        elif kind == "text":
            texts[name] = reader.text(value)
        else:
            _attribute(reader, value, found, node, depth)
    node.name, node.domain, node.operator = texts["name"], texts["domain"], texts["op_type"]
    found.used.update(node.inputs)
    what = shorten(f"{node.domain}::{node.operator}" if node.domain else node.operator)
    where = f"in the node {shorten(node.name)}"
    if node.operator not in onnx_values.OPERATORS.get(node.domain, ()):
        raise reader.refused(f"has the operator {what} {where}, which no decoder here knows")
    if depth and node.operator != "Constant":
        raise reader.refused(f"has the operator {what} {where} of a branch, which can only give constants")
    if not depth:
        found.nodes.append(node)
    first = node.inputs[0] if node.inputs else ""
    if node.operator == "GroupQueryAttention" and node.numbers.get("num_heads") and node.outputs:
        found.heads[node.outputs[0]] = node.numbers["num_heads"]
        found.tables.update(node.inputs[7:8])
        window = node.numbers.get("local_window_size") if node.numbers.get("sliding_window_cache") else None
        found.windows.append(window)
    elif node.operator == "MatMulNBits" and first in found.heads and "K" in node.numbers:
        found.head_size = node.numbers["K"] // found.heads[first]


def _attribute(reader: Reader, place: range, found: _Found, node: Node, depth: int) -> None:
    """Adds it to its node, where it is a number or a tensor."""
    attribute, number, tensor = "", None, None
    for name, kind, value in reader.fields("AttributeProto", place):
        if isinstance(value, int):
            number = value
        elif name == "name":
            attribute = reader.text(value)
        elif kind == "GraphProto":
            _graph(reader, value, found, depth + 1)
        else:
            tensor = _tensor(reader, value, found, node=True)[1]
    if attribute in node.numbers or attribute in node.tensors:
        raise reader.refused(f"has the attribute {shorten(attribute)} twice in a node")
    if number is not None:
        node.numbers[attribute] = number
    if tensor is not None:
        node.tensors[attribute] = tensor


def _tensor(reader: Reader, place: range, found: _Found, *, node: bool = False) -> tuple[str, Value]:
    """Its name, and what there is to know of it."""
    name, location, entries, sizes, numbers = "", 0, {}, list[int](), list[int]()
    for part, _, value in reader.fields("TensorProto", place):
        if part in ("dims", "int64_data"):
            these = sizes if part == "dims" else numbers
            these += [value] if isinstance(value, int) else reader.numbers(value)
        elif isinstance(value, int):
            location = value
        elif part == "name":
            name = reader.text(value)
        elif part == "raw_data":
            numbers += [reader.integer(value)] if len(value) <= _INT64 else []
        else:
            key, text = _entry(reader, value)
            if key in entries:
                raise reader.refused(f"has {shorten(key)} twice in the tensor {shorten(name)}")
            entries[key] = text
    if location not in (0, _EXTERNAL) or (location == _EXTERNAL) != bool(entries):
        raise reader.refused(f"has the tensor {shorten(name)}, of which it is not clear where its data are")
    weights = Value(WEIGHTS, sizes, number=numbers[0] if len(numbers) == 1 else None)
    if not entries:
        return name, weights
    for key, text in entries.items():
        if key not in ("location", "offset", "length"):
            raise reader.refused(f"has {shorten(key)} in the tensor {shorten(name)}, which is unknown here")
        if key != "location" and not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
            raise reader.refused(f"has {key} {shorten(text)} in the tensor {shorten(name)}: it must be a number")
    files.beside(reader.path, entries.get("location"))
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    found.external.append(_External(name, entries["location"], end, node))
    return name, weights


def _entry(reader: Reader, place: range) -> tuple[str, str]:
    texts = {"key": "", "value": ""}
    for name, _, value in reader.fields("StringStringEntryProto", place):
        assert isinstance(value, range)
        texts[name] = reader.text(value)
    return texts["key"], texts["value"]
