"""The virtual machines of a test run: each kind is booted once, the others are restored from it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import pytest

from tests.qemu.boards import ARM, ARM_UEFI, PC, PC_UEFI, POWER, Board
from tests.qemu.facts import Facts, prepare, read_pcrs
from tests.qemu.guest import find_kernel
from tests.qemu.machine import OURS, Emulator, Machine, Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.qemu.guest import Kernel

BOOT_SECONDS: Final = 120.0
SNAPSHOT: Final = "snapshot"


@dataclass(frozen=True)
class Kind:
    """A machine and its TPM.

    Attributes:
        name: Of the machine, where it is not the usual one.
    """

    model: str
    tpm2: bool
    board: Board = PC
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.model}-{2 if self.tpm2 else 1}"


CRB2, TIS2, TIS1 = Kind("tpm-crb", True), Kind("tpm-tis", True), Kind("tpm-tis", False)
KINDS: Final = (CRB2, TIS2, TIS1)
UEFI2: Final = Kind("tpm-crb", True, PC_UEFI, "uefi-")
ARM2: Final = Kind("tpm-tis-device", True, ARM, "arm-")
ARM_UEFI2: Final = Kind("tpm-tis-device", True, ARM_UEFI, "arm-uefi-")
SPAPR2: Final = Kind("tpm-spapr", True, POWER, "power-")
MEASURED: Final = (*KINDS, UEFI2, ARM_UEFI2, SPAPR2)
"""Those with a firmware, which measures."""
BOOTED: Final = (*MEASURED, ARM2)


@dataclass(frozen=True)
class Booted:
    """A running machine.

    Attributes:
        pcrs: The PCRs as firmware and kernel left them.
        seconds: From the start of the emulator to the guest's shell.
    """

    kind: Kind
    machine: Machine
    emulator: Emulator
    pcrs: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A machine in a file, and what its TPM held."""

    stream: Path
    facts: Facts


class Fleet:
    """All machines; they end with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels: dict[str, Kernel] = {}
        self._booted: dict[Kind, Booted] = {}
        self._saved: dict[Kind, Saved] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def booted(self, kind: Kind) -> Booted:
        """The machine of a kind, booted when it is wanted first."""
        if kind not in self._booted:
            self._booted[kind] = self._boot(kind)
        return self._booted[kind]

    def saved(self, kind: Kind) -> Saved:
        """The machine of a kind, as it was some time after boot; it runs on."""
        if kind not in self._saved:
            machine = self.booted(kind).machine
            facts = prepare(machine.shell, tpm2=kind.tpm2)
            stream = self._folder / f"{kind}.saved"
            machine.start_migration(f"exec:cat >{stream}")
            machine.migrated()
            machine.execute("cont")
            self._saved[kind] = Saved(stream, facts)
        return self._saved[kind]

    def kernel(self, board: Board) -> Kernel:
        """What the machine boots; skips the test where machine or kernel cannot be had."""
        architecture, missing = board.architecture, board.missing()
        if missing:
            pytest.skip(f"needs {missing}")
        if architecture not in self._kernels:
            kernel = find_kernel(self._folder, architecture)
            if kernel is None:
                pytest.skip(f"needs Debian's kernel for {architecture}: ./setup test fetches it")
            self._kernels[architecture] = kernel
        return self._kernels[architecture]

    def _machine(self, kind: Kind, folder: Path, emulator: Emulator, *options: str) -> Machine:
        return Machine(kind.board, self.kernel(kind.board), folder, kind.model, emulator, *options)

    def _boot(self, kind: Kind) -> Booted:
        begin = time.monotonic()
        emulator = Emulator(self._folder / f"{kind}.tpm", tpm2=kind.tpm2)
        self._stack.enter_context(emulator)
        machine = self._machine(kind, self._folder / f"{kind}.vm", emulator)
        self._stack.enter_context(machine)
        machine.shell.wait_ready(BOOT_SECONDS)
        seconds = time.monotonic() - begin
        return Booted(kind, machine, emulator, read_pcrs(machine.shell), seconds)

    @contextlib.contextmanager
    def vm(
        self,
        kind: Kind,
        folder: Path,
        *emulator_options: str,
        program: Program = OURS,
        state: Path | None = None,
        incoming: str | None = None,
        disk: Path | None = None,
    ) -> Iterator[tuple[Machine, Emulator]]:
        """A machine of its own below *folder*, with its state from *incoming*, or from a file.

        With *disk* it is in the state of the snapshot there.
        """
        folder.mkdir()
        if disk is not None:
            options = [
                "-blockdev",
                f"driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}",
            ]
            options += ["-loadvm", SNAPSHOT]
        else:
            options = ["-incoming", incoming or f"exec:cat <{self.saved(kind).stream}"]
        with (
            Emulator(
                folder / "tpm", *emulator_options, program=program, tpm2=kind.tpm2, state=state
            ) as emulator,
            self._machine(kind, folder / "vm", emulator, *options) as machine,
        ):
            yield machine, emulator
