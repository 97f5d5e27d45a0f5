"""Which instructions a processor has. Run with: python -m pytest tests/test_processor.py"""

import pytest

from phi3_mlflow.runtime.decoders.processor import has_vnni


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f avx512_vnni sha_ni", True), ("avx_vnni", True), ("fpu avx2 avx512f", False), ("", False)],
)
def test_vnni_is_one_of_the_flags_that_linux_lists(tmp_path, flags, expected):
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: avx512_vnni of a name\nflags\t\t: {flags}\nbugs\t\t: avx_vnni\n" * 2, "utf-8")
    assert has_vnni(path) is expected


def test_where_linux_does_not_say_there_is_none(tmp_path):
    assert not has_vnni(tmp_path / "missing")
