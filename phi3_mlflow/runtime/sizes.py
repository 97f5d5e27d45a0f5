"""Amounts of memory as people write them: bytes, or text such as "4GiB"."""

import re
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest, shorten
from .options import Range

_TEXT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Bytes:
    """A positive number of bytes, as an integer or as text with a unit (KB, MB, GB, TB; KiB, MiB, GiB, TiB)."""

    def check(self, name: str, value: Any) -> int:
        """The bytes; InvalidRequest where the value is no amount of memory."""
        if isinstance(value, str) and (found := _TEXT.fullmatch(value.strip())):
            unit = (found[2] or "").upper()
            value = int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** _POWERS[unit[:1]])
        try:
            return int(Range("integer", 1, 2**62).check(name, value))
        except InvalidRequest:
            problem = f'is {shorten(value)}; it must be a number of bytes above 0, or text such as "4GiB" or "500MB"'
            raise InvalidRequest(name, problem) from None
