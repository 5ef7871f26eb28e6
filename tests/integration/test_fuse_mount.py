"""`swtpm fuse` as a process: how a mount comes and goes, what is refused, what lies beside the TPM."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.device.semantics import KNOWN_STATE, LONGER, cancelled, footprint
from tests.kernel.harness import (
    OUR_IOCTL,
    PATIENCE,
    PTM_HASH_END,
    PTM_HASH_START,
    PTM_SHUTDOWN,
    Background,
    Server,
    errno_from,
    exchange,
    needs,
    opened,
    ptm_result,
    run,
    servers,
    wait_exit,
    wait_until,
)
from tests.support import sockets as s
from tests.support.attacks import WITNESS
from tests.support.commands import TPM2_SHUTDOWN_CLEAR, code_of, get_random, pcr_extend, tpm12
from tests.support.fuse import SWTPM_FUSE, FuseServer, User, mounts, needs_fuse, ordinary_user
from tests.support.sockets import is_locked
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANDOM = get_random(8)
ENDED = (errno.ENOTCONN, errno.ECONNABORTED)


@pytest.fixture(autouse=True)
def _fuse() -> None:
    needs_fuse()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    yield from servers(tmp_path, FuseServer)


@pytest.fixture
def server(make: Callable[..., Server]) -> Server:
    server = make("vtpm0")
    server.state.mkdir()
    shutil.copy(KNOWN_STATE, server.permall)  # for which it is known what takes long
    return server.start()


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


def text(server: Server, name: str) -> str:
    return (server.device.parent / name).read_text()


# -- an ordinary user -----------------------------------------------------------------------


def test_it_just_works(user: User) -> None:
    """The command line of the README, by somebody who is not root and has nothing prepared."""
    assert user.run("id", "-u").stdout != "0\n"
    done = user.run(*SWTPM_FUSE, "-n", "vtpm0")
    mount = user.folder / "run/vtpm"
    device = mount / "vtpm0"
    state = user.folder / "state/vtpm-cuse/vtpm0"
    assert done.stderr == f"swtpm: {device} is a TPM 2.0, whose state is in {state}.\n"
    assert str(mount) in dict(mounts())
    try:
        random = user.run("tpm2_getrandom", "-T", f"device:{device}", "--hex", "8").stdout
        assert len(bytes.fromhex(random)) == 8
        assert user.run("cat", mount / "tpm_version_major").stdout == "2\n"
        pcr = user.run("cat", mount / "pcr-sha256/7").stdout
        assert re.fullmatch("[0-9A-F]{64}\n", pcr)
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        if user.prefix:  # root is another user
            assert errno_from(lambda: os.open(device, os.O_RDWR)) == errno.EACCES
    finally:
        pid = int(json.loads(user.run("cat", mount / "status").stdout)["pid"])
        with_pid = os.pidfd_open(pid)
        user.run(OUR_IOCTL, "-s", device)
        wait_exit(with_pid)
        os.close(with_pid)
    assert not mount.exists()
    assert (state / "tpm2-00.permall").exists()


@pytest.mark.parametrize("umask", [0, 0o077], ids=["000", "077"])
def test_folders_are_nobody_elses(user: User, umask: int) -> None:
    """Those of the state and of the mount, and what is made on the way there."""
    mount = user.folder / "a/b/mount"
    words = (*SWTPM_FUSE, "-n", "x", "--mount", str(mount))
    user.run("sh", "-c", f'umask {umask:o}; exec "$@"', "sh", *words)
    try:
        made = [mount.parent, mount.parent.parent, *(user.folder / "state").glob("**/")]
        assert not [path for path in made if path.stat().st_mode & 0o022]
        leaf = user.folder / "state/vtpm-cuse/x"
        assert stat.S_IMODE(leaf.stat().st_mode) == 0o700
    finally:
        user.run(OUR_IOCTL, "-s", mount / "x")


def test_the_same_tpm_again_and_never_twice(user: User) -> None:
    """A name finds its TPM again; a second program that wants it is told so, and makes none."""
    mounts_of = [user.folder / "m0", user.folder / "m1"]
    words = [(*SWTPM_FUSE, "-n", "x", "--mount", str(mount)) for mount in mounts_of]
    permall = user.folder / "state/vtpm-cuse/x/tpm2-00.permall"
    user.run(*words[0])
    try:
        before = permall.read_bytes()
        second = user.run(*words[1], status=1)
        assert "another process" in second.stderr
        assert not mounts_of[1].exists()
        assert permall.read_bytes() == before
    finally:
        user.run(OUR_IOCTL, "-s", mounts_of[0] / "x")
    other = user.run(*words[0], "--tpm12", status=1)
    assert "holds a TPM 2.0; give --tpm2" in other.stderr


def test_tpm_1_2_stays_one(user: User) -> None:
    mount = user.folder / "mount"
    words = (*SWTPM_FUSE, "-n", "x", "--mount", str(mount))
    for more in (["--tpm12"], []):
        assert "is a TPM 1.2" in user.run(*words, *more).stderr
        assert user.run("cat", mount / "tpm_version_major").stdout == "1\n"
        user.run(OUR_IOCTL, "-s", mount / "x")


def test_place_that_others_may_write_to_is_not_used(user: User) -> None:
    place = user.folder / "state/vtpm-cuse/x"
    place.mkdir(parents=True)
    for path in (place, place.parent, place.parent.parent):
        user.own(path)
    place.chmod(0o777)
    words = (*SWTPM_FUSE, "-n", "x", "--mount", str(user.folder / "mount"))
    done = user.run(*words, status=1)
    assert f"{place} cannot be used: it can be written to by everybody" in done.stderr
    assert not list(place.iterdir())


def test_allow_other_must_be_permitted(user: User) -> None:
    conf = Path("/etc/fuse.conf")
    permitted = conf.exists() and re.search("^user_allow_other", conf.read_text(), re.MULTILINE)
    needs(bool(user.prefix) and not permitted, "an ordinary user may say allow_other here")
    done = user.run(*SWTPM_FUSE, "-n", "vtpm0", "--allow-other", status=1)
    assert "option allow_other only allowed if 'user_allow_other' is set" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (user.folder / "run/vtpm").exists()


def test_allow_other(make: Callable[..., Server], user: User, tmp_path: Path) -> None:
    needs(os.getuid() == 0, "root only")
    mount = user.folder / "mount"
    server = make("vtpm0", more=("--mount", str(mount), "--allow-other"))
    server.device = mount / "vtpm0"
    server.start()
    assert stat.S_IMODE(server.device.stat().st_mode) == 0o666
    user.run("tpm2_getrandom", "-T", f"device:{server.device}", "8")
    save = (OUR_IOCTL, "--save", "permanent")
    done = user.run(*save, user.folder / "blob", server.device, status=1)
    assert "Operation not permitted" in done.stderr, "they may use the TPM, and not copy it"
    run(*save, tmp_path / "blob", server.device)
    server.stop()
    assert str(mount) not in dict(mounts())


# -- its end --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("busy", [False, True])
def test_signals_end_it(server: Server, number: signal.Signals, busy: bool) -> None:
    with opened(server.device) as fd:
        if busy:
            os.write(fd, LONGER)
        server.signal(number)
        server.gone()
        assert not server.device.parent.exists()
        assert errno_from(lambda: os.write(fd, RANDOM)) in ENDED
    server.start()
    with opened(server.device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0


def test_foreground(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    words = ("-n", "x", "--mount", str(mount), "--tpmstate", f"dir={tmp_path}", "--foreground")
    process = subprocess.Popen([*SWTPM_FUSE, *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        with opened(mount / "x") as fd:
            assert code_of(exchange(fd, RANDOM)) == 0
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0
    line = f"swtpm: {mount}/x is a TPM 2.0, whose state is in {tmp_path}.\n"
    assert (said, process.stderr.read()) == (line, "")
    process.stderr.close()
    assert not mount.exists()


def test_kill_leaves_nothing_that_the_next_start_minds(server: Server) -> None:
    with opened(server.device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0
        server.signal(signal.SIGKILL)
        # Dead at first, and gone when the keeper has seen it.
        gone = (errno.ENOTCONN, errno.ENOENT)
        wait_until(lambda: errno_from(server.device.stat) in gone, "the mount is dead")
        assert errno_from(lambda: os.read(fd, 10)) in ENDED
    os.close(server._pidfd)
    server.start()
    assert len([path for path, _ in mounts() if path == str(server.device.parent)]) == 1
    with opened(server.device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0
    server.stop()


@pytest.mark.parametrize("lazily", [False, True])
def test_unmounted_by_somebody_else(server: Server, lazily: bool) -> None:
    """A client that still has the file open is served to its end."""
    mount = server.device.parent
    if lazily:
        with opened(server.device) as fd:
            assert run("fusermount3", "-u", mount, status=None).status != 0  # busy
            run("fusermount3", "-u", "-z", mount)
            assert code_of(exchange(fd, pcr_extend(16, bytes(32)))) == 0
            assert server.running
    else:
        run("fusermount3", "-u", mount)
    server.gone()
    assert f"{mount} was unmounted." in server.said


def test_one_who_mounts_there_afterwards_is_left_alone(server: Server) -> None:
    needs(os.getuid() == 0, "root only")
    mount = server.device.parent
    with opened(server.device) as fd:
        run("fusermount3", "-u", "-z", mount)
        run("mount", "-t", "tmpfs", "theirs", mount)
        assert code_of(exchange(fd, RANDOM)) == 0
    try:
        wait_until(lambda: not server.pid_file.exists(), "it has ended")
        assert os.path.ismount(mount)
    finally:
        run("umount", mount)
    server.gone()


# -- what is refused ------------------------------------------------------------------------


def test_folder_that_is_not_empty(make: Callable[..., Server]) -> None:
    server = make("vtpm0")
    server.device.parent.mkdir()
    (server.device.parent / "precious").write_text("precious")
    server.fails(1, f"{server.device.parent} is not empty; choose another")
    assert (server.device.parent / "precious").read_text() == "precious"
    assert not server.state.exists()


def test_folder_that_is_none(make: Callable[..., Server]) -> None:
    server = make("vtpm0")
    server.device.parent.write_text("a file")
    server.fails(1, f"{server.device.parent} is no directory")


def test_folder_in_use(server: Server, make: Callable[..., Server]) -> None:
    mount = server.device.parent
    other = make("vtpm1", more=("--mount", str(mount)))
    other.fails(1, f"{mount} is in use: something is mounted there")
    with opened(server.device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0


def test_state_in_use(server: Server, make: Callable[..., Server]) -> None:
    other = make("vtpm1", state=server.state)
    other.fails(1, "Could not initialize the TPM")
    assert not other.device.parent.exists()


def test_damaged_state_is_left_as_it_is(make: Callable[..., Server]) -> None:
    server = make("vtpm0")
    server.state.mkdir()
    server.permall.write_bytes(b"damaged")
    server.fails(1, "Could not initialize the TPM")
    assert server.permall.read_bytes() == b"damaged"
    assert not server.device.parent.exists()


def test_several_at_once(make: Callable[..., Server], tmp_path: Path) -> None:
    """One of them gets the folder; the others say so and leave it alone."""
    mount = tmp_path / "mount"
    words = [
        (*SWTPM_FUSE, "-n", f"x{i}", "--mount", str(mount), "--tpmstate", f"dir={tmp_path}/{i}")
        for i in range(4)
    ]
    started = [
        subprocess.Popen(
            [*word, "--pid", f"file={tmp_path}/pid"], stderr=subprocess.PIPE, text=True
        )
        for word in words
    ]
    said = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 1, 1, 1], said
    assert sum("is in use" in line for line in said) == 3, said
    assert len([path for path, _ in mounts() if path == str(mount)]) == 1
    pid = int((tmp_path / "pid").read_text())
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    wait_exit(pidfd)
    os.close(pidfd)
    assert not mount.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mount", "/x"), "Error: device name missing; give -n NAME\n"),
        (("-n", "a/b", "--mount", "/x"), "'a/b' cannot be the name of the TPM's file\n"),
        (("-n", "status", "--mount", "/x"), "'status' cannot be the name of the TPM's file\n"),
        (("-n", "pcr-sha1", "--mount", "/x"), "'pcr-sha1' cannot be the name"),
        (("-n", "vtpm0"), "Error: XDG_RUNTIME_DIR is not set; give --mount DIR\n"),
        (
            ("-n", "x", "--mount", "/x", "--tpm2", "--tpm12"),
            "--tpm2 and --tpm12 exclude each other",
        ),
        (("-n", "x", "--mount", "/dev/null/x"), "Could not use /dev/null/x: Not a directory"),
    ],
)
def test_bad_command_lines(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path), "XDG_RUNTIME_DIR": ""}
    done = run(*SWTPM_FUSE, *words, status=1, env=env)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("run", "XDG_RUNTIME_DIR is not an absolute path"),
        ("{0}/run", "XDG_RUNTIME_DIR is another user's: {0}/run"),
        ("{0}/link", "XDG_RUNTIME_DIR is another user's: {0}/link"),
    ],
)
def test_a_runtime_folder_that_is_not_ours(folder: str, said: str, tmp_path: Path) -> None:
    """Its owner could have a TPM mounted wherever he likes, over any empty folder."""
    if os.geteuid():
        pytest.skip("needs root")
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 65534, 65534)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    (tmp_path / "victim").mkdir()
    (tmp_path / "run/vtpm").symlink_to(tmp_path / "victim")
    env = {"XDG_STATE_HOME": str(tmp_path), "XDG_RUNTIME_DIR": folder.format(tmp_path)}
    state = f"dir={tmp_path / 'victim'}"
    done = run(*SWTPM_FUSE, "-n", "x", "--tpmstate", state, status=1, env=env)
    assert f"Error: {said.format(tmp_path)}; give --mount DIR\n" in done.stderr
    assert not list((tmp_path / "victim").iterdir())


SAYS_MISSING = "fuse: fusermount3 not found; install the package fuse3"
PROGRAM = ("-c", "import sys; from vtpm_cuse.cli.swtpm import main; sys.exit(main())", "fuse")


def test_without_fusermount3(make: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    server = make("vtpm0")
    done = run(
        sys.executable, *PROGRAM, *server.arguments, status=1, env={"PATH": str(tmp_path / "bin")}
    )
    assert SAYS_MISSING in done.stderr + server.said
    assert not server.device.parent.exists()


@pytest.mark.parametrize("part", ["", ".", "here/.."], ids=["empty", "dot", "relative"])
def test_fusermount3_of_the_current_folder_is_not_run(
    make: Callable[..., Server], tmp_path: Path, part: str
) -> None:
    """Who may write to a folder does not choose what somebody runs who happens to be there."""
    (tmp_path / "here").mkdir()
    planted = tmp_path / "fusermount3"
    planted.write_text(f"#!/bin/sh\n: >{tmp_path}/ran\nexit 1\n")
    planted.chmod(0o755)
    server = make("vtpm0")
    words = (sys.executable, *PROGRAM, *server.arguments, "--foreground")
    done = run(*words, status=1, env={"PATH": f"{part}:/none"}, cwd=tmp_path)
    assert not (tmp_path / "ran").exists()
    assert SAYS_MISSING in done.stderr + server.said


# -- what lies beside the TPM ---------------------------------------------------------------


def test_listing(server: Server) -> None:
    names = sorted(path.name for path in server.device.parent.iterdir())
    banks = ["pcr-sha1", "pcr-sha256", "pcr-sha384", "pcr-sha512"]
    others = ["caps", "durations", "log", "status", "timeouts", "tpm_version_major", "vtpm0"]
    assert names == sorted([*banks, *others, "vtpmrm0"])
    for bank in banks:
        pcrs = sorted(int(path.name) for path in (server.device.parent / bank).iterdir())
        assert pcrs == list(range(24))


def test_pcrs_are_those_that_the_tpm_tells(server: Server) -> None:
    with opened(server.device) as fd:
        for number in (0, 7, 16, 23):
            assert code_of(exchange(fd, pcr_extend(number, bytes([number]) * 32))) == 0
    told = run("tpm2_pcrread", "-T", f"device:{server.device}").stdout
    bank = ""
    seen = 0
    for line in told.splitlines():
        if found := re.fullmatch(r"  (\w+):", line):
            bank = found[1]
        elif found := re.fullmatch(r" +(\d+) *: 0x([0-9A-F]+)", line):
            assert text(server, f"pcr-{bank}/{found[1]}") == f"{found[2]}\n"
            seen += 1
    assert seen >= 48


def test_status_and_log(server: Server) -> None:
    before = json.loads(text(server, "status"))
    assert before["state"] == f"dir://{server.state}"
    assert (before["pid"], before["tpm_version"]) == (server.pid, "2.0")
    with opened(server.device) as fd:
        os.write(fd, LONGER)
        status = json.loads(text(server, "status"))
        assert (status["open"], status["busy"], status["running"]) == (True, True, True)
        cancelled(fd)
    assert f"{server.device} is a TPM 2.0" in text(server, "log")


def test_nothing_can_be_written(server: Server) -> None:
    mount = server.device.parent
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        assert errno_from(partial(os.open, mount / "caps", flags)) == errno.EACCES
    changes: tuple[Callable[[], object], ...] = (
        lambda: os.unlink(mount / "caps"),
        lambda: os.mkdir(mount / "x"),
        lambda: os.rename(mount / "caps", mount / "x"),
        lambda: (mount / "x").touch(),
        lambda: os.chmod(mount / "vtpm0", 0o400),
    )
    for change in changes:
        assert errno_from(change) in {errno.EPERM, errno.EACCES}


def test_a_client_does_not_notice_readers(server: Server) -> None:
    """Response in parts, a poll, the last command before the end: all as without them."""
    with opened(server.device) as fd:
        for _ in range(50):
            os.write(fd, get_random(20))
            head = os.read(fd, 5)
            text(server, "pcr-sha256/3")
            text(server, "caps")
            rest = os.read(fd, 4096)
            assert len(head + rest) == 10 + 2 + 20
            assert os.read(fd, 10) == b""


def test_a_text_waits_for_a_long_command(server: Server) -> None:
    with opened(server.device) as fd:
        os.write(fd, LONGER)
        reader = Background(lambda: text(server, "pcr-sha256/0"))
        cancelled(fd)
        assert reader.result(10) == "0" * 64 + "\n"


def test_a_client_that_never_reads(server: Server) -> None:
    fd = server.open()
    os.write(fd, RANDOM)
    unread = os.open(server.device.parent / "pcr-sha256/0", os.O_RDONLY)
    for _ in range(100):
        assert text(server, "tpm_version_major") == "2\n"
    assert errno_from(server.open) == errno.EBUSY
    os.close(fd)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0
    server.stop()
    assert errno_from(lambda: os.read(unread, 10)) in ENDED
    os.close(unread)


def test_readers_leave_nothing_behind(server: Server) -> None:
    def use(rounds: int) -> None:
        for number in range(rounds):
            text(server, f"pcr-sha1/{number % 24}")
            text(server, "status")
            os.listdir(server.device.parent)

    use(600)  # until every path has been gone, and memory is as large as it gets
    descriptors, resident, threads = footprint(server.pid)
    use(1000)
    assert footprint(server.pid)[::2] == (descriptors, threads)
    assert footprint(server.pid)[1] - resident <= 300


# -- what a reader could break --------------------------------------------------------------


def test_a_measurement_is_not_broken(server: Server) -> None:
    """A command between start and end of one would end it unseen; so the reader is refused."""
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_HASH_START) == 0
        assert errno_from(lambda: text(server, "pcr-sha256/17")) == errno.EBUSY
        assert ptm_result(fd, PTM_HASH_END) == 0
    assert text(server, "pcr-sha256/17") not in {"F" * 64 + "\n", "0" * 64 + "\n"}


def test_tpm12(make: Callable[..., Server]) -> None:
    server = make("vtpm0", tpm2=False, more=("--tpm12",)).start()
    assert text(server, "tpm_version_major") == "1\n"
    assert re.fullmatch(
        r"Manufacturer: 0x49424d00\nTCG version: 1\.2\nFirmware version: \d+\.\d+\n",
        text(server, "caps"),
    )
    assert re.fullmatch(r"\d+ \d+ \d+ \[original\]\n", text(server, "durations"))
    assert re.fullmatch(r"\d+ \d+ \d+ \d+ \[original\]\n", text(server, "timeouts"))
    with opened(server.device) as fd:
        extend = tpm12(0x14, (16).to_bytes(4, "big") + b"\x11" * 20)
        answer = exchange(fd, extend)
        assert code_of(answer) == 0
        assert text(server, "pcr-sha1/16") == answer[10:].hex().upper() + "\n"
        assert code_of(exchange(fd, tpm12(0xA0))) == 0  # TPM_SHA1Start
        update = tpm12(0xA1, (64).to_bytes(4, "big") + bytes(64))
        for _ in range(2):
            assert code_of(exchange(fd, update)) == 0
            assert errno_from(lambda: text(server, "pcr-sha1/16")) == errno.EBUSY


def test_a_shutdown_stays_the_last_command(server: Server) -> None:
    """The state after a client's TPM2_Shutdown(CLEAR) is not followed by one of ours."""
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM2_SHUTDOWN_CLEAR)) == 0
    before = server.permall.stat().st_mtime_ns
    text(server, "pcr-sha256/0")
    server.stop()
    assert server.permall.stat().st_mtime_ns == before


def test_who_has_the_answer_to_ptm_shutdown_finds_pid_file_and_lock_gone(server: Server) -> None:
    """The file itself goes when it is closed: the answer comes through it."""
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_SHUTDOWN) == 0
        assert not server.pid_file.exists()
        assert not is_locked(server.state)
    server.gone()


def test_no_state_is_touched_outside_the_sandbox_in_a_fuse_mount(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    words = ["-n", "vtpm0", "--mount", str(mount), "--tpmstate", f"dir={tmp_path / 'state'}"]
    words += ["--flags", "startup-clear,not-need-init", "--foreground"]
    with subprocess.Popen(
        [*WITNESS, "fuse", *words], env=s.environment(), stderr=subprocess.PIPE
    ) as process:
        try:
            wait_until((mount / "vtpm0").exists, "the device is there")
            process.terminate()
            _, told = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0
    found = {line for line in told.decode().splitlines() if "sandbox" in line}
    assert found == {"libtpms: in the sandbox", "state: in the sandbox"}
