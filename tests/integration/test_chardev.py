"""`swtpm chardev` on what any machine has: sockets, terminals, pipes. The proxy: tests/kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tty
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import OURS, RUNNING, Client, environment
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

RANDOM = tpm.get_random(8)
PREFIX = bytes.fromhex("00000008 03 0000000c")
INVALID_LOCALITY = 0x107


def set_locality(locality: int) -> bytes:
    """As the kernel sends it: tag "sessions", but none there."""
    return bytes.fromhex("80020000000b20001000") + bytes([locality])


def words_of(folder: Path, *words: str | Path) -> list[str]:
    (folder / "state").mkdir(exist_ok=True)
    start = [*OURS, "chardev", "--tpm2", "--tpmstate", f"dir={folder / 'state'}"]
    return [*start, *map(str, words)]


def ended(
    folder: Path, *words: str | Path, pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """One call that is expected to end by itself."""
    return subprocess.run(
        words_of(folder, *words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        pass_fds=pass_fds,
        env=environment(),
    )


@contextlib.contextmanager
def serving(
    folder: Path, *words: str | Path, pass_fds: Sequence[int] = ()
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words_of(folder, *words),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def farewell(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and messages of one that ends by itself."""
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, said


@contextlib.contextmanager
def on_socket(folder: Path, *words: str | Path) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    with s.socket_pair() as (client, theirs):
        fd = theirs.fileno()
        with serving(folder, "-f", str(fd), *words, pass_fds=[fd]) as process:
            theirs.close()
            yield client, process


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal that changes no byte: our end, and the path of the device."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        yield ours, os.ttyname(theirs)
    finally:
        os.close(theirs)
        with contextlib.suppress(OSError):
            os.close(ours)


def read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        assert s.readable(fd, PATIENCE_SECONDS)
        data += os.read(fd, size - len(data))
    return data


# -- where commands come from ---------------------------------------------------------------


def test_socket_descriptor_and_its_end(tmp_path: Path) -> None:
    with on_socket(tmp_path, *RUNNING) as (client, process):
        assert tpm.code_of(client.command(RANDOM)) == 0
        client.send(RANDOM[:4])
        client.send(RANDOM[4:])
        assert tpm.code_of(client.response()) == 0
        client.close()
        assert farewell(process) == (0, "swtpm: Data client disconnected\n")
    assert not s.is_locked(tmp_path / "state")


def test_terminal_by_its_path(tmp_path: Path) -> None:
    with terminal() as (ours, path), serving(tmp_path, "-c", path, *RUNNING) as process:
        for _ in range(3):
            os.write(ours, RANDOM)
            assert tpm.code_of(read_exactly(ours, 20)) == 0
        assert process.poll() is None


def test_hang_up_of_a_device(tmp_path: Path) -> None:
    with terminal() as (ours, path):
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        with serving(tmp_path, "--fd", str(fd), *RUNNING, pass_fds=[fd]) as process:
            os.close(fd)
            os.write(ours, RANDOM)
            assert tpm.code_of(read_exactly(ours, 20)) == 0
            os.close(ours)
            status, said = farewell(process)
            assert status == 0
            assert said.endswith("Data client disconnected\n")


def test_end_of_file_ends_it(tmp_path: Path) -> None:
    done = ended(tmp_path, "-c", "/dev/null", *RUNNING)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "swtpm: Data client disconnected\n"


def test_device_that_never_stops_can_be_ended(tmp_path: Path) -> None:
    """Nothing but zeros, each read an answer that nobody wants: signals get through all the same."""
    pid_file = tmp_path / "pid"
    with serving(tmp_path, "-c", "/dev/zero", *RUNNING, "--pid", f"file={pid_file}") as process:
        pid = str(process.pid)
        wait_until(
            lambda: pid_file.exists() and pid_file.read_text() == pid,
            "the pid file",
            process=process,
        )
        process.terminate()
        assert farewell(process)[0] == 0


def test_the_first_device_named_counts(tmp_path: Path) -> None:
    assert ended(tmp_path, "-c", "/dev/null", "-c", "/none", *RUNNING).returncode == 0
    assert ended(tmp_path, "-c", "/dev/null", "-f", "77", *RUNNING).returncode == 0
    done = ended(tmp_path, "-c", "/none", "-c", "/dev/null", *RUNNING)
    assert (done.returncode, done.stderr) == (
        1,
        "swtpm: Cannot open /none: No such file or directory\n",
    )


# -- the TPM --------------------------------------------------------------------------------


def test_tpm_is_off_until_it_is_told(tmp_path: Path) -> None:
    control = tmp_path / "ctrl"
    with on_socket(tmp_path, "--ctrl", f"type=unixio,path={control}") as (client, process):
        assert tpm.code_of(client.command(RANDOM)) == 0x101
        with s.connect(control) as channel:
            assert channel.result(s.INIT, s.u32(0)) == 0
            assert tpm.code_of(client.command(tpm.TPM2_STARTUP_CLEAR)) == 0
            assert tpm.code_of(client.command(RANDOM)) == 0
            ours, theirs = socket.socketpair()
            with ours, theirs:
                assert channel.set_data_fd(theirs.fileno()) == 0x1F
            assert channel.result(s.SHUTDOWN) == 0
        assert farewell(process)[0] == 0
    assert not control.exists()


def test_end_with_the_control_client(tmp_path: Path) -> None:
    control = tmp_path / "ctrl"
    with on_socket(tmp_path, "--ctrl", f"type=unixio,path={control},terminate") as (
        client,
        process,
    ):
        assert tpm.code_of(client.command(RANDOM)) == 0x101
        s.connect(control).close()
        assert farewell(process)[0] == 0


def test_locality_by_command_is_an_option(tmp_path: Path) -> None:
    with on_socket(tmp_path, *RUNNING) as (client, _):
        assert tpm.code_of(client.command(set_locality(1))) == 0x101
    allowed = "allow-set-locality,reject-locality-4"
    with on_socket(tmp_path, *RUNNING, "--locality", allowed) as (client, _):
        assert tpm.code_of(client.command(set_locality(1))) == 0
        assert tpm.code_of(client.command(set_locality(4))) == INVALID_LOCALITY
        assert tpm.code_of(client.command(RANDOM)) == 0


def test_prefix_is_understood(tmp_path: Path) -> None:
    with on_socket(tmp_path, *RUNNING) as (client, _):
        client.send(PREFIX + RANDOM)
        answer = client.exactly(4 + 20 + 4)
        assert answer[:4] == s.u32(20)
        assert answer[-4:] == bytes(4)


def test_orderly_shutdown_at_the_end(tmp_path: Path) -> None:
    """TPM2_Shutdown(STATE) before the power goes: the next start counts as a restart, no reset."""

    def counts(client: Client) -> tuple[int, int]:
        answer = client.command(tpm.TPM2_READ_CLOCK)
        return int.from_bytes(answer[26:30], "big"), int.from_bytes(answer[30:34], "big")

    with on_socket(tmp_path, *RUNNING) as (client, process):
        resets, restarts = counts(client)
        process.terminate()
        assert farewell(process)[0] == 0
    with on_socket(tmp_path, *RUNNING) as (client, process):
        assert counts(client) == (resets, restarts + 1)


# -- process --------------------------------------------------------------------------------


def test_daemon_serves_when_the_command_returns(tmp_path: Path) -> None:
    control, pid_file = tmp_path / "ctrl", tmp_path / "pid"
    with s.socket_pair() as (client, theirs):
        fd = theirs.fileno()
        more = ("--ctrl", f"type=unixio,path={control}", "--pid", f"file={pid_file}")
        done = ended(tmp_path, "-d", "-f", str(fd), *RUNNING, *more, pass_fds=[fd])
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        theirs.close()
        pidfd = os.pidfd_open(int(pid_file.read_text()))
        try:
            assert tpm.code_of(client.command(RANDOM)) == 0
            with s.connect(control) as channel:
                assert channel.result(s.SHUTDOWN) == 0
            assert s.readable(pidfd, PATIENCE_SECONDS)
        finally:
            os.close(pidfd)
    assert {path.name for path in tmp_path.iterdir()} == {"state"}


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Error: Missing character device or file descriptor"),
        (["--vtpm-proxy", "-c", "/dev/null"], "Cannot use vTPM proxy with a provided device."),
        (["--vtpm-proxy", "-f", "7"], "Cannot use vTPM proxy with a provided device."),
        (["-f", "2"], "Error: Cannot accept file descriptors with values 0, 1, or 2"),
        (["-f", "x"], "Cannot parse character device file descriptor."),
        (["-f", "77"], "Cannot stat file descriptor: Bad file descriptor"),
        (["-c", "/none"], "Cannot open /none: No such file or directory"),
        (["-c", "/usr"], "Cannot open /usr: Is a directory"),
        (["-c", "/dev/null", "--ctrl", "type=foo"], "Error parsing ctrl options: "),
        (["-c", "/dev/null", "--ctrl", "type=unixio,path=/none/x"], "Could not listen on /none/x"),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], said: str) -> None:
    done = ended(tmp_path, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"swtpm: {said}")
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.skipif(os.path.exists("/dev/vtpmx"), reason="this machine has the proxy driver")
def test_without_the_proxy_driver(tmp_path: Path) -> None:
    done = ended(tmp_path, "--vtpm-proxy")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "swtpm: Could not open /dev/vtpmx: No such file or directory; "
        "try 'modprobe tpm_vtpm_proxy' first\n"
    )


def test_a_file_is_no_device_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_bytes(RANDOM)
    with open(file, "r+b") as opened:
        fd = opened.fileno()
        for words in (("-c", file), ("-f", str(fd))):
            done = ended(tmp_path, *words, *RUNNING, pass_fds=[fd])
            assert done.returncode == 1
            assert done.stderr == "swtpm: Given file descriptor type is not supported.\n"
    assert file.read_bytes() == RANDOM


def test_listening_socket_is_refused(tmp_path: Path) -> None:
    with s.listener(tmp_path / "sock") as listener:
        fd = listener.fileno()
        done = ended(tmp_path, "-f", str(fd), *RUNNING, pass_fds=[fd])
    assert (done.returncode, done.stderr) == (
        1,
        f"swtpm: File descriptor {fd} is not a connected socket\n",
    )


def test_prints_need_no_device(tmp_path: Path) -> None:
    done = ended(tmp_path, "--print-capabilities")
    assert done.returncode == 0
    assert '"tpm-send-command-header"' in done.stdout
    assert ended(tmp_path, "--print-states").stdout == '{ "type": "swtpm", "states": [] }'
    done = ended(tmp_path, "--print-info", "1")
    assert done.returncode == 0
    assert '"family":"2.0"' in done.stdout
