"""``name=value,name,...``: the values of options such as ``--tpmstate``.

The first of several equal names wins. There is no quoting, but a value that
starts with ``{`` runs to the matching ``}`` and so may contain commas.

By hand, for Python has no getsubopt(3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.cli.words.numbers import leading_number, number
from vtpm_cuse.cli.words.table import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vtpm_cuse.cli.words.table import SubOption

Value = str | int | bool


class SubOptionError(ValueError):
    """The value of an option is not understood; ``str()`` gives the reason."""


class SubValues:
    """What was given, by name and type."""

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values

    def has(self, name: str) -> bool:
        """Whether it was given."""
        return name in self._values

    def text(self, name: str) -> str | None:
        """A text, None if not given."""
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def integer(self, name: str) -> int | None:
        """An integer, mode, user or group id; None if not given."""
        value = self._values.get(name)
        return value if isinstance(value, int) else None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean."""
        return bool(self._values.get(name, default))


def parse(text: str, table: Sequence[SubOption]) -> SubValues:
    """Reads all of *text*.

    Raises:
        SubOptionError: A name is not in *table*, or a value is not of its kind.
    """
    by_name = {sub.name: sub for sub in table}
    values: dict[str, Value] = {}
    for token in _tokens(text):
        name, equals, value = token.partition("=")
        sub = by_name.get(name)
        if sub is None or (equals and not value):
            raise SubOptionError(f"Unknown option '{token}'")
        if not sub.available:
            raise SubOptionError(f"'{name}' is not available yet")
        values.setdefault(name, _convert(sub, value if equals else "true"))
    return SubValues(values)


def _tokens(text: str) -> Iterator[str]:
    while True:
        name, _, value = text.partition("=")
        if value.startswith("{") and "," not in name:
            end = _json_end(text, len(name) + 1)
            if text[end : end + 1] not in {"", ","}:
                raise SubOptionError("Unexpected character following JSON map.")
        else:
            end = (text + ",").index(",")
        yield text[:end]
        if end == len(text):
            return
        text = text[end + 1 :]


def _json_end(text: str, start: int) -> int:
    """Counts braces only: one within a JSON string counts too, as in the C suite."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise SubOptionError("Unterminated JSON map.")


def _convert(sub: SubOption, value: str) -> Value:
    if sub.choices and value not in sub.choices:
        raise SubOptionError(f"'{value}' is not one of {', '.join(sub.choices)}")
    return _CONVERT[sub.kind](value)


def _bool(value: str) -> bool:
    # Any other word means no, and is no error: scripts rely on "truncate=0" and write "no" alike.
    return value.lower() in {"true", "1"}


def _int(value: str) -> int:
    return _within(value, -(1 << 31), (1 << 31) - 1)


def _uint(value: str) -> int:
    return _positive(value, (1 << 32) - 1)


def _mode(value: str) -> int:
    mode = _positive(value, (1 << 32) - 1, base=8)
    if mode > 0o777:
        raise SubOptionError(f"mode {value} is invalid")
    return mode


def user_number(value: str) -> int:
    """Of a user, by name or number. Raises SubOptionError."""
    import pwd

    if _is_number(value):
        return _positive(value, (1 << 32) - 2)
    try:
        return pwd.getpwnam(value).pw_uid
    except KeyError:
        raise SubOptionError(f"User '{value}' does not exist.") from None


def group_number(value: str) -> int:
    """Of a group, by name or number. Raises SubOptionError."""
    import grp

    if _is_number(value):
        return _positive(value, (1 << 32) - 2)
    try:
        return grp.getgrnam(value).gr_gid
    except KeyError:
        raise SubOptionError(f"Group '{value}' does not exist.") from None


def _positive(value: str, highest: int, base: int = 10) -> int:
    # PEER: before 0.11 lets a negative number pass and cuts a long one.
    if value.lstrip().startswith("-"):
        raise SubOptionError(f"invalid required positive number '{value}'")
    return _within(value, 0, highest, base)


def _within(value: str, lowest: int, highest: int, base: int = 10) -> int:
    if not _is_number(value, base):
        raise SubOptionError(f"invalid number '{value}'")
    found = number(value, lowest, highest, base)
    if found is None:
        raise SubOptionError(f"number {value.strip()} outside valid range")
    return found


def _is_number(value: str, base: int = 10) -> bool:
    found = leading_number(value, base)
    return found is not None and not found[1]


_CONVERT: dict[Kind, Callable[[str], Value]] = {
    Kind.TEXT: str,
    Kind.BOOL: _bool,
    Kind.INT: _int,
    Kind.UINT: _uint,
    Kind.MODE: _mode,
    Kind.UID: user_number,
    Kind.GID: group_number,
}
