"""The recorder's end of its pipe, when somebody else has closed it and opened another file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.lab.record import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, int]]:
    """One whose thread waits, and the emulator's end of its pipe."""
    made = Recorder(3)
    emulators_end = os.dup(made.fd)
    made.started()
    yield made, emulators_end
    made.release()


@pytest.mark.parametrize("ends", [True, False])
def test_what_took_the_number_is_neither_read_nor_closed(
    recorder: tuple[Recorder, int], *, ends: bool
) -> None:
    made, emulators_end = recorder
    read_end, write_end = os.pipe()
    os.write(write_end, b"not a capture")
    os.dup2(read_end, made._read_end)
    taken = made._read_end
    if ends:
        os.close(emulators_end)
        made.release()
    else:
        assert made.exchanges() == []
        os.close(emulators_end)
    os.set_blocking(taken, False)
    assert os.read(taken, 100) == b"not a capture"
    for fd in (taken, read_end, write_end):
        os.close(fd)


def test_the_thread_has_ended_when_its_recorder_is_released(
    recorder: tuple[Recorder, int],
) -> None:
    made, emulators_end = recorder
    os.close(emulators_end)
    made.release()
    assert made._thread is not None
    assert not made._thread.is_alive()
