"""One private TPM: an emulator as a child, its environment for clients, its time machine."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from vtpm_cuse.client.child import (
    ANNOUNCEMENT,
    CONTROL,
    ChildEmulator,
    Nest,
    Owned,
    Scratch,
    standard_files_left_alone,
)
from vtpm_cuse.client.connect import connect_unix, receive
from vtpm_cuse.errors import AnswerError, LabError, VtpmError, WireError
from vtpm_cuse.lab.fapi import FAPI_NAMES, FAPI_VARIABLE, configure
from vtpm_cuse.lab.loops import in_thread
from vtpm_cuse.lab.made import profile_words, set_up
from vtpm_cuse.lab.record import Recorder
from vtpm_cuse.lab.relay import Relay
from vtpm_cuse.lab.snapshot import Snapshot
from vtpm_cuse.wire.ptm import PtmBlobType, PtmInitFlag, PtmResult, PtmStateFlag
from vtpm_cuse.wire.tpm import (
    TPM_BUFFER_MAX,
    TPM_HEADER_SIZE,
    TpmSu,
    command_size,
    shutdown_command,
    startup_command,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from types import TracebackType

    from vtpm_cuse.client.base import Control
    from vtpm_cuse.wire.pcapng import Exchange

_DECRYPTED: Final = PtmStateFlag.PTM_STATE_FLAG_DECRYPTED
_PERMANENT: Final = PtmBlobType.PTM_BLOB_TYPE_PERMANENT
_VOLATILE: Final = PtmBlobType.PTM_BLOB_TYPE_VOLATILE
_SAVED: Final = PtmBlobType.PTM_BLOB_TYPE_SAVESTATE
_ANSWER_SECONDS: Final = 300
"""For one command: some keys take a TPM minutes on a busy machine."""
_MANAGED, _RAW, _CONTROL, _INNER = "tpm", "raw", "raw.ctrl", ".in"
_SOCKETS: Final = (_MANAGED, _RAW, _CONTROL, _MANAGED + _INNER, _RAW + _INNER)
_NAMES: Final = (*_SOCKETS, ANNOUNCEMENT, *FAPI_NAMES)
"""Of the sockets, and that of a program's file; where that for control is, tpm2-tss knows by the one before."""
_ACCEPTCON: Final = 1 << 16  # __SO_ACCEPTCON, linux/net.h
_TCTI: Final = Path(__file__).with_name("tcti.py")


class Tpm:
    """A private TPM, from the entry of the context to its end.

    It is gone, with its folder and sockets, when this process is, however that ended. A copy of this
    process, which fork() makes, cannot use it, but clients there can connect to it.

    Methods are for any thread, and wait for each other. None of them is a coroutine: in an event
    loop use ``async with``, and a thread of the loop's for commands that take a TPM long.

    Args:
        version: "2.0" or "1.2".
        state: A folder that keeps what the TPM keeps, made if it is not there; else it is in memory.
        snapshot: What it begins from, with the version of that.
        manufactured: With endorsement keys and certificates. All such in memory are the same one:
            it takes a second to make, and is made once in a process.
        profile: Of a TPM 2.0 yet to be made, by name or as JSON; needs libtpms 0.10.
        faults: Whether `fail_next`, `latency` and `lose_next_response` can be used. All commands
            then go through another process, which costs each about 50 µs.
        trace: How many of the last commands are kept for `exchanges`.
        capture: A descriptor that takes a packet capture of all commands, in format pcapng; it stays
            the caller's. Not together with *trace*.

    Attributes:
        folder: A folder of this user's alone that goes with the TPM; its sockets are in it.
        path: The Unix socket of the resource manager: each connection has a TPM of its own. A TPM
            1.2 has none; this is the other socket then.
        raw_path: The Unix socket of the TPM itself, which has one client at a time.
        tcti: `path` as tpm2-tss writes it.
        raw_tcti: `raw_path` as tpm2-tss writes it.
        env: Environment variables by which clients find the TPM; docs/lab.md says who reads which.
        pid: The emulator's process.
        version: "2.0" or "1.2".

    Raises:
        LabError: Of `start` and all methods: there is no TPM to be had, or it has gone.
        TpmError: Of methods that are TPM commands: the TPM refuses.
    """

    def __init__(
        self,
        *,
        version: Literal["2.0", "1.2"] = "2.0",
        state: str | Path | None = None,
        snapshot: Snapshot | None = None,
        manufactured: bool = False,
        profile: str | None = None,
        faults: bool = False,
        trace: int = 0,
        capture: int | None = None,
    ) -> None:
        if version not in {"2.0", "1.2"}:
            raise LabError(f"There is no TPM {version}: it is 2.0 or 1.2")
        if snapshot is not None and (state is not None or manufactured or profile is not None):
            raise LabError("A snapshot is all of a TPM: leave out state, manufactured and profile")
        if trace and capture is not None:
            raise LabError("The commands are kept or captured: leave out trace or capture")
        self._tpm2 = version == "2.0" if snapshot is None else snapshot.tpm2
        self._state = None if state is None else _whole(state)
        self._begin = snapshot
        self._manufactured = manufactured
        self._profile = profile
        self._trace, self._capture = trace, capture
        self._faults = faults
        self._relay: Relay | None = None
        self._recorder: Recorder | None = None
        self._lock = threading.RLock()
        self._nest: Nest | None = None
        self._emulator: ChildEmulator | None = None
        self._client: Client | None = None

    # -- life -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await in_thread(self.start, lambda tpm: tpm.close())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await in_thread(self.close)

    def start(self) -> Self:
        """Starts it, as the context does, which is ended by `close`. It is ready then."""
        with self._lock:
            if self._nest is not None:
                raise LabError("It runs already")
            try:
                with standard_files_left_alone():
                    self._start()
            except BaseException as exc:
                self._kill()
                if isinstance(exc, OSError):  # no descriptor is to be had, say
                    raise LabError(f"The TPM could not be started: {exc.strerror}") from exc
                raise
        return self

    def _start(self) -> None:
        if self._manufactured and self._state is None:
            self._begin = _manufactured(self.version, self._profile)
        words, fds = self._words(), []
        if self._trace:
            self._recorder = Recorder(self._trace)
            fds = [self._recorder.fd]
        elif self._capture is not None:
            fds = [self._capture]
        words += [word for fd in fds for word in ("--pcap", f"fd={fd}")]
        self._emulator = self._launch(words, fds)
        if self._tpm2:
            configure(self.folder, self.tcti)
        if self._recorder is not None:
            self._recorder.started()
        if self._begin is not None:
            with self._asking("The TPM could not begin from the snapshot") as control:
                self._return_to(control, self._begin)
            if not self._begin.volatile:
                self._start_up()

    def _launch(self, words: list[str], fds: list[int]) -> ChildEmulator:
        """What serves it, in a `Nest`; of a TPM that begins from a snapshot, off."""
        self._nest = nest = Nest(_NAMES)
        with contextlib.ExitStack() as undo:

            def listen(name: str) -> socket.socket:
                return undo.enter_context(nest.listen(name))

            listeners = {"--server": listen(_RAW)}
            if self._tpm2:
                listeners["--managed"] = listen(_MANAGED)
            if self._faults:
                names = {"--server": _RAW, "--managed": _MANAGED}
                inner = {option: listen(names[option] + _INNER) for option in listeners}
                ways = {listeners[option]: nest.path(names[option] + _INNER) for option in inner}
                self._relay = Relay(ways, tpm2=self._tpm2)
                listeners = inner
            listeners[CONTROL] = listen(_CONTROL)
            emulator = ChildEmulator(words, listeners, fds)
            undo.pop_all()
        return emulator

    def _words(self) -> list[str]:
        """Of the options; makes the state's folder, and what is to be in it."""
        words = ["--tpm2"] if self._tpm2 else []
        where = "mem://"
        if self._state is not None:
            where = f"dir://{self._state}"
            try:
                os.makedirs(self._state, mode=0o700, exist_ok=True)
            except OSError as exc:
                raise LabError(f"Could not make {self._state}: {exc.strerror}") from exc
            if self._manufactured:
                set_up(self._state, self.version, self._profile)
        words += ["--tpmstate", f"backend-uri={where}"]
        if self._begin is None:  # else it is not to make another one first
            words += ["--flags", "not-need-init,startup-clear"]
            if not self._manufactured:
                given = profile_words(self._profile, name="name", text="profile")
                words += ["--profile", "=".join(given)] if given else []
        return words

    def close(self) -> None:
        """Ends it; again is harmless. A state in a folder is stored then.

        Raises:
            LabError: The emulator did not end in order; it has ended all the same.
        """
        if self._nest is not None and not self._nest.ours:  # a copy, in which a lock may be held
            self._kill()
            return
        with self._lock:
            try:
                if self._emulator is not None and self._state is not None:
                    self._emulator.end()
            finally:
                self._kill()

    def _kill(self) -> None:
        self._hang_up()
        if self._emulator is not None:
            self._emulator.kill()
        if self._relay is not None:
            self._relay.close()
        if self._recorder is not None:
            self._recorder.release()
        if self._nest is not None:
            self._nest.close()
        self._emulator = self._relay = self._recorder = self._nest = None

    @property
    def alive(self) -> bool:
        """Whether it runs, and is this process' own."""
        return self._emulator is not None and self._emulator.alive

    @property
    def ending(self) -> str:
        """How the emulator ended, if it did so by itself: "status 1", "signal 9"."""
        return "" if self._emulator is None else self._emulator.ending

    # -- where it is ----------------------------------------------------------------------

    @property
    def version(self) -> Literal["2.0", "1.2"]:  # noqa: D102 - see the class
        return "2.0" if self._tpm2 else "1.2"

    @property
    def pid(self) -> int:  # noqa: D102
        return self._running().pid

    @property
    def folder(self) -> str:  # noqa: D102
        return os.path.dirname(self._path(_RAW))

    @property
    def path(self) -> str:  # noqa: D102
        return self._path(_MANAGED if self._tpm2 else _RAW)

    @property
    def raw_path(self) -> str:  # noqa: D102
        return self._path(_RAW)

    @property
    def clients(self) -> int:
        """How many connections others have to `path` and `raw_path`. 0, too, without /proc."""
        self._running()
        paths = {os.fsencode(self._path(name)) for name in (_MANAGED, _RAW)}
        with self._lock, contextlib.suppress(FileNotFoundError):
            with open("/proc/net/unix", "rb") as table:
                rows = [row.split(None, 7) for row in table.read().splitlines()]
            found = [r for r in rows if r[-1] in paths and not int(r[3], 16) & _ACCEPTCON]
            return len(found) - (self._client is not None)
        return 0

    @property
    def tcti(self) -> str:  # noqa: D102
        return tcti_of(self.path)

    @property
    def raw_tcti(self) -> str:  # noqa: D102
        return f"swtpm:path={self.raw_path}"

    @property
    def env(self) -> dict[str, str]:  # noqa: D102
        found = {"VTPM_PATH": self.path, "VTPM_RAW_PATH": self.raw_path}
        if self._tpm2:
            found |= self._env_of_stacks
        return found

    @property
    def _env_of_stacks(self) -> dict[str, str]:
        """Of all that read one; for a TPM 2.0."""
        file = f"{self.folder}/{FAPI_NAMES[0]}"
        return {**dict.fromkeys(TCTI_VARIABLES, self.tcti), FAPI_VARIABLE: file}

    def _path(self, name: str) -> str:
        if self._nest is None:
            raise LabError("The TPM is not running: enter its context, or start it")
        return self._nest.path(name)

    # -- commands -------------------------------------------------------------------------

    def command(self, command: bytes) -> bytes:
        """The TPM's response to a command, both whole with their headers.

        All of them come from one client: what it loads stays until the TPM is reset.
        """
        if not TPM_HEADER_SIZE <= len(command) == command_size(command) <= TPM_BUFFER_MAX:
            raise WireError("TPM command", command_size(command), len(command))
        emulator = self._running()
        with self._lock:
            try:
                if self._client is None:
                    self._client = self._connect()
                return self._client.ask(command)
            except (OSError, EOFError, VtpmError) as exc:
                self._hang_up()
                raise emulator.failure("The TPM did not answer", exc) from exc
            finally:
                if not self._tpm2:  # others wait for that socket
                    self._hang_up()

    def _connect(self) -> Client:
        return Client(self.path)

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.release()

    # -- time -----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All of it, as it is now; it goes on."""
        with self._asking("The TPM gave no snapshot") as control:
            permanent = control.get_state(_PERMANENT, _DECRYPTED)
            volatile = control.get_state(_VOLATILE, _DECRYPTED)
            saved = b"" if self._tpm2 else _saved_state(control)
        return Snapshot(permanent, volatile, saved, tpm2=self._tpm2)

    def rewind(self, snapshot: Snapshot) -> None:
        """Puts the TPM back to where *snapshot* was taken, of this TPM or of any of its version.

        Clients that are connected find themselves at a TPM that was reset: their objects and
        sessions are gone, as those of all clients at the moment of the snapshot are.

        Raises:
            LabError: The TPM does not take it, and is off until it is rewound to another one.
        """
        if snapshot.tpm2 != self._tpm2:
            raise LabError(f"The snapshot is of another version than this TPM {self.version}")
        self._running()
        with self._lock:
            with self._asking("The TPM could not be rewound") as control:
                control.stop()
                self._return_to(control, snapshot)
            if not snapshot.volatile:
                self._start_up()
            self._forget()

    def _return_to(self, control: Control, snapshot: Snapshot) -> None:
        """Of a TPM that is off. Raises as `Control` does."""
        control.set_state(_PERMANENT, snapshot.permanent)
        control.set_state(_VOLATILE, snapshot.volatile)
        if snapshot.saved:  # libtpms takes none, where there is one, for an error
            control.set_state(_SAVED, snapshot.saved)
        control.init()

    def _start_up(self) -> None:
        kind = TpmSu.TPM_SU_CLEAR if self._tpm2 else TpmSu.TPM_ST_CLEAR
        self.command(startup_command(kind, tpm2=self._tpm2))

    def power_cycle(self) -> None:
        """Takes the power away and gives it back, then starts the TPM up, as a machine does.

        It is shut down in order before; what it keeps without power stays.
        """
        self._running()
        with self._lock:
            with self._asking("The TPM could not be powered off and on") as control:
                control.stop()
                control.init(PtmInitFlag.PTM_INIT_FLAG_DELETE_VOLATILE)
            self._start_up()

    def reset(self) -> None:
        """As a machine's reset line: the TPM is initialized while it is on, and started up.

        It is shut down in order before, here, too.
        """
        self._running()
        with self._lock:
            with self._asking("The TPM could not be reset") as control:
                control.init(PtmInitFlag.PTM_INIT_FLAG_DELETE_VOLATILE)
            self._start_up()

    # -- what it has seen, and what is done to it -----------------------------------------

    def pcr(self, number: int, bank: str = "sha256") -> bytes:
        """The value of a PCR, 0 to 23; a TPM 1.2 has the bank "sha1" alone, whatever is asked for.

        Raises:
            LabError: There is no such PCR, or bank.
        """
        from vtpm_cuse.lab import commands  # with structures that few programs need

        if self._tpm2:
            return commands.read_pcr(self.command, number, bank)
        return commands.read_pcr12(self.command, number)

    def exchanges(self) -> list[Exchange]:
        """The last commands and responses since the last rewind, of all clients; see *trace*.

        As the TPM saw them: behind the resource manager, with its own commands among them.
        """
        self._running()
        return [] if self._recorder is None else self._recorder.exchanges()

    def lockout(self) -> None:
        """Gives it wrong passwords until it refuses all of those that it protects that way."""
        from vtpm_cuse.lab import commands

        self._need_tpm2("A lockout")
        self._running()
        with self._lock:
            commands.lock_out(self.command)

    def clock_step(self, milliseconds: int) -> None:
        """Sets its clock forward, which cannot be set back. It takes the platform's authorization.

        Raises:
            LabError: *milliseconds* are not positive.
        """
        self._need_tpm2("A clock that can be set")
        from vtpm_cuse.lab import commands

        if milliseconds <= 0:
            raise LabError("The clock of a TPM can only be set forward")
        self._running()
        with self._lock:
            commands.step_clock(self.command, milliseconds)

    def fail_next(self, code: int) -> None:
        """The next command of any client gets this response code; the TPM does not see it."""
        self._need_relay().fail_next(code)

    def lose_next_response(self) -> None:
        """The TPM executes the next command, whose client finds its connection at an end instead."""
        self._need_relay().lose_next_response()

    def latency(self, seconds: float) -> None:
        """All later commands reach the TPM so much later; 0 for at once."""
        if not 0 <= seconds < math.inf:
            raise LabError(f"A command cannot come {seconds} seconds later")
        self._need_relay().latency(seconds)

    def _need_relay(self) -> Relay:
        self._running()
        if self._relay is None:
            raise LabError("Faults need a relay: make the TPM with faults=True")
        return self._relay

    def _need_tpm2(self, what: str) -> None:
        if not self._tpm2:
            raise LabError(f"{what}: a TPM 1.2 has none")

    def _forget(self) -> None:
        if self._relay is not None:
            self._relay.reset()
        if self._recorder is not None:
            self._recorder.clear()

    # -- helpers --------------------------------------------------------------------------

    def _running(self) -> ChildEmulator:
        if self._emulator is None:
            raise LabError("The TPM is not running: enter its context, or start it")
        if not self._emulator.ours:
            raise LabError("The TPM belongs to the process that started it")
        return self._emulator

    @contextlib.contextmanager
    def _asking(self, failing: str) -> Iterator[Control]:
        emulator = self._running()
        try:
            with self._lock, emulator.control() as control:
                yield control
        except LabError:
            raise
        except (OSError, VtpmError) as exc:
            raise emulator.failure(failing, exc) from exc


def tcti_of(path: str) -> str:
    """A Unix socket with a stream of commands, as tpm2-tss writes it."""
    return f"cmd:{shlex.join([sys.executable, '-I', '-S', str(_TCTI), path])}"


def _whole(path: str | Path) -> str:
    """A path that counts in any folder. Raises LabError."""
    try:
        return os.path.abspath(path)
    except OSError as exc:
        raise LabError(f"The current folder has gone; give the whole path of {path}") from exc


@functools.cache
def _manufactured(version: Literal["2.0", "1.2"], profile: str | None) -> Snapshot:
    """One that is off. Raises LabError."""
    with Scratch() as folder:
        with Tpm(version=version, state=folder, manufactured=True, profile=profile) as tpm:
            if version == "2.0":  # else it would count as one that lost its power
                tpm.command(shutdown_command(TpmSu.TPM_SU_CLEAR))
            found = tpm.snapshot()
        return Snapshot(found.permanent, tpm2=found.tpm2)


def _saved_state(control: Control) -> bytes:
    """Of a TPM 1.2, which there may be none of. Raises as `Control` does."""
    try:
        return control.get_state(_SAVED, _DECRYPTED)
    except AnswerError as exc:
        if exc.result != PtmResult.TPM_RETRY:
            raise
        return b""


TCTI_VARIABLES: Final = (
    "TPM2TOOLS_TCTI",
    "TPM2OPENSSL_TCTI",
    "TPM2_PKCS11_TCTI",
    "TPM2TSSENGINE_TCTI",
    "TCTI",
)
IBM_VARIABLES: Final = ("TPM_INTERFACE_TYPE", "TPM_DEVICE")
"""Of the TSS of IBM, for a device."""


class Client(Owned):
    """A connection for `Tpm.command`. Raises OSError or FrontendError."""

    def __init__(self, path: str) -> None:
        self._connection = connect_unix(path)
        self._connection.settimeout(_ANSWER_SECONDS)
        super().__init__()

    def ask(self, command: bytes) -> bytes:
        """The response. Raises OSError, EOFError."""
        self._connection.sendall(command)
        head = receive(self._connection, TPM_HEADER_SIZE)
        return head + receive(self._connection, command_size(head) - TPM_HEADER_SIZE)

    def release(self) -> None:
        """See `Owned`."""
        with contextlib.suppress(OSError):  # somebody else has closed it
            self._connection.close()
