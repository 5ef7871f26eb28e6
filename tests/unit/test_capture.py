"""Where a packet capture goes: which part of a file is kept, and who may read it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support.engine import FakeEngine
from vtpm_cuse.config import PcapConfig
from vtpm_cuse.engine.recorded import RecordedTpm
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

STARTED = 312
"""Bytes of a capture of a TPM that was powered on, as the C suite's tests count them."""
WITH_STARTUP = 508
"""And sent a Startup that succeeded."""
SUCCESS = bytes.fromhex("80010000000a00000000")


def record(config: PcapConfig, *, startup: bool = False) -> None:
    """A short life of a TPM, but for its end."""
    engine = RecordedTpm(FakeEngine(script={0x144: SUCCESS}), config)
    engine.start()
    if startup:
        engine.process(tpm.TPM2_STARTUP_CLEAR)


def size_and_mode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mode & 0o777


def test_a_file_is_appended_to_and_given_the_mode_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tpm.pcap"
    record(PcapConfig(str(path), mode=0o654), startup=True)
    assert size_and_mode(path) == (WITH_STARTUP, 0o654)
    record(PcapConfig(str(path), mode=0o633))
    assert size_and_mode(path) == (WITH_STARTUP + STARTED, 0o633)
    record(PcapConfig(str(path), truncate=True))
    assert size_and_mode(path) == (STARTED, 0o600)


@pytest.mark.parametrize(("before", "after"), [(None, 0o640), (0o644, 0o640), (0o600, 0o600)])
def test_a_mode_that_is_not_given_opens_nothing(
    tmp_path: Path, before: int | None, after: int
) -> None:
    path = tmp_path / "tpm.pcap"
    if before is not None:
        path.touch()
        path.chmod(before)
    record(PcapConfig(str(path)))
    assert size_and_mode(path) == (STARTED, after)


def test_so_is_that_of_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "tpm.pcap"
    path.write_bytes(b"before")
    with path.open("r+b", buffering=0) as file:
        record(PcapConfig(fd=file.fileno(), mode=0o600))
        assert size_and_mode(path) == (6 + STARTED, 0o600)
        assert path.read_bytes()[:6] == b"before"
        record(PcapConfig(fd=file.fileno(), truncate=True, mode=0o765))
        assert size_and_mode(path) == (STARTED, 0o765)


def test_a_pipe_is_written_to_and_keeps_its_mode() -> None:
    read_end, write_end = os.pipe()
    before = os.fstat(write_end).st_mode
    record(PcapConfig(fd=write_end, truncate=True))
    assert os.fstat(write_end).st_mode == before
    assert len(os.read(read_end, 4096)) == STARTED
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    ("truncate", "reason"),
    [(True, "Could not ftruncate the pcap file: "), (False, "Could not open pcap file for writ")],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, reason: str, *, truncate: bool) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    path = None if truncate else str(tmp_path / "no" / "file")
    with pytest.raises(UsageError) as caught:
        record(PcapConfig(path, fd, truncate=truncate))
    os.close(fd)
    assert str(caught.value).startswith(reason)
