"""A TPM on I2C, which no kernel of Debian's drives: its registers, over the wires of a board.

They are moved by qtest, QEMU's protocol for its own tests: nothing runs on the board. Addresses
of the bus are of the ASPEED AST2600, those of the TPM of "TCG PC Client Device Driver Design
Principles for TPM 2.0", section "I2C".
"""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self

import pytest

from tests.qemu.machine import BOUND, Emulator, Program
from tests.support import commands as tpm
from tests.support.unstable import FOLDER, REASON, is_ready
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QEMU: Final = Program("qemu-system-arm", "/usr/bin/qemu-system-arm", unstable=True)

pytestmark = pytest.mark.skipif(
    not (is_ready() and (FOLDER / "usr/bin/qemu-system-arm").exists()), reason=REASON
)

ADDRESS: Final = 0x2E
# Bus 12 of the board, and its registers.
BUS: Final = 0x1E78A080 + 12 * 0x80
CONTROL, STATUS, COMMAND, BUFFER = BUS, BUS + 0x10, BUS + 0x14, BUS + 0x20
START, SEND, RECEIVE, LAST, STOP = 0x01, 0x02, 0x08, 0x10, 0x20

# Registers of the TPM, and what is in them.
ACCESS, STS, FIFO, CAPABILITY, DID_VID = 0x04, 0x18, 0x24, 0x30, 0x48
REQUEST_USE, ACTIVE = 0x02, 0xA1
READY, GO, AVAILABLE = 0x40, 0x20, 0x10
A_MILLISECOND: Final = 1_000_000  # ns


class Bus:
    """One bus of a board without a processor that runs, and the TPM on it."""

    def __init__(self, folder: Path, emulator: Emulator) -> None:
        command = [*BOUND, *QEMU.argv(folder), "-M", "ast2600-evb", "-accel", "qtest"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-qtest", "stdio", "-qtest-log", "none"]
        command += ["-chardev", f"socket,id=tpmctrl,path={emulator.control}"]
        command += ["-tpmdev", "emulator,id=tpm0,chardev=tpmctrl"]
        command += ["-device", f"tpm-tis-i2c,tpmdev=tpm0,bus=aspeed.i2c.bus.12,address={ADDRESS}"]
        self._log = folder / "qemu.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        assert answer[:1] == ["OK"], (line, answer, self._log.read_text())
        return int(answer[1], 16) if answer[1:] else 0

    def _do(self, command: int, byte: int = 0) -> int:
        self._ask(f"writel {BUFFER:#x} {byte:#x}")
        self._ask(f"writel {COMMAND:#x} {command:#x}")
        return self._ask(f"readl {BUFFER:#x}") >> 8 & 0xFF

    def _stop(self) -> None:
        self._ask(f"writel {COMMAND:#x} {STOP:#x}")
        self._ask(f"writel {STATUS:#x} 0xffffffff")

    def begin(self) -> None:
        """Switches the bus on, and starts the TPM."""
        self._ask(f"writel {CONTROL:#x} 1")
        self._ask(f"writel {STATUS:#x} 0xffffffff")
        self.write(ACCESS, bytes([REQUEST_USE]))
        assert self.read(ACCESS, 1) == bytes([ACTIVE])
        assert tpm.code_of(self.execute(tpm.TPM2_STARTUP_CLEAR)) == 0

    def write(self, register: int, data: bytes) -> None:
        """Writes a register of the TPM."""
        self._do(START | SEND, ADDRESS << 1)
        for byte in (register, *data):
            self._do(SEND, byte)
        self._stop()

    def read(self, register: int, size: int) -> bytes:
        """Reads a register of the TPM."""
        self.write(register, b"")
        self._do(START | SEND, ADDRESS << 1 | 1)
        data = bytes(
            self._do(RECEIVE if left else RECEIVE | LAST) for left in reversed(range(size))
        )
        self._stop()
        return data

    def _has_answered(self) -> bool:
        # No time passes on the board but what it is given.
        self._ask(f"clock_step {A_MILLISECOND}")
        return bool(self.read(STS, 1)[0] & AVAILABLE)

    def execute(self, command: bytes) -> bytes:
        """The TPM's response to a command."""
        self.write(STS, bytes([READY]))
        self.write(FIFO, command)
        self.write(STS, bytes([GO]))
        wait_until(self._has_answered, "a response", process=self._process, log=self._log)
        header = self.read(FIFO, 10)
        return header + self.read(FIFO, int.from_bytes(header[2:6], "big") - len(header))


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    """With a TPM that has been started."""
    folder = tmp_path_factory.mktemp("i2c")
    with ExitStack() as stack:
        emulator = stack.enter_context(Emulator(folder / "tpm"))
        bus = stack.enter_context(Bus(folder, emulator))
        bus.begin()
        yield bus


def test_registers(bus: Bus) -> None:
    assert bus.read(DID_VID, 4) == bytes.fromhex("14100100"), "of IBM, as QEMU says"
    assert bus.read(CAPABILITY, 4)[0] & 0x0F == 0x02


def test_commands(bus: Bus) -> None:
    draws = [bus.execute(tpm.get_random(16)) for _ in range(2)]
    assert [tpm.code_of(draw) for draw in draws] == [0, 0]
    assert draws[0][-16:] != draws[1][-16:]
    digest = bytes(range(32))
    assert tpm.code_of(bus.execute(tpm.pcr_extend(16, digest))) == 0
    assert bus.execute(tpm.pcr_read(16)).endswith(hashlib.sha256(bytes(32) + digest).digest())


def test_command_that_does_not_exist(bus: Bus) -> None:
    assert tpm.code_of(bus.execute(tpm.tpm2(0x1FF))) == 0x143, "TPM_RC_COMMAND_CODE"
