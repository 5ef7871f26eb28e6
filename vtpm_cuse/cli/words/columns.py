"""What people read in tables: columns, users, times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the cells of each row below those of the first; a terminal obeys none of them."""
    table = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def user_name(uid: int) -> str:
    """The user's name; the number of one who has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def duration(seconds: int) -> str:
    """As M:SS, or H:MM:SS."""
    minutes, seconds = divmod(max(seconds, 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
