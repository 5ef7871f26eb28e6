"""How long swtpm_setup takes, by turns with Debian's.

.venv/bin/python bench/setup.py

Both have configuration and CA of their own. The search for the primes of an RSA key varies: that
is why there are many runs, and medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from bench.report import Report, Row, add_arguments, finish

OURS: Final = str(Path(sys.executable).parent / "swtpm_setup")
PEER: Final = "/usr/bin/swtpm_setup"
PEER_CA: Final = "/usr/bin/swtpm_localca"
CERTIFICATES: Final = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram")
PATIENCE_SECONDS: Final = 120


class Case(NamedTuple):
    """One kind of set-up: *new_ca* makes the CA as well."""

    what: str
    words: tuple[str, ...]
    limit: float
    new_ca: bool = False


CASES: Final = (
    Case("TPM 2.0, keys and certificates", CERTIFICATES, 0.8),
    Case("TPM 2.0, keys and certificates, new CA", CERTIFICATES, 0.8, new_ca=True),
    Case("TPM 2.0, ECC key alone", ("--create-spk", "--ecc"), 0.5),
)


class Side:
    """One suite, with its own configuration in *folder*."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        folder.mkdir()
        (folder / "swtpm_setup.conf").write_text(
            f"create_certs_tool = {PEER_CA if program == PEER else 'swtpm_localca'}\n"
            f"create_certs_tool_config = {folder}/swtpm-localca.conf\n"
            f"create_certs_tool_options = {folder}/swtpm-localca.options\n"
            "active_pcr_banks = sha256\n"
        )
        ca = folder / "ca"
        (folder / "swtpm-localca.conf").write_text(
            f"statedir = {ca}\nsigningkey = {ca}/signkey.pem\n"
            f"issuercert = {ca}/issuercert.pem\ncertserial = {ca}/certserial\n"
        )
        (folder / "swtpm-localca.options").write_text(
            "--platform-manufacturer Fedora\n--platform-version 2.1\n--platform-model QEMU\n"
        )

    def seconds(self, case: Case) -> float:
        """One run, on an empty state directory."""
        state = self._folder / "state"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        if case.new_ca:
            shutil.rmtree(self._folder / "ca", ignore_errors=True)
        command = [self._program, "--tpm2", "--tpm-state", str(state), *case.words]
        begun = time.perf_counter()
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            env={**os.environ, "XDG_CONFIG_HOME": str(self._folder), "HOME": str(self._folder)},
        )
        return time.perf_counter() - begun


def main() -> None:
    """Measures all cases and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="of each case and suite (20)")
    add_arguments(parser)
    options = parser.parse_args()
    report = Report("setup", "Setting a TPM up")
    with tempfile.TemporaryDirectory(prefix="bench-setup.") as folder:
        sides = [Side(OURS, Path(folder, "ours")), Side(PEER, Path(folder, "peer"))]
        for case in CASES:
            for side in sides:  # not counted: the CA is made, the files are read
                side.seconds(case)
            taken = [[side.seconds(case) for side in sides] for _ in range(options.runs)]
            ours, peer = (1000 * statistics.median(column) for column in zip(*taken, strict=True))
            report.rows.append(Row(case.what, "ms", ours, peer, case.limit))
    report.notes.append(f"Medians of {options.runs} runs, by turns.")
    finish(report, options)


if __name__ == "__main__":
    main()
