"""Other people's programs on `swtpm socket`: tpm2-tools, IBM's tss2, and our swtpm_ioctl."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import sockets as s
from tests.support.sockets import RUNNING, TREE, Server
from tests.support.tpm2_tools import (
    DIGEST,
    NV_INDEX,
    Said,
    Tool,
    quote_and_check,
    seal_under_a_pcr_policy,
    sign_and_verify,
)
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path


needs_tools = pytest.mark.skipif(shutil.which("tpm2_quote") is None, reason="needs tpm2-tools")
needs_tss2 = pytest.mark.skipif(shutil.which("tssgetrandom") is None, reason="needs tss2 of IBM")


def run(
    words: list[str | Path], folder: Path, env: dict[str, str], status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert bool(done.returncode) == bool(status), done
    return done


# -- tpm2-tools -----------------------------------------------------------------------------


def address_of_tcti(kind: str, folder: Path) -> tuple[str, list[str]]:
    """Its control channel is at the next port, or the path with ".ctrl"."""
    if kind == "tcp":
        port = s.free_ports()
        options = ["--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"]
        return f"swtpm:host=127.0.0.1,port={port}", options
    path = folder / "t"
    options = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    return f"swtpm:path={path}", options


@needs_tools
@pytest.mark.parametrize("kind", ["tcp", "unixio"])
def test_a_session_of_tpm2_tools(kind: str, tmp_path: Path) -> None:
    tcti, options = address_of_tcti(kind, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    words = ["--tpm2", "--tpmstate", f"dir={state}", *RUNNING, *options]
    start = s.run_swtpm(*words, "-d", "--pid", f"file={tmp_path / 'pid'}")
    assert start.returncode == 0, start.stderr
    pid = int((tmp_path / "pid").read_text())

    def tool(name: str, *arguments: str | Path, status: int = 0) -> Said:
        to_tpm = [] if name == "checkquote" else ["-T", tcti]  # that one asks no TPM
        words = [f"tpm2_{name}", *to_tpm, *arguments]
        done = run(words, tmp_path, {}, status)
        if not status:
            assert "WARN" not in done.stderr, done
            if name not in {"createpolicy", "flushcontext"}:
                run(["tpm2_flushcontext", "-T", tcti, "-t"], tmp_path, {})
        return done

    try:
        whole_session(tool, tmp_path)
    finally:
        os.kill(pid, 15)


def whole_session(tool: Tool, folder: Path) -> None:
    assert len(bytes.fromhex(tool("getrandom", "--hex", "16").stdout)) == 16
    assert "rsa:" in tool("createprimary", "-C", "o", "-G", "rsa2048", "-c", "rsa.ctx").stdout
    tool("createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")

    sign_and_verify(tool, folder, "rsa.ctx", "rsa2048:rsassa-sha256:null")

    tool("nvdefine", NV_INDEX, "-C", "o", "-s", "12", "-a", "ownerread|ownerwrite")
    (folder / "data").write_text("twelve bytes")
    tool("nvwrite", NV_INDEX, "-C", "o", "-i", "data")
    assert tool("nvread", NV_INDEX, "-C", "o", "-s", "12").stdout == "twelve bytes"

    tool("pcrextend", f"7:sha256={DIGEST}")
    extended = hashlib.sha256(bytes(32) + bytes.fromhex(DIGEST)).hexdigest()
    assert extended.upper() in tool("pcrread", "sha256:7").stdout

    quote_and_check(tool, "primary.ctx")
    seal_under_a_pcr_policy(tool, folder, "primary.ctx")


# -- IBM's TSS ------------------------------------------------------------------------------


@needs_tss2
def test_a_session_of_ibm_tss2(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING, data="tcp", control="tcp") as server:
        env = {
            "TPM_SERVER_TYPE": "raw",
            "TPM_INTERFACE_TYPE": "socsim",
            "TPM_SERVER_NAME": "127.0.0.1",
            "TPM_COMMAND_PORT": str(server.data_address),
            "TPM_DATA_DIR": str(tmp_path),
        }

        def tss(name: str, *arguments: str, status: int = 0) -> str:
            return run([f"tss{name}", *arguments], tmp_path, env, status).stdout

        assert tss("getrandom", "-by", "16") != tss("getrandom", "-by", "16")
        assert "Handle 80000000" in tss("createprimary", "-hi", "o", "-rsa")
        tss(
            "create", "-hp", "80000000", "-si", "-ecc", "nistp256", "-opr", "k.prv", "-opu", "k.pub"
        )
        loaded = tss("load", "-hp", "80000000", "-ipr", "k.prv", "-ipu", "k.pub")
        assert "Handle 80000001" in loaded
        (tmp_path / "message").write_text("one message")
        (tmp_path / "other").write_text("another")
        sign = ("-hk", "80000001", "-ecc", "-halg", "sha256")
        tss("sign", *sign, "-if", "message", "-os", "signature")
        verify = ("-hk", "80000001", "-ecc", "-halg", "sha256", "-is", "signature")
        tss("verifysignature", *verify, "-if", "message")
        tss("verifysignature", *verify, "-if", "other", status=1)
        tss("quote", "-hk", "80000001", "-hp", "7", "-salg", "ecc", "-halg", "sha256")

        tss("nvdefinespace", "-ha", "01500030", "-hi", "o", "-ty", "o", "-sz", "12")
        tss("nvwrite", "-ha", "01500030", "-ic", "twelve bytes")
        tss("nvread", "-ha", "01500030", "-sz", "12", "-of", "read")
        assert (tmp_path / "read").read_text() == "twelve bytes"

        before = tss("pcrread", "-ha", "7", "-ns")
        tss("pcrextend", "-ha", "7", "-halg", "sha256", "-ic", "x")
        assert tss("pcrread", "-ha", "7", "-ns") != before

        found = re.search(r"Handle (\w{8})", tss("startauthsession", "-se", "p"))
        assert found
        tss("policypcr", "-ha", found[1], "-halg", "sha256", "-bm", "000080")
        assert "policyDigest length 32" in tss("policygetdigest", "-ha", found[1])
        for handle in (found[1], "80000001", "80000000"):
            tss("flushcontext", "-ha", handle)


# -- swtpm_ioctl ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unixio"])
def test_swtpm_ioctl(kind: str, tmp_path: Path) -> None:
    """Every command of ours against ours; `test_swtpm_ioctl.py` compares it with the C suite's."""
    with Server(tmp_path, *RUNNING, control=kind) as server:
        address = server.control_address
        target = ["--tcp", f":{address}"] if kind == "tcp" else ["--unix", str(address)]

        def ioctl(*words: str, status: int = 0) -> str:
            tool = "import sys; from vtpm_cuse.cli.swtpm_ioctl import main; sys.exit(main())"
            call: list[str | Path] = [sys.executable, "-c", tool, *target, *words]
            done = run(call, tmp_path, {"PYTHONPATH": str(TREE)}, status)
            return done.stdout + done.stderr

        assert ioctl("-c") == "ptm capability is 0x1ffff\n"
        assert ioctl("-e") == "tpmEstablished is 0\n"
        assert ioctl("-h", "data") == ""
        assert ioctl("-e") == "tpmEstablished is 1\n"
        assert "0x3d" in ioctl("-r", "0", status=1)
        assert ioctl("-r", "3") == ""
        assert ioctl("-e") == "tpmEstablished is 0\n"
        assert ioctl("-l", "2") == ioctl("-l", "0") == ioctl("-C") == ioctl("-v") == ""
        assert ioctl("-g") == "ptm configuration flags: 0x0\n"
        assert "TPM buffersize: 4096\nminimum size  : 2808\n" in ioctl("-b", "0")
        assert "0xa" in ioctl("-b", "3000", status=1)
        assert '"TPMSpecification"' in ioctl("--info", "1")
        assert ioctl("--lock-storage", "0") == ""
        for name in ("permanent", "volatile"):
            assert ioctl("--save", name, name) == ""
            assert (tmp_path / name).stat().st_size > 1000
        assert ioctl("--save", "savestate", "savestate") == ""
        assert (tmp_path / "savestate").stat().st_size == 0
        assert "0xa" in ioctl("--load", "permanent", "permanent", status=1)
        assert ioctl("--stop") == ""
        assert ioctl("--load", "permanent", "permanent") == ""
        assert ioctl("--load", "volatile", "volatile") == ""
        assert ioctl("-i") == ""
        assert ioctl("-s") == ""
        assert server.wait() == 0
        ioctl("-c", status=1)
