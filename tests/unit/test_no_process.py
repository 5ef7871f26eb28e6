"""Where no process or no descriptor is to be had: an error, nobody hangs, nothing is left."""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from vtpm_cuse import faults
from vtpm_cuse.acquire import chardev
from vtpm_cuse.acquire.keeper import Keeper
from vtpm_cuse.acquire.watcher import DeviceWatcher
from vtpm_cuse.errors import UsageError
from vtpm_cuse.manufacture import confined
from vtpm_cuse.service.confine import seccomp
from vtpm_cuse.service.process.daemon import run_in_background
from vtpm_cuse.service.process.pidfile import PidFile
from vtpm_cuse.service.remover import Remover

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def descriptors() -> set[str]:
    return {f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in _open_ones()}


def _open_ones() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # what listed them
            continue
        found.append(int(name))
    return found


def refuse(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int, after: int = 0
) -> None:
    """*name* fails from the call on that comes after so many."""
    real: Callable[..., Any] = getattr(module, name)
    calls: list[int] = []

    def failing(*words: object) -> object:
        calls.append(0)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return real(*words)

    monkeypatch.setattr(module, name, failing)


PIPES = pytest.mark.parametrize(
    ("name", "number", "after"),
    [
        ("fork", errno.EAGAIN, 0),
        ("fork", errno.ENOMEM, 0),
        ("pipe", errno.EMFILE, 0),
        ("pipe", errno.ENFILE, 1),
    ],
)
ENDS = pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (os, "fork", errno.EAGAIN),
        (os, "fork", errno.ENOMEM),
        (socket, "socketpair", errno.EMFILE),
    ],
)


def socket_at(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return str(path)


@PIPES
def test_remover_removes_here_what_is_there(
    name: str, number: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    paths = [socket_at(tmp_path / "c"), socket_at(tmp_path / "s")]
    remover = Remover(None)
    refuse(monkeypatch, os, name, number, after)
    with pytest.raises(OSError, match=os.strerror(number)):
        remover.start(paths, PidFile(None, 1), to_come=False)
    remover.end(pid_files=True)
    remover.end(pid_files=True)
    assert not os.listdir(tmp_path)
    assert descriptors() <= before


@pytest.mark.parametrize("after", [0, 1])
def test_remover_without_a_descriptor_to_hold_a_socket(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [socket_at(tmp_path / "c"), socket_at(tmp_path / "s")]
    remover = Remover(None)
    refuse(monkeypatch, os, "open", errno.EMFILE, after)
    with pytest.raises(OSError, match="Too many open files"):
        remover.start(paths, PidFile(None, 1), to_come=False)
    remover.end(pid_files=True)
    assert not os.listdir(tmp_path)


@PIPES
def test_keeper(name: str, number: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    refuse(monkeypatch, os, name, number, after)
    with pytest.raises(OSError, match=os.strerror(number)):
        Keeper(lambda _: None, set())
    assert descriptors() <= before


@pytest.mark.parametrize(
    ("name", "number"), [("fork", errno.EAGAIN), ("fork", errno.ENOMEM), ("pipe", errno.EMFILE)]
)
def test_background(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    refuse(monkeypatch, os, name, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        run_in_background(lambda _: 0, lambda _: None)
    assert descriptors() <= before


@ENDS
def test_watcher(module: object, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    refuse(monkeypatch, module, name, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        DeviceWatcher(tpm2=True)
    assert descriptors() <= before


@ENDS
def test_maker(
    module: object, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vtpmx").touch()
    monkeypatch.setattr(chardev, "VTPMX_PATH", str(tmp_path / "vtpmx"))
    monkeypatch.setattr(chardev, "_check_right", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = descriptors()
    refuse(monkeypatch, module, name, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        chardev.ProxyMaker(tpm2=True)
    assert descriptors() <= before


@ENDS
def test_confined_tpm(
    module: object, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Tpm:
        tpm2 = True

        def __init__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(confined, "EngineTpm", Tpm)
    monkeypatch.setattr(seccomp, "make_filter", lambda *_, **__: None)
    before = descriptors()
    refuse(monkeypatch, module, name, number)
    config: Any = None
    with pytest.raises(UsageError, match=f"No process can be started: {os.strerror(number)}"):
        confined.ConfinedTpm(config, {})
    assert closed == [True]
    assert descriptors() <= before


def test_a_limit_comes_with_its_cure() -> None:
    few = OSError(errno.EMFILE, "Too many open files")
    cure = "raise the limit: 'ulimit -n', or LimitNOFILE= of a unit"
    assert faults.sentence(few) == f"Too many open files; {cure}"
    error = UsageError("Could not listen on x: Too many open files")
    error.__cause__ = few
    assert faults.sentence(error) == f"Could not listen on x: Too many open files; {cure}"
    assert faults.sentence(UsageError("No", hint="see 'ulimit -n'")) == "No; see 'ulimit -n'"
    assert faults.sentence(FileNotFoundError(errno.ENOENT, "No such file", "x")).endswith("'x'")
