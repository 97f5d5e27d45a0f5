"""An ONNX file as plain data: nodes with their attributes, and tensors that stay where they are in the mapped files.

Knows the encoding (https://protobuf.dev/programming-guides/encoding, and onnx.proto of https://github.com/onnx/onnx)
and no operator. What the file may hold at all is checked before, see `trust`.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError
from ..trust.files import beside

# TensorProto.DataType; 16-bit floats and what is smaller than a byte are not read.
_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
# In which field integers stand one by one (int32_data, int64_data), by the data type.
_LISTS = {2: 5, 3: 5, 6: 5, 9: 5, 7: 7}
_EXTERNAL = 1  # TensorProto.DataLocation

_Bytes = memoryview
_Fields = dict[int, list[int | memoryview]]


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its operator, without the domain.
        domain: of the operator; empty for ONNX's own.
        inputs: names of values; an empty one is an input that is left out.
        outputs: likewise.
        attributes: numbers, strings, lists of both, arrays and graphs, by their names.
    """

    name: str
    op: str
    domain: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]

    def input(self, index: int) -> str:
        """The name of an input; empty where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Graph:
    """Nodes in the order in which they run, and what they begin and end with.

    Attributes:
        tensors: arrays by their names, read-only and not copied; they keep the mapped files open.
    """

    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read(path: Path) -> Graph:
    """Reads an ONNX file.

    Args:
        path: the file; its external data are beside it.

    Returns:
        Its graph.

    Raises:
        WeightsError: it is no such file, is cut off, or has a tensor that is not read here; the message names it.
        OSError: a file cannot be opened.
    """
    try:
        model = _fields(memoryview(_map(path)))
        if 7 not in model:
            raise WeightsError(f"{path} is no ONNX graph: copy or download it again")
        return _graph(_message(model, 7), _Files(path))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is no ONNX graph, or is cut off: copy or download it again ({error})") from error


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


class _Files:
    """The files beside the graph, mapped when they are first needed."""

    def __init__(self, graph: Path):
        self.graph = graph
        self._maps: dict[str, mmap.mmap] = {}

    def part(self, tensor: str, entries: Mapping[str, str]) -> _Bytes:
        location = entries["location"]
        if location not in self._maps:
            self._maps[location] = _map(beside(self.graph, location))
        start = int(entries.get("offset", 0))
        end = start + int(entries["length"])
        if not 0 <= start <= end <= len(self._maps[location]):
            raise WeightsError(f"{location} is cut off: the tensor {tensor} ends at byte {end}; copy it again")
        return memoryview(self._maps[location])[start:end]


def _graph(data: _Bytes, files: _Files) -> Graph:
    fields = _fields(data)
    tensors = (_tensor(part, files) for part in _messages(fields, 5))
    return Graph(
        nodes=[_node(part, files) for part in _messages(fields, 1)],
        tensors=dict(tensors),
        inputs=[_text(_fields(part), 1) for part in _messages(fields, 11)],
        outputs=[_text(_fields(part), 1) for part in _messages(fields, 12)],
    )


def _node(data: _Bytes, files: _Files) -> Node:
    fields = _fields(data)
    return Node(
        name=_text(fields, 3),
        op=_text(fields, 4),
        domain=_text(fields, 7),
        inputs=_texts(fields, 1),
        outputs=_texts(fields, 2),
        attributes=dict(_attribute(part, files) for part in _messages(fields, 5)),
    )


def _attribute(data: _Bytes, files: _Files) -> tuple[str, Any]:
    fields = _fields(data)
    name, kind = _text(fields, 1), _number(fields, 20)
    match kind:  # AttributeProto.AttributeType
        case 1:
            return name, _floats(fields, 2)[0] if 2 in fields else 0.0
        case 2:
            return name, _number(fields, 3)
        case 3:
            return name, _text(fields, 4)
        case 4:
            return name, _tensor(_message(fields, 5), files)[1]
        case 5:
            return name, _graph(_message(fields, 6), files)
        case 6:
            return name, _floats(fields, 7)
        case 7:
            return name, _numbers(fields, 8)
        case 8:
            return name, _texts(fields, 9)
    raise WeightsError(f"{files.graph} has an attribute {name} of type {kind}, which is not read here")


def _tensor(data: _Bytes, files: _Files) -> tuple[str, np.ndarray]:
    fields = _fields(data)
    name, kind, shape = _text(fields, 8), _number(fields, 2), _numbers(fields, 1)
    if kind not in _DTYPES:
        raise WeightsError(f"{files.graph} has the tensor {name} of data type {kind}, which is not read here")
    dtype = np.dtype(_DTYPES[kind]).newbyteorder("<")
    if _number(fields, 14) == _EXTERNAL:
        entries = {_text(entry, 1): _text(entry, 2) for entry in map(_fields, _messages(fields, 13))}
        content = files.part(name, {"length": str(int(np.prod(shape)) * dtype.itemsize)} | entries)
    elif 9 in fields:
        content = _message(fields, 9)
    elif kind == 1 and 4 in fields:
        return name, np.array(_floats(fields, 4), dtype).reshape(shape)
    elif kind in _LISTS and (_LISTS[kind] in fields or 0 in shape):
        return name, np.array(_numbers(fields, _LISTS[kind]), dtype).reshape(shape)
    else:
        raise WeightsError(
            f"{files.graph} has the tensor {name} without its numbers, or with them in a way unknown here"
        )
    return name, np.frombuffer(content, dtype).reshape(shape)


def _fields(data: _Bytes) -> _Fields:
    """The fields of a message by their numbers: integers, and the bytes of everything else."""
    found: _Fields = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | _Bytes
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
            case 1:
                value, at = data[at : at + 8], at + 8
            case 2:
                size, at = _varint(data, at)
                value, at = data[at : at + size], at + size
            case 5:
                value, at = data[at : at + 4], at + 4
            case wire:
                raise ValueError(f"wire type {wire}")
        if at > len(data):
            raise ValueError("a field is longer than what it is in")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: _Bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _messages(fields: _Fields, number: int) -> Iterator[_Bytes]:
    for value in fields.get(number, ()):
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number")
        yield value


def _message(fields: _Fields, number: int) -> _Bytes:
    *_, last = _messages(fields, number)
    return last


def _texts(fields: _Fields, number: int) -> list[str]:
    return [bytes(value).decode() for value in _messages(fields, number)]


def _text(fields: _Fields, number: int) -> str:
    return (_texts(fields, number) or [""])[-1]


def _numbers(fields: _Fields, number: int) -> list[int]:
    """Integers, one by one or packed."""
    found = []
    for value in fields.get(number, ()):
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            one, at = _varint(value, at)
            found.append(_signed(one))
    return found


def _number(fields: _Fields, number: int) -> int:
    return (_numbers(fields, number) or [0])[-1]


def _floats(fields: _Fields, number: int) -> list[float]:
    return [one for value in _messages(fields, number) for (one,) in struct.iter_unpack("<f", value)]
