"""Our swtpm_ioctl and the C suite's, each against a `swtpm socket` of its own: the same answers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_SECONDS

PEER_TOOL = shutil.which("swtpm_ioctl", path="/usr/bin")
PEER_SERVER = shutil.which("swtpm", path="/usr/bin")
OURS = "import sys; from vtpm_cuse.cli.swtpm_ioctl import main; sys.exit(main())"
TREE = str(Path(__file__).parents[2])

pytestmark = pytest.mark.skipif(
    PEER_TOOL is None or PEER_SERVER is None, reason="needs Debian's swtpm and swtpm-tools"
)

ON = """
-c
-e
-g
-b 0
-b 100
-b -1
-b 0x64
--info 0
--info 0x2
--info 255
-l 0
-l 0x4
-l 1x
-l 03
-r 0
-r 3
-h abc
-h {long}
-h -
-v
-C
--save permanent permanent
--save volatile volatile
--save savestate savestate
--save foo file
--save permanent no/such/file
--load permanent permanent
--load permanent no/such/file
--load foo permanent
--foo -c
-c operand
-c --stop
-sto
--c
--loa permanent permanent
"""
OFF = """
--stop
--stop
-c
-e
-g
-r 3
-l 1
-v
-h abc
-C
-b 0
-b 100
--info 1
--save permanent file
--load savestate permanent
--load permanent volatile
--load permanent text
--load permanent empty
--load permanent permanent
--load volatile volatile
-i
-c
-i
"""
WITHOUT_SERVER = """

operand
-c
-c -i
-c -c
-l
-l x
-l 5
-l -1
-l 09
-b x
--info x
--info 1x
--foo
-foo
--t
-tc
--c=3
-in
--save
--save volatile
--save volatile -c
--save volatile -
--load volatile
--tcp :x -c
--tcp :99999 -c
--tcp :1 -c
--tcp :0x10 -c
--tcp :010 -c
--tcp ::1:1 -c
--tcp 127.0.0.1:1x -c
--tcp no.such.host.invalid:1 -c
--unix /no/such/socket -c
--unix /no/such/socket
--unix {long} -c
--unix /no/such/socket --tcp :1 -c
--tpm-device /no/such/device --tcp :1 -c
-c /no/such/device
-l 9 /no/such/device
-c /dev/null
"""


@dataclass(frozen=True)
class Outcome:
    """What one call showed."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str


def invocations(table: str) -> list[tuple[str, ...]]:
    return [
        tuple(word.replace("{long}", "x" * 5000) for word in row.split())
        for row in table.strip("\n").split("\n")
    ]


def call(tool: list[str], words: tuple[str, ...], target: tuple[str, ...], cwd: Path) -> Outcome:
    done = subprocess.run(
        [*tool, *target, *words],
        input="data from standard input" * 300,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": TREE},
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return Outcome(words, done.returncode, masked(done.stdout), masked(done.stderr))


def masked(text: str) -> str:
    """Without what must differ: help text, program path, our reason behind a sentence, newline."""
    if text.startswith("TPM emulator control tool version"):
        return "(help)"
    text = text.replace("/usr/bin/swtpm_ioctl:", "swtpm_ioctl:").rstrip("\n")
    head, dot, _ = text.partition("'. ")
    return head + "'." if dot and head.startswith("Unable to open device") else text


class PeerServer:
    """The C suite's `swtpm socket`, its control channel on a socket that listens already."""

    def __init__(self, kind: str, tpm2: bool, folder: Path) -> None:
        (folder / "state").mkdir(parents=True)
        (folder / "text").write_text("no state blob")
        (folder / "empty").touch()
        self.folder = folder
        if kind == "unixio":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(folder / "ctrl"))
            listener.listen()
            self.target = ("--unix", "ctrl")
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.target = ("--tcp", f"127.0.0.1:{listener.getsockname()[1]}")
        with listener:
            self.process = subprocess.Popen(
                [
                    *(str(PEER_SERVER), "socket", *(["--tpm2"] if tpm2 else [])),
                    *("--tpmstate", f"dir={folder / 'state'}"),
                    *("--flags", "not-need-init,startup-clear"),
                    *("--ctrl", f"type={kind},fd={listener.fileno()}", "--log", "file=-"),
                ],
                pass_fds=[listener.fileno()],
            )

    def outcomes(self, tool: list[str]) -> list[Outcome]:
        try:
            found = [
                call(tool, words, self.target, self.folder) for words in invocations(ON + OFF[1:])
            ]
            found.append(call(tool, ("-s",), self.target, self.folder))
            assert self.process.wait(PATIENCE_SECONDS) == 0
            found.append(call(tool, ("-c",), self.target, self.folder))
        finally:
            self.process.kill()
            self.process.wait()
        return found

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and permissions of what --save left."""
        return {
            path.name: (path.stat().st_size, path.stat().st_mode)
            for path in self.folder.iterdir()
            if path.is_file()
        }


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
@pytest.mark.parametrize("kind", ["unixio", "tcp"])
def test_a_whole_life(kind: str, tpm2: bool, tmp_path: Path) -> None:
    peers, mine = (PeerServer(kind, tpm2, tmp_path / name) for name in ("peer", "ours"))
    expected = peers.outcomes([str(PEER_TOOL)])
    found = mine.outcomes([sys.executable, "-c", OURS])
    for theirs, ours in zip(expected, found, strict=True):
        if kind == "tcp" and theirs.err.startswith("Could not connect"):
            assert ours.err.startswith("Could not connect")  # the port differs
        else:
            assert ours == theirs
    # PEER: makes the file before it knows whether there is anything to put in.
    expected_files = peers.files()
    del expected_files["file"]
    assert mine.files() == expected_files


@pytest.mark.parametrize("words", invocations(WITHOUT_SERVER), ids=" ".join)
def test_what_needs_no_server(words: tuple[str, ...], tmp_path: Path) -> None:
    theirs = call([str(PEER_TOOL)], words, (), tmp_path)
    assert call([sys.executable, "-c", OURS], words, (), tmp_path) == theirs


@pytest.mark.parametrize("kind", ["unixio", "tcp"])
def test_state_saved_from_one_tpm_serves_another(kind: str, tmp_path: Path) -> None:
    tool = [sys.executable, "-c", OURS]
    first = PeerServer(kind, True, tmp_path / "first")
    second = PeerServer(kind, True, tmp_path / "second")
    try:
        for name in ("permanent", "volatile"):
            saved = ("--save", name, str(tmp_path / name))
            assert call(tool, saved, first.target, first.folder).status == 0
        assert call(tool, ("--stop",), second.target, second.folder).status == 0
        for name in ("permanent", "volatile"):
            loaded = ("--load", name, str(tmp_path / name))
            assert call(tool, loaded, second.target, second.folder) == Outcome(loaded, 0, "", "")
        assert call(tool, ("-i",), second.target, second.folder).status == 0
        again = ("--save", "permanent", str(tmp_path / "again"))
        assert call(tool, again, second.target, second.folder).status == 0
        assert (tmp_path / "again").stat().st_size == (tmp_path / "permanent").stat().st_size
    finally:
        for server in (first, second):
            server.process.terminate()
            server.process.wait(PATIENCE_SECONDS)
