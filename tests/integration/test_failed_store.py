"""A state that cannot be stored: what the log says, what it keeps to itself, and the way back."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.libtpms import BOTH, nv_commands

if TYPE_CHECKING:
    import pytest

SECRET = b"persists"
FULL = (
    "import errno, os, sys\n"
    "from vtpm_cuse.storage import directory\n"
    "from vtpm_cuse.cli.swtpm import main\n"
    "full, create = sys.argv.pop(1), directory.DirectoryStore._created\n"
    "def created(self, name):\n"
    "    if os.path.exists(full):\n"
    "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
    "    return create(self, name)\n"
    "directory.DirectoryStore._created = created\n"
    "sys.exit(main())\n"
)


class FullDisk(s.Server):
    """A server whose disk is full while a file is there; it has no log file, only descriptor 2."""

    def __init__(self, folder: Path, *words: str, tpm2: bool) -> None:
        self.sign = folder / "full"
        program = (sys.executable, "-c", FULL, str(self.sign))
        super().__init__(folder, *s.RUNNING, *words, tpm2=tpm2, program=program)

    def codes(self, *commands: bytes) -> list[int]:
        with self.data() as client:
            return [tpm.code_of(client.command(command)) for command in commands]


@BOTH
def test_log_says_what_to_do_and_no_secret(
    tmp_path: Path, tpm2: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    define, write, read = nv_commands(tpm2=tpm2)
    failed = 0x101 if tpm2 else 0x1C
    with FullDisk(tmp_path, tpm2=tpm2) as server:
        assert server.codes(define) == [0]
        server.sign.touch()
        assert server.codes(write)[0] in {0x101, 9}
        assert server.codes(read) == [failed]
        server.sign.unlink()
        assert server.codes(read) == [failed]  # it cannot go on by itself
        said = server.log_text() + capfd.readouterr().err
        assert server.init() == 0
        startup = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
        assert server.codes(startup, write, read) == [0, 0, 0]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    everything = said + capfd.readouterr().err + server.log_text()
    for form in (SECRET.decode(), SECRET.hex(), SECRET.hex(" ")):
        assert form not in everything
    assert said.count("failure mode") == 1
    assert "No space left on device" in said
    assert "then reset it: restart its VM or this program" in said
    assert "libtpms/" not in said


@BOTH
def test_at_the_debug_level_libtpms_says_it(tmp_path: Path, tpm2: bool) -> None:
    define, write, _ = nv_commands(tpm2=tpm2)
    debug = f"file={tmp_path / 'debug'},level=5"
    with FullDisk(tmp_path, "--log", debug, tpm2=tpm2) as server:
        assert server.codes(define) == [0]
        server.sign.touch()
        assert server.codes(write)[0] in {0x101, 9}
    if tpm2:
        assert SECRET.hex(" ") in (tmp_path / "debug").read_text().replace(" \n", " ")


def test_no_descriptor_is_left_but_those_for_the_state(tmp_path: Path) -> None:
    define, write, read = nv_commands(tpm2=True)
    with s.Server(tmp_path, *s.RUNNING) as server, server.data() as client:
        assert tpm.code_of(client.command(define)) == 0
        used = {int(path.name) for path in Path(f"/proc/{server.process.pid}/fd").iterdir()}
        limit = next(number for number in range(1024) if number not in used)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        for _ in range(3):
            assert tpm.code_of(client.command(write)) == 0
        assert tpm.code_of(client.command(read)) == 0
    assert "failure mode" not in server.log_text()
