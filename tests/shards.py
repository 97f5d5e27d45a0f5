"""Files of safetensors that no library would write: headers by hand."""

import json
import math
import random
from collections.abc import Mapping
from typing import Any

_WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}


def header(tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """The header of tensors, by their names with types and shapes, one behind the other."""
    found, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * _WIDTHS[dtype]
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return found


def file(header: object, numbers: bytes) -> bytes:
    """A file: the header as bytes, text, or what is to be written as JSON."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    content = text if isinstance(text, bytes) else text.encode()
    return len(content).to_bytes(8, "little") + content + numbers


def whole(name: str, size: int, seed: int) -> bytes:
    """A file of so many bytes, at least 1000, with one tensor."""
    content = json.dumps(header({name: ("U8", [size - 208])})).ljust(200)
    return file(content, random.Random(seed).randbytes(size - 208))
