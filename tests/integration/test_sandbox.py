"""Attacks from inside: a subverted command handler gets nowhere, and nothing else breaks."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from tests.support import sockets as s
from tests.support.attacks import (
    ATTACKS,
    CALLS,
    STILL,
    UNFILTERED,
    WITNESS,
    attack,
    subverted,
    sweep,
    under_filter,
)
from tests.support.commands import get_random
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


class Victim(s.Server):
    """A subverted TPM, and what is none of its business beside its state."""

    def __init__(self, folder: Path, *words: str, below: tuple[str, ...] = ()) -> None:
        self.secret = folder / "secret"
        self.secret.write_text("none of its business")
        for name in ("folder", "folder2", "below"):
            (folder / name).mkdir()
        (folder / "below" / "thesis").touch()
        (folder / "spare").touch()
        program = (*below, *subverted(str(self.secret)))
        super().__init__(folder, *s.RUNNING, *words, program=program)

    def suffer(self, name: str, *, on_worker: bool = False) -> str:
        """How it went."""
        with self.data() as client:
            client.send(attack(name, on_worker=on_worker))
            try:
                answer = client.socket.recv(1000)
            except ConnectionResetError:
                answer = b""
        return answer.decode().removeprefix("refused: ") or "no answer"


def unharmed(victim: Victim) -> bool:
    """Whether everything beside the state is as it was."""
    there = {path.name for path in victim.secret.parent.iterdir()}
    return (
        there == {"ctrl", "data", "log", "secret", "spare", "state", "folder", "folder2", "below"}
        and (victim.secret.parent / "below" / "thesis").exists()
        and victim.secret.read_text() == "none of its business"
        and victim.secret.stat().st_mode == 0o100600
        and not any(path.stat().st_mode & 0o7000 for path in victim.state.iterdir())
    )


SURVIVED = [
    name for name, attack in ATTACKS.items() if attack.inside not in {"killed", "no answer"}
]
DEADLY = [name for name, attack in ATTACKS.items() if attack.inside == "killed"]


@pytest.mark.parametrize("on_worker", [False, True], ids=["inline", "worker"])
def test_refused(tmp_path: Path, on_worker: bool) -> None:
    with Victim(tmp_path) as victim:
        victim.secret.chmod(0o600)
        found = {name: victim.suffer(name, on_worker=on_worker) for name in SURVIVED}
        assert found == {name: ATTACKS[name].inside for name in SURVIVED}
        # It lives, writes its state, and ends in order.
        assert victim.suffer("nothing", on_worker=on_worker) == "done"
        assert victim.request(s.STORE_VOLATILE) == s.u32(0)
        victim.process.send_signal(signal.SIGTERM)
        assert victim.wait() == 0
        assert unharmed(victim)
    assert (victim.state / "tpm2-00.volatilestate").exists()


def test_a_bug_is_logged_and_survived(tmp_path: Path) -> None:
    with Victim(tmp_path) as victim:
        assert victim.suffer("bug") == "no answer"
        assert victim.suffer("nothing") == "done"
        assert "RuntimeError: a bug of ours" in victim.log_text()


@pytest.mark.parametrize("name", DEADLY)
def test_deadly(name: str, tmp_path: Path) -> None:
    with Victim(tmp_path) as victim:
        victim.secret.chmod(0o600)
        assert victim.suffer(name, on_worker=name in DEADLY[::2]) == "no answer"
        assert victim.wait() == -signal.SIGSYS
        assert unharmed(victim)


@pytest.mark.parametrize("action", ["none", "log"])
def test_no_sandbox_on_request(action: str, tmp_path: Path) -> None:
    """Also shows that the attacks are some."""
    wanted = {name: attack.outside for name, attack in ATTACKS.items() if attack.outside}
    with Victim(tmp_path, "--seccomp", f"action={action}") as victim:
        found = {name: victim.suffer(name) for name in wanted}
    assert {name: found[name] for name in wanted if found[name] not in wanted[name]} == {}


DANGEROUS = {"vhangup", "fork", "vfork", "rt_sigreturn", "reboot"}


def test_every_system_call() -> None:
    """Whatever is not in the list of what serving takes is refused, or the end."""
    left_out = CALLS | UNFILTERED
    inside = sweep("kill", left_out=left_out)
    assert {name: answer for name, answer in inside.items() if answer not in {0, -31}} == {}
    # Without a sandbox most of them are answered otherwise.
    outside = sweep("none", left_out=left_out | DANGEROUS)
    assert sum(answer > 0 for answer in outside.values()) > 150


def test_what_it_still_can(tmp_path: Path) -> None:
    """The whole list, as the documents have it."""
    with Victim(tmp_path) as victim:
        victim.secret.chmod(0o600)
        assert {name: victim.suffer(name) for name in STILL} == dict.fromkeys(STILL, "done")
        assert unharmed(victim)


LANDLOCK_CREATE_RULESET = 444


def test_without_landlock_all_files_of_its_user_are_open_and_nothing_else(tmp_path: Path) -> None:
    below = under_filter(errno.ENOSYS, LANDLOCK_CREATE_RULESET)
    with Victim(tmp_path, below=below) as victim:
        victim.secret.chmod(0o600)
        found = {name: victim.suffer(name) for name in SURVIVED}
    files = {name for name in SURVIVED if ATTACKS[name].inside in {"EACCES", "EXDEV"}}
    assert found == {name: "done" if name in files else ATTACKS[name].inside for name in SURVIVED}
    assert {"read", "append", "remove-below", "read-memory"} <= files


def status_of(pid: int) -> list[dict[str, str]]:
    """What /proc tells about each thread."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return [
        {
            name: value.strip()
            for name, _, value in (line.partition(":") for line in text.splitlines())
        }
        for text in texts
    ]


def test_every_thread_has_no_rights(tmp_path: Path) -> None:
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CONFIG, size=8)
        threads = status_of(server.process.pid)
    assert len(threads) == 2
    for thread in threads:
        assert {thread[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (thread["NoNewPrivs"], thread["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("flags", [s.RUNNING, s.NOT_NEED_INIT, ()], ids=["startup", "on", "off"])
def test_no_state_is_touched_outside_the_sandbox(flags: tuple[str, ...], tmp_path: Path) -> None:
    """A state that somebody has prepared meets libtpms where it can do nothing."""
    told = tmp_path / "told"
    with open(told, "w") as file, redirected_errors(file):
        server = s.Server(tmp_path, *flags, program=WITNESS)
    with server:
        assert flags or server.init() == 0
        assert server.request(s.STORE_VOLATILE) in {s.u32(0), s.u32(9)}
    lines = told.read_text().splitlines()
    assert "libtpms: in the sandbox" in lines
    assert "state: in the sandbox" in lines
    assert set(lines) == {"libtpms: in the sandbox", "state: in the sandbox"}


def test_no_state_is_touched_outside_the_sandbox_to_print_facts(tmp_path: Path) -> None:
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path}", "--print-info", "1"]
    done = s.run_swtpm(*words, program=WITNESS)
    assert done.returncode == 0
    assert '"TPMSpecification"' in done.stdout
    assert set(done.stderr.splitlines()) == {
        "libtpms: in the sandbox",
        "state: in the sandbox",
    }


def test_no_state_is_touched_outside_the_sandbox_on_a_device(tmp_path: Path) -> None:
    with s.socket_pair() as (client, theirs):
        words = ["--fd", str(theirs.fileno()), "--tpm2", "--tpmstate", f"dir={tmp_path}"]
        with subprocess.Popen(
            [*WITNESS, "chardev", *words, *s.RUNNING],
            env=s.environment(),
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        ) as process:
            theirs.close()
            assert len(client.command(get_random(8))) == 20
            client.close()
            _, told = process.communicate(timeout=PATIENCE_SECONDS)
    found = {line for line in told.decode().splitlines() if "sandbox" in line}
    assert found == {"libtpms: in the sandbox", "state: in the sandbox"}


_LIMIT_AT_THE_FILTER = r"""
import os, resource, sys
from vtpm_cuse.service.confine.seccomp import Filter

load = Filter.load
def told(self):
    os.write(2, b"threads to come: %d\n" % resource.getrlimit(resource.RLIMIT_NPROC)[0])
    load(self)
Filter.load = told
"""


@pytest.mark.parametrize("how", ["serves", "prints", "reconfigures"])
def test_no_thread_is_to_come_when_the_filter_does(how: str, tmp_path: Path) -> None:
    """In each process that has libtpms in its sandbox, the filter is the last of it."""
    state = tmp_path / "state"
    state.mkdir()
    control = f"type=unixio,path={tmp_path / 'ctrl'}"
    words = ["socket", "--tpm2", "--tpmstate", f"dir={state}"]
    program = "cli.swtpm"
    if how == "serves":
        # Where its state is damaged, it ends by itself.
        (state / "tpm2-00.permall").write_bytes(b"nothing")
        words += ["--ctrl", control, *s.NOT_NEED_INIT]
    elif how == "prints":
        words += ["--print-info", "1"]
    else:
        made = subprocess.run(
            [*s.OURS, *words, "--print-info", "1"],
            check=False,
            capture_output=True,
            env=s.environment(),
        )
        assert made.returncode == 0
        program = "cli.setup.swtpm_setup"
        words = ["--tpm2", "--tpm-state", str(state), "--reconfigure", "--pcr-banks", "sha384"]
    code = f"{_LIMIT_AT_THE_FILTER}\nfrom vtpm_cuse.{program} import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=s.environment(),
    )
    assert done.returncode == (1 if how == "serves" else 0), done.stderr
    assert "threads to come: 0\n" in done.stderr


@contextlib.contextmanager
def redirected_errors(file: IO[str]) -> Iterator[None]:
    """What is started within writes its errors there."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_a_state_file_that_is_not_there_yet_opens_no_folder(tmp_path: Path) -> None:
    """QEMU's way: the TPM is switched on later, in the sandbox."""
    secret = tmp_path / "secret"
    secret.touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "thesis").touch()
    state = f"backend-uri=file://{tmp_path / 'tpm.state'}"
    with s.Server(tmp_path, "--tpmstate", state, program=subverted(str(secret))) as server:
        assert server.init() == 0
        with server.data() as client:
            for name in ("read-neighbour", "append", "write", "list", "rename", "remove-below"):
                client.send(attack(name))
                assert client.socket.recv(100) == b"refused: EACCES", name
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
    assert (tmp_path / "tpm.state").stat().st_size > 0


def test_a_link_in_place_of_the_state_file_opens_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("none of its business")
    (tmp_path / "tpm.state").symlink_to(secret)
    state = f"backend-uri=file://{tmp_path / 'tpm.state'}"
    with s.Server(tmp_path, "--tpmstate", state, *s.NOT_NEED_INIT) as server:
        assert server.wait() == 1
        assert "is a symbolic link" in server.log_text()
    assert secret.read_text() == "none of its business"


@needs_root
def test_runs_as_another_user(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, 12345)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with s.Server(tmp_path, *s.RUNNING, "--runas", "12345", "--pid", f"file={pid_file}") as server:
        assert server.request(s.GET_CONFIG, size=8)
        for thread in status_of(server.process.pid):
            assert set(thread["Uid"].split()) == set(thread["Gid"].split()) == {"12345"}
            assert thread["Groups"] in {"", "12345"}
        assert {pid_file.stat().st_uid, server.log.stat().st_uid} == {12345}
        assert {path.stat().st_uid for path in state.iterdir()} == {12345}
        # Not dumpable: what /proc tells about it is root's.
        assert Path(f"/proc/{server.process.pid}/environ").stat().st_uid == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@needs_root
def test_a_second_process_leaves_the_pid_file(tmp_path: Path) -> None:
    """It opens the file before it is another user, and only then finds the state locked."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, 12345)
    pid_file = tmp_path / "pid"
    words = (*s.RUNNING, "--runas", "12345", "--pid", f"file={pid_file}")
    with s.Server(tmp_path, *words) as server:
        assert server.request(s.GET_CONFIG, size=8)
        again = s.run_swtpm("--tpm2", "--tpmstate", f"dir={state}", *words)
        assert again.returncode == 1
        assert pid_file.read_text() == str(server.process.pid)


@needs_root
def test_state_of_another_user_can_be_written(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 12345, 12345)
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
        effective = {thread["CapEff"] for thread in status_of(server.process.pid)}
        assert effective == {"000000000000000a"}  # CAP_DAC_OVERRIDE, CAP_FOWNER
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def make_odd(folder: Path) -> None:
    """What a TPM that was taken over could leave for its next start, and what it could not."""
    bare = [".lock", "tpm2-00.permall.bak", "tpm2-00.volatilestate.new", "TMP2-00.savestate", "x"]
    for name in (*map(os.fsencode, bare), b"\xff\xfe", b" ", b"-x", b"a\nb"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))
        path.touch()
        path.chmod(0)
    (folder / "another's").touch()
    os.chown(folder / "another's", 12345, 12345)
    (folder / "another's").chmod(0)
    (folder / "away").symlink_to("/no/such")
    (folder / "tpm2-00.savestate").symlink_to(folder / "another's")
    (folder / "TMP2-00.permall").symlink_to("/etc/shadow")
    os.mkfifo(folder / "fifo", 0)
    os.mkfifo(folder / "tpm-00.permall", 0)
    (folder / "sub").mkdir(mode=0)


@needs_root
@pytest.mark.parametrize("folder_mode", [0o700, 0])
def test_nothing_that_a_tpm_can_make_keeps_rights_for_the_next_start(
    folder_mode: int, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    make_odd(state)
    state.chmod(folder_mode)
    with s.Server(tmp_path, *s.RUNNING, "--tpmstate", f"dir={state},backup") as server:
        wait_until(lambda: ends_or_is_confined(server), "the sandbox")
        assert confined_rights(server) <= {"0" * 16}
    assert (state / ".lock").stat().st_mode & 0o777 == 0o600
    assert (state / "x").stat().st_mode & 0o777 == 0


@needs_root
def test_a_start_beside_what_a_tpm_can_make_serves_without_rights(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
    for path in state.iterdir():
        path.chmod(0)
    for name in ("x", "odd name"):
        (state / name).touch()
        (state / name).chmod(0)
    with s.Server(tmp_path / "again", *s.RUNNING, state=state) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
        assert {thread["CapEff"] for thread in status_of(server.process.pid)} == {"0" * 16}


@needs_root
def test_a_state_file_of_another_users_can_be_written(tmp_path: Path) -> None:
    """In a folder of ours: its name says that it is the state."""
    state = tmp_path / "state"
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
    for path in state.iterdir():
        os.chown(path, 12345, 12345)
    with s.Server(tmp_path / "again", *s.RUNNING, state=state) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)
        effective = {thread["CapEff"] for thread in status_of(server.process.pid)}
        assert effective == {"000000000000000a"}


def ends_or_is_confined(server: s.Server) -> bool:
    return server.process.poll() is not None or bool(confined_rights(server))


def confined_rights(server: s.Server) -> set[str]:
    """CapEff of the threads that have a filter."""
    with contextlib.suppress(OSError):
        threads = status_of(server.process.pid)
        return {one["CapEff"] for one in threads if one.get("Seccomp") == "2"}
    return set()


@needs_root
def test_another_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "state").mkdir(parents=True)
    words: list[str | Path] = [
        "--tpm2",
        "--chroot",
        root,
        "--tpmstate",
        "dir=/state",
        "--log",
        "file=log,level=3",
    ]
    words += ["--ctrl", "type=unixio,path=/ctrl", "--server", "type=unixio,path=data"]
    done = s.run_swtpm(*words, *s.RUNNING, "--daemon", "--pid", "file=/pid")
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((root / "pid").read_text())
    try:
        assert os.readlink(f"/proc/{pid}/root") == str(root)
        with s.connect(root / "data") as client:
            client.send(get_random(32))
            assert len(client.exactly(44)) == 44
    finally:
        with s.connect(root / "ctrl") as client:
            assert client.control(s.SHUTDOWN) == s.u32(0)
            client.socket.recv(1)
        wait_until(lambda: not (root / "pid").exists(), "the end of the daemon")
    left = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert left == {"state", "state/.lock", "state/tpm2-00.permall", "log"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--runas", "no-such-user"], "swtpm: Error: User 'no-such-user' does not exist.\n"),
        (["--runas", "-1"], "swtpm: Error: uid -1 outside valid range.\n"),
        (["--chroot", "/no/such/folder"], "swtpm: chroot failed: No such file or directory\n"),
        (["--seccomp", "action=x"], "swtpm: Unsupported seccomp log action x\n"),
    ],
)
def test_errors(words: list[str], reason: str, tmp_path: Path) -> None:
    done = s.run_swtpm("--tpm2", "--tpmstate", f"dir={tmp_path}", *words)
    assert (done.returncode, done.stderr) == (1, reason)
    assert not list(tmp_path.iterdir())


_AS_NOBODY = (
    sys.executable,
    "-c",
    "import os, sys; from vtpm_cuse.cli.emulator import prints, swtpm_socket; from vtpm_cuse.cli.swtpm import"
    " main; from vtpm_cuse.service.confine import preload; preload.import_all();"
    " os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main())",
)


@needs_root
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--runas", "5"], "swtpm: Error: setgid(5) failed.\n"),
        (["--runas", "root"], "swtpm: Error: initgroups(root, 0) failed.\n"),
        (["--chroot", "/"], "swtpm: chroot failed: Operation not permitted\n"),
    ],
)
def test_not_permitted(words: list[str], reason: str, tmp_path: Path) -> None:
    state = ["--tpm2", "--tpmstate", f"dir={tmp_path}"]
    done = s.run_swtpm(*state, *words, program=_AS_NOBODY)
    assert (done.returncode, done.stderr) == (1, reason)
