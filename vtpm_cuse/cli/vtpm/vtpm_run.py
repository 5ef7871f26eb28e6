"""``vtpm run``: a command that has a TPM of its own, for as long as it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.command import (
    FAILED,
    NOT_EXECUTABLE,
    NOT_FOUND,
    Attendant,
    EndedBySignal,
    find_command,
)
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, inform, run_program
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import LabError, UsageError, VtpmError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.lab.tpm import Tpm

PROGRAM: Final = Program(
    "vtpm run",
    "run a command with a TPM of its own",
    (
        Option("tpm1.2", "a TPM 1.2; else it is a TPM 2.0", group="The TPM"),
        Option(
            "state",
            "keep its state in that directory, made if it is missing; else it is gone at the end",
            metavar="DIR",
            group="The TPM",
        ),
        Option(
            "manufactured",
            "with endorsement keys and certificates, as from a factory",
            group="The TPM",
        ),
        Option(
            "profile",
            "of a TPM 2.0 that is made anew, by name or as JSON; needs libtpms 0.10",
            metavar="PROFILE",
            group="The TPM",
        ),
        Option("from", "begin from the snapshot in that file", metavar="FILE", group="The TPM"),
        Option(
            "save",
            "write a snapshot to that file when the command has ended; it is as secret as all "
            "that the TPM keeps",
            metavar="FILE",
            group="The TPM",
        ),
        Option(
            "managed",
            "what the variables name is a resource manager, by which each client has a TPM 2.0 of "
            "its own; that is so without this option, too",
            group="How clients find it",
        ),
        Option(
            "raw",
            "what the variables name is the TPM itself, with one client at a time, and no "
            "resource manager",
            group="How clients find it",
        ),
        Option(
            "device",
            "a device file in a FUSE mount instead of sockets, for what knows devices alone",
            group="How clients find it",
        ),
        Option(
            "name",
            "what vtpm env calls it; else that is the process id",
            metavar="NAME",
            group="How clients find it",
        ),
        Option("shell", "run the user's shell, with a line about how to leave it"),
        Option(
            "trace",
            "write the TPM commands, a readable line each, to that file; - for standard error",
            metavar="FILE",
        ),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("[options] [--] COMMAND [ARGUMENT...]", "[options] --shell"),
    operands=(Term("COMMAND", "what is run; the options end before it"),),
    runs=True,
    description=(
        "Starts a TPM, runs COMMAND with environment variables by which clients find it, and ends "
        "the TPM when COMMAND has ended. It needs no root. Each client has, through a resource "
        "manager, a TPM 2.0 of its own, so nothing has to be flushed.",
        "Ctrl-C and other keys reach COMMAND as without vtpm run. SIGTERM, SIGHUP, SIGUSR1 and "
        "SIGUSR2 are passed on to it. However vtpm run ends, by SIGKILL, too, nothing is left: "
        "COMMAND gets SIGKILL then, but what it has put into the background does not.",
        "Clients find the TPM by the variables below; vtpm_env(8) prints them for others than "
        "COMMAND. Another vtpm run's are not passed on.",
    ),
    examples=(
        Example("", "vtpm run tpm2_getrandom --hex 8"),
        Example("The tests of a project", "vtpm run -- make check"),
        Example(
            "A TPM prepared once, as new for each run",
            "vtpm run --manufactured --save tpm.snapshot -- ./enroll\n"
            "vtpm run --from tpm.snapshot -- ./test",
        ),
        Example(
            "A program that knows /dev/tpm0 alone", "vtpm run --device sh -c './p $VTPM_DEVICE'"
        ),
        Example("A shell to try things in", "vtpm run --shell"),
    ),
    exits=(
        Term(str(FAILED), "vtpm run itself failed: there is no TPM, or it could not be saved."),
        Term(str(NOT_EXECUTABLE), "COMMAND may not be executed."),
        Term(str(NOT_FOUND), "There is no COMMAND."),
        Term("128+N", "COMMAND was ended by signal N."),
        Term("others", "COMMAND's own."),
    ),
    environment=(
        Term("VTPM_NAME", "Set: its name."),
        Term("VTPM_PATH", "Set: the Unix socket of its resource manager; of a TPM 1.2, its own."),
        Term("VTPM_RAW_PATH", "Set: the Unix socket of the TPM itself, with one client at a time."),
        Term("VTPM_DEVICE, VTPM_RAW_DEVICE", "Set with --device instead: files in their place."),
        Term("TPM2TOOLS_TCTI", "Set, for tpm2-tools and others that read it."),
        Term("TPM2OPENSSL_TCTI", "Set, for the provider tpm2 of OpenSSL."),
        Term("TPM2_PKCS11_TCTI", "Set, for tpm2-pkcs11."),
        Term("TPM2TSSENGINE_TCTI", "Set, for the engine tpm2tss of OpenSSL."),
        Term(
            "TSS2_FAPICONF", "Set, for FAPI of tpm2-tss: a configuration with a place for its keys."
        ),
        Term("TCTI", "Set, for Keylime and others in Rust; they know what --device gives alone."),
        Term(
            "TPM_INTERFACE_TYPE, TPM_DEVICE",
            "Set with --device, for the TSS of IBM; else COMMAND has none, which would lead it to "
            "another TPM.",
        ),
        Term("SHELL", "What --shell runs; else /bin/sh."),
        Term("XDG_RUNTIME_DIR, TMPDIR", "Where the sockets are."),
    ),
    see_also=("vtpm_env(8)", "vtpm_trace(8)", "swtpm_socket(8)", "swtpm_fuse(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm run`` with the words behind it."""
    ended: list[int] = []

    def work() -> int:
        ended.append(_run(words, program))
        return ended[0]

    def report(text: str) -> None:
        complain(f"{program}: {text}")

    try:
        status = run_program(work, report, clears_up=False)
    except EndedBySignal as exc:
        signal.signal(exc.number, signal.SIG_DFL)
        os.kill(os.getpid(), exc.number)
        raise
    return status if ended or status in {NOT_EXECUTABLE, NOT_FOUND} else FAILED


def _run(words: Sequence[str], program: str) -> int:
    line = CommandLine(PROGRAM, words, program)
    if line.has("help"):
        print(help_text(PROGRAM, program), end="")
        return 0
    command = _command(line)
    with Attendant() as attendant:
        return _Run(line, attendant, program).run(command)


def _command(line: CommandLine) -> list[str]:
    """What is to be run, which is there. Raises UsageError."""
    words = line.operands
    if line.has("shell"):
        if words:
            raise UsageError("With --shell there is no command; leave one of them out")
        words = [os.environ.get("SHELL") or "/bin/sh"]
    if not words:
        raise UsageError("There is no command; name one, or say --shell")
    find_command(words[0])
    return words


class _Run:
    def __init__(self, line: CommandLine, attendant: Attendant, program: str) -> None:
        self._line, self._attendant, self._program = line, attendant, program
        self._good, self._told = True, False

    def run(self, command: Sequence[str]) -> int:
        """Raises VtpmError, OSError: the command has not been started."""
        name = self._line.value("name") or ""
        if self._line.has("managed") and self._line.has("raw"):
            raise UsageError("--managed and --raw exclude each other; leave one of them out")
        if name:
            _check_free(name)
        if (path := self._line.value("save")) is not None:
            _check_place(path)
        with self._traced() as capture:
            tpm = self._tpm(capture)
            try:
                tpm.start()
                status = self._attend(tpm, command, name)
            except BaseException:
                with contextlib.suppress(LabError):  # there is another reason to give
                    tpm.close()
                raise
            with self._noting():
                tpm.close()
        return status or (0 if self._good else FAILED)

    @contextlib.contextmanager
    def _traced(self) -> Iterator[int | None]:
        """A descriptor for a capture, if there is to be a trace."""
        path = self._line.value("trace")
        if path is None:
            yield None
            return
        from vtpm_cuse.cli.vtpm.tracer import Tracer

        tracer = Tracer(path)
        try:
            yield tracer.fd
        except BaseException:
            tracer.abandon()
            raise
        self._good &= tracer.end()

    def _tpm(self, capture: int | None) -> Tpm:
        from vtpm_cuse.lab.tpm import Tpm as Kind

        line, snapshot = self._line, None
        if line.has("device"):
            from vtpm_cuse.lab.device import DeviceTpm as Kind
        if (path := line.value("from")) is not None:
            from vtpm_cuse.lab.snapshot import Snapshot

            try:
                snapshot = Snapshot.load(path)
            except (OSError, VtpmError) as exc:
                why = exc.strerror if isinstance(exc, OSError) else "it is no snapshot"
                raise UsageError(f"Could not begin from {path}: {why}") from exc
            if snapshot.tpm2 and line.has("tpm1.2"):
                raise UsageError(f"{path} is of a TPM 2.0; leave --tpm1.2 out")
        tpm = Kind(
            version="1.2" if line.has("tpm1.2") else "2.0",
            state=line.value("state"),
            snapshot=snapshot,
            manufactured=line.has("manufactured"),
            profile=line.value("profile"),
            capture=capture,
        )
        if line.has("managed") and tpm.version == "1.2":
            raise UsageError("A TPM 1.2 has no resource manager; leave --managed out")
        return tpm

    def _attend(self, tpm: Tpm, command: Sequence[str], name: str) -> int:
        """With the TPM there; returns the command's exit status."""
        from vtpm_cuse.lab.running import announce

        name = name or str(os.getpid())
        env = {"VTPM_NAME": name, **tpm.env}
        if self._line.has("raw"):
            env |= {key: tpm.raw_tcti for key, value in env.items() if value == tpm.tcti}
            env |= {key: tpm.raw_path for key, value in env.items() if value == tpm.path}
        announce(tpm.folder, name, tpm.version, env)
        if self._line.has("shell"):
            self._introduce(tpm, name)
            env |= _prompt()
        status = self._attendant.run(command, {**_environment(), **env})
        if not tpm.alive:
            self._complain(f"The TPM ended before {command[0]} did, with {tpm.ending}")
            self._good = not (self._line.has("state") or self._line.has("save"))
            self._told = True
        elif (path := self._line.value("save")) is not None:
            with self._noting():
                _save(tpm, path)
        return status

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """An error at the end is said, and does not take the place of the command's status."""
        try:
            yield
        except VtpmError as exc:
            if not self._told:  # else this follows from that
                self._complain(str(exc))
            self._good, self._told = False, True

    def _introduce(self, tpm: Tpm, name: str) -> None:
        inform(
            f"{self._program}: A TPM {tpm.version}, {name}, for this shell. 'vtpm env' shows what "
            "is set for it.\n"
            f"{self._program}: It ends with the shell: type exit or Ctrl-D.\n",
            sys.stderr,
        )

    def _complain(self, text: str) -> None:
        complain(f"{self._program}: {text}")


def _check_free(name: str) -> None:
    """Raises UsageError."""
    from vtpm_cuse.lab.running import is_name, running

    if not is_name(name):
        raise UsageError(
            f"'{name}' is no name for a TPM: up to 64 letters, digits and . _ -, not digits alone"
        )
    if any(one.name == name for one in running()):
        raise UsageError(f"There is a TPM {name} already; choose another --name")


def _check_place(path: str) -> None:
    """Raises UsageError where nothing can be saved, while nothing is lost yet."""
    try:
        folder = os.path.dirname(os.path.abspath(path))
    except OSError as exc:
        raise UsageError(f"The current folder has gone; give the whole path of {path}") from exc
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is no file; save to another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written to" if os.path.isdir(folder) else "is not there"
        raise UsageError(f"Could not save to {path}: its folder {why}")


def _environment() -> dict[str, str]:
    """The caller's, but for what leads to another TPM, and for what Python has put into it."""
    from vtpm_cuse.lab.fapi import FAPI_VARIABLE
    from vtpm_cuse.lab.tpm import IBM_VARIABLES, TCTI_VARIABLES

    hidden = {"VTPM_NAME", "VTPM_PATH", "VTPM_RAW_PATH", "VTPM_DEVICE", "VTPM_RAW_DEVICE"}
    hidden |= {*TCTI_VARIABLES, *IBM_VARIABLES, FAPI_VARIABLE}
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        # In the locale C it sets this one, which our children were not given.
        if not any(item.startswith(b"LC_CTYPE=") for item in file.read().split(b"\0")):
            hidden.add("LC_CTYPE")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def _prompt() -> dict[str, str]:
    """What Debian's bash shows in front of its prompt."""
    name = "debian_chroot"
    return {name: os.environ.get(name) or "vtpm"}


def _save(tpm: Tpm, path: str) -> None:
    """Raises VtpmError."""
    try:
        tpm.snapshot().save(path)
    except OSError as exc:
        raise LabError(f"Could not save the TPM to {path}: {exc.strerror}") from exc
