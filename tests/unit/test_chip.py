"""A TPM behind a device, which here is the other end of a socket that keeps messages whole."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import get_random
from tests.support.managed import load_external, start_session
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.acquire import chip as acquire
from vtpm_cuse.config import ChipConfig
from vtpm_cuse.engine.chip import Chip
from vtpm_cuse.errors import DeviceGone, EngineError, FrontendError, UsageError
from vtpm_cuse.vtpm.borrowed import Borrowed
from vtpm_cuse.vtpm.ptm import ABOUT_CLIENTS, PtmService
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions
from vtpm_cuse.wire.ptm import (
    PtmCommand,
    PtmInitRequest,
    PtmLocalityRequest,
    PtmResult,
    PtmResultResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RANDOM = get_random(8)
ANSWER = bytes.fromhex("800100000014000000000008") + b"\5" * 8
FAILURE = bytes.fromhex("80010000000a000b0101")


def largest(size: int) -> bytes:
    """The answer to the first question: TPM_PT_MAX_COMMAND_SIZE."""
    head = bytes.fromhex("80010000001b00000000 00 00000006 00000001 0000011e".replace(" ", ""))
    return head + size.to_bytes(4, "big")


@contextmanager
def chip(*answers: bytes, start: bool = True) -> Iterator[tuple[Chip, list[bytes]]]:
    """One that gives these answers, of which an empty one is its end; and what it was given."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    commands: list[bytes] = []

    def answer() -> None:
        with theirs:
            for one in answers:
                commands.append(theirs.recv(8192))
                if commands[-1]:
                    theirs.send(one)

    thread = threading.Thread(target=answer)
    thread.start()
    made = Chip(ours.detach(), "/dev/tpm7")
    try:
        if start:
            made.start()
        yield made, commands
    finally:
        made.stop()
        thread.join(PATIENCE_SECONDS)


def test_a_command_and_its_response() -> None:
    with chip(largest(1280), ANSWER) as (made, commands):
        assert made.process(RANDOM) == ANSWER
        assert commands[1] == RANDOM


def test_one_that_is_too_long_for_it_is_refused_and_not_cut() -> None:
    with chip(largest(len(load_external(1)) - 1), ANSWER) as (made, commands):
        assert made.process(load_external(1)) == bytes.fromhex("80010000000a00000142")
        assert made.process(RANDOM) == ANSWER
        assert len(commands) == 2


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x80",
        bytes(10),
        ANSWER[:-1],
        ANSWER + b"\0",
        b"\x80\x03" + ANSWER[2:],
        ANSWER[:2] + b"\xff\xff\xff\xff" + ANSWER[6:],
        b"\xff" * 4096,
    ],
)
def test_nonsense_costs_one_command(nonsense: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with chip(largest(4096), nonsense, ANSWER) as (made, _), caplog.at_level(logging.ERROR):
        assert made.process(RANDOM) == FAILURE
        assert made.process(RANDOM) == ANSWER
    assert f"/dev/tpm7 answered nonsense, which begins with {nonsense[:10].hex()}" in caplog.text


@pytest.mark.parametrize(
    ("number", "command", "code"),
    [
        (errno.EIO, RANDOM, 0x000B0101),
        (errno.ETIME, RANDOM, 0x000B0101),
        (errno.EINVAL, RANDOM, 0x000B0101),
        (errno.ENOMEM, load_external(1), 0x902),
        (errno.ENOMEM, start_session(), 0x903),
    ],
)
def test_a_command_that_the_device_refuses(
    number: int, command: bytes, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    with chip(largest(4096), ANSWER) as (made, _):
        with monkeypatch.context() as patch:
            patch.setattr("vtpm_cuse.engine.chip.os.write", refuse)
            assert int.from_bytes(made.process(command)[6:], "big") == code
        assert made.process(RANDOM) == ANSWER


def test_one_that_goes_away() -> None:
    with (
        chip(largest(4096), b"") as (made, _),
        pytest.raises(DeviceGone, match="The TPM at /dev/tpm7 has gone away"),
    ):
        made.process(RANDOM)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENOTCONN, errno.EPIPE])
def test_one_that_says_that_it_is_gone(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _size: int) -> bytes:
        raise OSError(number, os.strerror(number))

    with chip(largest(4096), ANSWER) as (made, _), monkeypatch.context() as patch:
        patch.setattr("vtpm_cuse.engine.chip.os.read", refuse)
        with pytest.raises(DeviceGone, match=os.strerror(number)):
            made.process(RANDOM)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (bytes.fromhex("00c40000000a0000001e"), "is a TPM 1.2"),
        (b"OK\r\n", "does not answer as a TPM"),
    ],
)
def test_what_is_no_tpm_2(first: bytes, said: str) -> None:
    with chip(first, start=False) as (made, _), pytest.raises(FrontendError, match=said):
        made.start()


def test_one_that_is_not_started_yet_can_be_used() -> None:
    with chip(bytes.fromhex("80010000000a00000100"), ANSWER) as (made, _):
        assert made.process(RANDOM) == ANSWER


# -- what is not its borrower's -------------------------------------------------------------


def test_nobody_takes_its_power_its_locality_or_its_state() -> None:
    with chip(largest(4096), ANSWER, start=False) as (made, commands):
        vtpm = Vtpm(made, None, VtpmOptions(borrowed=Borrowed()))
        vtpm.start()
        ptm = PtmService(vtpm)
        fine = {"GET_CAPABILITY", "SHUTDOWN", "SET_LOCALITY", "CANCEL_TPM_CMD", "GET_CONFIG"}
        for command in PtmCommand:
            # What is asked of the manager is about its own clients.
            if command.name.removeprefix("PTM_") not in fine and command not in ABOUT_CLIENTS:
                answer = ptm.handle(command, PtmInitRequest(0))
                assert answer == PtmResultResponse(PtmResult.TPM_BAD_ORDINAL), command
        locality = PtmCommand.PTM_SET_LOCALITY
        assert ptm.handle(locality, PtmLocalityRequest(0)) == PtmResultResponse(0)
        assert ptm.handle(locality, PtmLocalityRequest(1)) != PtmResultResponse(0)
        with pytest.raises(EngineError):
            made.volatile_state()
        assert vtpm.running
        vtpm.before_snapshot = lambda: commands.append(vtpm.manage(RANDOM))
        vtpm.close()
        assert commands[-1] == ANSWER  # what clients have can be ended; and no TPM2_Shutdown
        assert len(commands) == 3


def test_no_command_to_it_is_short() -> None:
    """It is asked on the thread for long ones, and never past that."""
    with chip(largest(4096), ANSWER, start=False) as (made, _):
        vtpm = Vtpm(made, None, VtpmOptions(borrowed=Borrowed()))
        vtpm.start()
        assert vtpm.process(RANDOM) == ANSWER
        assert vtpm.is_long(RANDOM)
        assert vtpm.process_known(RANDOM) is None


# -- opening it -----------------------------------------------------------------------------


def test_a_file_that_was_meant_to_be_none_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    with pytest.raises(UsageError, match="is no TPM device"):
        acquire.open_chip(ChipConfig(str(path)))
    assert path.read_text() == "precious"


def test_a_terminal_is_no_tpm() -> None:
    ours, theirs = os.openpty()
    try:
        with pytest.raises(UsageError, match="is no TPM device"):
            acquire.open_chip(ChipConfig(os.ttyname(theirs)))
        assert not select.select([ours], [], [], 0)[0]
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.EBUSY, "fuser -v"), (errno.EACCES, "root"), (errno.ENOENT, "ls")]
)
def test_one_that_cannot_be_opened(number: int, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []

    def refuse(path: str, given: int) -> int:
        flags.append(given)
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("vtpm_cuse.acquire.chip.os.open", refuse)
    for exclusive in (False, True):
        with pytest.raises(UsageError, match=os.strerror(number)) as caught:
            acquire.open_chip(ChipConfig("/dev/tpm0", exclusive=exclusive))
        assert cure in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [bool(given & os.O_EXCL) for given in flags] == [False, True]


@pytest.mark.parametrize(
    ("path", "below"), [("/dev/tpm0", False), ("/dev/tpmrm0", True), ("/run/x/vtpmrm0", True)]
)
def test_a_device_of_a_resource_manager_is_known_by_its_name(path: str, *, below: bool) -> None:
    assert acquire.is_below_manager(path) == below
