"""Headers of safetensors: what is damaged or hostile is refused in one line that names the file and the tensor.

Run: pytest tests/test_tensors.py
"""

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import file, header

from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.trust import tensors

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers" / "model.safetensors"
GOOD = header({"a.weight": ("F32", [2, 3]), "b.weight": ("BF16", [4])})
NUMBERS = bytes(range(32))


def changed(name: str = "b.weight", **values: object) -> bytes:
    """A file with another value of one tensor; None takes it away."""
    tensor = {key: value for key, value in (GOOD[name] | values).items() if value is not None}
    return file({**GOOD, name: tensor}, NUMBERS)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def test_tensors_are_read_as_the_library_reads_them():
    from safetensors import safe_open

    with safe_open(EMBEDDED, "np") as theirs:
        expected = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118
        assert {name: (each.dtype, each.shape) for name, each in tensors.header(EMBEDDED).items()} == {
            name: (each.get_dtype(), tuple(each.get_shape())) for name, each in expected.items()
        }


def test_notes_padding_order_and_empty_tensors_are_of_no_account(tmp_path):
    empty = {"dtype": "F16", "shape": [0, 7], "data_offsets": [24, 24]}
    content = json.dumps({"z": empty, "__metadata__": {"format": "pt"}, **dict(reversed(GOOD.items()))})
    found = tensors.header(written(tmp_path, file(content + "   ", NUMBERS)))
    assert {name: each.shape for name, each in found.items()} == {"a.weight": (2, 3), "b.weight": (4,), "z": (0, 7)}


BROKEN = {
    "an empty file": (b"", "is empty"),
    "a few bytes": (b"abc", "begins with a header of 6513249 bytes, and the file has 3"),
    "no header": (file("", b""), "is not JSON"),
    "a length beyond the file": (struct.pack("<Q", 40) + b"{}", "a header of 40 bytes, and the file has 10"),
    "the largest length": (b"\xff" * 8 + b"{}", "begins with a header of 18446744073709551615 bytes"),
    "no JSON": (file("{", NUMBERS), "is not JSON"),
    "a list": (file("[]", NUMBERS), "is not a JSON object"),
    "no UTF-8": (file(b'{"\xff": 1}', NUMBERS), "is not JSON"),
    "a name twice": (file(f'{{"a": {json.dumps(GOOD)}, "a": 1}}', b""), "has the key a twice"),
    "a key twice": (file('{"a": {"dtype": "F32", "dtype": "F16"}}', b""), "has the key a.dtype twice"),
    "a deep one": (file('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", b""), "the header of .* is not JSON"),
    "a huge number": (file('{"a": ' + "9" * 5000 + "}", b""), "is not JSON"),
    "a name with a control character": (file({"a\n": GOOD["a.weight"]}, b""), r"has the key 'a\\n': it must be"),
    "notes that are no text": (file({"__metadata__": {"format": 1}}, b""), "has __metadata__.format 1: it must be"),
    "no tensor": (file({"a": 1}, b""), "has a 1: it must be an object"),
    "an unknown key": (changed(more=1), "has the key b.weight.more, which no tensor has"),
    "no type": (changed(dtype=None), r"has no b\.weight\.dtype"),
    "an unknown type": (changed(dtype="F7"), r"has b\.weight\.dtype 'F7': it must be 'F64' or"),
    "no shape": (changed(shape=None), r"has no b\.weight\.shape"),
    "a negative size": (changed(shape=[-4]), r"has b\.weight\.shape\[0\] -4: it must be an integer from 0"),
    "a size that is none": (changed(shape=[True, 4]), r"has b\.weight\.shape\[0\] True"),
    "a fraction": (changed(shape=[4.0]), r"has b\.weight\.shape\[0\] 4\.0"),
    "a shape that does not fit": (changed(shape=[5]), r"the tensor b\.weight at bytes 24 to 32, where .* 24 to 34"),
    "sizes beyond all memory": (changed(shape=[2**40] * 8), r"the tensor b\.weight at bytes 24 to 32, where"),
    "no place": (changed(data_offsets=None), r"has no b\.weight\.data_offsets"),
    "a negative place": (changed(data_offsets=[-8, 0]), r"has b\.weight\.data_offsets \[-8, 0\]: it must be two"),
    "half a place": (changed(data_offsets=[24]), r"has b\.weight\.data_offsets \[24\]: it must be two"),
    "a place that ends before it begins": (changed(data_offsets=[32, 24]), r"the tensor b\.weight at bytes 32 to 24"),
    "a place beyond the file": (changed(data_offsets=[10**15, 10**15 + 8]), r"the tensor b\.weight at bytes 1000"),
    "two in one place": (changed(data_offsets=[16, 24]), r"the tensor b\.weight at bytes 16 to 24, where .* 24 to 32"),
    "a gap": (changed(data_offsets=[25, 33]), r"the tensor b\.weight at bytes 25 to 33, where .* 24 to 32"),
    "a truncated file": (file(GOOD, NUMBERS[:-1]), "has 31 bytes of numbers, and its tensors take 32"),
    "more than its tensors": (file(GOOD, NUMBERS + b"x"), "has 33 bytes of numbers, and its tensors take 32"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_in_one_line_with_the_files_name(tmp_path, what):
    content, message = BROKEN[what]
    path = written(tmp_path, content)
    with pytest.raises(WeightsError, match=message) as error:
        tensors.header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_of_100_megabytes_is_not_read(tmp_path):
    path = written(tmp_path, struct.pack("<Q", 100_000_000) + b"{")
    with path.open("r+b") as stream:
        stream.truncate(100_000_008)
    with pytest.raises(WeightsError, match="a header of 100000000 bytes, and at most 16777216 are read"):
        tensors.header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_passes_the_library_reads_as_well(tmp_path, data):
    from safetensors import safe_open

    whole = file(GOOD, NUMBERS)
    content = bytearray(whole)
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path = written(tmp_path, bytes(content))
    with suppress(WeightsError):
        found = tensors.header(path)
        with safe_open(path, "np") as theirs:
            assert set(theirs.keys()) == set(found)
