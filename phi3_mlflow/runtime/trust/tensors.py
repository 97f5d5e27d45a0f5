"""The safetensors of a folder: which tensors they hold, by their headers, and that those are true of the files.

A file is the length of its header in 8 bytes (little-endian), the header as JSON, and the numbers, where each tensor
has a place of its own and nothing else has one (https://github.com/huggingface/safetensors#format). None are read here.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError, shorten
from . import files, rules

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Bytes of a header, or of an index. One of a thousand tensors has about a hundredth.
_MOST = 16 * files.MiB
# Bytes of a number, by the type's name (safetensors/src/tensor.rs, Dtype), but for types that share bytes.
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int and each >= 0 for each in value)


_TENSOR = {
    "dtype": rules.one_of(*_WIDTHS),
    "shape": rules.List(rules.integer(0, 2**40), 8),
    "data_offsets": rules.Rule("two numbers of bytes, from 0 on", _is_place),
}
_HEADER = rules.Named(rules.text(200), rules.Object(_TENSOR, tuple(_TENSOR)), 2**16)
_NOTES = rules.Named(rules.text(200), rules.Rule("text", lambda value: isinstance(value, str)), 1000)


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header has it.

    Attributes:
        path: the file.
        dtype: the type of its numbers, in the format's words (`BF16`).
        shape: its sizes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read(folder: Path) -> tuple[list[Path], dict[str, Tensor]]:
    """What transformers loads of a folder: one file, or else the shards that an index names.

    Returns:
        The files that are needed, first the one that says which tensors there are; and those tensors by their names.

    Raises:
        WeightsError: a file is missing or damaged, or the index and the shards contradict each other.
    """
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        shards, tensors = _sharded(index)
        # Transformers takes the single file where both are there.
        return ([single, index, *shards], header(single)) if single.is_file() else ([index, *shards], tensors)
    if not single.is_file() and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise WeightsError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded, and is refused: save the model with "
            "save_pretrained, which writes safetensors"
        )
    return [single], header(single)


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by their names.

    Raises:
        WeightsError: it is missing, or its header makes no sense or does not fit the file's size.
    """
    size = files.needed(path).stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise WeightsError(
                    f"{path} begins with a header of {length} bytes, and the file has {size}: copy or download it again"
                )
            if length > _MOST:
                raise WeightsError(
                    f"{path} begins with a header of {length} bytes, and at most {_MOST} are read: do not use this copy"
                )
            content = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    found = files.plain(path, files.parse(f"the header of {path}", content))
    rules.check(path, found.pop("__metadata__", {}), _NOTES, "", "__metadata__")
    rules.check(path, found, _HEADER, "which no tensor has: do not use this copy")
    at = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = tensor["data_offsets"]
        due = at, at + math.prod(tensor["shape"]) * _WIDTHS[tensor["dtype"]]
        if (begin, end) != due:
            raise WeightsError(
                f"{path} has the tensor {name} at bytes {begin} to {end}, where its type and shape ({tensor['dtype']}, "
                f"{tensor['shape']}) and the tensors before it leave {due[0]} to {due[1]}: copy or download it again"
            )
        at = end
    if at != size - 8 - length:
        raise WeightsError(
            f"{path} has {size - 8 - length} bytes of numbers, and its tensors take {at}: copy or download it again"
        )
    return {name: Tensor(path, each["dtype"], tuple(each["shape"])) for name, each in found.items()}


def _sharded(index: Path) -> tuple[list[Path], dict[str, Tensor]]:
    """The shards that an index names, and their tensors."""
    content = files.plain(index, files.json_object(index, _MOST))
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index} has no `weight_map`: copy or download it again")
    shards = [files.beside(index, name) for name in sorted(set(map(str, places.values())))]
    if others := [shard for shard in shards if shard.suffix != ".safetensors"]:
        raise WeightsError(f"{index} names {shorten(others[0].name)}, which is not .safetensors: do not use this copy")
    if not isinstance(content.get("metadata"), dict):  # transformers fails without it
        raise WeightsError(f"{index} has no `metadata`: copy or download it again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in header(shard).items():
            if places.get(name) != shard.name:
                where = f"in {shorten(places[name])}" if name in places else "nowhere"
                raise WeightsError(
                    f"{shard} has the tensor {name}, and {INDEX} has it {where}: copy or download both again"
                )
            tensors[name] = tensor
    if missing := [name for name in places if name not in tensors]:
        raise WeightsError(
            f"{index.parent / places[missing[0]]} lacks the tensor {shorten(missing[0])}, which {INDEX} has there: "
            "copy or download both again"
        )
    return shards, tensors
