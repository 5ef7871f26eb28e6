"""swtpm_setup gives libtpms a state that is there already in the sandbox only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.setups import OURS, Word, Workshop
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM: Final = r"""
import ctypes, errno, fcntl, os, signal, sys, time
from vtpm_cuse.cli.setup.swtpm_setup import main
from vtpm_cuse.engine.libtpms import LibtpmsEngine

libc = ctypes.CDLL(None, use_errno=True)
start, stop = LibtpmsEngine.start, LibtpmsEngine.stop


def say(text):
    os.write(2, text.encode() + b"\n")


def look():
    sandboxed = libc.prctl(21, 0, 0, 0, 0) < 0 and ctypes.get_errno() == errno.ENOSYS
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
    except PermissionError:
        pass
    else:
        sandboxed = False
    say(f"libtpms: {'in' if sandboxed else 'out of'} the sandbox")
    held = []
    for fd in range(3, 64):
        try:
            os.fstat(fd)
            held.append(fd)
        except OSError:
            pass
    say(f"descriptors: {len(held)}")


def subverted(self):
    start(self)
    exec(os.environ["ATTACK"], {**globals(), "self": self})


LibtpmsEngine.start = subverted
sys.exit(main())
"""
_GIVES_BACK: Final = """
blobs = self._nvram.blobs.blobs
def lie(self):
    stop(self)
    {}
LibtpmsEngine.stop = lie
"""


def reconfigure(workshop: Workshop, state: Path, attack: str, *words: Word) -> tuple[int, str]:
    """Exit status, and what it says."""
    program: list[Word] = [
        sys.executable,
        "-c",
        _PROGRAM,
        "--tpm2",
        "--tpm-state",
        state,
        "--reconfigure",
    ]
    run = subprocess.run(
        [*program, "--pcr-banks", "sha384", *words],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE_SECONDS,
        env={**workshop.environment, "ATTACK": attack},
    )
    assert "Traceback" not in run.stderr
    return run.returncode, run.stderr


def contents(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.fixture
def state(workshop: Workshop) -> Path:
    directory = workshop.new_state("state")
    run = workshop.run(OURS, "--tpm2", "--tpm-state", directory)
    assert run.returncode == 0, run.stderr
    return directory


def test_no_state_is_touched_outside_the_sandbox(workshop: Workshop, state: Path) -> None:
    before = contents(state)
    status, said = reconfigure(workshop, state, "look()")
    assert (status, said) == (0, "libtpms: in the sandbox\ndescriptors: 1\n")
    assert contents(state) != before


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "Bad system call"),
        ("ctypes.string_at(0)", "Segmentation fault"),
        ("os.fork()", "Bad system call"),
        ("os._exit(0)", "status 0"),
        ("raise ZeroDivisionError", "status 1"),
        ("os.closerange(3, 64); time.sleep(1000)", "Killed"),
    ],
)
def test_a_tpm_that_dies_is_one_line(
    workshop: Workshop, state: Path, attack: str, reason: str
) -> None:
    before = contents(state)
    assert reconfigure(workshop, state, attack) == (
        1,
        f"The TPM has ended unexpectedly: {reason}\n"
        "An error occurred. Authoring the TPM state failed.\n",
    )
    assert contents(state) == before


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("blobs.clear()", "The TPM does not give its state back."),
        ("blobs['permall'] = b''", "The TPM does not give its state back."),
        ("blobs['permall'] = b'x' * 1000", "permall: "),
        ("blobs['permall'] += b'x'", "permall: "),
        ("blobs['volatilestate'] = b'x' * 100", "volatilestate: "),
        ("blobs['permall'] = bytes(1 << 22)", "Killed"),
    ],
)
def test_what_is_no_state_is_not_stored(
    workshop: Workshop, state: Path, lie: str, reason: str
) -> None:
    before = contents(state)
    status, said = reconfigure(workshop, state, _GIVES_BACK.format(lie))
    assert status == 1
    assert reason in said
    assert said.endswith("\nAn error occurred. Authoring the TPM state failed.\n")
    assert len(said.splitlines()) == 2
    assert contents(state) == before


def test_a_volatile_state_that_cannot_be_used_stays(workshop: Workshop, state: Path) -> None:
    """The TPM starts without it, as when it is served."""
    (state / "tpm2-00.volatilestate").write_bytes(b"of somebody else")
    before = contents(state)
    status, said = reconfigure(workshop, state, "pass")
    assert (status, len(said.splitlines())) == (0, 1)
    after = contents(state)
    assert after["tpm2-00.volatilestate"] == before["tpm2-00.volatilestate"]
    assert after["tpm2-00.permall"] != before["tpm2-00.permall"]


def test_a_damaged_state_is_not_said_to_be_in_memory(workshop: Workshop, state: Path) -> None:
    """What can be done about it is the same as when it is served."""
    path = state / "tpm2-00.permall"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = contents(state)
    status, said = reconfigure(workshop, state, "pass")
    assert status == 1
    assert "put back a copy that you kept" in said
    assert contents(state) == before


def test_an_encrypted_state_stays_encrypted(workshop: Workshop) -> None:
    """Also where libtpms, subverted, gives back the plain one."""
    (workshop.path / "key").write_text("00" * 16)
    directory = workshop.new_state("sealed")
    key: list[Word] = ["--keyfile", workshop.path / "key"]
    assert workshop.run(OURS, "--tpm2", "--tpm-state", directory, *key).returncode == 0
    before = contents(directory)
    lie = "self._nvram._key = None; self._nvram.store('permall', self._nvram.load('permall'))"
    plain = "self._nvram.store('permall', bytes(1000))"
    for attack in (_GIVES_BACK.format(lie), f"self._nvram._key = None; {plain}"):
        status, said = reconfigure(workshop, directory, attack, *key)
        assert (status, len(said.splitlines())) == (1, 2), said
        assert contents(directory) == before
    assert reconfigure(workshop, directory, "pass", *key) == (0, "")
    assert contents(directory) != before
