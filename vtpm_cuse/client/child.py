"""An emulator as a child: a TPM that its parent has to itself, and that goes when its parent goes.

The parent binds the sockets, in a folder of its user's alone, and hands them over, so a client can
connect before the emulator has begun. The parent itself does, to the control channel: when that
connection has ended, however that came about, no control client is left and the emulator ends, too.
A guardian waits for the same, and removes sockets and folder: the parent may be killed, and the
emulator's sandbox lets it remove nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import site
import socket
import stat
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.channel import SocketControl
from vtpm_cuse.client.connect import connect_unix
from vtpm_cuse.errors import LabError, VtpmError, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vtpm_cuse.client.base import Control

CONTROL: Final = "--ctrl"
ANNOUNCEMENT: Final = "env.json"
"""Of a TPM that others of this user may find, in its `Nest`; see `lab.running`."""
START_SECONDS: Final = 120
"""How long an answer may take: on a busy machine many emulators start at once."""

END_SECONDS: Final = 30
_GONE_MILLISECONDS: Final = 50
"""What who has found one connection at an end looks for that of another one."""

_PATH_MAX: Final = 107  # bytes of sun_path, without the NUL
_MESSAGES_MAX: Final = 1 << 14  # bytes
_ROOT: Final = Path(__file__).resolve().parents[2]
"""Where the package is: in a checkout, or beside what was installed with it."""

# Counts before that of others for one import; behind all of them there may be what else it needs.
_PROGRAM: Final = """\
import sys
root, module = sys.argv[1:3]
sys.path.insert(0, root)
import vtpm_cuse
sys.path.append(sys.path.pop(0))
sys.argv[:3] = [module.rpartition(".")[2]]
from importlib import import_module
sys.exit(import_module(module).main())
"""
# The shell and what it runs are the system's (command -p), and names are words, never its text.
_GUARDIAN: Final = """\
trap '' HUP INT QUIT TERM
read -r _
[ -d "$1" ] || exit 0
folder=$1
shift
cd "$folder" && command -p rm -rf -- "$@" && cd / && command -p rmdir -- "$folder"
"""
# The whole of a folder, which nobody else can have put anything into.
_SCRATCH_GUARDIAN: Final = """\
trap '' HUP INT QUIT TERM
read -r _
[ ! -d "$1" ] || command -p rm -rf -- "$1"
"""
# A child is not to announce itself to its parent's service manager, nor to hear what is for that.
_NOT_FOR_A_CHILD: Final = (
    "LISTEN_",
    "NOTIFY_SOCKET",
    "PYTHON",
    "TPM_PATH",
    "WATCHDOG_",
    "__PYVENV",
)


def program_words(module: str) -> list[str]:
    """What starts a program of this package, by its *module*, as an installed one is started.

    Neither PATH nor what Python reads of its environment counts: it is this package, run by this
    interpreter. Raises LabError where that is none, as in a program with Python inside.
    """
    if not sys.executable:
        raise LabError("Nobody knows where the interpreter of this Python is")
    personal = site.ENABLE_USER_SITE and _ROOT.is_relative_to(site.getusersitepackages())
    alone = "-EP" if personal else "-I"
    return [sys.executable, alone, "-c", _PROGRAM, str(_ROOT), module]


def program_environment() -> dict[str, str]:
    """The caller's, but for what a child is not to hear."""
    return {name: value for name, value in os.environ.items() if not _is_private(name)}


def _is_private(name: str) -> bool:
    return name.startswith(_NOT_FOR_A_CHILD)


class Owned:
    """What belongs to the process that made it: a copy of that, which fork() made, lets go of it.

    It could corrupt what both would use, and would keep others from noticing the parent's end.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        _owned.add(self)

    @property
    def ours(self) -> bool:
        """Whether this process made it."""
        return os.getpid() == self._owner

    def release(self) -> None:
        """Closes its descriptors, and nothing more; again is harmless. Takes no lock."""
        raise NotImplementedError


_owned: Final[weakref.WeakSet[Owned]] = weakref.WeakSet()


def _release_those_of_the_parent() -> None:
    for one in list(_owned):
        one.release()


os.register_at_fork(after_in_child=_release_those_of_the_parent)


class Nest(Owned):
    """A folder for sockets, of this user's alone, that goes with this process and its copies.

    Args:
        names: Of what may come to be in it: sockets, files, folders with all that is in them.

    Attributes:
        folder: Its path, with room for the names behind it.

    Raises:
        LabError: It cannot be made.
    """

    _guard = _GUARDIAN

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = -1
        longest = max(map(len, names), default=0)
        self.folder = f"{_base(longest)}/vtpm-{os.urandom(8).hex()}"
        self._guardian: subprocess.Popen[bytes] | None = None
        try:
            read_end, self._held = os.pipe()
            super().__init__()
            try:
                self._guardian = _start_guardian(self._guard, read_end, self.folder, names)
            finally:
                os.close(read_end)
            # After its guardian: there is no moment at which nobody would remove it.
            os.mkdir(self.folder, 0o700)
            os.chmod(self.folder, 0o700)  # whatever the umask
        except OSError as exc:
            self.close()
            raise LabError(f"Could not make {self.folder}: {exc.strerror}") from exc

    def path(self, name: str) -> str:
        """Where the socket of that *name* is, or comes to be."""
        return f"{self.folder}/{name}"

    def listen(self, name: str) -> socket.socket:
        """A Unix socket, for this user alone. Raises LabError."""
        made = socket.socket(socket.AF_UNIX)
        try:
            made.bind(self.path(name))
            os.chmod(self.path(name), 0o600)
            made.listen(socket.SOMAXCONN)
        except OSError as exc:
            made.close()
            raise LabError(f"Could not listen on {self.path(name)}: {exc.strerror}") from exc
        return made

    def close(self) -> None:
        """Removes it; again is harmless."""
        if self._held < 0:
            return
        if self.ours:
            self._remove()
        self.release()
        if self.ours and self._guardian is not None:
            self._guardian.wait()

    def release(self) -> None:
        """See `Owned`. Once all have let go of it the guardian removes it."""
        if self._held >= 0:
            with contextlib.suppress(OSError):  # somebody else has closed it
                os.close(self._held)
            self._held = -1
        if not self.ours and self._guardian is not None:
            self._guardian.returncode = 0  # another process' child

    def _remove(self) -> None:
        for name in self._names:
            try:
                os.unlink(self.path(name))
            except IsADirectoryError:
                shutil.rmtree(self.path(name), ignore_errors=True)
            except OSError:
                continue
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)


class Scratch(Nest):
    """A folder for anything, of this user's alone, that goes with this process. Raises LabError."""

    _guard = _SCRATCH_GUARDIAN

    def __init__(self) -> None:
        super().__init__(())

    def __enter__(self) -> str:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _start_guardian(
    script: str, read_end: int, folder: str, names: Sequence[str]
) -> subprocess.Popen[bytes]:
    """It waits for the end of what *read_end* is of. Raises OSError."""
    return subprocess.Popen(  # noqa: S603 - our own words
        ["/bin/sh", "-c", script, "vtpm-guardian", folder, *names],
        stdin=read_end,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def nest_places() -> list[str]:
    """Folders in which a `Nest` may be, the best one first."""
    runtime, chosen = (os.environ.get(name, "") for name in ("XDG_RUNTIME_DIR", "TMPDIR"))
    private = [runtime] if os.path.isabs(runtime) and _is_own_folder(runtime) else []
    # Not tempfile.gettempdir(), which tries them with a file that a signal would leave there.
    temporary = [chosen] if os.path.isabs(chosen) else []
    return [*private, *temporary, "/tmp"]  # noqa: S108 - what is in it is private


def _base(longest: int) -> str:
    """A folder in which sockets may be. Raises LabError."""
    room = _PATH_MAX - len("/vtpm-") - 16 - 1 - longest
    for base in nest_places():
        # A comma ends a path in tpm2-tss' words; and vtpm env believes in nothing that is not printed.
        plain = base.isprintable() and "," not in base
        fits = plain and len(os.fsencode(base)) <= room
        if fits and os.access(base, os.W_OK | os.X_OK):
            return base.rstrip("/")
    raise LabError(
        "There is no folder for sockets: set TMPDIR to a short path, of letters and digits, that can "
        "be written"
    )


def _is_own_folder(path: str) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


class ChildEmulator(Owned):
    """A running ``swtpm socket`` that belongs to this process alone.

    It is in a session of its own, so what is typed at a terminal to interrupt a program reaches
    that program and not its TPM.

    Args:
        words: Options, all but those of the channels.
        listeners: The sockets it serves, by their options, as "--server", and `CONTROL` among them;
            closed here afterwards.
        pass_fds: More descriptors that *words* name.

    Raises:
        LabError: It does not start; with what it said.
        OSError: No descriptor is to be had.
    """

    _messages = -1

    def __init__(
        self,
        words: Iterable[str],
        listeners: Mapping[str, socket.socket],
        pass_fds: Iterable[int] = (),
    ) -> None:
        with contextlib.ExitStack() as undo:
            for listener in listeners.values():
                undo.callback(listener.close)
            self._path: str = listeners[CONTROL].getsockname()
            self._ours = _connect(self._path)
            try:
                # Nobody has to read what is in memory; and it is little: the log leaves out what
                # repeats.
                self._messages = os.memfd_create("messages", os.MFD_CLOEXEC)
                self._process = self._start(words, listeners, pass_fds)
            except OSError as exc:
                self._ours.close()
                self._close_messages()
                raise LabError(f"Could not start an emulator: {exc.strerror}") from exc
        super().__init__()
        try:
            SocketControl(self._ours.dup).capability()  # answered when it is up
        except (OSError, VtpmError) as exc:
            failure = self.failure("The emulator did not start", exc)
            self.kill()
            raise failure from exc
        except BaseException:
            self.kill()
            raise

    def _start(
        self,
        words: Iterable[str],
        listeners: Mapping[str, socket.socket],
        pass_fds: Iterable[int],
    ) -> subprocess.Popen[bytes]:
        """Raises OSError."""
        channels = []
        for option, listener in listeners.items():
            more = ",terminate" if option == CONTROL else ""
            channels += [option, f"type=unixio,fd={listener.fileno()}{more}"]
        return subprocess.Popen(  # noqa: S603 - our own program
            [*program_words("vtpm_cuse.cli.swtpm"), "socket", *words, *channels],
            stdin=subprocess.DEVNULL,
            stdout=self._messages,
            stderr=self._messages,
            cwd="/",
            env=program_environment(),
            pass_fds=[*(one.fileno() for one in listeners.values()), *pass_fds],
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, and is this process' own."""
        return self.ours and self._process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, if it has: "status 1", "signal 9"."""
        status = self._process.poll()
        if status is None:
            return ""
        return f"signal {-status}" if status < 0 else f"status {status}"

    @contextlib.contextmanager
    def control(self) -> Iterator[Control]:
        """A control connection of its own for several requests: after one is refused it must end.

        Raises:
            OSError: Nobody is there.
        """
        with _connect(self._path) as connection, SocketControl(connection.dup) as control:
            yield control

    def failure(self, what: str, exc: Exception) -> LabError:
        """An error that says *what* went wrong, why, and what the emulator said last."""
        if isinstance(exc, VtpmError):
            return LabError(f"{what}: {exc}", self.messages())
        if self._has_gone():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        ended = f"it ended with {self.ending}" if self.ending else ""
        return LabError(f"{what}: {ended or exc}", self.messages())

    def _has_gone(self) -> bool:
        """Whether it is at its end: then nobody has the other end of the parent's connection."""
        try:
            found = select.poll()
            found.register(self._ours, select.POLLIN)
            return bool(found.poll(_GONE_MILLISECONDS))
        except (OSError, ValueError):  # it is closed
            return True

    def messages(self) -> str:
        """What it said last: of its log, and of what Python had to say, at most 16 KiB."""
        try:
            begin = max(0, os.fstat(self._messages).st_size - _MESSAGES_MAX)
            said = os.pread(self._messages, _MESSAGES_MAX, begin)
        except OSError:  # it is closed
            return ""
        return shown(said.decode(errors="replace")).strip()

    def end(self) -> None:
        """Has it store its state and end. Raises LabError; it has ended all the same."""
        if self.ours and self._messages >= 0:
            try:
                with self.control() as control:
                    control.shutdown()
                self._process.wait(END_SECONDS)
            except (OSError, VtpmError, subprocess.TimeoutExpired) as exc:
                failure = self.failure("The emulator did not end in order", exc)
                self.kill()
                raise failure from exc
        self.release()

    def kill(self) -> None:
        """Ends it at once; what is in memory needs no orderly end."""
        if self.ours and self._messages >= 0:
            self._process.kill()
            self._process.wait()
        self.release()

    def release(self) -> None:
        """See `Owned`. Once all have let go of its control channel, it ends."""
        with contextlib.suppress(OSError):  # somebody else has closed it
            self._ours.close()
        self._close_messages()
        if not self.ours:
            self._process.returncode = 0  # another process' child

    def _close_messages(self) -> None:
        if self._messages >= 0:
            with contextlib.suppress(OSError):
                os.close(self._messages)
            self._messages = -1


def _connect(path: str) -> socket.socket:
    """Raises OSError."""
    connection = connect_unix(path)
    connection.settimeout(START_SECONDS)
    return connection


@contextlib.contextmanager
def standard_files_left_alone() -> Iterator[None]:
    """Has descriptors that are made meanwhile not take the place of a standard file that is closed."""
    held: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            held.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in held:
            os.close(fd)
