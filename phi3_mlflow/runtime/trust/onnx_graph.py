"""What an ONNX graph may hold: operators that the decoders know, and weights in files beside it.

It reads the protobuf encoding itself (https://protobuf.dev/programming-guides/encoding, and onnx.proto of
https://github.com/onnx/onnx), since logged models are loaded without the package onnx. It reads what decides what will
be opened or run, jumps over the rest, and refuses what another reader might understand otherwise.
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import WeightsError, shorten
from . import files

# Pure arithmetic on tensors: what the model builder of onnxruntime-genai writes for the models here (0.3 of 2024 to
# 0.18, any execution provider), and what onnxruntime fuses of it when it saves an optimised graph.
_STANDARD = """
    Add And Cast Clip Concat Constant ConstantOfShape Cos DequantizeLinear Div Equal Erf Exp Expand Flatten Gather
    GatherElements Gelu Greater GreaterOrEqual Identity If IsInf LayerNormalization Less LessOrEqual Log MatMul Max Min
    Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceSum Reshape RMSNormalization RotaryEmbedding Shape
    Sigmoid SimplifiedLayerNormalization Sin Slice Softmax Split Sqrt Squeeze Sub Swish Tanh Tile Transpose Trilu
    Unsqueeze Where
"""
_MICROSOFT = """
    BiasGelu FastGelu FusedMatMul GatherBlockQuantized Gelu GroupQueryAttention MatMulNBits MultiHeadAttention
    QuickGelu RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
# By domain; the standard one has two names.
OPERATORS = {
    **dict.fromkeys(("", "ai.onnx"), frozenset(_STANDARD.split())),
    "com.microsoft": frozenset(_MICROSOFT.split()),
}

# What protobuf itself allows for a whole file, in bytes.
_MOST_BYTES = 2**31 - 1
# A graph of Phi-3-mini has some 14,000 fields that are read or jumped over, and 0.1 MB of names.
_MOST_FIELDS, _MOST_TEXT = 1_000_000, 64 * files.MiB
_MOST_DEPTH = 8  # of graphs in nodes; an If for the rotary caches is one

# By message and field number: the name, and how the field is read. `skip` jumps over it; `number` and `text` come at
# most once, `texts` and `numbers` (also packed) more often; a message's name means one such part, with a star several;
# `refuse` may not be there.
_SKIP = ("", "skip")
_FIELDS: dict[str, dict[int, tuple[str, str]]] = {
    "ModelProto": {
        **dict.fromkeys((1, 2, 3, 4, 5, 6, 8), _SKIP),
        7: ("graph", "GraphProto"),
        14: ("metadata_props", "StringStringEntryProto*"),
        20: ("training_info", "refuse"),
        25: ("functions", "refuse"),
        26: ("configuration", "refuse"),
    },
    "GraphProto": {
        **dict.fromkeys((2, 10, 13, 14, 16), _SKIP),
        1: ("node", "NodeProto*"),
        5: ("initializer", "TensorProto*"),
        11: ("input", "ValueInfoProto*"),
        12: ("output", "ValueInfoProto*"),
        15: ("sparse_initializer", "refuse"),
    },
    "ValueInfoProto": {
        **dict.fromkeys((3, 4), _SKIP),
        1: ("name", "text"),
        2: ("type", "TypeProto"),
    },
    "TypeProto": {**dict.fromkeys((4, 5, 6, 7, 8, 9), _SKIP), 1: ("tensor_type", "TypeProto.Tensor")},
    "TypeProto.Tensor": {1: _SKIP, 2: ("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: ("dim", "TensorShapeProto.Dimension*")},
    "TensorShapeProto.Dimension": {**dict.fromkeys((2, 3), _SKIP), 1: ("dim_value", "number")},
    "NodeProto": {
        **dict.fromkeys((6, 9), _SKIP),
        1: ("input", "texts"),
        2: ("output", "texts"),
        3: ("name", "text"),
        4: ("op_type", "text"),
        5: ("attribute", "AttributeProto*"),
        7: ("domain", "text"),
        8: ("overload", "refuse"),
        10: ("device_configurations", "refuse"),
    },
    "AttributeProto": {
        **dict.fromkeys((2, 4, 7, 8, 9, 13, 20), _SKIP),
        1: ("name", "text"),
        3: ("i", "number"),
        5: ("t", "TensorProto"),
        6: ("g", "GraphProto"),
        10: ("tensors", "TensorProto*"),
        11: ("graphs", "GraphProto*"),
        14: ("tp", "refuse"),
        15: ("type_protos", "refuse"),
        21: ("ref_attr_name", "refuse"),
        22: ("sparse_tensor", "refuse"),
        23: ("sparse_tensors", "refuse"),
    },
    "TensorProto": {
        **dict.fromkeys((2, 4, 5, 6, 7, 9, 10, 11, 12, 16), _SKIP),
        1: ("dims", "numbers"),
        3: ("segment", "refuse"),
        8: ("name", "text"),
        13: ("external_data", "StringStringEntryProto*"),
        14: ("data_location", "number"),
    },
    "StringStringEntryProto": {1: ("key", "text"), 2: ("value", "text")},
}
_EXTERNAL = 1  # TensorProto.DataLocation


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
    external: list[_External] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)  # of attentions, by their outputs
    head_size: int | None = None
    tables: set[str] = field(default_factory=set)  # of the angles of positions, by their names
    positions: int | None = None


@dataclass(frozen=True)
class Graph:
    """What a graph says of itself.

    Attributes:
        files: those beside it that hold its weights, sorted.
        shapes: of its inputs and outputs, by their names.
        head_size: of its attention; None where the graph does not show it.
        positions: for how many its attention has angles; None where the graph does not show it.
    """

    files: list[Path]
    shapes: Mapping[str, Shape]
    head_size: int | None
    positions: int | None


def check(path: Path) -> Graph:
    """Checks a graph, and that its weights are where it says.

    Raises:
        WeightsError: it is no ONNX graph, uses an operator that no decoder here knows, has functions, training or
            sparse tensors, or takes a tensor from a file that is not beside it, that no node needs, or that is too
            short.
    """
    files.needed(path)
    if path.stat().st_size > _MOST_BYTES:
        raise WeightsError(f"{path} is larger than an ONNX graph can be: keep its weights in a file beside it")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _Found()
            _model(_Reader(path, content), found)
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
    return Graph([path.parent / name for name in sorted(sizes)], found.shapes, found.head_size, found.positions)


class _Reader:
    """Reads messages out of the file, and gives up before a hostile one exhausts time or memory."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path = path
        self._content = content
        self._fields = self._text = 0

    def broken(self, why: str) -> WeightsError:
        return WeightsError(f"{self.path} {why}: copy or download it again")

    def refused(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} {what}: do not use this copy")

    def whole(self) -> range:
        """The place of the outermost message."""
        return range(len(self._content))

    def fields(self, message: str, place: range) -> Iterator[tuple[str, str, int | range]]:
        """Name, kind and value (a number, or the place of a text or a message) of the fields that are looked at."""
        known, seen = _FIELDS[message], set()
        at = place.start
        while at < place.stop:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise self.refused(f"has more than {_MOST_FIELDS} fields")
            tag, at = self._varint(at, place.stop, 5)
            number, wire = tag >> 3, tag & 7
            if number not in known:
                raise self.refused(f"has a field {number} in {message}, which is unknown here")
            name, kind = known[number]
            if kind == "refuse":
                raise self.refused(f"has {name} in {message}, which no decoder here knows")
            value: int | range
            if wire == 0:
                value, at = self._varint(at, place.stop, 10)
            elif wire == 2:
                size, at = self._varint(at, place.stop, 5)
                value, at = range(at, at + size), at + size
            elif wire in (1, 5) and kind == "skip":
                value, at = 0, at + (8 if wire == 1 else 4)
            else:
                raise self.broken("is no ONNX graph")
            if at > place.stop:
                raise self.broken("is cut off")
            if kind == "skip":
                continue
            if kind != "numbers" and (wire == 0) != (kind == "number"):
                raise self.broken("is no ONNX graph")
            # Readers differ on what comes twice: the last one counts, or both are put together.
            if kind not in ("texts", "numbers") and not kind.endswith("*"):
                if number in seen:
                    raise self.refused(f"has {name} in {message} twice")
                seen.add(number)
            yield name, kind.rstrip("*"), value

    def text(self, place: range) -> str:
        """A name, most of which are ASCII; what is no UTF-8 is kept apart from what is."""
        self._text += len(place)
        if self._text > _MOST_TEXT:
            raise self.refused(f"has more than {_MOST_TEXT} bytes of names")
        return self._content[place.start : place.stop].decode("utf-8", "surrogateescape")

    def numbers(self, place: range) -> list[int]:
        """Packed numbers."""
        found, at = [], place.start
        while at < place.stop:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise self.refused(f"has more than {_MOST_FIELDS} fields")
            number, at = self._varint(at, place.stop, 10)
            found.append(number)
        return found

    def _varint(self, at: int, stop: int, most: int) -> tuple[int, int]:
        value = 0
        for index in range(most):
            if at + index >= stop:
                raise self.broken("is cut off")
            byte = self._content[at + index]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise self.broken("is no ONNX graph")


def _model(reader: _Reader, found: _Found) -> None:
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


def _graph(reader: _Reader, place: range, found: _Found, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise reader.refused(f"has graphs within graphs, more than {_MOST_DEPTH} deep")
    for name, _, value in reader.fields("GraphProto", place):
        assert isinstance(value, range)
        if name == "node":
            _node(reader, value, found, depth)
        elif name == "initializer":
            _tensor(reader, value, found)
        else:
            value_name, shape = _value(reader, value)
            if name == "output":
                found.used.add(value_name)
            if depth == 0:
                found.shapes[value_name] = shape


def _value(reader: _Reader, place: range) -> tuple[str, Shape]:
    """Name and shape of an input or output; the shape is empty where it has none."""
    name = ""
    dimensions: list[int | None] = []
    level = [("ValueInfoProto", place)]
    while level:
        message, inner = level.pop(0)
        if message == "TensorShapeProto.Dimension":
            numbers = [number for _, _, number in reader.fields(message, inner)]
            dimensions.append(numbers[0] if numbers and isinstance(numbers[0], int) else None)
            continue
        for part, kind, value in reader.fields(message, inner):
            assert isinstance(value, range)
            if part == "name":
                name = reader.text(value)
            else:
                level.append((kind, value))
    return name, tuple(dimensions)


def _node(reader: _Reader, place: range, found: _Found, depth: int) -> None:
    texts = {"domain": "", "op_type": "", "name": ""}
    values: dict[str, list[str]] = {"input": [], "output": []}
    numbers: dict[str, int] = {}
    for name, kind, value in reader.fields("NodeProto", place):
        assert isinstance(value, range)
        if kind == "texts":
            values[name].append(reader.text(value))
        elif kind == "text":
            texts[name] = reader.text(value)
        else:
            numbers |= _attribute(reader, value, found, depth)
    found.used.update(values["input"])
    domain, operator = texts["domain"], texts["op_type"]
    if operator not in OPERATORS.get(domain, ()):
        what = shorten(f"{domain}::{operator}" if domain else operator)
        where = f"in the node {shorten(texts['name'])}"
        raise reader.refused(f"has the operator {what} {where}, which no decoder here knows")
    first = values["input"][0] if values["input"] else ""
    if operator == "GroupQueryAttention" and numbers.get("num_heads") and values["output"]:
        found.heads[values["output"][0]] = numbers["num_heads"]
        found.tables.update(values["input"][7:8])
    elif operator == "MatMulNBits" and first in found.heads and "K" in numbers:
        found.head_size = numbers["K"] // found.heads[first]


def _attribute(reader: _Reader, place: range, found: _Found, depth: int) -> dict[str, int]:
    """Its name and number, where it is one."""
    attribute, number = "", None
    for name, kind, value in reader.fields("AttributeProto", place):
        if isinstance(value, int):
            number = value
        elif name == "name":
            attribute = reader.text(value)
        elif kind == "GraphProto":
            _graph(reader, value, found, depth + 1)
        else:
            _tensor(reader, value, found, node=True)
    return {} if number is None else {attribute: number}


def _tensor(reader: _Reader, place: range, found: _Found, *, node: bool = False) -> None:
    name, location, entries, sizes = "", 0, {}, list[int]()
    for part, _, value in reader.fields("TensorProto", place):
        if part == "dims":
            sizes += [value] if isinstance(value, int) else reader.numbers(value)
        elif isinstance(value, int):
            location = value
        elif part == "name":
            name = reader.text(value)
        else:
            key, text = _entry(reader, value)
            if key in entries:
                raise reader.refused(f"has {shorten(key)} twice in the tensor {shorten(name)}")
            entries[key] = text
    if name in found.tables and sizes:
        found.positions = sizes[0]
    if location not in (0, _EXTERNAL) or (location == _EXTERNAL) != bool(entries):
        raise reader.refused(f"has the tensor {shorten(name)}, of which it is not clear where its data are")
    if not entries:
        return
    for key, text in entries.items():
        if key not in ("location", "offset", "length"):
            raise reader.refused(f"has {shorten(key)} in the tensor {shorten(name)}, which is unknown here")
        if key != "location" and not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
            raise reader.refused(f"has {key} {shorten(text)} in the tensor {shorten(name)}: it must be a number")
    files.beside(reader.path, entries.get("location"))
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    found.external.append(_External(name, entries["location"], end, node))


def _entry(reader: _Reader, place: range) -> tuple[str, str]:
    texts = {"key": "", "value": ""}
    for name, _, value in reader.fields("StringStringEntryProto", place):
        assert isinstance(value, range)
        texts[name] = reader.text(value)
    return texts["key"], texts["value"]
