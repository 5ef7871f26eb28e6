"""A TPM between libtpms 0.9 of Debian 12 and 0.10 of Debian unstable, there and back.

One side runs here, the other in the folder of kernel-helpers/unstable; both are `swtpm socket`.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import unstable
from tests.support.waiting import wait_until
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.storage.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Send = Callable[[bytes], bytes]

PATIENCE_SECONDS = 30
HERE, THERE = "here", "in unstable"
PERMANENT, SHUTDOWN = "tpm2-00.permall", (3).to_bytes(4, "big")


def both_engines() -> bool:
    """The folder is made, this process is outside of it, and may enter it."""
    if not unstable.is_ready():
        return False
    engine = LibtpmsEngine(tpm2=True, nvram=MemoryStore())
    return engine.version < (0, 10, 0)


pytestmark = pytest.mark.skipif(
    not both_engines(), reason="needs root, libtpms 0.9 and kernel-helpers/unstable --prepare"
)


def command(where: str, folder: Path) -> list[str | Path]:
    """The program on one of the engines."""
    if where == HERE:
        return [Path(sys.executable).parent / "swtpm"]
    return [unstable.UNSTABLE, "--share", folder, "--", "swtpm"]


@contextlib.contextmanager
def powered(where: str, folder: Path, *options: str, tpm2: bool = True) -> Iterator[Send]:
    """The TPM in *folder*, running on one of the engines; shut down in order at the end."""
    data, control = folder / "data", folder / "control"
    words = [*command(where, folder), "socket", "--tpmstate", f"dir={folder}"]
    words += ["--tpm2"] * tpm2
    words += ["--server", f"type=unixio,path={data}", "--ctrl", f"type=unixio,path={control}"]
    words += ["--flags", "not-need-init,startup-clear", *options]
    with subprocess.Popen(words) as process:
        try:
            with connected(process, data) as connection:

                def send(message: bytes) -> bytes:
                    connection.sendall(message)
                    return connection.recv(4096)

                yield send
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(control))
                connection.sendall(SHUTDOWN)
                assert connection.recv(4) == bytes(4)
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()


@contextlib.contextmanager
def connected(process: subprocess.Popen[bytes], path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        wait_until(
            lambda: connection.connect_ex(str(path)) == 0,
            f"{path} listens",
            process=process,
            seconds=PATIENCE_SECONDS,
        )
        yield connection


def fails_to_start(where: str, folder: Path, *options: str) -> str:
    """What is said about it."""
    words = [*command(where, folder), "socket", "--tpm2", "--tpmstate", f"dir={folder}"]
    words += ["--flags", "not-need-init,startup-clear", "--log", "fd=1,level=1", *options]
    run = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert run.returncode == 1, run
    return run.stdout + run.stderr


def primary(send: Send) -> bytes:
    """The public part of a primary key: it depends on the seeds alone."""
    answer = send(tpm.create_primary_rsa())
    assert tpm.code_of(answer) == 0, answer.hex()
    handle = answer[10:14]
    assert tpm.code_of(send(tpm.tpm2(0x165, handle))) == 0  # FlushContext
    return answer[18 : 18 + 280]


@pytest.mark.parametrize("way", [(HERE, THERE), (THERE, HERE)], ids=" to ".join)
def test_tpm2_there_and_back(tmp_path: Path, way: tuple[str, str]) -> None:
    first, second = way
    with powered(first, tmp_path) as send:
        key = primary(send)
        assert tpm.code_of(send(tpm.nv_define(tpm.NV_INDEX, 8))) == 0
        assert tpm.code_of(send(tpm.nv_write(tpm.NV_INDEX, b"written1"))) == 0
    with powered(second, tmp_path) as send:
        assert primary(send) == key
        assert tpm.nv_data(send(tpm.nv_read(tpm.NV_INDEX, 8))) == b"written1"
        assert tpm.code_of(send(tpm.nv_write(tpm.NV_INDEX, b"written2"))) == 0
    with powered(first, tmp_path) as send:
        assert primary(send) == key
        assert tpm.nv_data(send(tpm.nv_read(tpm.NV_INDEX, 8))) == b"written2"


@pytest.mark.parametrize("way", [(HERE, THERE), (THERE, HERE)], ids=" to ".join)
def test_tpm12_there_and_back(tmp_path: Path, way: tuple[str, str]) -> None:
    index = 0x1101
    with powered(way[0], tmp_path, tpm2=False) as send:
        assert tpm.code_of(send(tpm.tpm12_nv_define(index, 8))) == 0
        assert tpm.code_of(send(tpm.tpm12_nv_write(index, b"written1"))) == 0
    for where in way[1], way[0]:
        with powered(where, tmp_path, tpm2=False) as send:
            assert tpm.tpm12_nv_data(send(tpm.tpm12_nv_read(index, 8))) == b"written1"


def test_newer_profile_is_refused_without_damage(tmp_path: Path) -> None:
    with powered(THERE, tmp_path, "--profile", "name=default-v1") as send:
        key = primary(send)
    before = (tmp_path / PERMANENT).read_bytes()
    assert "Could not initialize the TPM" in fails_to_start(HERE, tmp_path)
    assert (tmp_path / PERMANENT).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", PERMANENT]
    with powered(THERE, tmp_path) as send:
        assert primary(send) == key


def test_profile_is_refused_by_the_older_engine(tmp_path: Path) -> None:
    said = fails_to_start(HERE, tmp_path, "--profile", "name=null")
    assert "no profiles" in said
    assert list(tmp_path.iterdir()) == []


def test_older_tpm_refuses_a_profile_on_the_newer_engine(tmp_path: Path) -> None:
    with powered(HERE, tmp_path) as send:
        key = primary(send)
    before = (tmp_path / PERMANENT).read_bytes()
    assert "existing TPM 2" in fails_to_start(THERE, tmp_path, "--profile", "name=default-v1")
    assert (tmp_path / PERMANENT).read_bytes() == before
    with powered(THERE, tmp_path) as send:
        assert primary(send) == key
