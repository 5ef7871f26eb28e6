"""Set-ups of TPMs for tests: a private configuration, the programs, and what a TPM then has."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support import sockets
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Word = str | Path

PEER: Final = "/usr/bin/swtpm_setup"
PEER_SWTPM: Final = ("/usr/bin/swtpm",)
OURS: Final = str(Path(sys.executable).parent / "swtpm_setup")


@dataclass(frozen=True)
class Workshop:
    """A directory with a configuration and a CA of its own; no file of the system is used."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "conf" / "swtpm_setup.conf"

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    def new_state(self, name: str) -> Path:
        directory = self.path / name
        directory.mkdir()
        return directory

    def run(
        self, program: str, *words: Word, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Calls a program with the workshop's configuration."""
        return subprocess.run(
            [program, *words],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            env=self.environment,
            pass_fds=pass_fds,
        )

    @property
    def environment(self) -> dict[str, str]:
        """TMPDIR lets tests see what is left behind."""
        (self.path / "tmp").mkdir(exist_ok=True)
        return {
            **os.environ,
            "XDG_CONFIG_HOME": str(self.path / "conf"),
            "HOME": str(self.path),
            "TMPDIR": str(self.path / "tmp"),
            "TZ": "UTC",
        }


def make_workshop(path: Path, tool: str = "swtpm_localca") -> Workshop:
    conf, ca = path / "conf", path / "ca"
    conf.mkdir()
    ca.mkdir()
    (conf / "swtpm_setup.conf").write_text(
        f"create_certs_tool = {tool}\n"
        f"create_certs_tool_config = {conf}/swtpm-localca.conf\n"
        f"create_certs_tool_options = {conf}/swtpm-localca.options\n"
        "active_pcr_banks = sha256\n"
    )
    (conf / "swtpm-localca.conf").write_text(
        f"statedir = {ca}\n"
        f"signingkey = {ca}/signkey.pem\n"
        f"issuercert = {ca}/issuercert.pem\n"
        f"certserial = {ca}/certserial\n"
    )
    (conf / "swtpm-localca.options").write_text(
        "--platform-manufacturer Fedora\n--platform-version 2.1\n--platform-model QEMU\n"
    )
    return Workshop(path)


@contextlib.contextmanager
def served(
    state: Path, *options: Word, tpm2: bool = True, program: Sequence[str] = sockets.OURS
) -> Iterator[str]:
    """Serves a TPM until the end; gives the name of its TCTI, for tpm2-tools."""
    folder = Path(tempfile.mkdtemp(prefix="served.", dir=state.parent))
    path = folder / "tpm"
    words = [
        *(*sockets.RUNNING, "--server", f"type=unixio,path={path}"),
        *("--ctrl", f"type=unixio,path={path}.ctrl", *options),
    ]
    with sockets.Server(
        folder, *words, tpm2=tpm2, data=None, control=None, state=state, program=program
    ) as server:
        control = folder / "tpm.ctrl"
        with socket.socket(socket.AF_UNIX) as probe:
            wait_until(
                lambda: probe.connect_ex(str(control)) == 0,
                f"{control} listens",
                process=server.process,
                log=server.log,
            )
            with sockets.Client(probe) as client:  # once it answers, all its sockets listen
                assert client.control(sockets.GET_CAPABILITY, size=8)
        yield f"swtpm:path={path}"
        with sockets.connect(control) as client:
            assert client.result(sockets.SHUTDOWN) == 0
        assert server.wait() == 0


def tool(tcti: str, *words: Word) -> bytes:
    """Runs one of the tpm2-tools and gives what it printed."""
    run = subprocess.run(
        [words[0], "-T", tcti, *words[1:]],
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


def succeed(*words: Word, text: str = "") -> str:
    """Runs a program that has to succeed; gives what it printed."""
    run = subprocess.run(
        words, check=False, capture_output=True, input=text, text=True, timeout=PATIENCE_SECONDS
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
