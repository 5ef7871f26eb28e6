"""The process that has the kernel make a TPM device, for a server that has no right to any more."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.support.processes import in_child
from tests.support.waiting import wait_until
from vtpm_cuse.acquire import chardev
from vtpm_cuse.acquire.chardev import ProxyMaker
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.vtpmx import VTPM_PROXY_FLAG_TPM2, VTPM_PROXY_IOC_NEW_DEV, VtpmProxyNewDev


@pytest.fixture
def vtpmx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the device's place."""
    path = tmp_path / "vtpmx"
    path.touch()
    monkeypatch.setattr(chardev, "VTPMX_PATH", str(path))
    return path


def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the processes that are forked from now on."""
    fork, found = os.fork, []

    def noted() -> int:
        pid = fork()
        found.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", noted)
    return found


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("tpm2", [True, False])
@in_child
def test_device_comes_from_the_other_process(
    tpm2: bool, vtpmx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getpid()

    def ioctl(_fd: int, number: int, argument: bytearray, _mutate: bool) -> int:
        assert number == VTPM_PROXY_IOC_NEW_DEV
        asked = VtpmProxyNewDev.unpack_untrusted(argument, HOST)
        if os.getpid() == here:
            refuse_flag(asked)
        assert asked.flags == (VTPM_PROXY_FLAG_TPM2 if tpm2 else 0)
        fd = os.open("/dev/null", os.O_RDWR)
        argument[:] = VtpmProxyNewDev(asked.flags, 7, fd, 10, 224).pack(HOST)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    pids = forked(monkeypatch)
    maker = ProxyMaker(tpm2=tpm2)
    device, made = maker.make()
    assert (made.tpm_num, made.major, made.minor) == (7, 10, 224)
    assert os.readlink(f"/proc/self/fd/{device.fileno()}") == "/dev/null"
    assert not os.get_inheritable(device.fileno())
    wait_until(lambda: is_gone(pids[0]), "its end, with nobody waiting for it")
    device.close()
    maker.close()


def refuse_flag(asked: VtpmProxyNewDev) -> None:
    """As the kernel does, for a caller who may have a device."""
    assert asked.flags & ~VTPM_PROXY_FLAG_TPM2
    raise OSError(errno.EOPNOTSUPP, "no such flag")


@in_child
def test_missing_right_is_told_before_there_is_a_tpm(
    vtpmx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ioctl(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(FrontendError) as caught:
        ProxyMaker(tpm2=True)
    assert str(caught.value) == (
        "Ioctl to create vtpm proxy failed: Operation not permitted; "
        "it takes root, or the capability CAP_SYS_ADMIN"
    )


@in_child
def test_refusal_is_told(vtpmx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(_fd: int, _number: int, argument: bytearray, _mutate: bool) -> int:
        asked = VtpmProxyNewDev.unpack_untrusted(argument, HOST)
        if asked.flags & ~VTPM_PROXY_FLAG_TPM2:
            refuse_flag(asked)
        raise OSError(errno.ENFILE, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    maker = ProxyMaker(tpm2=True)
    with pytest.raises(FrontendError, match="open files in system; the system's limit"):
        maker.make()


@in_child
def test_it_ends_with_the_server_and_not_by_signals(
    vtpmx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chardev, "_check_right", lambda _control: None)
    pids = forked(monkeypatch)
    maker = ProxyMaker(tpm2=True)
    with open(f"/proc/{pids[0]}/status", encoding="ascii") as status:
        assert status.read()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        wait_until(partial(ignores, pids[0], number), "its being ready")
        os.kill(pids[0], number)
    assert not is_gone(pids[0])
    maker.close()
    wait_until(lambda: is_gone(pids[0]), "its end")


@in_child
def test_it_holds_nothing_of_the_servers(vtpmx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who waits for the end of what the server wrote to does not wait for this one."""
    monkeypatch.setattr(chardev, "_check_right", lambda _control: None)
    pids = forked(monkeypatch)
    ours, theirs = os.pipe()
    maker = ProxyMaker(tpm2=True)
    name = f"/proc/{pids[0]}/comm"
    wait_until(lambda: Path(name).read_text() == "vtpm-maker\n", "its name")
    held = [os.readlink(path) for path in Path(f"/proc/{pids[0]}/fd").iterdir()]
    assert sorted(path.partition(":")[0] for path in held) == sorted(
        ["/dev/null"] * 3 + [str(vtpmx), "socket"]
    )
    os.close(theirs)
    assert os.read(ours, 1) == b""
    os.close(ours)
    maker.close()
    wait_until(lambda: is_gone(pids[0]), "its end")


def ignores(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        (mask,) = [int(line.split()[1], 16) for line in status if line.startswith("SigIgn:")]
    return bool(mask >> (number - 1) & 1)


@in_child
def test_no_device_to_ask(vtpmx: Path) -> None:
    vtpmx.unlink()
    with pytest.raises(FrontendError, match="try 'modprobe tpm_vtpm_proxy' first"):
        ProxyMaker(tpm2=True)
