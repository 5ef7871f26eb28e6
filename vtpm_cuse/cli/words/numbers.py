"""Numbers on a command line, read as the C library's strtol() reads them."""

from __future__ import annotations

import re
from typing import Final

_DIGITS: Final = {0: "0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*", 8: "[0-7]+", 10: "[0-9]+"}

FD_MAX: Final = 0x7FFF_FFFF
"""No descriptor has a number above it."""

_DIGITS_MAX: Final = 1000  # Python's own limit is an error that says nothing of options


def leading_number(text: str, base: int = 0) -> tuple[int, str] | None:
    """Reads the number that *text* starts with.

    Args:
        text: May start with white space and a sign.
        base: 8 or 10; 0 tells by the prefix ``0x`` or ``0``.

    Returns:
        The number and the text behind it; None if there is no number.
    """
    found = re.match(rf"\s*([+-]?)({_DIGITS[base]})", text, re.ASCII)
    if found is None or len(found[2]) > _DIGITS_MAX:
        return None
    sign, digits = found.groups()
    if base == 0:
        base = 16 if digits[:2] in {"0x", "0X"} else 8 if digits[0] == "0" else 10
    return int(sign + digits, base), text[found.end() :]


def number(text: str, lowest: int, highest: int, base: int = 0) -> int | None:
    """Reads *text* as one number within the bounds; None if it is none."""
    found = leading_number(text, base)
    if found is None or found[1] or not lowest <= found[0] <= highest:
        return None
    return found[0]
