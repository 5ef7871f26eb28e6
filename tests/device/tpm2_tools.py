"""Debian's tpm2-tools on a device: the TPM 2.0 that other people's programs see."""

from __future__ import annotations

import hashlib
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import OUR_IOCTL, Done, needs
from tests.support.tpm2_tools import (
    DIGEST,
    NV_INDEX,
    SIGNING,
    quote_and_check,
    seal_under_a_pcr_policy,
    sign_and_verify,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

PERSISTENT = "0x81000001"


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    needs(shutil.which("tpm2_getrandom") is not None, "tpm2-tools are missing")


class Tools:
    """tpm2-tools on one device, in one folder; each call leaves no transient object behind."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.folder = folder
        self._server = server
        self._tcti = {"TPM2TOOLS_TCTI": f"device:{server.device}"}

    def __call__(self, name: str, *arguments: str | Path, status: int = 0) -> Done:
        """Runs ``tpm2_NAME``."""
        done = self.keep(name, *arguments, status=status)
        if name in _LOADING:
            self.flush()
        return done

    def keep(self, name: str, *arguments: str | Path, status: int = 0) -> Done:
        """Runs it and lets the objects stay that it loads."""
        words = (f"tpm2_{name}", *arguments)
        done = self._server.run(*words, status=status, env=self._tcti, cwd=self.folder)
        if status == 0:
            assert "ERROR" not in done.stderr, done
            assert "WARN" not in done.stderr, done
        return done

    def flush(self) -> None:
        self.keep("flushcontext", "-t")

    def path(self, name: str) -> Path:
        return self.folder / name

    def primary(self, context: str = "primary.ctx") -> None:
        self("createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", context)

    def name_of(self, context: str) -> str:
        """The hash of an object's public area."""
        return _name_in(self("readpublic", "-c", context).stdout)

    def pcr(self, number: int) -> str:
        text = self("pcrread", f"sha256:{number}").stdout
        found = re.search(rf"^ +{number} *: 0x([0-9A-F]{{64}})$", text, re.MULTILINE)
        assert found, text
        return found[1].lower()


_LOADING = {"createprimary", "create", "load", "sign", "verifysignature", "readpublic", "quote"}
_LOADING |= {"unseal", "evictcontrol"}


@pytest.fixture
def tpm(server: Server, folder: Path) -> Tools:
    return Tools(server, folder)


def extended(value: str, digest: str) -> str:
    return hashlib.sha256(bytes.fromhex(value + digest)).hexdigest()


def test_getrandom_by_the_option(server: Server) -> None:
    call = ("tpm2_getrandom", "-T", f"device:{server.device}", "--hex", "16")
    first, second = server.run(*call).stdout, server.run(*call).stdout
    assert len(bytes.fromhex(first)) == len(bytes.fromhex(second)) == 16
    assert first != second


def test_rsa_primary(tpm: Tools) -> None:
    text = tpm("createprimary", "-C", "o", "-G", "rsa2048", "-c", "rsa.ctx").stdout
    found = re.search(r"^rsa: ([0-9a-f]+)$", text, re.MULTILINE)
    assert found, text
    assert int(found[1], 16).bit_length() == 2048


def test_create_load_sign_verify(tpm: Tools) -> None:
    tpm.primary()
    sign_and_verify(tpm, tpm.folder, "primary.ctx", "ecc:ecdsa-sha256:null")


def test_nv(tpm: Tools) -> None:
    tpm.path("data").write_bytes(b"thirty-two bytes of contents!!!!")
    tpm("nvdefine", NV_INDEX, "-C", "o", "-s", "32", "-a", "ownerread|ownerwrite")
    try:
        tpm("nvwrite", NV_INDEX, "-C", "o", "-i", "data")
        read = tpm("nvread", NV_INDEX, "-C", "o", "-s", "32").stdout
        assert read == "thirty-two bytes of contents!!!!"
    finally:
        tpm("nvundefine", NV_INDEX, "-C", "o")
    tpm("nvread", NV_INDEX, "-C", "o", "-s", "32", status=1)


def test_pcr_extend_and_read(tpm: Tools) -> None:
    before = tpm.pcr(7)
    tpm("pcrextend", f"7:sha256={DIGEST}")
    assert tpm.pcr(7) == extended(before, DIGEST)


def test_quote(tpm: Tools) -> None:
    tpm.primary()
    quote_and_check(tpm, "primary.ctx")


def test_seal_under_a_pcr_policy(tpm: Tools) -> None:
    tpm.primary()
    seal_under_a_pcr_policy(tpm, tpm.folder, "primary.ctx")


def test_state_outlives_the_process(serve: Serve, folder: Path) -> None:
    server: Server = serve("vtpm1").start()
    tpm = Tools(server, folder)
    tpm.path("data").write_text("kept")
    tpm.primary()
    name = tpm.name_of("primary.ctx")
    tpm("evictcontrol", "-Q", "-C", "o", "-c", "primary.ctx", PERSISTENT)
    tpm("nvdefine", NV_INDEX, "-C", "o", "-s", "4", "-a", "ownerread|ownerwrite")
    tpm("nvwrite", NV_INDEX, "-C", "o", "-i", "data")
    tpm("pcrextend", f"7:sha256={DIGEST}")
    server.stop()

    server.start()
    assert tpm("nvread", NV_INDEX, "-C", "o", "-s", "4").stdout == "kept"
    assert PERSISTENT in tpm("getcap", "handles-persistent").stdout
    assert tpm.name_of(PERSISTENT) == name
    tpm.primary("again.ctx")
    assert tpm.name_of("again.ctx") == name
    assert tpm.pcr(7) == "00" * 32


def test_state_moves_to_another_tpm(server: Server, serve: Serve, tpm: Tools, folder: Path) -> None:
    tpm("pcrextend", f"14:sha256={DIGEST}")
    pcr = tpm.pcr(14)
    tpm.keep("createprimary", "-Q", "-C", "o", "-G", "ecc:ecdsa", "-a", SIGNING, "-c", "key.ctx")
    handles = tpm.keep("getcap", "handles-transient").stdout
    assert "0x80000000" in handles
    name = name_of_loaded(tpm)
    permanent, volatile = folder / "permanent", folder / "volatile"
    server.run(OUR_IOCTL, "--save", "permanent", permanent, server.device)
    server.run(OUR_IOCTL, "--save", "volatile", volatile, server.device)
    tpm.flush()

    second: Server = serve("vtpm1", flags="").start()
    other = Tools(second, folder)
    second.run(OUR_IOCTL, "--stop", second.device)  # where it is on from the start
    second.run(OUR_IOCTL, "--load", "permanent", permanent, second.device)
    second.run(OUR_IOCTL, "--load", "volatile", volatile, second.device)
    second.run(OUR_IOCTL, "-i", second.device)
    assert other.pcr(14) == pcr
    assert name_of_loaded(other) == name
    tpm.path("message").write_text("signed over there")
    other.keep("sign", "-c", "0x80000000", "-g", "sha256", "-o", "signature", "message")
    verify = ("-c", "0x80000000", "-g", "sha256", "-m", "message", "-s", "signature")
    other.keep("verifysignature", *verify)


def name_of_loaded(tpm: Tools) -> str:
    return _name_in(tpm.keep("readpublic", "-c", "0x80000000").stdout)


def _name_in(text: str) -> str:
    found = re.search(r"^name: ([0-9a-f]+)$", text, re.MULTILINE)
    assert found, text
    return found[1]
