"""What ./setup runs: commands that end with it, and steps whose output is in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TREE: Final = Path(__file__).resolve().parents[1]
SETUP: Final = str(TREE / "setup")
CACHE: Final = Path(".cache")
_LOG: Final = CACHE / "setup.log"
_SHOWN_LINES: Final = 40
_PATIENCE: Final = 30.0  # s, for a command that was told to end
_WORTH_TELLING: Final = 5  # s
_NOT_FOUND: Final = 127


class Signalled(BaseException):
    """SIGINT or SIGTERM has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def say(text: str) -> None:
    """Tells what is done."""
    print(f"setup: {text}", file=sys.stderr)


def fail(text: str) -> NoReturn:
    """Ends it all, saying why."""
    say(text)
    sys.exit(1)


def wrong_words() -> NoReturn:
    """Ends it all for a command line that cannot be understood."""
    sys.stderr.write((TREE / "tools/usage").read_text())
    sys.exit(2)


class _Held:
    """A signal that comes while nobody could end a command for it waits until somebody can."""

    def __init__(self) -> None:
        self._active = False
        self._came: int | None = None

    def hold(self) -> None:
        """From now on they wait."""
        self._active = True

    def release(self) -> None:
        """From now on they do not. Raises Signalled for one that has waited."""
        self._active = False
        number, self._came = self._came, None
        if number is not None:
            raise Signalled(number)

    def come(self, number: int, _frame: object) -> None:
        """A signal's handler."""
        if not self._active:
            raise Signalled(number)
        self._came = number


_held: Final = _Held()


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program of this folder, to its end by itself or by a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _held.come)
    try:
        sys.exit(main())
    except Signalled as exc:
        say(f"ended by {signal.Signals(exc.number).name}")
        sys.exit(128 + exc.number)


class Started:
    """A command in a process group of its own, so that it gets signals from here, once.

    When the block is left by an exception, the command is ended. Signals wait until `wait`.
    """

    def __init__(self, command: Sequence[str | Path], output: IO[bytes] | None = None) -> None:
        self._command = command
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        _held.hold()
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=TREE,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT if self._output else None,
                process_group=0,
            )
        except OSError as exc:
            say(f"{self._command[0]}: {exc.strerror}")
        return self

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        _held.hold()
        if exc is None or self._process is None:
            _held.release()
        else:
            number = exc.number if isinstance(exc, Signalled) else signal.SIGTERM
            _end(self._process, number)

    def wait(self) -> int:
        """Waits for its end; returns its exit status, as a shell has it. Raises Signalled."""
        _held.release()
        if self._process is None:
            return _NOT_FOUND
        status = self._process.wait()
        return status if status >= 0 else 128 - status


def run(command: Sequence[str | Path], output: IO[bytes] | None = None) -> int:
    """Runs a command as `Started`; returns its exit status."""
    with Started(command, output) as started:
        return started.wait()


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """At the second signal, or after half a minute, it is over anyhow."""
    with contextlib.suppress(ProcessLookupError):
        with contextlib.suppress(Signalled, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            _held.release()
            process.wait(_PATIENCE)
        os.killpg(process.pid, signal.SIGKILL)


def step(message: str, command: Sequence[str | Path]) -> None:
    """Says what it does; what the command says goes to the log, and is shown if it fails."""
    begin = time.monotonic()
    say(f"{message} ...")
    CACHE.mkdir(exist_ok=True)
    with _LOG.open("ab") as log:
        size = log.tell()
        status = run(command, log)
    if status:
        said = _LOG.read_bytes()[size:].decode(errors="replace").splitlines()
        for line in said[-_SHOWN_LINES:]:
            print(line, file=sys.stderr)
        fail(f"{message} failed; all that was said is in {_LOG}")
    took = int(time.monotonic() - begin)
    if took >= _WORTH_TELLING:
        say(f"{message}: done in {took} s")


def can_be_root() -> bool:
    """Whether `as_root` works, without a question asked."""
    if os.geteuid() == 0:
        return True
    with contextlib.suppress(OSError):
        command = ["sudo", "-n", "true"]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return False


def as_root(command: Sequence[str]) -> list[str]:
    """The command as root runs it, with the PATH of this process."""
    if os.geteuid() == 0:
        return list(command)
    return ["sudo", "-n", "env", f"PATH={os.environ['PATH']}", *command]


def become(command: Sequence[str]) -> NoReturn:
    """Gives this process to a command, so that signals are its own."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python alone ignores
    os.execvp(command[0], list(command))  # noqa: S606 - no shell is wanted
