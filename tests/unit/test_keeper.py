"""The process that clears up behind a server, whatever that has become."""

from __future__ import annotations

import os

from vtpm_cuse.acquire.keeper import Keeper


def test_the_first_note_counts() -> None:
    """What a server says that was taken over since moves nobody."""
    read_end, write_end = os.pipe()
    keeper = Keeper(lambda note: _write(write_end, note), {write_end})
    os.close(write_end)
    keeper.note(b"true")
    keeper.note(b"false")
    keeper.end()
    with open(read_end, "rb") as told:
        assert told.read() == b"true"


def _write(fd: int, note: bytes) -> None:
    os.write(fd, note)
