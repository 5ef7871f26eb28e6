"""What ./setup runs: commands that end with it, and steps whose output is in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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

    def __init__(self, number: int, _frame: object = None) -> None:
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


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program of this folder, to its end by itself or by a signal."""

    def raise_it(number: int, frame: object) -> NoReturn:
        raise Signalled(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_it)
    try:
        sys.exit(main())
    except Signalled as exc:
        say(f"ended by {signal.Signals(exc.number).name}")
        sys.exit(128 + exc.number)


@contextlib.contextmanager
def started(
    command: Sequence[str | Path], output: IO[bytes] | None = None
) -> Iterator[Callable[[], int]]:
    """Starts a command in a process group of its own, so that it gets signals from here, once.

    Gives what waits for its end and returns its exit status, as a shell has it. When the block is
    left otherwise, the command is ended.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=TREE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            process_group=0,
        )
    except OSError as exc:
        say(f"{command[0]}: {exc.strerror}")
        yield lambda: _NOT_FOUND
        return

    def wait() -> int:
        status = process.wait()
        return status if status >= 0 else 128 - status

    try:
        yield wait
    except BaseException as exc:
        _end(process, exc.number if isinstance(exc, Signalled) else signal.SIGTERM)
        raise


def run(command: Sequence[str | Path], output: IO[bytes] | None = None) -> int:
    """Runs a command as `started`; returns its exit status."""
    with started(command, output) as wait:
        return wait()


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """At the second signal, or after half a minute, it is over anyhow."""
    with contextlib.suppress(ProcessLookupError):
        with contextlib.suppress(Signalled, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
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
