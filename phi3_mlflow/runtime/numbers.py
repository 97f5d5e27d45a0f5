"""Numbers of a JSON Schema that llguidance takes exactly: it reads them as floats and writes bounds digit by digit.

Knows numbers, nothing of other keywords.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from .errors import shorten
from .nodes import Node

# Floats hold integers exactly within these, and every decimal of at most MAX_DIGITS; decimals are padded to 18 digits
# of an int64 at most.
MAX_INTEGER = 2**53
MAX_DIGITS = 15
MAX_DECIMALS = 18
LARGEST = 10**18
# Multiples of this up to LARGEST are exact as floats: at most 9 digits, times 5**9.
_COARSE = 10**9


def unwritable(values: Any) -> str | None:
    """What is wrong with the first number in a JSON value that an answer could not repeat digit by digit, if any."""
    level = [values]
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                below += value.values() if isinstance(value, dict) else value
            elif isinstance(value, (int, float)) and not isinstance(value, bool) and not _exact(value):
                return (
                    f"is {shorten(value)}; numbers up to {MAX_INTEGER} with at most {MAX_DIGITS} digits, "
                    f"{MAX_DECIMALS} of them after the point, can be enforced"
                )
        level = below
    return None


def numerator(value: int | float) -> int:
    """A number's digits without the point: llguidance keeps one state for each remainder of them."""
    number = Decimal(repr(value))
    return int(number.scaleb(max(0, -int(number.as_tuple().exponent))))


def _exact(value: int | float) -> bool:
    if abs(value) > MAX_INTEGER:
        return False
    if isinstance(value, int):
        return True
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    return isinstance(exponent, int) and exponent >= -MAX_DECIMALS and len(digits) <= MAX_DIGITS


def close_bounds(node: Node) -> str | None:
    """Make a node's bounds `minimum` and `maximum` alone, inclusive, and numbers that are taken exactly.

    Exclusive bounds become the next number inside (text just below an exclusive 1, 0.99999999999999999, is read back
    as 1, and llguidance takes 0 for above 0), bounds with too many digits are rounded inwards, and those beyond
    LARGEST, which an answer's numbers then cannot pass, become it.

    Returns:
        The keyword that asks for numbers beyond LARGEST, or None.
    """
    whole = node.types() & {"number", "integer"} == {"integer"}
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        bounds = []
        if inclusive in node:
            bounds.append(_inward(Decimal(repr(node[inclusive])), sign, whole))
        if exclusive in node:
            bound = Decimal(repr(node.pop(exclusive)))
            if whole:
                step = Decimal(1) if bound == bound.to_integral_value() else Decimal(0)
            else:
                step = Decimal(1).scaleb(
                    max(bound.adjusted() - MAX_DIGITS + 1, -MAX_DECIMALS) if bound else -MAX_DIGITS
                )
            bounds.append(_inward(bound + sign * step, sign, whole))
        if not bounds:
            continue
        bound = max(bounds) if sign > 0 else min(bounds)
        if sign * bound > LARGEST:
            return inclusive if inclusive in node else exclusive
        node[inclusive] = int(bound) if bound == bound.to_integral_value() else float(bound)
    return None


def _inward(bound: Decimal, sign: int, whole: bool) -> Decimal:
    if sign * bound < -LARGEST:
        return Decimal(-sign * LARGEST)
    if abs(bound) > MAX_INTEGER:
        quantum = Decimal(_COARSE)
    elif whole:
        quantum = Decimal(1)
    else:
        quantum = Decimal(1).scaleb(max(bound.adjusted() - MAX_DIGITS + 1, -MAX_DECIMALS) if bound else 0)
    rounding = ROUND_CEILING if sign > 0 else ROUND_FLOOR
    return (bound / quantum).to_integral_value(rounding) * quantum
