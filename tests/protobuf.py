"""Writes the encoding of protobuf messages, field by field, ill-formed ones too; and small ONNX graphs with it."""

from collections.abc import Iterable


def varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """A field: a number, or a text or message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def entries(**values: str) -> bytes:
    """TensorProto.external_data."""
    return b"".join(field(13, field(1, key) + field(2, value)) for key, value in values.items())


def tensor(name: str = "w", **external: str) -> bytes:
    """A TensorProto of one row with one byte, 1, in another file where entries of external_data are given."""
    content = field(1, 1) * 2 + field(2, 2) + field(8, name)
    return content + (entries(**external) + field(14, 1) if external else field(9, b"\1"))


def node(operator: str = "Add", *inputs: str, domain: str = "", attributes: Iterable[bytes] = ()) -> bytes:
    """A NodeProto."""
    parts = [field(1, name) for name in inputs] + [field(2, "out"), field(3, "a node"), field(4, operator)]
    return b"".join([*parts, *(field(5, attribute) for attribute in attributes), field(7, domain)])


def value(name: str, *shape: int | str) -> bytes:
    """A ValueInfoProto: an input or output of fixed and of named dimensions."""
    dimensions = [field(1, field(1 if isinstance(size, int) else 2, size)) for size in shape]
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, b"".join(dimensions))))


def attention(attributes: Iterable[bytes] = ()) -> list[bytes]:
    """A GroupQueryAttention of the input `x`, matrix `w` and tables `cos` and `sin`, and the nodes before it."""

    def made(name: str, operator: str, *inputs: str, to: int = 0) -> bytes:
        parts = [field(1, each) for each in inputs] + [field(2, name), field(4, operator)]
        return b"".join([*parts, *([field(5, field(1, "to") + field(3, to))] if to else [])])

    heads = field(1, "num_heads") + field(3, 2)
    inputs = ("q", "", "", "", "", "last32", "total32", "cos", "sin")
    return [
        made("q", "Gather", "w", "x"),
        made("sums", "ReduceSum", "x", "w"),
        made("last", "Sub", "sums", "w"),
        made("last32", "Cast", "last", to=6),
        made("shape", "Shape", "x"),
        made("total", "Gather", "shape", "w"),
        made("total32", "Cast", "total", to=6),
        node("GroupQueryAttention", *inputs, domain="com.microsoft", attributes=[heads, *attributes]),
    ]


def graph(nodes: Iterable[bytes] = (), initializers: Iterable[bytes] = (), more: bytes = b"") -> bytes:
    """A GraphProto with the input `x` of rows of tokens."""
    parts = [*(field(1, part) for part in nodes), *(field(5, part) for part in initializers)]
    ends = field(11, value("x", "rows", "tokens")) + field(12, field(1, "out"))
    return b"".join([*parts, field(2, "a graph"), ends, more])


def model(content: bytes, more: bytes = b"") -> bytes:
    """A ModelProto."""
    return field(1, 10) + field(2, "a producer") + field(7, content) + field(8, field(1, "") + field(2, 21)) + more
