"""TPM 1.2 on the device: raw commands, swtpm_ioctl, and Debian's trousers with tpm-tools."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    OUR_IOCTL,
    PTM_CANCEL_TPM_CMD,
    PTM_GET_TPMESTABLISHED,
    PTM_HASH_DATA,
    PTM_INIT,
    PTM_STOP,
    exchange,
    needs,
    opened,
    ptm,
    ptm_result,
    run,
    wait_until,
)
from tests.support.commands import (
    TPM12_CONTINUE_SELF_TEST,
    TPM12_PHYSICAL_PRESENCE_CMD_ENABLE,
    TPM12_PHYSICAL_PRESENCE_PRESENT,
    TPM12_SAVE_STATE,
    TPM12_STARTUP_CLEAR,
    TPM12_STARTUP_STATE,
    code_of,
    tpm12,
    tpm12_nv_data,
    tpm12_nv_define,
    tpm12_nv_read,
    tpm12_nv_write,
    tpm12_pcr_extend,
    tpm12_pcr_read,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")

ONES = b"\x11" * 20
PHYSICAL_ENABLE = tpm12(0x6F)
PHYSICAL_SET_ACTIVATED = tpm12(0x72, b"\0")
SELF_TEST_FULL = tpm12(0x50)


@pytest.fixture(scope="module")
def server(module_serve: Serve) -> Server:
    return module_serve("vtpm12", tpm2=False).start()


@pytest.fixture
def fd(server: Server) -> Iterator[int]:
    """Freshly started."""
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_INIT) == 0
        assert exchange(fd, TPM12_STARTUP_CLEAR).hex() == "00c40000000a00000000"
        yield fd


def test_self_tests(fd: int) -> None:
    assert code_of(exchange(fd, SELF_TEST_FULL)) == 0
    assert code_of(exchange(fd, TPM12_CONTINUE_SELF_TEST)) == 0


def test_capability(fd: int) -> None:
    """TPM_CAP_PROPERTY: manufacturer IBM, 24 PCRs; TPM_CAP_VERSION 1.1 as every TPM 1.2 says."""
    manufacturer = exchange(fd, tpm12(0x65, struct.pack(">III", 5, 4, 0x103)))
    assert manufacturer[10:] == b"\0\0\0\4IBM\0"
    pcrs = exchange(fd, tpm12(0x65, struct.pack(">III", 5, 4, 0x101)))
    assert pcrs[10:] == struct.pack(">II", 4, 24)
    version = exchange(fd, tpm12(0x65, struct.pack(">II", 6, 0)))
    assert version[10:].hex() == "0000000401010000"


def test_pcr_vectors(fd: int) -> None:
    assert exchange(fd, tpm12_pcr_read(10))[10:] == bytes(20)
    response = exchange(fd, tpm12_pcr_extend(10, ONES))
    expected = hashlib.sha1(bytes(20) + ONES).digest()  # noqa: S324
    assert response.hex() == "00c40000001e00000000" + expected.hex()
    assert exchange(fd, tpm12_pcr_read(10))[10:] == expected
    assert exchange(fd, tpm12_pcr_read(11))[10:] == bytes(20)


def test_refusals(fd: int) -> None:
    assert exchange(fd, tpm12_pcr_read(24)).hex() == "00c40000000a00000002"
    assert exchange(fd, b"\0\xc1").hex() == "00c40000000a00000019"
    assert code_of(exchange(fd, tpm12(0x7FFFFFFF))) == 0xA
    assert code_of(exchange(fd, SELF_TEST_FULL)) == 0


def test_stopped(server: Server, fd: int) -> None:
    assert ptm_result(fd, PTM_STOP) == 0
    assert exchange(fd, tpm12_pcr_read(0)).hex() == "00c40000000a00000009"
    assert ptm_result(fd, PTM_CANCEL_TPM_CMD) == 0xA
    assert ptm_result(fd, PTM_INIT) == 0
    assert code_of(exchange(fd, tpm12_pcr_read(0))) == 0x26  # TPM_INVALID_POSTINIT


def test_ptm_answers(server: Server, fd: int) -> None:
    assert ptm_result(fd, PTM_CANCEL_TPM_CMD) == 9
    assert ptm(fd, PTM_GET_TPMESTABLISHED) == bytes(8)
    assert ptm_result(fd, PTM_HASH_DATA, struct.pack("=I", 4) + b"data") == 0x1A


def test_swtpm_ioctl(server: Server) -> None:
    sizes = "TPM buffersize: 4096\nminimum size  : 3072\nmaximum size  : 4096\n"
    assert run(OUR_IOCTL, "-b", "0", server.device).stdout == sizes
    info = run(OUR_IOCTL, "--info", "1", server.device).stdout
    assert info.startswith('{"TPMSpecification":{"family":"1.2","level":2,"revision":116}')
    done = run(OUR_IOCTL, "-C", server.device, status=1)
    assert done.stderr == "TPM result from PTM_CANCEL_TPM_CMD: 0x9\n"
    run(OUR_IOCTL, "-h", "measured", server.device)
    assert run(OUR_IOCTL, "-e", server.device).stdout == "tpmEstablished is 1\n"
    run(OUR_IOCTL, "-r", "3", server.device)
    assert run(OUR_IOCTL, "-e", server.device).stdout == "tpmEstablished is 0\n"


def test_state_outlives_the_process(serve: Serve) -> None:
    """NV by the permanent state, PCRs by TPM_SaveState."""
    server = serve("vtpm12a", tpm2=False).start()
    with opened(server.device) as fd:
        assert code_of(exchange(fd, tpm12_nv_define(0x1234, 8))) == 0
        assert code_of(exchange(fd, tpm12_nv_write(0x1234, b"contents"))) == 0
        assert code_of(exchange(fd, tpm12_pcr_extend(3, ONES))) == 0
        assert code_of(exchange(fd, TPM12_SAVE_STATE)) == 0
    assert (server.state / "tpm-00.savestate").exists()
    server.stop()

    server.flags = "not-need-init"
    server.start()
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM12_STARTUP_STATE)) == 0
        assert tpm12_nv_data(exchange(fd, tpm12_nv_read(0x1234, 8))) == b"contents"
        expected = hashlib.sha1(bytes(20) + ONES).digest()  # noqa: S324
        assert exchange(fd, tpm12_pcr_read(3))[10:] == expected


def test_state_moves_to_another_tpm(serve: Serve, tmp_path: Path) -> None:
    first = serve("vtpm12a", tpm2=False).start()
    with opened(first.device) as fd:
        assert code_of(exchange(fd, tpm12_pcr_extend(5, ONES))) == 0
        expected = exchange(fd, tpm12_pcr_read(5))
    for kind in ("permanent", "volatile"):
        run(OUR_IOCTL, "--save", kind, tmp_path / kind, first.device)
    second = serve("vtpm12b", tpm2=False, flags="").start()
    for kind in ("permanent", "volatile"):
        run(OUR_IOCTL, "--load", kind, tmp_path / kind, second.device)
    run(OUR_IOCTL, "-i", second.device)
    with opened(second.device) as fd:
        assert exchange(fd, tpm12_pcr_read(5)) == expected


# -- trousers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tcsd(module_serve: Serve) -> Iterator[Server]:
    """Debian's TCS daemon on /dev/tpm0, which is ours here; enabled and activated."""
    program = shutil.which("tcsd") or "/usr/sbin/tcsd"
    needs(os.access(program, os.X_OK), "apt-get install trousers tpm-tools")
    needs(not Path("/dev/tpm0").exists(), "this machine has a /dev/tpm0 of its own")
    server = module_serve("tpm0", tpm2=False).start()
    shutil.chown(server.device, "tss", "tss")
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM12_PHYSICAL_PRESENCE_CMD_ENABLE)) == 0
        assert code_of(exchange(fd, TPM12_PHYSICAL_PRESENCE_PRESENT)) == 0
        assert code_of(exchange(fd, PHYSICAL_ENABLE)) == 0
        assert code_of(exchange(fd, PHYSICAL_SET_ACTIVATED)) == 0
        assert ptm_result(fd, PTM_INIT) == 0  # activation counts from the next start on
        assert code_of(exchange(fd, TPM12_STARTUP_CLEAR)) == 0
    process = subprocess.Popen([program, "-f"], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(30003), "tcsd listens", process=process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def listens(port: int) -> bool:
    listening = rf"^ *\d+: [0-9A-F]+:{port:04X} 0+:0000 0A "
    return re.search(listening, Path("/proc/net/tcp").read_text(), re.MULTILINE) is not None


def test_tpm_version(tcsd: Server) -> None:
    text = run("/usr/sbin/tpm_version").stdout
    assert re.search(r"Chip Version: +1\.2\.", text), text
    assert re.search(r"TPM Vendor ID: +IBM", text), text


def test_tpm_selftest(tcsd: Server) -> None:
    assert "TPM Test Results:" in run("/usr/sbin/tpm_selftest").stdout


def test_tpm_takeownership(tcsd: Server) -> None:
    """Makes an RSA endorsement key and a storage root key: two long commands."""
    run("/usr/sbin/tpm_createek")
    assert "Public Endorsement Key:" in run("/usr/sbin/tpm_getpubek").stdout
    run("/usr/sbin/tpm_takeownership", "-y", "-z")
    nv = ("-i", "0x1000", "-s", "16", "-p", "OWNERREAD|OWNERWRITE", "-y")
    assert "Successfully created NVRAM area" in run("/usr/sbin/tpm_nvdefine", *nv).stdout
