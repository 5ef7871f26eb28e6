"""The virtual machines of a test run: each kind is booted once, the others are restored from it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from tests.qemu.facts import Facts, prepare, read_pcrs
from tests.qemu.machine import OURS, Emulator, Machine, Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.qemu.guest import Kernel

BOOT_SECONDS: Final = 120.0
SNAPSHOT: Final = "snapshot"


@dataclass(frozen=True)
class Kind:
    """What TPM a machine has."""

    model: str
    tpm2: bool

    def __str__(self) -> str:
        return f"{self.model}-{2 if self.tpm2 else 1}"


CRB2, TIS2, TIS1 = Kind("tpm-crb", True), Kind("tpm-tis", True), Kind("tpm-tis", False)
KINDS: Final = (CRB2, TIS2, TIS1)


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

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.kernel = kernel
        self._folder = folder
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

    def _boot(self, kind: Kind) -> Booted:
        begin = time.monotonic()
        emulator = Emulator(self._folder / f"{kind}.tpm", tpm2=kind.tpm2)
        self._stack.enter_context(emulator)
        machine = Machine(self.kernel, self._folder / f"{kind}.vm", kind.model, emulator)
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
            Machine(self.kernel, folder / "vm", kind.model, emulator, *options) as machine,
        ):
            yield machine, emulator
