"""The program swtpm-cuse: start, refusal, end, and what must survive them."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    OUR_IOCTL,
    PATIENCE,
    PTM_CANCEL_TPM_CMD,
    PTM_GET_STATEBLOB,
    PTM_HASH_START,
    PTM_INIT,
    PTM_SET_LOCALITY,
    PTM_SET_STATEBLOB,
    PTM_SHUTDOWN,
    PTM_STOP,
    ROOT,
    SWTPM_CUSE,
    Server,
    errno_from,
    exchange,
    needs,
    opened,
    ptm_result,
    run,
    seeded,
    u32,
    wait_for_line,
    wait_until,
)
from tests.support.commands import (
    NV_INDEX,
    TPM2_SHUTDOWN_CLEAR,
    TPM2_STARTUP_CLEAR,
    TPM2_STARTUP_STATE,
    code_of,
    create_primary_rsa,
    get_random,
    nv_data,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    pcr_value,
    tpm2,
)
from tests.support.files import open_files, tmpfs
from tests.support.zygote import whole_programs

if TYPE_CHECKING:
    from tests.kernel.conftest import Serve

pytestmark = pytest.mark.usefixtures("warm")

GOOD_STATE = ROOT / "tests/vectors/state/v0.7.1-tpm2-dir-plain/tpm2-00.permall"
GOOD_STATE_12 = ROOT / "tests/vectors/state/v0.7.1-tpm12-dir-plain/tpm-00.permall"
LOCKED = "Could not lock access to lockfile: Resource temporarily unavailable"
SHUTTING_DOWN = "CUSE TPM is shutting down."
DEVICES = Path("/sys/class/cuse")


def answers(server: Server) -> bool:
    with opened(server.device) as fd:
        return code_of(exchange(fd, get_random(8))) == 0


def cuse_fails(status: int, text: str, *words: str, user: str | None = None) -> None:
    done = run(SWTPM_CUSE, *words, status=status, user=user)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# -- what is refused ----------------------------------------------------------------------


def test_missing_name(cuse: None, tmp_path: Path) -> None:
    state = f"dir={tmp_path}/state"
    cuse_fails(254, "Error: device name missing", "--tpm2", "--tpmstate", state)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--tpmstate", "dir=/tmp,nonsense=1", "Error parsing tpmstate options: Unknown option"),
        ("--flags", "nonsense", "Error parsing flags options: Unknown option 'nonsense'"),
        ("--locality", "nonsense", "Error parsing locality options: Unknown option 'nonsense'"),
        ("--pid", "nonsense", "Error parsing pid options: Unknown option 'nonsense'"),
    ],
)
def test_unknown_sub_option(cuse: None, tmp_path: Path, option: str, value: str, text: str) -> None:
    state = ("--tpmstate", f"dir={tmp_path}/state")
    cuse_fails(253, text, "-n", "vtpmnew", "--tpm2", *state, option, value)


@pytest.mark.parametrize("number", [("-M", "65536"), ("-M", "x"), ("-m", "-1")])
def test_bad_number(cuse: None, tmp_path: Path, number: tuple[str, str]) -> None:
    state = f"dir={tmp_path}/state"
    cuse_fails(255, "", "-n", "vtpmnew", "--tpm2", "--tpmstate", state, *number)
    assert not Path("/dev/vtpmnew").exists()


def test_number_that_the_kernel_refuses(serve: Serve) -> None:
    server = serve("vtpmnew", more=("-M", "600"))
    server.fails(1, "The kernel refused to make /dev/vtpmnew (600:0)")


def test_log_that_cannot_be_written(cuse: None, tmp_path: Path) -> None:
    words = ("-n", "vtpmnew", "--tpm2", "--tpmstate", f"dir={tmp_path}/state")
    text = "Could not open logfile for writing: No such file or directory"
    cuse_fails(1, text, *words, "--log", f"file={tmp_path}/missing/log")


def test_pid_file_that_cannot_be_written(cuse: None, tmp_path: Path) -> None:
    words = ("-n", "vtpmnew", "--tpm2", "--tpmstate", f"dir={tmp_path}/state")
    cuse_fails(243, "pid file", *words, "--pid", f"file={tmp_path}/missing/pid")
    assert not Path("/dev/vtpmnew").exists()


def test_not_root(cuse: None) -> None:
    needs("LAB_SCRATCH" in os.environ, "opens the way to the programs: in the lab only")
    for folder in Path(sys.executable).parents:  # a home folder of mode 0700, for one
        folder.chmod(folder.stat().st_mode | 0o011)
    words = ("-n", "vtpmnew", "--tpm2", "--tpmstate", "dir=/tmp/vtpm-of-nobody")
    cuse_fails(252, "Error: Unable to setuid root. uid = ", *words, user="nobody")


def test_no_cuse(cuse: None, tmp_path: Path) -> None:
    needs("LAB_SCRATCH" in os.environ, "takes /dev/cuse away: in the lab only")
    words = ("-n", "vtpmnew", "--tpm2", "--tpmstate", f"dir={tmp_path}/state")
    os.rename("/dev/cuse", "/dev/cuse.away")
    try:
        cuse_fails(1, "cuse: device not found, try 'modprobe cuse' first", *words)
    finally:
        os.rename("/dev/cuse.away", "/dev/cuse")


def test_startup_deactivated_is_for_tpm12(serve: Serve) -> None:
    """No device, and still success, as in the C suite."""
    server = serve("vtpmnew", flags="startup-deactivated")
    server.fails(0, "TPM 2 does not support startup deactivated.")
    assert not server.device.exists()


# -- names and numbers --------------------------------------------------------------------


def test_name_of_another_device(cuse: None, tmp_path: Path) -> None:
    state = f"dir={tmp_path}/state"
    cuse_fails(
        255, "Error: A device '/dev/null' already exists.", "-n", "null", "--tpmstate", state
    )


def test_name_of_a_live_tpm(serve: Serve, tmp_path: Path) -> None:
    first = serve("vtpmtwo").start()
    second = serve("vtpmtwo", state=tmp_path / "other", more=("--pid", f"file={tmp_path}/x"))
    second.fails(255, "Error: A device '/dev/vtpmtwo' already exists.")
    assert answers(first)


def test_name_taken_behind_a_removed_node(serve: Serve, tmp_path: Path) -> None:
    first = serve("vtpmtwo").start()
    first.device.unlink()
    second = serve("vtpmtwo", state=tmp_path / "other", more=("--pid", f"file={tmp_path}/x"))
    second.fails(1, "The device name 'vtpmtwo' is taken")
    first.signal(signal.SIGTERM)
    first.gone()


def test_number_taken(serve: Serve) -> None:
    first = serve("vtpmone").start()
    number = first.device.stat().st_rdev
    major, minor = os.major(number), os.minor(number)
    second = serve("vtpmtwo", more=("-M", str(major), "-m", str(minor)))
    second.fails(1, f"The device number {major}:{minor} is taken")
    assert answers(first)


def test_number_is_honoured(serve: Serve) -> None:
    server = serve("vtpmnum", more=("-M", "240", "-m", "77")).start()
    number = server.device.stat().st_rdev
    assert (os.major(number), os.minor(number)) == (240, 77)
    assert (DEVICES / "vtpmnum/dev").read_text() == "240:77\n"
    assert answers(server)


def test_two_start_at_once_under_one_name(serve: Serve, tmp_path: Path) -> None:
    """One of them gets the device; the other says that it did not."""
    (first, second) = serve("vtpmrace"), serve("vtpmrace", state=tmp_path / "other")
    second.pid_file = first.pid_file  # only the one that wins writes it
    both = [
        subprocess.Popen([SWTPM_CUSE, *server.arguments], stderr=subprocess.DEVNULL)
        for server in (first, second)
    ]
    statuses = sorted(process.wait(PATIENCE) for process in both)
    assert statuses[0] == 0
    assert statuses[1] in {1, 255}
    assert answers(first)
    first._pidfd = os.pidfd_open(first.pid)
    first.stop()


# -- state --------------------------------------------------------------------------------


def test_missing_state_directory_is_made(serve: Serve, tmp_path: Path) -> None:
    server = serve("vtpmnew", state=tmp_path / "a/b/c").start()
    assert server.permall.stat().st_size > 500
    assert answers(server)


def test_state_directory_that_is_a_file(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    serve("vtpmnew", state=tmp_path / "file").fails(255, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "here"


def test_relative_state_directory(cuse: None, tmp_path: Path) -> None:
    """The background process leaves the directory it was started in, but not the state."""
    words = ("-n", "vtpmrel", "--tpm2", "--tpmstate", "dir=state", "--flags", "startup-clear")
    run(SWTPM_CUSE, *words, cwd=tmp_path)
    try:
        permall = tmp_path / "state/tpm2-00.permall"
        before = permall.read_bytes()
        with opened(Path("/dev/vtpmrel")) as fd:
            assert code_of(exchange(fd, nv_define(NV_INDEX, 16))) == 0
        assert permall.read_bytes() != before
    finally:
        run(OUR_IOCTL, "-s", "/dev/vtpmrel")


def test_second_server_on_the_same_state(serve: Serve) -> None:
    first = serve("vtpmone").start()
    serve("vtpmtwo", state=first.state).fails(255, LOCKED)
    assert not Path("/dev/vtpmtwo").exists()
    second = serve("vtpmtwo", state=first.state, flags="").start()
    with opened(second.device) as fd:
        assert ptm_result(fd, PTM_INIT) == 9
    assert LOCKED in second.said
    assert answers(first)
    first.stop()
    with opened(second.device) as fd:
        assert ptm_result(fd, PTM_INIT) == 0
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


def fill(folder: Path) -> Path:
    """Leaves not a byte."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        assert errno_from(lambda: [file.write(bytes(4096)) for _ in range(10_000)]) == errno.ENOSPC
    return filler


def nothing_to_free(server: Server, folder: Path) -> bool:
    """Whether the server holds no file there that has lost its name."""
    held = open_files(server.pid).values()
    return not any(path.startswith(f"{folder}/") and "(deleted)" in path for path in held)


def test_read_only_state(serve: Serve, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        (disk / "tpm2-00.permall").write_bytes(GOOD_STATE.read_bytes())
        run("mount", "-o", "remount,ro", disk)
        server = serve("vtpmnew", state=disk)
        server.fails(255, "Read-only file system")
        assert server.permall.read_bytes() == GOOD_STATE.read_bytes()


def test_no_room_for_a_new_state(serve: Serve, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        filler = fill(disk)
        server = serve("vtpmnew", state=disk)
        server.fails(255, "No space left on device")
        filler.unlink()
        assert {path.name for path in disk.iterdir()} <= {".lock"}
        server.start()
        assert answers(server)
        server.stop()


def test_disk_full_later(serve: Serve, tmp_path: Path) -> None:
    """The TPM says that it failed; the state on disk is the old one, whole."""
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        server = serve("vtpmnew", state=disk).start()
        with opened(server.device) as fd:
            assert code_of(exchange(fd, nv_define(NV_INDEX, 16))) == 0
            assert code_of(exchange(fd, nv_write(NV_INDEX, b"old"))) == 0
            before = server.permall.read_bytes()
            wait_until(partial(nothing_to_free, server, disk), "the replaced file is freed")
            filler = fill(disk)
            assert code_of(exchange(fd, nv_write(NV_INDEX, b"new"))) != 0
            assert server.permall.read_bytes() == before
        assert "No space left on device" in server.said
        filler.unlink()
        server.stop()
        assert {path.name for path in disk.iterdir()} == {".lock", server.permall.name}
        server.start()
        with opened(server.device) as fd:
            assert nv_data(exchange(fd, nv_read(NV_INDEX, 3))) == b"old"
        server.stop()


DAMAGED = {
    "garbage": b"garbage" * 200,
    "truncated": GOOD_STATE.read_bytes()[:700],
    "header": GOOD_STATE.read_bytes()[:10],
    "empty": b"",
}


def test_damaged_state_by_init(serve: Serve) -> None:
    """PTM_INIT says so and touches nothing; with the right file it works again."""
    server = serve("vtpmbad", flags="")
    server.state.mkdir()
    server.start()
    with opened(server.device) as fd:
        for name, content in DAMAGED.items():
            server.permall.write_bytes(content)
            assert ptm_result(fd, PTM_INIT) == 0x101, name
            assert ptm_result(fd, PTM_INIT, u32(1)) == 0x101, name
            assert server.permall.read_bytes() == content, name
            assert exchange(fd, get_random(8)).hex() == "80010000000a00000101"
        server.permall.write_bytes(GOOD_STATE.read_bytes())
        assert ptm_result(fd, PTM_INIT) == 0
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_state_at_start(serve: Serve, name: str) -> None:
    server = serve("vtpmbad")
    server.state.mkdir()
    server.permall.write_bytes(DAMAGED[name])
    server.fails(255, "Error: Could not initialize the TPM")
    assert server.permall.read_bytes() == DAMAGED[name]
    assert not server.device.exists()


def test_damaged_tpm12_state(serve: Serve) -> None:
    server = serve("vtpmbad", flags="", tpm2=False)
    server.state.mkdir()
    server.start()
    good = GOOD_STATE_12.read_bytes()
    with opened(server.device) as fd:
        for content in (b"garbage" * 200, good[:700], b""):
            server.permall.write_bytes(content)
            assert ptm_result(fd, PTM_INIT) != 0
            assert server.permall.read_bytes() == content
        server.permall.write_bytes(good)
        assert ptm_result(fd, PTM_INIT) == 0


# -- the end ------------------------------------------------------------------------------


def resumes(server: Server) -> bool:
    """Whether TPM2_Startup(STATE) works, that is, a TPM2_Shutdown came before the end."""
    server.flags = "not-need-init"
    server.start()
    with opened(server.device) as fd:
        code = code_of(exchange(fd, TPM2_STARTUP_STATE))
    assert code in {0, 0x1C4}
    return code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_foreground(serve: Serve, number: signal.Signals) -> None:
    """Exit 0, nothing left, and an orderly shutdown of the TPM: its PCRs can be resumed."""
    server = serve("vtpmfg", more=("--foreground",))
    process = subprocess.Popen([SWTPM_CUSE, *server.arguments])
    wait_for_line(server.log, "CUSE TPM successfully initialized.", process)
    wait_for_line(server.pid_file, str(process.pid), process)  # written a moment later
    assert server.pid == process.pid
    with opened(server.device) as fd:
        assert code_of(exchange(fd, pcr_extend(7, b"\x11" * 32))) == 0
        before = pcr_value(exchange(fd, pcr_read(7)))
    server._pidfd = os.pidfd_open(process.pid)
    process.send_signal(number)
    assert process.wait(30) == 0
    server.gone()
    assert server.said.endswith(SHUTTING_DOWN + "\n")
    server.more = ()
    assert resumes(server)
    with opened(server.device) as fd:
        assert pcr_value(exchange(fd, pcr_read(7))) == before


def test_who_may_use_the_device_is_not_its_platform(serve: Serve) -> None:
    """udev gives it to a user of its own, whose programs need commands alone."""
    server = serve("vtpmbg").start()
    os.chown(server.device, 65534, -1)
    code = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "os.write(fd, bytes.fromhex('80010000000c0000017b0008'))\n"
        "assert len(os.read(fd, 4096)) == 20\n"
        "for number in map(int, sys.argv[2:]):\n"
        "    try:\n"
        "        fcntl.ioctl(fd, number, bytearray(number >> 16 & 0x3FFF), True)\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
    )
    platforms = (PTM_INIT, PTM_STOP, PTM_SHUTDOWN, PTM_SET_LOCALITY, PTM_HASH_START)
    numbers = (*platforms, PTM_GET_STATEBLOB, PTM_SET_STATEBLOB)
    words = ["/usr/bin/python3", "-c", code, str(server.device), *map(str, numbers)]
    done = subprocess.run(
        words, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("refused\n" * len(numbers), "")
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_GET_STATEBLOB, u32(0, 1, 0)) == 0


@pytest.mark.parametrize("end", ["SIGTERM", "PTM_SHUTDOWN"])
def test_end_of_the_background(serve: Serve, end: str) -> None:
    server = serve("vtpmbg").start()
    assert answers(server)
    if end == "SIGTERM":
        server.signal(signal.SIGTERM)
    else:
        with opened(server.device) as fd:
            assert ptm_result(fd, PTM_SHUTDOWN) == 0
            assert not server.pid_file.exists(), "gone before the answer, the state given up"
    server.gone()
    assert resumes(server)


def test_no_shutdown_when_disabled(serve: Serve) -> None:
    server = serve("vtpmbg", flags="startup-clear,disable-auto-shutdown").start()
    assert answers(server)
    server.signal(signal.SIGTERM)
    server.gone()
    assert not resumes(server)


def test_own_shutdown_is_respected(serve: Serve) -> None:
    server = serve("vtpmbg").start()
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM2_SHUTDOWN_CLEAR)) == 0
    server.signal(signal.SIGTERM)
    server.gone()
    assert not resumes(server)


def test_end_with_a_client_in_the_middle(serve: Serve) -> None:
    """A running command is ended, its reader is told, the TPM is shut down all the same."""
    server = serve("vtpmbg").start()
    with opened(server.device) as fd:
        os.write(fd, create_primary_rsa(bits=3072))
        server.signal(signal.SIGTERM)
        server.gone()
        assert errno_from(lambda: os.read(fd, 4096)) in {errno.ENOTCONN, errno.ECONNABORTED}
        assert errno_from(lambda: os.write(fd, get_random(8))) == errno.ENOTCONN
        assert errno_from(lambda: ptm_result(fd, PTM_CANCEL_TPM_CMD)) == errno.ENOTCONN
    assert resumes(server)


def test_background_holds_nothing_of_its_caller(serve: Serve, tmp_path: Path) -> None:
    with whole_programs():
        server = serve("vtpmbg").start()
    proc = Path(f"/proc/{server.pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert {os.readlink(proc / "fd" / str(number)) for number in range(3)} == {"/dev/null"}
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    assert int(fields[3]) == server.pid  # a session of its own
    links = [os.readlink(path) for path in (proc / "fd").iterdir()]
    assert links.count("/dev/cuse") == 1
    assert b"/swtpm-cuse\0-n\0vtpmbg\0" in (proc / "cmdline").read_bytes()


# -- kill -9 ------------------------------------------------------------------------------

COUNTER = 0x01500042
_AUTH = bytes.fromhex("00000009400000090000000000")
DEFINE_COUNTER = tpm2(
    0x12A,
    struct.pack(">I", 0x40000001)
    + _AUTH
    + struct.pack(">HHIHIHH", 0, 14, COUNTER, 0x000B, 0x00020012, 0, 8),
    sessions=True,
)
INCREMENT = tpm2(0x134, struct.pack(">II", 0x40000001, COUNTER) + _AUTH, sessions=True)


def count(fd: int) -> int:
    return int.from_bytes(nv_data(exchange(fd, nv_read(COUNTER, 8))), "big")


def test_kill_at_random_moments(serve: Serve) -> None:
    """What the TPM has acknowledged is there after a kill; nothing but the very last may be more."""
    random = seeded(2)
    server = serve("vtpmkill").start()
    with opened(server.device) as fd:
        assert code_of(exchange(fd, DEFINE_COUNTER)) == 0
        assert code_of(exchange(fd, INCREMENT)) == 0
        acknowledged = count(fd)
    increments = 0
    for _ in range(10):
        killer = threading.Timer(random.uniform(0, 0.2), server.signal, [signal.SIGKILL])
        with opened(server.device) as fd:
            killer.start()
            try:
                while True:
                    response = exchange(fd, INCREMENT)
                    if not response:
                        break
                    assert code_of(response) == 0
                    acknowledged += 1
                    increments += 1
            except OSError as exc:
                assert exc.errno in {errno.ENOTCONN, errno.ECONNABORTED}  # noqa: PT017
        killer.join()
        server.gone(pid_file=True)
        server.start()
        with opened(server.device) as fd:
            found = count(fd)
        assert acknowledged <= found <= acknowledged + 1
        acknowledged = found
    assert increments > 20
    server.stop()
    assert {path.name for path in server.state.iterdir()} <= {
        ".lock",
        "tpm2-00.permall",
        "TMP2-00.permall",
    }


def test_restart_while_an_old_client_has_it_open(serve: Serve) -> None:
    server = serve("vtpmkill").start()
    with ExitStack() as stack:
        old = stack.enter_context(opened(server.device))
        os.write(old, get_random(8))
        server.kill()
        assert errno_from(lambda: os.read(old, 100)) == errno.ENOTCONN
        server.start()
        new = stack.enter_context(opened(server.device))
        assert code_of(exchange(new, get_random(8))) == 0
        assert errno_from(lambda: os.write(old, get_random(8))) == errno.ENOTCONN
        stack.pop_all().close()
    assert answers(server)


def test_many_devices_come_and_go(serve: Serve) -> None:
    before = sorted(DEVICES.iterdir())
    server = serve("vtpmloop")
    for number in range(20):
        server.start()
        assert answers(server)
        server.signal((signal.SIGTERM, signal.SIGKILL)[number % 2])
        server.gone(pid_file=number % 2 == 1)
        assert sorted(DEVICES.iterdir()) == before


def test_several_devices_at_once(serve: Serve) -> None:
    servers = [serve(f"vtpmset{number}").start() for number in range(4)]
    for number, server in enumerate(servers):
        with opened(server.device) as fd:
            assert code_of(exchange(fd, pcr_extend(7, bytes([number]) * 32))) == 0
    values = set()
    for server in servers:
        with opened(server.device) as fd:
            values.add(pcr_value(exchange(fd, pcr_read(7))))
    assert len(values) == 4
    for server in servers:
        server.signal(signal.SIGTERM)
    for server in servers:
        server.gone()
