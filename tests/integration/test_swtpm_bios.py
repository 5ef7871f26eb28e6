"""swtpm_bios: the commands it sends, what it says, how it ends; each beside the C suite's own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import sockets
from tests.support.sockets import Server
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS: Final = str(Path(sys.executable).parent / "swtpm_bios")
PEER: Final = "/usr/bin/swtpm_bios"

SUCCESS: Final = bytes.fromhex("00c40000000a00000000")
FLAGS: Final = "00c4 00000023 00000000 00000015 001f 00 01 {} " + "00" * 16


class Recorder:
    """A TPM that answers from a script, keeps the commands, and counts the connections."""

    def __init__(self, listener: socket.socket, answer: Callable[[bytes], bytes]) -> None:
        self.commands: list[bytes] = []
        self._listener, self._answer = listener, answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(PATIENCE_SECONDS)
                command = connection.recv(4096)
                if command:
                    self.commands.append(command)
                    connection.sendall(self._answer(command))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextlib.contextmanager
def recorded(
    path: Path, answer: Callable[[bytes], bytes] = lambda _: SUCCESS
) -> Iterator[Recorder]:
    path.unlink(missing_ok=True)
    recorder = Recorder(sockets.listener(path), answer)
    try:
        yield recorder
    finally:
        recorder.close()


def run(program: str, *words: str | Path, **env: str) -> tuple[int, str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TCSD")}
    done = subprocess.run(
        [program, *words],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE_SECONDS,
        env={**clean, "TPM_DEVICE": "/nonexistent/tpm", **env},
    )
    return done.returncode, done.stdout, done.stderr


def masked(commands: list[bytes]) -> list[str]:
    """The random password away; version 0.7.1 of the peer tests SHA-1 and not SHA-256."""
    texts = [c[:-20].hex() if c[6:10].hex() == "00000129" else c.hex() for c in commands]
    return [text.replace("0142000000010004", "014200000001000b") for text in texts]


@pytest.mark.parametrize("tpm2", [[], ["--tpm2"]], ids=["tpm12", "tpm2"])
@pytest.mark.parametrize(
    "words",
    [
        "",
        "-c",
        "-s",
        "-d",
        "-n",
        "-o",
        "-cs",
        "-u",
        "-ea",
        "-s -o",
        "-o -c",
        "-d -c",
        "-c -d -u",
        "-n -cs -u",
        "-o -cs",
        "-d -o -n",
        "--cs",
        "operand",
    ],
)
def test_same_commands_as_the_peer(tmp_path: Path, tpm2: list[str], words: str) -> None:
    """One connection for each command, and the same end."""
    path = tmp_path / "tpm"
    seen = []
    for program in (OURS, PEER):
        with recorded(path, answer_flags("00")) as tpm:
            seen.append((run(program, "--unix", path, *tpm2, *words.split()), masked(tpm.commands)))
    assert seen[0] == seen[1]
    assert seen[0][0] == (0, "", "")


def answer_flags(deactivated: str) -> Callable[[bytes], bytes]:
    def answer(command: bytes) -> bytes:
        asked = command[6:10].hex() == "00000065"
        return bytes.fromhex(FLAGS.format(deactivated)) if asked else SUCCESS

    return answer


@pytest.mark.parametrize("tpm2", [[], ["--tpm2"]], ids=["tpm12", "tpm2"])
def test_errors_of_the_tpm_do_not_stop_the_sequence(tmp_path: Path, tpm2: list[str]) -> None:
    path, seen = tmp_path / "tpm", []
    for program in (OURS, PEER):
        with recorded(path, lambda _: bytes.fromhex("80010000000a0000001c")) as tpm:
            words = ["-s", "-cs", "-u", *([] if tpm2 else ["-ea"])]
            status, out, err = run(program, "--unix", path, *tpm2, *words)
            out = out.replace("Imcremental", "Incremental")  # so says version 0.7.1
            seen.append((status, out, err, len(tpm.commands)))
    assert seen[0] == seen[1]
    assert seen[0][0] == 128
    said = seen[0][1] if tpm2 else seen[0][2]
    assert said.count("returned error code 0x0000001c") == seen[0][3]


def test_a_deactivated_tpm_needs_a_reset(tmp_path: Path) -> None:
    path, seen = tmp_path / "tpm", []
    for program in (OURS, PEER):
        with recorded(path, answer_flags("01")) as tpm:
            seen.append((run(program, "--unix", path, "-ea", "-u"), masked(tpm.commands)))
    assert seen[0] == seen[1]
    assert seen[0][0] == (129, "TPM requires a reset\n", "")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "Returned packet is too short."),
        (b"\0\xc4\0\0", "Returned packet is too short."),
        (bytes.fromhex("00c40000000b00000000"), "Returned packet is too short."),
        (bytes.fromhex("00c4ffffffff00000000"), "Malformed response."),
        (bytes.fromhex("00c40000000900000000"), "Malformed response."),
        (bytes.fromhex("00c40000000a00000000ff"), "Malformed response."),
    ],
)
def test_nonsense_for_an_answer(tmp_path: Path, answer: bytes, message: str) -> None:
    path = tmp_path / "tpm"
    with recorded(path, lambda _: answer) as tpm:
        assert run(OURS, "--unix", path) == (255, "", f"{message}\n")
    assert len(tpm.commands) == 1


@pytest.mark.parametrize("size", ["00c40000000e00000000 00000000", "00c40000000e00000000 00000fff"])
def test_flags_that_are_cut_short(tmp_path: Path, size: str) -> None:
    def answer(command: bytes) -> bytes:
        return bytes.fromhex(size) if command[6:10].hex() == "00000065" else SUCCESS

    with recorded(tmp_path / "tpm", answer):
        status, out, err = run(OURS, "--unix", tmp_path / "tpm", "-ea")
    assert (status, out) == (255, "")
    assert err.startswith("Malformed response.")


@pytest.mark.parametrize(
    ("words", "env", "status"),
    [
        (["--unix", "/nonexistent/x"], {}, 255),
        (["--tcp", ":1"], {}, 255),
        (["--tpm-device", "/nonexistent/x"], {}, 255),
        (["--tcp", "foo:bar"], {}, 1),
        (["--tcp", ":99999"], {}, 1),
        (["--foo"], {}, 1),
        (["--unix"], {}, 1),
        (["-h"], {}, 0),
        ([], {}, 255),
        ([], {"TCSD_USE_TCP_DEVICE": "", "TCSD_TCP_DEVICE_PORT": "1"}, 255),
    ],
)
def test_same_end_as_the_peer(words: list[str], env: dict[str, str], status: int) -> None:
    ours, peer = run(OURS, *words, **env), run(PEER, *words, **env)
    assert ours[0] == peer[0] == status
    if status == 255:  # the peer's sentence, and then a reason
        assert ours[2].startswith(peer[2].rstrip("\n"))


def test_a_file_is_no_device(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    path.write_text("root")
    assert run(OURS, "--tpm-device", path)[0] == 255
    assert path.read_text() == "root"


def test_version() -> None:
    status, out, _ = run(OURS, "-v")
    assert status == 0
    assert out.startswith("TPM emulator BIOS emulator version 0.10.2")


@pytest.mark.parametrize("tpm2", [False, True])
def test_on_a_tpm(tmp_path: Path, tpm2: bool) -> None:
    """A TPM 1.2 is active afterwards; a TPM 2.0 has a platform password."""
    with Server(tmp_path, *sockets.NOT_NEED_INIT, tpm2=tpm2) as server:
        words = ["--unix", str(tmp_path / "data"), *(["--tpm2"] if tpm2 else []), "-cs", "-u"]
        assert run(OURS, *words) == (0, "", "")
        status, out, err = run(OURS, *words)
        assert status == 128
        said = out if tpm2 else err
        assert ("HierarchyChangeAuth" if tpm2 else "TPM_Startup(0x01)") in said
        assert server.process.poll() is None
