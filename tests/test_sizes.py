"""Run with: python -m pytest tests/test_sizes.py"""

import pytest

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.sizes import Bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (4 * 2**30, 4 * 2**30),
        (1e9, 10**9),
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("1.5G", 1_500_000_000),
        ("500MB", 500_000_000),
        ("64KiB", 65536),
        ("2TiB", 2**41),
        ("123", 123),
        (" 7 B ", 7),
    ],
)
def test_memory_is_given_in_bytes_or_as_text_with_a_unit(value, expected):
    assert Bytes().check("kv_budget", value) == expected


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, True, None, "", "0", "much", "4GiBs", "-4GiB", "GiB", "1e9", "9" * 40, []]
)
def test_what_is_no_amount_of_memory_is_refused_by_name(value):
    with pytest.raises(InvalidRequest, match=r"`kv_budget` is .* bytes above 0"):
        Bytes().check("kv_budget", value)
