"""What a vTPM takes with it into its sandbox, and what becomes of it where the kernel has none."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support import sockets as s
from tests.support.attacks import WITNESS, under_filter
from tests.support.commands import get_random
from tests.support.files import open_files
from tests.support.waiting import wait_until

LANDLOCK_CREATE_RULESET: Final = 444
REQUIRED: Final = ("--seccomp", "action=kill,landlock=require")
REASONS: Final = {
    errno.ENOSYS: "this kernel has none",
    errno.EOPNOTSUPP: "it is not among the kernel's lsm= modules",
    errno.EPERM: "this process may not use it, perhaps because of a container's filter",
}


@pytest.mark.parametrize("error", REASONS)
def test_without_landlock_the_log_says_so(error: int, tmp_path: Path) -> None:
    log = tmp_path / "log1"
    program = (*under_filter(error, LANDLOCK_CREATE_RULESET), *s.OURS)
    words = ("--log", f"file={log},level=1")
    with s.Server(tmp_path, *s.RUNNING, *words, program=program) as server:
        with server.data() as client:
            assert len(client.command(get_random(8))) == 20
        found = log.read_text()
    said = "There is no Landlock, so files are not out of this TPM's reach"
    assert f"{said}: {REASONS[error]}\n" in found


@pytest.mark.parametrize("error", REASONS)
def test_without_landlock_it_ends_where_that_is_required(error: int, tmp_path: Path) -> None:
    program = (*under_filter(error, LANDLOCK_CREATE_RULESET), *s.OURS)
    state = tmp_path / "state"
    state.mkdir()
    words = ["--tpm2", "--tpmstate", f"dir={state}", *s.RUNNING, *REQUIRED]
    done = s.run_swtpm(*words, "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}", program=program)
    said = f"swtpm: There is no Landlock: {REASONS[error]}; landlock=try serves without it\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert list(tmp_path.rglob("*")) == [state]


def test_where_landlock_is_required_and_there_it_serves(tmp_path: Path) -> None:
    with s.Server(tmp_path, *s.RUNNING, *REQUIRED) as server, server.data() as client:
        assert len(client.command(get_random(8))) == 20


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("landlock=x", "Unsupported seccomp landlock value x"),
        (
            "action=none,landlock=require",
            "landlock=require needs action=kill: no other action uses Landlock",
        ),
    ],
)
def test_words_about_landlock_that_make_no_sense(words: str, reason: str, tmp_path: Path) -> None:
    done = s.run_swtpm("--tpm2", "--tpmstate", f"dir={tmp_path}", "--seccomp", words)
    assert (done.returncode, done.stderr) == (1, f"swtpm: {reason}\n")


def test_a_kernel_that_refuses_filters_is_named_as_the_reason(tmp_path: Path) -> None:
    """Nothing that could be installed would help."""
    program = (*under_filter(errno.EPERM, _seccomp_number()), *s.OURS)
    done = s.run_swtpm("--tpm2", "--tpmstate", f"dir={tmp_path}", *s.RUNNING, program=program)
    assert done.returncode == 1
    assert done.stderr.startswith("swtpm: Could not create the seccomp profile: ")
    assert "install" not in done.stderr
    assert "let the kernel, or the container that this runs in, have seccomp filters" in done.stderr
    assert not list(tmp_path.glob("tpm2-00.*"))


def _seccomp_number() -> int:
    return int(ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(b"seccomp"))


# -- descriptors and limits ---------------------------------------------------------------------


def test_what_the_caller_left_open_is_closed(tmp_path: Path) -> None:
    """A pipe, a folder and a file by accident; the log and the pid file on purpose."""
    pid_file, log = tmp_path / "pid", tmp_path / "log2"
    (tmp_path / "folder").mkdir()
    pipe = os.pipe()
    folder = os.open(tmp_path / "folder", os.O_RDONLY)
    left = os.open(tmp_path / "left", os.O_RDWR | os.O_CREAT, 0o600)
    for_pid, for_log = (os.open(p, os.O_WRONLY | os.O_CREAT, 0o600) for p in (pid_file, log))
    words = ("--pid", f"fd={for_pid}", "--log", f"fd={for_log},level=2")
    fds = [*pipe, folder, left, for_pid, for_log]
    try:
        with s.Server(tmp_path, *s.RUNNING, *words, pass_fds=fds) as server:
            assert server.request(s.GET_CAPABILITY, size=8)
            there = set(open_files(server.process.pid).values())
            assert not there & {str(tmp_path / "folder"), str(tmp_path / "left")}
            assert os.readlink(f"/proc/self/fd/{pipe[0]}") not in there
            assert str(log) in there
            assert pid_file.read_text() == str(server.process.pid)
            assert "Ctrl Cmd" in log.read_text()
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
        assert not pid_file.exists()
    finally:
        for fd in fds:
            os.close(fd)


def limits(pid: int) -> dict[str, tuple[str, str]]:
    """Soft and hard, by name."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    fields = [(line[:26].strip(), line[26:].split()) for line in lines]
    return {name: (values[0], values[1]) for name, values in fields}


def test_limits_of_its_resources(tmp_path: Path) -> None:
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CAPABILITY, size=8)
        found = limits(server.process.pid)
    assert found["Max core file size"] == ("0", "0")
    assert found["Max processes"] == ("0", "0")
    assert found["Max file size"] == (str(1 << 30), str(1 << 30))
    soft, hard = found["Max open files"]
    assert soft == hard
    assert int(soft) <= 1024


_SMALL_FILES: Final = (
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20480, 20480));"
    " os.execv(sys.argv[1], sys.argv[1:])"
)


def test_a_log_that_may_grow_no_more_costs_nothing_else(tmp_path: Path) -> None:
    program = (sys.executable, "-c", _SMALL_FILES, *s.OURS)
    words = ("--log", f"file={tmp_path / 'long'},level=20")
    with s.Server(tmp_path, *s.RUNNING, *words, program=program) as server:
        with server.data() as client:
            for _ in range(1000):
                client.send(get_random(32))
                client.response()
                if (tmp_path / "long").stat().st_size == 20480:
                    break
            assert (tmp_path / "long").stat().st_size == 20480
            assert len(client.command(get_random(8))) == 20
        assert server.request(s.STORE_VOLATILE) == s.u32(0)


# -- what removes files in the end ---------------------------------------------------------------


def started(folder: Path, *, state: Path | None = None) -> s.Server:
    """On sockets and with a pid file by path; it answers."""
    data, control = folder / "d", folder / "c"
    made = s.Server(
        folder,
        *(*s.RUNNING, "--server", f"type=unixio,path={data}"),
        *("--ctrl", f"type=unixio,path={control}", "--pid", f"file={folder / 'pid'}"),
        data=None,
        control=None,
        state=state,
    )
    made.data_address, made.control_address = data, control
    wait_until(lambda: s.listens(control), "the control socket", process=made.process)
    assert made.request(s.GET_CAPABILITY, size=8)
    return made


@pytest.mark.parametrize("form", ["file={}", "fd={}"])
def test_who_takes_over_the_tpm_cannot_have_others_killed_by_the_pid_file(
    form: str, tmp_path: Path
) -> None:
    """At the start, when libtpms gets the state, the file is there and not yet written to."""
    pid_file, state = tmp_path / "pid", tmp_path / "state"
    state.mkdir()
    data = tmp_path / "data"
    with open(pid_file, "w") as file:
        where = form.format(pid_file if "file" in form else file.fileno())
        words = ["--tpm2", "--tpmstate", f"dir={state}", *s.RUNNING, "--pid", where]
        with subprocess.Popen(
            [*WITNESS, "socket", *words, "--server", f"type=unixio,path={data}"],
            stderr=subprocess.PIPE,
            pass_fds=[file.fileno()],
            env={**s.environment(), "PID_FILE": str(pid_file)},
        ) as process:
            wait_until(lambda: s.listens(data), "the socket", process=process)
            wait_until(lambda: pid_file.read_text() == str(process.pid), "the process id")
            process.terminate()
            assert process.stderr is not None
            assert b"libtpms: cannot write to the pid file" in process.stderr.read()
            assert process.wait() == 0
    assert names(tmp_path) == {"state"}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_orderly_end_removes_sockets_and_pid_file(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        (remover,) = children(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert names(tmp_path) == {"state", "log"}
        wait_until(lambda: not is_running(remover), "the end of the remover")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_who_is_killed_leaves_no_socket_and_no_process(tmp_path: Path) -> None:
    """The pid file stays, as ever: a successor may have begun to write to it."""
    with started(tmp_path) as server:
        (remover,) = children(server.process.pid)
        server.process.kill()
        server.wait()
        wait_until(lambda: not is_running(remover), "the end of the remover")
        assert names(tmp_path) == {"state", "log", "pid"}


def test_what_has_taken_the_place_of_a_socket_is_left(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        for name in ("c", "d", "pid"):
            (tmp_path / name).unlink()
            (tmp_path / name).write_text("somebody else's")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert {(tmp_path / name).read_text() for name in ("c", "d", "pid")} == {"somebody else's"}


def test_the_remover_is_not_taken_for_the_server(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        (remover,) = children(server.process.pid)
        assert Path(f"/proc/{remover}/comm").read_text() == "vtpm-remover\n"
        line = Path(f"/proc/{remover}/cmdline").read_bytes().strip(b"\0").decode()
        assert line == f"vtpm-remover: clears up after {server.process.pid}"
        held = set(open_files(remover).values())
        assert len(held) <= 7  # two pipes, three files, and nowhere
        # Signals to the group, as a terminal sends them, are the server's to obey.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(remover, number)
        assert is_running(remover)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert names(tmp_path) == {"state", "log"}


def test_there_is_no_remover_where_nothing_is_to_be_removed(tmp_path: Path) -> None:
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CAPABILITY, size=8)
        assert children(server.process.pid) == []


def test_there_is_no_remover_where_all_is_in_the_folder_of_the_state(tmp_path: Path) -> None:
    with started(tmp_path / "state", state=tmp_path / "state") as server:
        assert children(server.process.pid) == []
        assert {"c", "d", "pid"} <= names(tmp_path / "state")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not {"c", "d", "pid"} & names(tmp_path / "state")


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"damaged")
    words = ["--tpm2", "--tpmstate", f"dir={state}", *s.RUNNING, "--pid", f"file={tmp_path}/pid"]
    done = s.run_swtpm(*words, "--ctrl", f"type=unixio,path={tmp_path}/c")
    assert done.returncode == 1
    assert "swtpm: Error: Could not initialize the TPM: " in done.stderr
    assert names(tmp_path) == {"state"}


def test_a_start_that_fails_leaves_the_pid_file_of_another(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        words = ["--tpm2", "--tpmstate", f"dir={server.state}", *s.RUNNING]
        again = s.run_swtpm(*words, "--pid", f"file={tmp_path}/pid")
        assert again.returncode == 1
        assert (tmp_path / "pid").read_text() == str(server.process.pid)


# -- what is open, and its mode ------------------------------------------------------------------


def test_no_device_is_held_and_nothing_comes_from_standard_input(tmp_path: Path) -> None:
    secret = tmp_path / "given"
    secret.write_text("for somebody else")
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path}", *s.RUNNING]
    with (
        secret.open() as given,
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(
            [*s.OURS, "socket", *words, "--ctrl", f"type=unixio,path={tmp_path / 'c'}"],
            stdin=given,
            stdout=said,
            stderr=said,
            env=s.environment(),
        ) as process,
    ):
        wait_until(lambda: s.listens(tmp_path / "c"), "the socket", process=process)
        wait_until(lambda: is_filtered(process.pid), "the sandbox", process=process)
        held = open_files(process.pid)
        process.kill()
    assert str(secret) not in held.values()
    assert held[0].startswith("pipe:")
    assert not [what for what in held.values() if what.startswith("/dev/")]


def is_filtered(pid: int) -> bool:
    return "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            ("--runas", "12345"), marks=pytest.mark.skipif(os.getuid() != 0, reason="needs root")
        ),
    ],
)
def test_a_terminal_is_written_to_and_not_read(more: tuple[str, ...], tmp_path: Path) -> None:
    """Not even by another user, who could not open it anew."""
    ours, terminal = os.openpty()
    state = tmp_path / "state"
    state.mkdir()
    if more:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o777 if folder == tmp_path else 0o755)
        os.chown(state, 12345, 12345)
    words = ["--tpm2", "--tpmstate", f"dir={state}", *s.RUNNING, "--log", "fd=2", *more]
    try:
        with subprocess.Popen(
            [*s.OURS, "socket", *words, "--ctrl", f"type=unixio,path={tmp_path / 'c'}"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=s.environment(),
        ) as process:
            wait_until(lambda: s.listens(tmp_path / "c"), "the socket", process=process)
            wait_until(lambda: is_filtered(process.pid), "the sandbox", process=process)
            held = open_files(process.pid)
            name = os.ttyname(terminal)
            readable = [fd for fd in held if held[fd] == name and access(process.pid, fd) != 1]
            process.kill()
    finally:
        os.close(ours)
        os.close(terminal)
    assert held[1] == held[2] == name
    assert readable == []


def access(pid: int, fd: int) -> int:
    """O_RDONLY, O_WRONLY or O_RDWR."""
    (line,) = [
        line
        for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
        if line.startswith("flags:")
    ]
    return int(line.split()[1], 8) & os.O_ACCMODE


@pytest.mark.parametrize("action", ["kill", "none"])
@pytest.mark.parametrize("mask", [0, 0o022, 0o027, 0o077, 0o777])
@pytest.mark.parametrize("option", ["", ",mode=0600", ",mode=0664"])
@pytest.mark.parametrize("kind", ["dir", "file"])
def test_modes_of_state_files(
    kind: str, option: str, mask: int, action: str, tmp_path: Path
) -> None:
    """Where nothing changes a mode any more they are what they are elsewhere."""
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    place = f"dir={state}" if kind == "dir" else f"backend-uri=file://{state}/tpm2-00.linear"
    words = ("--tpmstate", place + option, "--seccomp", f"action={action}")
    before = os.umask(mask)
    try:
        server = s.Server(tmp_path / "server", *s.RUNNING, *words, state=state)
    finally:
        os.umask(before)
    with server:
        assert server.request(s.STORE_VOLATILE) == bytes(4)
        found = {path.name: path.stat().st_mode & 0o7777 for path in state.iterdir()}
    lock = found.pop(".lock", None)
    assert lock == (None if kind == "file" else 0o660 & ~mask | 0o600)
    wanted = int(option[-4:], 8) if option else 0o640 & ~mask | 0o600
    assert set(found.values()) == {wanted}
    assert len(found) == (1 if kind == "file" else 2)


@pytest.mark.parametrize(("option", "wanted"), [("", 0o644), (",mode=0600", 0o600)])
@pytest.mark.parametrize("kind", ["dir", "file"])
def test_files_that_are_there_have_the_mode_that_is_asked_for(
    kind: str, option: str, wanted: int, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    place = f"dir={state}" if kind == "dir" else f"backend-uri=file://{state}/tpm"
    file = state / ("tpm2-00.permall.bak" if kind == "dir" else "tpm")
    for path in (file, state / "another's"):
        path.touch()
        path.chmod(0o644)
    with s.Server(tmp_path, *s.RUNNING, "--tpmstate", place + option) as server:
        # A backup alone is an error, said in the sandbox.
        wait_until(lambda: server.process.poll() == 1 or is_filtered(server.process.pid), "a start")
    assert file.stat().st_mode & 0o777 == wanted
    assert (state / "another's").stat().st_mode & 0o777 == 0o644
