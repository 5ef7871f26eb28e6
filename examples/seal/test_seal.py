"""The program is tested on a TPM that is as new for each test.

python -m pytest examples/seal
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtpm_cuse.lab import Tpm

PROGRAM = Path(__file__).with_name("seal.py")
SECRET = b"a secret\0\xff"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return tmp_path / "sealed"


def run(tpm: Tpm, *words: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, PROGRAM, *words]
    env = {**os.environ, **tpm.env}
    return subprocess.run(command, env=env, input=data, check=False, capture_output=True)


def measure(tpm: Tpm) -> None:
    """Extends PCR 16, as software does that is started."""
    words = ["tpm2_pcrextend", f"16:sha256={'a5' * 32}"]
    subprocess.run(words, env={**os.environ, **tpm.env}, check=True)


def test_a_secret_comes_back(tpm: Tpm, sealed: Path) -> None:
    assert run(tpm, "seal", sealed, data=SECRET).returncode == 0
    assert SECRET not in sealed.read_bytes()
    tpm.power_cycle()
    assert run(tpm, "unseal", sealed).stdout == SECRET


def test_other_software_does_not_get_it(tpm: Tpm, sealed: Path) -> None:
    assert run(tpm, "seal", sealed, data=SECRET).returncode == 0
    before = tpm.snapshot()
    measure(tpm)
    done = run(tpm, "unseal", sealed)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"policy check failed" in done.stderr
    tpm.rewind(before)
    assert run(tpm, "unseal", sealed).stdout == SECRET


def test_another_tpm_does_not_open_it(tpm: Tpm, sealed: Path) -> None:
    assert run(tpm, "seal", sealed, data=SECRET).returncode == 0
    with Tpm() as another:
        assert run(another, "unseal", sealed).returncode == 1


def test_a_tpm_that_answers_no_more_is_told(faulty_tpm: Tpm, sealed: Path) -> None:
    faulty_tpm.lose_next_response()
    done = run(faulty_tpm, "seal", sealed, data=SECRET)
    assert done.returncode == 1
    assert b"the TPM refuses" in done.stderr
    assert not sealed.exists()
