"""`swtpm socket` as a process: options, daemon, files, signals, prints."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Server, run_swtpm
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from pathlib import Path

RANDOM = tpm.get_random(8)


def state_of(folder: Path) -> str:
    (folder / "state").mkdir(exist_ok=True)
    return f"dir={folder / 'state'}"


def wait_for_end(pid: int) -> None:
    """Of a process that need not be our child."""
    fd = os.pidfd_open(pid)
    try:
        assert s.readable(fd, PATIENCE_SECONDS)
    finally:
        os.close(fd)


# -- daemon ---------------------------------------------------------------------------------


def test_daemon_is_ready_when_the_command_returns(tmp_path: Path) -> None:
    """As libvirt starts it; paths are relative to the caller's folder."""
    state_of(tmp_path)
    before = os.umask(0o027)
    try:
        done = run_swtpm(
            *("-d", "--tpm2", "--tpmstate", "dir=state,mode=0600", *RUNNING),
            *("--ctrl", "type=unixio,path=ctrl,mode=0600", "--server", "type=unixio,path=data"),
            *("--log", "file=log", "--pid", "file=pid"),
            cwd=tmp_path,
        )
    finally:
        os.umask(before)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid_text = (tmp_path / "pid").read_text()
    pid = int(pid_text)
    assert pid_text == str(pid), "no newline"
    assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o640
    try:
        assert stat.S_IMODE((tmp_path / "ctrl").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o770
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2)} == {os.devnull}
        assert os.getsid(pid) != os.getsid(0)
        with s.connect(tmp_path / "data") as data, s.connect(tmp_path / "ctrl") as control:
            assert tpm.code_of(data.command(RANDOM)) == 0
            assert control.result(s.SHUTDOWN) == 0
        wait_for_end(pid)
        assert {path.name for path in tmp_path.iterdir()} == {"state", "log"}
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


def test_daemon_that_cannot_start_tells_its_caller(tmp_path: Path) -> None:
    done = run_swtpm(
        "-d", "--tpmstate", f"dir={tmp_path}/none", *RUNNING, "--pid", f"file={tmp_path}/pid"
    )
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert not (tmp_path / "pid").exists()


_LOCKED_FIRST = (
    "import fcntl, os, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX);"
    " os.execv(sys.argv[2], sys.argv[2:])"
)


def test_a_file_that_the_caller_has_locked_stays_so(tmp_path: Path) -> None:
    """libvirt looks whether its locked pid file still is."""
    with open(tmp_path / "held", "w") as held:
        fd = held.fileno()
        program = (sys.executable, "-c", _LOCKED_FIRST, str(fd), *s.OURS)
        with Server(tmp_path, *RUNNING, pass_fds=[fd], program=program) as server:
            assert server.request(s.GET_CAPABILITY, size=8)
            with pytest.raises(BlockingIOError):
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_sockets_listen_before_the_state_is_looked_at(tmp_path: Path) -> None:
    """The key comes from a pipe that nobody writes to yet: what follows has to wait."""
    read_end, write_end = os.pipe()
    options = ("--key", f"fd={read_end}", *RUNNING)
    addresses = ("--server", f"type=unixio,path={tmp_path / 'data'}")
    with Server(tmp_path, *options, *addresses, data=None, pass_fds=[read_end]) as server:
        os.close(read_end)
        with server.control() as control:
            control.send(s.u32(s.GET_CONFIG))
            data = socket.socket(socket.AF_UNIX)
            wait_until(
                lambda: data.connect_ex(str(tmp_path / "data")) == 0,
                "the data channel listens",
                process=server.process,
                log=server.log,
            )
            assert not s.readable(control.socket), "it still waits for its key"
            os.write(write_end, b"0123456789abcdef" * 2)
            os.close(write_end)
            assert control.answer(8) == s.u32(0, 1)
            with s.Client(data) as client:
                assert tpm.code_of(client.command(RANDOM)) == 0


@pytest.mark.parametrize("how", ["file", "fd"])
def test_pid_file(how: str, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with open(path, "w") as file:
        value = f"fd={file.fileno()}" if how == "fd" else f"file={path}"
        fds = [file.fileno()] if how == "fd" else []
        with Server(tmp_path, *RUNNING, "--pid", value, pass_fds=fds) as server:
            server.request(s.GET_CAPABILITY, size=8)
            assert path.read_text() == str(server.process.pid)
            server.process.terminate()
            wait_until(lambda: not path.exists(), "the end of the pid file")
            assert not s.is_locked(server.state), "a successor may start"
            assert server.wait() == 0


def test_pid_file_that_cannot_be_written(tmp_path: Path) -> None:
    done = run_swtpm("--tpmstate", state_of(tmp_path), "--pid", f"file={tmp_path}/no/pid")
    assert (done.returncode, "no/pid" in done.stderr) == (1, True)


# -- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("said", [b"", RANDOM[:5], RANDOM[:11]], ids=["idle", "five bytes", "half"])
def test_signal_ends_in_order(number: signal.Signals, said: bytes, tmp_path: Path) -> None:
    """PEER: only SIGTERM, and not while a client has said half a command."""
    ctrl = tmp_path / "sock"
    options = ("--ctrl", f"type=unixio,path={ctrl}", "--pid", f"file={tmp_path / 'pid'}")
    with Server(tmp_path, *RUNNING, *options, control=None) as server, server.data() as data:
        assert tpm.code_of(data.command(tpm.pcr_extend(5, b"\5" * 32))) == 0
        data.send(said)
        with s.connect(ctrl) as control:
            control.control(s.GET_CAPABILITY, size=8)
            control.send(b"\0\0")
            server.process.send_signal(number)
            assert server.wait() == 0
            assert data.rest() == b""
    assert not ctrl.exists()
    assert not (tmp_path / "pid").exists()
    again = Server(tmp_path / "again", "--flags", "startup-state", state=server.state)
    with again, again.data() as data:
        assert tpm.pcr_value(data.command(tpm.pcr_read(5))) != bytes(32), "it was shut down"


def test_signal_during_a_long_command(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.data() as data:
        data.command(RANDOM)
        data.send(tpm.create_primary_rsa())
        server.request(s.GET_CAPABILITY, size=8)
        server.process.terminate()
        assert server.wait() == 0
    assert "Traceback" not in server.log_text()


def test_signal_before_anything_was_said(tmp_path: Path) -> None:
    with Server(tmp_path, data=None, control=None) as server:
        wait_until(
            lambda: server.log.exists() and b"SIGTERM" in caught(server.process.pid),
            "SIGTERM is caught",
            process=server.process,
        )
        server.process.terminate()
        assert server.wait() == 0


def caught(pid: int) -> bytes:
    """Which signals a process catches, as far as tests care."""
    with open(f"/proc/{pid}/status") as file:
        mask = int(file.read().partition("SigCgt:")[2].split()[0], 16)
    return b"SIGTERM" if mask & 1 << (signal.SIGTERM - 1) else b""


# -- kill -9 --------------------------------------------------------------------------------


def test_killed_at_random_moments_it_has_all_it_acknowledged(tmp_path: Path) -> None:
    """A counter in NVRAM, written by a client until the server is killed under it."""
    chance = random.Random(20261121)  # noqa: S311 - repeatable, not secret
    (tmp_path / "state").mkdir()
    acknowledged = 0
    for life in range(12):
        folder = tmp_path / str(life)
        with Server(folder, *RUNNING, state=tmp_path / "state") as server, server.data() as data:
            if life == 0:
                assert tpm.code_of(data.command(tpm.nv_define(tpm.NV_INDEX, 8))) == 0
                assert tpm.code_of(data.command(count_command(0))) == 0
            found = int.from_bytes(tpm.nv_data(data.command(tpm.nv_read(tpm.NV_INDEX, 8))), "big")
            assert acknowledged <= found <= acknowledged + 1, f"life {life}"
            acknowledged = found
            timer = threading.Timer(chance.uniform(0, 0.2), server.process.kill)
            timer.start()
            try:
                while True:
                    assert tpm.code_of(data.command(count_command(acknowledged + 1))) == 0
                    acknowledged += 1
            except (AssertionError, ConnectionError, BrokenPipeError):
                assert server.wait() == -signal.SIGKILL
            timer.join()
    assert acknowledged > 12


def count_command(value: int) -> bytes:
    return tpm.nv_write(tpm.NV_INDEX, value.to_bytes(8, "big"))


# -- start-up -------------------------------------------------------------------------------


def test_nothing_to_listen_on_is_no_error(tmp_path: Path) -> None:
    server = Server(tmp_path, *RUNNING, data=None, control=None)
    with server, pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.5)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--bogus"], 1, "socket: unrecognized option '--bogus'"),
        (["--version"], 1, "socket: unrecognized option '--version'"),
        (["extra"], 1, "Unknown parameter 'extra'"),
        (["--migration"], 1, "option '--migration' requires an argument"),
        (["--fd", "1"], 1, "Error: Cannot accept file descriptors with values 0, 1, or 2"),
        (["--flags", "not-need-init"], 1, "SWTPM_NVRAM_Init: Missing backend URI."),
        (["--tpmstate", "dir=/no/such", *RUNNING], 1, "No such file or directory"),
        (["--tpmstate", "backend-uri=foo://x", *RUNNING], 1, "Unsupported backend"),
        (["--key", "file=/no/such"], 1, "Unable to open file /no/such"),
        (["--key", "mode=aes-cbc"], 1, "Either file=, fd=, pwdfile=, or pwdfd= is required"),
        (["--log", "file=/no/such/log"], 1, "Could not open logfile for writing"),
        (["--tpm2", "--flags", "startup-deactivated"], 0, "TPM 2 does not support startup"),
    ],
)
def test_messages_and_exit_statuses(words: list[str], status: int, message: str) -> None:
    done = run_swtpm(*words)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("tpm2", "flags", "code"),
    [
        (True, "startup-clear", 0),
        (True, "startup-state", 0x100),
        (True, "startup-clear,startup-none", 0),
        (True, "not-need-init,startup-none", 0x100),
        (True, "startup-none", 0x101),
        (False, "startup-clear", 0),
        (False, "startup-deactivated", 6),
        (False, "not-need-init", 0x26),
    ],
)
def test_startup_flags(tpm2: bool, flags: str, code: int, tmp_path: Path) -> None:
    with Server(tmp_path, "--flags", flags, tpm2=tpm2) as server, server.data() as data:
        command = tpm.pcr_read(0) if tpm2 else tpm.tpm12_pcr_read(0)
        assert tpm.code_of(data.command(command)) == code


@pytest.mark.parametrize(
    ("flags", "mask"),
    [((), 0), (("--key",), 1), (("--migration-key",), 2), (("--key", "--migration-key"), 3)],
)
def test_keys(flags: tuple[str, ...], mask: int, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("correct horse")
    words = [word for flag in flags for word in (flag, f"pwdfile={tmp_path / 'secret'}")]
    with Server(tmp_path, *RUNNING, *words) as server, server.control() as control:
        assert control.control(s.GET_CONFIG, size=8) == s.u32(0, mask)
        header = {0: "0004", 1: "0004", 2: "0006", 3: "0006"}[mask]
        result, state_flags, blob = control.get_blob(s.PERMANENT, flags=1)
        assert (result, state_flags, blob[4:6].hex()) == (0, 0, header)
        result, state_flags, blob = control.get_blob(s.PERMANENT, flags=0)
        assert (result, state_flags) == (0, 2 if mask & 1 else 0)
        assert blob[4:6].hex() == {0: "0004", 1: "0005", 2: "0006", 3: "0007"}[mask]


def test_wrong_migration_key_is_refused_and_nothing_breaks(tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        (tmp_path / name).write_text(name)

    def key(name: str) -> tuple[str, str]:
        return "--migration-key", f"pwdfile={tmp_path / name}"

    with Server(tmp_path / "a", *RUNNING, *key("right")) as source, source.control() as control:
        blob = control.get_blob(s.PERMANENT)[2]
    with Server(tmp_path / "b", *key("wrong")) as target, target.control() as control:
        assert control.set_blob(s.PERMANENT, blob) == 0x21
    with Server(tmp_path / "c") as target, target.control() as control:
        assert control.set_blob(s.PERMANENT, blob) == 0xD
        assert control.result(s.INIT, s.u32(0)) == 0
    with Server(tmp_path / "d", *key("right")) as target, target.control() as control:
        assert control.set_blob(s.PERMANENT, blob) == 0
        assert control.result(s.INIT, s.u32(0)) == 0


# -- prints ---------------------------------------------------------------------------------


def test_print_states(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server:
        assert server.request(s.STORE_VOLATILE) == bytes(4)
        done = run_swtpm("--print-states", "--tpm2", "--tpmstate", f"dir={server.state}")
    sizes = {
        name: (server.state / f"tpm2-00.{name}").stat().st_size
        for name in ("permall", "volatilestate")
    }
    assert done.stdout == (
        '{ "type": "swtpm", "states": [ '
        f'{{"name": "permall", "size": {sizes["permall"]}}}, '
        f'{{"name": "volatilestate", "size": {sizes["volatilestate"]}}} ] }}'
    )
    empty = run_swtpm("--print-states", "--tpmstate", f"dir={server.state}")
    assert (empty.returncode, empty.stdout) == (0, '{ "type": "swtpm", "states": [] }'), "TPM 1.2"
    assert run_swtpm("--print-states").returncode == 1


@pytest.mark.parametrize("tpm2", [True, False])
def test_print_capabilities(tpm2: bool) -> None:
    done = run_swtpm("--print-capabilities", *(["--tpm2"] if tpm2 else []))
    assert done.returncode == 0
    assert done.stdout.startswith('{ "type": "swtpm", "features": [ "tpm-1.2", "tpm-2.0", ')
    assert done.stdout.endswith(', "version": "0.10.2" }\n')
    features = json.loads(done.stdout)["features"]
    assert features[2] == "tpm-send-command-header"
    assert ("rsa-keysize-2048" in features) == tpm2
    for verb in ("ctrl-opt-terminate", "cmdarg-key-fd", "cmdarg-migration", "cmdarg-print-info"):
        assert verb in features


def test_print_profiles() -> None:
    assert run_swtpm("--print-profiles").stdout == "{}"
    done = run_swtpm("--print-profiles", "--tpm2")
    assert (done.returncode, done.stdout[-1:]) == (0, "}")
    json.loads(done.stdout)


def test_print_info(tmp_path: Path) -> None:
    done = run_swtpm("--print-info", "0x1")
    assert done.stdout == '{"TPMSpecification":{"family":"1.2","level":2,"revision":116}}\n'
    assert run_swtpm("--print-info", "x").returncode == 1
    state = state_of(tmp_path)
    done = run_swtpm("--print-info", "0x21", "--tpm2", "--tpmstate", state)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["TPMSpecification"]["family"] == "2.0"
    assert (tmp_path / "state/tpm2-00.permall").exists(), "the TPM was started, so made"
    if "AvailableProfiles" in json.loads(run_swtpm("--print-profiles", "--tpm2").stdout):
        assert found["ActiveProfile"]["Name"] == "null"
    none = run_swtpm("--print-info", "1", "--tpmstate", "dir=/no/such")
    assert none.returncode == 1
    assert none.stderr.count("No such file or directory") == 1


def test_help() -> None:
    done = run_swtpm("--help")
    assert done.returncode == 0
    for option in ("--server", "--ctrl", "--port", "--migration", "--terminate"):
        assert option in done.stdout


def test_secrets_are_not_logged(tmp_path: Path) -> None:
    """PEER: dumps all bytes from level 2 on."""
    secret = b"a secret in NVRAM"
    with Server(tmp_path, *RUNNING) as server, server.data() as data:
        data.command(tpm.nv_define(tpm.NV_INDEX, len(secret)))
        assert tpm.code_of(data.command(tpm.nv_write(tpm.NV_INDEX, secret))) == 0
    log = server.log_text()
    assert " SWTPM_IO_Read: length " in log
    assert secret.decode() not in log
    assert secret.hex(" ").upper() not in log


def test_a_start_runs_no_other_program(tmp_path: Path) -> None:
    """Each costs as long as the whole start of a TPM in C."""
    told = (
        "import os, sys\n"
        "from vtpm_cuse.cli.swtpm import main\n"
        "sys.addaudithook(lambda name, _: name == 'subprocess.Popen' and os._exit(99))\n"
        "sys.exit(main())\n"
    )
    with s.Server(tmp_path, *s.RUNNING, program=(sys.executable, "-c", told)) as server:
        assert server.request(s.GET_CONFIG, size=8)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
