"""QEMU with an emulated TPM, driven over QMP, and the TPM emulator beside it."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.qemu.guest import Shell
from tests.support.sockets import listens
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.qemu.boards import Board
    from tests.qemu.guest import Kernel

PATIENCE_SECONDS: Final = 30.0

# What is started here ends with the tests, whatever happens to them.
BOUND: Final = ("setpriv", "--pdeathsig", "KILL", "--")


@dataclass(frozen=True)
class Program:
    """A program to test or to test with.

    Attributes:
        command: What starts it.
        unstable: It lives in the folder of Debian unstable, and sees what it is given to see.
    """

    name: str
    command: str | None
    unstable: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def installed(self) -> bool:
        """Whether it can be started here."""
        return self.command is not None

    def argv(self, folder: Path) -> list[str]:
        """The start of its command line, for use of files in *folder*."""
        assert self.command is not None
        if not self.unstable:
            return [self.command]
        return [str(_UNSTABLE), "--inside", "--share", str(folder), "--", self.command]


_UNSTABLE: Final = Path(__file__).parents[2] / "kernel-helpers/unstable"
_CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_FOLDER: Final = _CACHE / "vtpm-cuse/unstable"

OURS: Final = Program("ours", str(Path(sys.executable).with_name("swtpm")))
PEER: Final = Program("peer", shutil.which("swtpm", path="/usr/bin"))
# By its path: the first swtpm that is found in the folder is ours.
_THERE: Final = "/usr/bin/swtpm"
NEW_PEER: Final = Program(
    "new_peer", _THERE if Path(f"{_FOLDER}{_THERE}").exists() else None, unstable=True
)


class MachineError(Exception):
    """QEMU ended, refused a request, or does not answer."""


class Emulator:
    """A TPM emulator, started as libvirt does; its files are in a folder of its own.

    Attributes:
        control: The path of its control socket.
        state: Its state directory.
        log: Its log file.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        program: Program = OURS,
        tpm2: bool = True,
        state: Path | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        folder.mkdir()
        self.control, self.log = folder / "control", folder / "log"
        self.state = state or folder / "state"
        self.state.mkdir(exist_ok=True)
        command = [
            *program.argv(folder.parents[1]),
            "socket",
            "--ctrl",
            f"type=unixio,path={self.control},mode=0600",
        ]
        command += ["--tpmstate", f"dir={self.state},mode=0600", "--log", f"file={self.log}"]
        command += [*(["--tpm2"] if tpm2 else []), "--terminate", *options]
        self.process = subprocess.Popen(
            [*BOUND, *command], stdin=subprocess.DEVNULL, pass_fds=pass_fds
        )
        wait_until(
            partial(listens, self.control),
            f"the control socket of {command}",
            process=self.process,
            log=self.log,
            seconds=PATIENCE_SECONDS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(PATIENCE_SECONDS)


class Machine:
    """QEMU with one TPM.

    Attributes:
        shell: The shell in the guest.
        console: What firmware and kernel say, on a board that has a port for it.
    """

    def __init__(
        self,
        board: Board,
        kernel: Kernel,
        folder: Path,
        model: str,
        emulator: Emulator,
        *options: str,
    ) -> None:
        self._folder = folder
        self.console = folder / "console"
        folder.mkdir()
        qmp, their_qmp = socket.socketpair()
        serial, their_serial = socket.socketpair()
        command = [board.program, "-accel", "tcg", *board.options]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-kernel", str(kernel.image)]
        command += ["-initrd", str(kernel.initramfs)]
        command += ["-append", board.words]
        if board.console:
            command += ["-serial", f"file:{self.console}"]
        command += ["-chardev", f"socket,id=shell,fd={their_serial.fileno()}"]
        command += ["-serial", "chardev:shell"]
        command += ["-chardev", f"socket,id=qmp,fd={their_qmp.fileno()}"]
        command += ["-mon", "chardev=qmp,mode=control"]
        command += ["-chardev", f"socket,id=tpmctrl,path={emulator.control}"]
        command += ["-tpmdev", "emulator,id=tpm,chardev=tpmctrl"]
        command += ["-device", f"{model},tpmdev=tpm", *options]
        with (folder / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*BOUND, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(folder)},
                pass_fds=[their_qmp.fileno(), their_serial.fileno()],
            )
        their_qmp.close()
        their_serial.close()
        self._serial, self._qmp = serial, qmp
        self.shell = Shell(serial)
        self._received = b""
        self._events: list[dict[str, Any]] = []
        try:
            self._message("QMP")
            self.execute("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._qmp.close()
        self._serial.close()

    @property
    def log(self) -> str:
        """What QEMU had to complain of."""
        return (self._folder / "qemu.log").read_text()

    # -- QMP ------------------------------------------------------------------------------

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """What a QMP command returns. Raises MachineError."""
        message = {"execute": command, "arguments": arguments}
        self._qmp.sendall(json.dumps(message).encode() + b"\n")
        answer = self._message("return", "error")
        if "error" in answer:
            raise MachineError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def event(self, name: str, **data: object) -> None:
        """Waits for an event with at least these data, from among those not yet waited for."""
        while True:
            event = self._events.pop(0) if self._events else self._message("event")
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                return

    def _message(self, *kinds: str) -> dict[str, Any]:
        """The next message that is of one of the kinds; events on the way are kept."""
        while True:
            message = self._next_message()
            if any(kind in message for kind in kinds):
                return message
            self._events.append(message)

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._qmp], [], [], left)[0]:
                raise MachineError(f"no word from QEMU in {PATIENCE_SECONDS} s: {self.log}")
            data = self._qmp.recv(65536)
            if not data:
                raise MachineError(f"QEMU ended: {self.log}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    # -- what a user does -----------------------------------------------------------------

    def quit(self) -> None:
        """Ends QEMU in order."""
        self.execute("quit")
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.log

    def job(self, command: str, **arguments: object) -> None:
        """Starts a job and waits for its end. Raises MachineError."""
        self.execute(command, **{"job-id": "job", **arguments})
        self.event("JOB_STATUS_CHANGE", id="job", status="concluded")
        (job,) = self.execute("query-jobs")
        self.execute("job-dismiss", id="job")
        if "error" in job:
            raise MachineError(f"{command}: {job['error']}")

    def start_migration(self, uri: str) -> None:
        """Starts to send the machine somewhere."""
        capabilities = [{"capability": "events", "state": True}]
        self.execute("migrate-set-capabilities", capabilities=capabilities)
        self.execute("migrate", uri=uri)

    def migrated(self) -> None:
        """Waits until all was sent. Raises MachineError when it was not."""
        while (status := self.migration_status()) not in {"completed", "failed"}:
            del status
            self.event("MIGRATION")
        if status == "failed":
            raise MachineError(f"the migration failed: {self.log}")
        # Nothing tells of this last step, without which the machine may not be started again.
        wait_until(
            lambda: self.run_state() != "finish-migrate",
            "the end of the migration",
            process=self.process,
            seconds=PATIENCE_SECONDS,
        )

    def run_state(self) -> str:
        """Whether the machine runs, and if not, why."""
        return str(self.execute("query-status")["status"])

    def migration_status(self) -> str:
        """How far it is."""
        return str(self.execute("query-migrate").get("status", "none"))
