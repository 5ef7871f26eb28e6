"""What a new user types: a name, or not even that, and a TPM is there and ready."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import (
    OUR_IOCTL,
    PATIENCE,
    PTM_GET_CAPABILITY,
    SWTPM_CUSE,
    exchange,
    needs,
    opened,
    processes,
    ptm,
    run,
    wait_exit,
    wait_until,
)
from tests.kernel.proxy import LINE, SWTPM
from tests.support.commands import code_of, get_random, tpm12_pcr_read

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE: Final = Path("/var/lib/vtpm-cuse")
RANDOM: Final = get_random(8)


@pytest.fixture(autouse=True)
def _nothing_there(cuse: None) -> Iterator[None]:
    """The machine is the lab's own, and nobody has a TPM on it."""
    needs(os.getuid() == 0, "needs root")
    needs(not PLACE.exists(), f"{PLACE} is there already")
    yield
    shutil.rmtree(PLACE, ignore_errors=True)


def end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        wait_exit(pidfd)
    finally:
        os.close(pidfd)


def shut_down(*devices: Path) -> None:
    """By the first; they go when that has been answered, one after the other."""
    run(OUR_IOCTL, "-s", devices[0])
    wait_until(lambda: not any(map(os.path.exists, devices)), "the end of the devices")


@pytest.mark.parametrize("name", ["vtpmbare", "/dev/vtpmbare"])
def test_cuse_with_a_name_alone(name: str) -> None:
    state, device = PLACE / "vtpmbare", Path("/dev/vtpmbare")
    for _ in range(2):
        done = run(SWTPM_CUSE, "-n", name)
        assert f"/dev/vtpmbare is a TPM 2.0, whose state is in {state}." in done.stderr
        with opened(device) as fd:
            assert code_of(exchange(fd, RANDOM)) == 0
        managed = Path("/dev/vtpmrmbare")
        with opened(managed) as one, opened(managed) as other:
            assert code_of(exchange(one, RANDOM)) == code_of(exchange(other, RANDOM)) == 0
        shut_down(device, managed)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE(PLACE.stat().st_mode) == 0o755
    assert (state / "tpm2-00.permall").exists()


@pytest.mark.parametrize(("option", "version"), [("--tpm2", "2.0"), ("--tpm12", "1.2")])
def test_cuse_with_a_version_keeps_it(option: str, version: str) -> None:
    """The next start finds the TPM there, of whichever version, and needs no option."""
    device, command = Path("/dev/vtpmbare"), RANDOM if version == "2.0" else tpm12_pcr_read(0)
    for words in (("-n", "vtpmbare", option), ("-n", "vtpmbare")):
        done = run(SWTPM_CUSE, *words)
        assert f"/dev/vtpmbare is a TPM {version}, whose state is in " in done.stderr
        with opened(device) as fd:
            assert code_of(exchange(fd, command)) == 0
        shut_down(device)


def test_cuse_behaves_as_the_c_suite_where_a_place_is_named(tmp_path: Path) -> None:
    """A TPM 1.2 that waits for its INIT."""
    run(SWTPM_CUSE, "-n", "vtpmbare", "--tpmstate", f"dir={tmp_path}")
    with opened(Path("/dev/vtpmbare")) as fd:
        assert ptm(fd, PTM_GET_CAPABILITY)
        assert not list(tmp_path.glob("*permall"))
    shut_down(Path("/dev/vtpmbare"))
    assert not PLACE.exists()


def test_first_client_after_the_start_never_finds_it_in_use(tmp_path: Path) -> None:
    """Whoever sees the node may open it at once: the program that starts the TPM does not."""
    device = Path("/dev/vtpmbare")
    words = (SWTPM_CUSE, "-n", "vtpmbare")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        wait_until(device.exists, "the device")
        with opened(device) as fd:
            assert code_of(exchange(fd, RANDOM)) == 0
            assert process.wait(PATIENCE) == 0
    shut_down(device)


def test_one_process_once_the_pid_file_is_there(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with subprocess.Popen(
        (SWTPM_CUSE, "-n", "vtpmbare", "--pid", f"file={pid_file}"), stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", "the pid file")
        found, pid = processes("vtpmbare"), int(pid_file.read_text())
        assert process.wait(PATIENCE) == 0
    assert {*found} - {process.pid} == {pid}  # who wrote it, as his last act, may be there yet
    assert processes("vtpmbare") == [pid]
    end(pid)
    assert not pid_file.exists()


def another_root(folder: Path, *devices: str) -> Path:
    root = folder / "root"
    for name in ("urandom", *devices):
        (root / "dev").mkdir(parents=True, exist_ok=True)
        found = os.stat(f"/dev/{name}")
        os.mknod(root / "dev" / name, found.st_mode, found.st_rdev)
    return root


@pytest.mark.parametrize("more", [(), ("--foreground",)], ids=["background", "foreground"])
def test_cuse_below_another_root(more: tuple[str, ...], tmp_path: Path) -> None:
    """A folder with two devices and nothing else."""
    root, device = another_root(tmp_path, "cuse"), Path("/dev/vtpmbare")
    words = [SWTPM_CUSE, "-n", "vtpmbare", "--chroot", str(root), "--runas", "nobody"]
    words += ["--pid", "file=/pid", "--log", "file=/log", *more]
    state = root / "var/lib/vtpm-cuse/vtpmbare"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_until(
            lambda: (
                bool((root / "pid").exists() and (root / "pid").read_text())
                or process.poll() is not None
            ),
            "the pid file",
            log=root / "log",
        )
        said = (root / "log").read_text() if (root / "log").exists() else "no log"
        assert process.poll() in {None, 0}, (process.communicate(), said)
        pid = int((root / "pid").read_text())
        if not more:
            assert process.wait(PATIENCE) == 0
        assert processes("vtpmbare") == [pid]
        assert os.readlink(f"/proc/{pid}/root") == str(root)
        with opened(device) as fd:
            assert code_of(exchange(fd, RANDOM)) == 0
        end(pid)
    assert state.stat().st_uid == 65534
    assert not device.exists()


@pytest.mark.parametrize("start", [("--daemon",), ()], ids=["background", "foreground"])
def test_proxy_alone(start: tuple[str, ...], tmp_path: Path) -> None:
    state = PLACE / "proxy0"
    words = (SWTPM, "chardev", "--vtpm-proxy", *start)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = LINE.fullmatch(process.stdout.readline())
        assert found, process.communicate(timeout=PATIENCE)
        line = process.stderr.readline()
        assert line == f"swtpm: /dev/tpm{found[1]} is a TPM 2.0, whose state is in {state}.\n"
        device = Path(f"/dev/tpmrm{found[1]}")
        if start:
            assert process.wait(PATIENCE) == 0, process.stderr.read()
        wait_until(device.exists, "the device")
        with opened(device) as fd:
            assert code_of(exchange(fd, RANDOM)) == 0
        # The same again: its TPM is in use, and it gets no other one.
        second = run(*words, status=1)
        assert "another process has this TPM" in second.stderr
        assert second.stdout == ""
        other = (SWTPM, "chardev", "--vtpm-proxy", "-n", "other")
        with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as third:
            assert third.stdout is not None
            assert LINE.fullmatch(third.stdout.readline())
            third.terminate()
            assert third.wait(PATIENCE) == 0
        (pid,) = [pid for pid in processes("--vtpm-proxy") if pid != third.pid]
        end(pid)
    assert sorted(path.name for path in PLACE.iterdir()) == ["other", "proxy0"]


def test_proxy_as_another_user_and_below_another_root(tmp_path: Path) -> None:
    """The right to make the device is not the server's any more when the device is made."""
    root = another_root(tmp_path, "vtpmx")
    words = (SWTPM, "chardev", "--vtpm-proxy", "--chroot", str(root), "--runas", "nobody")
    done = run(*words, "--daemon", "--pid", "file=/pid")
    found = LINE.match(done.stdout)
    assert found
    device, pid = Path(f"/dev/tpmrm{found[1]}"), int((root / "pid").read_text())
    wait_until(device.exists, "the device")
    with opened(device) as fd:
        assert code_of(exchange(fd, RANDOM)) == 0
    assert processes("--vtpm-proxy") == [pid]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    end(pid)
    wait_until(lambda: not device.exists(), "the end of the device")
