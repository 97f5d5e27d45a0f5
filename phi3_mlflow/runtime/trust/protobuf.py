"""The encoding of ONNX graphs, message by message; it knows which fields there are, and little of what they mean.

It reads the protobuf encoding itself (https://protobuf.dev/programming-guides/encoding, and onnx.proto of
https://github.com/onnx/onnx), since logged models are loaded without the package onnx.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import WeightsError
from . import files

# A graph of Phi-3-mini has some 14,000 fields that are read or jumped over, and 0.1 MB of names.
_MOST_FIELDS, _MOST_TEXT = 1_000_000, 64 * files.MiB
# By message and field number: the name, and how the field is read. `skip` jumps over it; `number`, `text` and `bytes`
# come at most once, `texts` and `numbers` (also packed) more often; a message's name means one such part, with a star
# several; `refuse` may not be there.
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
    "ValueInfoProto": {**dict.fromkeys((3, 4), _SKIP), 1: ("name", "text"), 2: ("type", "TypeProto")},
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
        **dict.fromkeys((2, 4, 5, 6, 10, 11, 12, 16), _SKIP),
        1: ("dims", "numbers"),
        3: ("segment", "refuse"),
        7: ("int64_data", "numbers"),
        8: ("name", "text"),
        9: ("raw_data", "bytes"),
        13: ("external_data", "StringStringEntryProto*"),
        14: ("data_location", "number"),
    },
    "StringStringEntryProto": {1: ("key", "text"), 2: ("value", "text")},
}


class Reader:
    """Reads messages out of the file, and gives up before a hostile one exhausts time or memory."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path = path
        self._content = content
        self._fields = self._text = 0

    def broken(self, why: str) -> WeightsError:
        """An error about a file that was damaged."""
        return WeightsError(f"{self.path} {why}: copy or download it again")

    def refused(self, what: str) -> WeightsError:
        """An error about a file that nobody should use."""
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

    def integer(self, place: range) -> int:
        """The bytes of a whole number, the lowest first."""
        return int.from_bytes(self._content[place.start : place.stop], "little", signed=True)

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
