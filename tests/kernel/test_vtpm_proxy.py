"""``swtpm chardev --vtpm-proxy``: a TPM that the kernel itself drives."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    OUR_IOCTL,
    PATIENCE,
    ROOT,
    Background,
    child,
    errno_from,
    exchange,
    needs,
    opened,
    processes,
    run,
    wait_blocked,
    wait_child,
    wait_exit,
    wait_readable,
)
from tests.kernel.proxy import SWTPM, Proxy, next_number, uevents
from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.zygote import whole_programs
from vtpm_cuse.acquire.chardev import ProxyMaker
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.zygote import Zygote

pytestmark = pytest.mark.usefixtures("warm")

log = logging.getLogger(__name__)

RANDOM = tpm.get_random(8)
NEW_DEV = 0xC014A100
SESSION = ROOT / "tests/support/tpm2_session.sh"


@pytest.fixture(scope="module", autouse=True)
def _driver() -> None:
    error = errno_from(lambda: os.close(os.open("/dev/vtpmx", os.O_RDWR)))
    needs(not error, f"/dev/vtpmx: {os.strerror(error)}; run kernel-helpers/lab -- ...")
    needs(shutil.which("tpm2_getrandom") is not None, "tpm2-tools are missing")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One TPM 2.0 for all tests that leave it running."""
    with Proxy(tmp_path_factory.mktemp("proxy")) as proxy:
        yield proxy
        assert proxy.end() == 0


def digest_in_sysfs(proxy: Proxy, pcr: int, bank: str = "sha256") -> bytes:
    return bytes.fromhex((proxy.sysfs / f"pcr-{bank}" / str(pcr)).read_text())


# -- the devices ----------------------------------------------------------------------------


def test_line_names_the_device(shared: Proxy) -> None:
    device = os.stat(shared.device).st_rdev
    assert shared.line == (
        f"New TPM device: /dev/tpm{shared.number} "
        f"(major/minor = {os.major(device)}/{os.minor(device)})\n"
    )


def test_the_kernel_takes_it_for_a_tpm(shared: Proxy) -> None:
    assert (shared.sysfs / "tpm_version_major").read_text() == "2\n"
    with opened(shared.device) as fd:
        assert tpm.code_of(exchange(fd, RANDOM)) == 0
        error = errno_from(lambda: os.close(os.open(shared.device, os.O_RDWR)))
        assert error == errno.EBUSY


def test_response_can_be_read_in_parts(shared: Proxy) -> None:
    for path in (shared.device, shared.shared):
        with opened(path) as fd:
            os.write(fd, RANDOM)
            header = os.read(fd, 10)
            assert struct.unpack(">HII", header)[1:] == (20, 0)
            assert len(os.read(fd, 4096)) == 10


def test_pcrs_of_the_kernel_are_ours(shared: Proxy) -> None:
    """Its files in sysfs, each a command of its own, against what a client reads."""
    with opened(shared.shared) as fd:
        for pcr in (0, 7, 16, 23):
            digest = hashlib.sha256(b"%d" % pcr).digest()
            assert tpm.code_of(exchange(fd, tpm.pcr_extend(pcr, digest))) == 0
        for pcr in range(24):
            value = tpm.pcr_value(exchange(fd, tpm.pcr_read(pcr)))
            assert digest_in_sysfs(shared, pcr) == value
    banks = {path.name for path in shared.sysfs.glob("pcr-*")}
    assert banks == {"pcr-sha1", "pcr-sha256", "pcr-sha384", "pcr-sha512"}


def test_what_one_client_extends_the_other_sees(shared: Proxy) -> None:
    with opened(shared.shared) as one, opened(shared.shared) as other:
        before = tpm.pcr_value(exchange(other, tpm.pcr_read(10)))
        assert tpm.code_of(exchange(one, tpm.pcr_extend(10, b"\x5a" * 32))) == 0
        expected = hashlib.sha256(before + b"\x5a" * 32).digest()
        assert tpm.pcr_value(exchange(other, tpm.pcr_read(10))) == expected
    assert digest_in_sysfs(shared, 10) == expected


def test_tool_extends_and_tool_sees(shared: Proxy) -> None:
    env = {"TPM2TOOLS_TCTI": f"device:{shared.shared}"}
    run("tpm2_pcrextend", f"11:sha256={'3c' * 32}", env=env)
    expected = hashlib.sha256(bytes(32) + b"\x3c" * 32).hexdigest().upper()
    assert expected in run("tpm2_pcrread", "sha256:11", env=env).stdout


def test_session_with_tools(shared: Proxy) -> None:
    env = {"TPM2TOOLS_TCTI": f"device:{shared.shared}"}
    assert run(SESSION, env=env).stdout.endswith("session passed\n")


def test_several_clients_at_once(shared: Proxy) -> None:
    """Each with a key and a session of its own: the kernel swaps them in and out."""

    def use(unique: bytes) -> None:
        with opened(shared.shared) as fd:
            assert tpm.code_of(exchange(fd, tpm.create_primary_rsa(unique=unique))) == 0
            for _ in range(20):
                answer = exchange(fd, RANDOM)
                assert (len(answer), tpm.code_of(answer)) == (20, 0)

    for client in [Background(partial(use, b"%d" % number)) for number in range(4)]:
        client.result()


def test_hardware_random_generator_is_fed(shared: Proxy) -> None:
    available = Path("/sys/class/misc/hw_random/rng_available").read_text().split()
    assert f"tpm-rng-{shared.number}" in available


@pytest.mark.parametrize("size", [4, 6, 9])
def test_fragment_that_a_client_forges_spoils_nothing(shared: Proxy, size: int) -> None:
    """The kernel passes on as many bytes as the header says, be it fewer than a header has."""
    with opened(shared.device) as fd:
        fragment = RANDOM[:2] + size.to_bytes(4, "big") + RANDOM[6:]
        error = errno_from(lambda: os.write(fd, fragment))
        if not error:
            assert tpm.code_of(os.read(fd, 4096)) != 0
        answer = exchange(fd, RANDOM)
        assert (len(answer), tpm.code_of(answer)) == (20, 0)


def test_user_may_not_set_the_locality(shared: Proxy) -> None:
    with opened(shared.device) as fd:
        command = bytes.fromhex("80020000000b2000100003")
        assert errno_from(lambda: os.write(fd, command)) == errno.EFAULT
        assert tpm.code_of(exchange(fd, RANDOM)) == 0


def test_control_channel_beside_it(shared: Proxy) -> None:
    assert "0x" in run(OUR_IOCTL, "--unix", shared.control, "-c").stdout
    with s.connect(shared.control) as control:
        assert control.info(1)[0] > 0
        assert control.result(s.SET_LOCALITY, s.u32(0)) == 0
        ours, theirs = os.openpty()
        try:
            assert control.set_data_fd(theirs) == 0x1F
        finally:
            os.close(ours)
            os.close(theirs)
    with opened(shared.device) as fd:
        assert tpm.code_of(exchange(fd, RANDOM)) == 0


def test_long_command_leaves_the_control_channel_free(shared: Proxy) -> None:
    def create() -> bytes:
        with opened(shared.device) as fd:
            return exchange(fd, tpm.create_primary_rsa(unique=b"long"))

    with s.connect(shared.control) as control:
        client = Background(create)
        asked = 0
        while client.running:
            assert control.control(s.GET_CAPABILITY, size=8)
            asked += 1
        response = client.result()
    assert isinstance(response, bytes)
    assert tpm.code_of(response) == 0
    assert asked > 1


def test_who_is_told_of_the_device_finds_one_process(tmp_path: Path) -> None:
    """By its command line, as ps shows it."""
    proxy, others = Proxy(tmp_path), set(processes("--vtpm-proxy"))
    with uevents() as events, whole_programs():
        proxy.begin()
        found = set(processes("--vtpm-proxy")) - others
        events.wait("add", *proxy.names)
    assert found == {proxy.process.pid}
    assert proxy.end() == 0


# -- the other version, start and end -------------------------------------------------------


def test_tpm12(tmp_path: Path) -> None:
    with Proxy(tmp_path, tpm2=False) as proxy:
        assert (proxy.sysfs / "tpm_version_major").read_text() == "1\n"
        assert not proxy.shared.exists()
        with opened(proxy.device) as fd:
            digest = hashlib.sha1(b"x").digest()  # noqa: S324  all that a TPM 1.2 knows
            response = exchange(fd, tpm.tpm12_pcr_extend(16, digest))
            assert tpm.code_of(response) == 0
            assert response[10:] == hashlib.sha1(bytes(20) + digest).digest()  # noqa: S324
        shown = (proxy.sysfs / "pcrs").read_text()
        assert f"PCR-16: {response[10:].hex(' ').upper()}" in shown
        assert proxy.end() == 0


@pytest.mark.parametrize("tpm2", [True, False])
def test_startup_can_be_left_to_the_kernel(tmp_path: Path, tpm2: bool) -> None:
    with Proxy(tmp_path, tpm2=tpm2, more=("--flags", "startup-none")) as proxy:
        with opened(proxy.device) as fd:
            response = exchange(fd, RANDOM if tpm2 else tpm.tpm12_pcr_read(0))
            assert tpm.code_of(response) == 0
        assert proxy.end() == 0


def test_state_survives_and_can_be_locked_at_once(tmp_path: Path) -> None:
    """When the devices are gone, the next server has the state, and the number, for the asking."""
    with Proxy(tmp_path / "a") as first:
        with opened(first.shared) as fd:
            assert tpm.code_of(exchange(fd, tpm.nv_define(tpm.NV_INDEX, 8))) == 0
            assert tpm.code_of(exchange(fd, tpm.nv_write(tpm.NV_INDEX, b"whatever"))) == 0
        with uevents() as events:
            first.process.send_signal(signal.SIGTERM)
            events.wait("remove", *first.names)
            with Proxy(tmp_path / "a") as second:
                assert second.number == first.number
                with opened(second.shared) as fd:
                    answer = exchange(fd, tpm.nv_read(tpm.NV_INDEX, 8))
                assert tpm.nv_data(answer) == b"whatever"
                assert second.end() == 0
        assert first.process.wait() == 0
        first.process.communicate()


def test_end_by_the_control_channel(tmp_path: Path) -> None:
    with Proxy(tmp_path) as proxy:
        run(OUR_IOCTL, "--unix", proxy.control, "-s")
        assert proxy.ended() == 0
    assert not proxy.control.exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_end_with_clients(tmp_path: Path, how: signal.Signals) -> None:
    """They hold the devices open and one waits for a long command: all of them get to know."""
    with Proxy(tmp_path) as proxy, opened(proxy.device) as plain, opened(proxy.shared) as shared:

        def create() -> None:
            os.write(plain, tpm.create_primary_rsa(unique=b"end"))
            os.read(plain, 4096)

        client = Background(lambda: errno_from(create))
        wait_blocked(client.native_id, "1")  # in write
        assert proxy.end(how) == (0 if how is signal.SIGTERM else -how)
        assert client.result() in {0, errno.EPIPE, errno.ECANCELED}
        for fd in (plain, shared):
            assert errno_from(partial(os.write, fd, RANDOM)) == errno.EPIPE
    with Proxy(tmp_path) as again, opened(again.shared) as fd:
        assert again.number == proxy.number
        assert tpm.code_of(exchange(fd, RANDOM)) == 0
        assert again.end() == 0


def test_client_killed_in_a_command(tmp_path: Path) -> None:
    with Proxy(tmp_path) as proxy:

        def create() -> None:
            with opened(proxy.device) as fd:
                os.write(fd, tpm.create_primary_rsa(unique=b"kill"))

        with child(create) as pid:
            wait_blocked(pid, "1")
            os.kill(pid, signal.SIGKILL)
            assert wait_child(pid) == -signal.SIGKILL
        with opened(proxy.device) as fd:
            assert tpm.code_of(exchange(fd, RANDOM)) == 0
        assert proxy.end() == 0


@pytest.mark.parametrize("tpm2", [True, False])
def test_daemon(tmp_path: Path, tpm2: bool) -> None:
    """The line comes first, and there is nothing else on the caller's output.

    The next line of a script may use the device.
    """
    proxy = Proxy(tmp_path, tpm2=tpm2)
    pid_file = tmp_path / "pid"
    with uevents() as events:
        done = run(*proxy.arguments, "-d", "--pid", f"file={pid_file}")
        pid = int(pid_file.read_text())
        pidfd = os.pidfd_open(pid)
        try:
            assert done.stdout.startswith("New TPM device: /dev/tpm")
            assert (done.stdout.count("\n"), done.stderr) == (1, "")
            proxy.number = int(done.stdout.removeprefix("New TPM device: /dev/tpm").split()[0])
            with opened(proxy.shared if tpm2 else proxy.device) as fd:
                answer = exchange(fd, RANDOM if tpm2 else tpm.TPM12_CONTINUE_SELF_TEST)
                assert tpm.code_of(answer) == 0
        finally:
            os.kill(pid, signal.SIGTERM)
            events.wait("remove", *proxy.names)
            os.close(pidfd)


def test_two_at_once(shared: Proxy, tmp_path: Path) -> None:
    with Proxy(tmp_path) as other:
        assert other.number != shared.number
        with opened(other.shared) as one, opened(shared.shared) as two:
            answers = [exchange(fd, RANDOM) for fd in (one, two)]
        assert [tpm.code_of(answer) for answer in answers] == [0, 0]
        assert answers[0] != answers[1]
        assert other.end() == 0


# -- bad input ------------------------------------------------------------------------------


def test_without_the_capability(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    state = tmp_path / "state"
    state.mkdir(mode=0o777)
    words = (SWTPM, "chardev", "--vtpm-proxy", "--tpm2", "--tpmstate", f"dir={state}")
    dropped = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    done = run(*dropped, *words, status=1)
    assert (done.stdout, done.stderr) == (
        "",
        "swtpm: Ioctl to create vtpm proxy failed: Operation not permitted; "
        "it takes root, or the capability CAP_SYS_ADMIN\n",
    )
    done = run("setpriv", "--reuid=65534", "--clear-groups", *words, status=1)
    assert (done.stdout, done.stderr) == (
        "",
        "swtpm: Could not open /dev/vtpmx: Permission denied; run it as root\n",
    )
    assert not list(state.iterdir())


def test_no_descriptor_left(tmp_path: Path) -> None:
    """Of those a process may have, the kernel needs one for the device."""

    def make() -> None:
        maker = ProxyMaker(tpm2=True)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
        while errno_from(lambda: os.dup(0)) == 0:
            pass
        with pytest.raises(FrontendError, match="vtpm proxy failed: Too many open files"):
            maker.make()

    with child(make) as pid:
        assert wait_child(pid) == 0


def test_tpm_that_cannot_start_leaves_no_device(tmp_path: Path) -> None:
    proxy = Proxy(tmp_path)
    (proxy.state / "tpm2-00.permall").write_bytes(b"damaged")
    before = set(os.listdir("/sys/class/tpm"))
    done = run(*proxy.arguments, status=1)
    assert done.stdout == ""  # none was promised
    assert "Traceback" not in done.stderr
    assert "Error: Could not initialize the TPM" in proxy.said
    assert set(os.listdir("/sys/class/tpm")) == before
    assert (proxy.state / "tpm2-00.permall").read_bytes() == b"damaged"


def test_device_that_the_kernel_refuses(tmp_path: Path) -> None:
    """A TPM 1.2 behind a device that was to be a TPM 2.0: its set-up fails, and we say so."""
    before = set(os.listdir("/sys/class/tpm"))
    fd = new_device(flags=1)
    try:
        (tmp_path / "state").mkdir()
        words = ("-f", str(fd), "--tpmstate", f"dir={tmp_path}/state", "--flags", "startup-clear")
        done = run_inheriting(fd, *words)
    finally:
        os.close(fd)
    said = "swtpm: Data client disconnected\nswtpm: The kernel has given the TPM device up; see dmesg\n"
    assert done == (1, said)
    assert set(os.listdir("/sys/class/tpm")) == before


def new_device(flags: int) -> int:
    """A proxy's descriptor, made without the package."""
    control = os.open("/dev/vtpmx", os.O_RDWR)
    try:
        argument = bytearray(struct.pack("=5I", flags, 0, 0, 0, 0))
        fcntl.ioctl(control, NEW_DEV, argument, True)
    finally:
        os.close(control)
    return int(struct.unpack("=5I", argument)[2])


def run_inheriting(fd: int, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [SWTPM, "chardev", *words],
        check=False,
        pass_fds=[fd],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stderr


def test_descriptor_of_a_parent_for_a_server_without_privileges(tmp_path: Path) -> None:
    """Whoever may make devices makes one, and somebody else serves it."""
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != folder.parent and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    number = next_number()
    with uevents() as events:
        fd = new_device(flags=1)
        words = [SWTPM, "chardev", "--tpm2", "-f", str(fd), "--tpmstate", f"dir={state}"]
        words += ["--flags", "startup-clear", "--locality", "allow-set-locality"]
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        process = subprocess.Popen([*nobody, *words], pass_fds=[fd])
        try:
            os.close(fd)
            events.wait("add", f"tpm{number}", f"tpmrm{number}")
            with opened(Path(f"/dev/tpmrm{number}")) as client:
                assert tpm.code_of(exchange(client, RANDOM)) == 0
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert not Path(f"/dev/tpm{number}").exists()


def test_response_that_came_too_late(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel has asked something else by then, or nothing: a warning, and on it goes."""
    device, made = ProxyMaker(tpm2=True).make()
    try:
        assert not os.get_inheritable(device.fileno())
        wait_readable(device.fileno())
        assert device.recv(4096) == bytes.fromhex("80020000000b2000100000")
        assert device.send(bytes(10)) == 10
        assert device.send(bytes(10)) == 10
        assert "did not wait" in caplog.text
    finally:
        device.close()
    assert not Path(f"/sys/class/tpm/tpm{made.tpm_num}").exists()


# -- again and again ------------------------------------------------------------------------


@pytest.mark.timeout(900)  # a hundred self-tests by the kernel, on an emulated processor
def test_devices_come_and_go(zygote: Zygote, tmp_path: Path) -> None:
    """By turns ended in order and killed; no descriptor, memory or number is lost on the way."""
    rounds = int(os.environ.get("PROXY_ROUNDS", "100"))
    proxy = Proxy(tmp_path, number=next_number())
    pid_file = tmp_path / "pid"
    words = [*proxy.arguments, "-d", "--pid", f"file={pid_file}"]
    free, files, descriptors = 0, 0, 0
    with uevents() as events:
        for number in range(rounds):
            assert zygote.run(words)[0] == 0, proxy.said
            events.wait("add", *proxy.names)
            with opened(proxy.shared) as fd:
                assert tpm.code_of(exchange(fd, RANDOM)) == 0
            how = signal.SIGKILL if number % 2 else signal.SIGTERM
            pidfd = os.pidfd_open(int(pid_file.read_text()))
            signal.pidfd_send_signal(pidfd, how)
            events.wait("remove", *proxy.names)
            wait_exit(pidfd)
            os.close(pidfd)
            if number == 9:  # what is made once has been made
                free, files = available_kib(), open_files()
                descriptors = zygote.descriptors()
    assert zygote.descriptors() == descriptors
    assert open_files() <= files + 64  # counted per processor, so never exactly
    lost = free - available_kib()
    log.info("%d rounds: %d KiB less free, %d more files", rounds, lost, open_files() - files)
    assert lost < 16384 + 20 * rounds
    assert "Traceback" not in proxy.said


def available_kib() -> int:
    """Free memory, with what each processor keeps in its own lists of free pages.

    Those hold tens of megabytes at times, and no count of /proc/meminfo has them.
    """
    Path("/proc/sys/vm/drop_caches").write_text("3")  # what can be had back is not lost
    found = re.search(r"MemAvailable: +([0-9]+) kB", Path("/proc/meminfo").read_text())
    assert found
    kept = re.findall(r"^ +count: +([0-9]+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    assert kept
    return int(found[1]) + sum(map(int, kept)) * resource.getpagesize() // 1024


def open_files() -> int:
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])
