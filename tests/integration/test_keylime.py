"""keylime's library as registrar and verifier of an agent whose TPM is a managed one of ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, needs
from tests.support.private import runtime_folder
from tests.support.sockets import TREE
from vtpm_cuse.lab import Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION: Final = "7.14.3"
SHA256: Final = "0e7085b7c8b6b0380ad5634c097d37c64695e2ac2d0362de386d84c0fea7eb62"
FOLDER: Final = TREE / f".cache/keylime/{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}"
BESIDE: Final = ("pyyaml", "sqlalchemy", "typing_extensions")
"""What the modules import that know of TPMs; the rest of what keylime asks for is its servers'."""

ENROL: Final = """
tpm2_createek -Q -c ek.ctx -G {kind} -u ek.pub
tpm2_createak -Q -C ek.ctx -c ak.ctx -G {kind} -g sha256 -s {scheme} -u ak.pub -r ak.priv -n ak.name
"""
ACTIVATE: Final = """
tpm2_startauthsession -Q --policy-session -S session.ctx
tpm2_policysecret -Q -S session.ctx -c e
tpm2_activatecredential -Q -c ak.ctx -C ek.ctx -i credential -o opened -P session:session.ctx
"""
QUOTE: Final = """
tpm2_pcrextend 16:sha256={digest}
tpm2_quote -Q -c ak.ctx -l sha256:0,16 -q {nonce} -m quote -s signature -o pcrs -g sha256
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """A folder from which it is imported, made once."""
    stamp = FOLDER / "made"
    if not stamp.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
        plain = ("--no-deps", "--no-binary", ":all:", "-d", FOLDER, f"keylime=={VERSION}")
        subprocess.run([*pip, "download", *plain], check=True)
        (archive,) = FOLDER.glob("*.tar.gz")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
        subprocess.run([*pip, "install", "--target", FOLDER / "beside", *BESIDE], check=True)
        subprocess.run(["tar", "-xf", archive, "-C", FOLDER], check=True)
        stamp.touch()
    return FOLDER


@pytest.fixture
def tpm() -> Iterator[Tpm]:
    with runtime_folder(), Tpm() as made:
        yield made


def verifier(library: Path, folder: Path, *words: str) -> str:
    path = f"{library / f'keylime-{VERSION}'}:{library / 'beside'}"
    program = (sys.executable, str(TREE / "tests/support/keylime_verifier.py"), *words)
    env = {**os.environ, "PYTHONPATH": path, "HOME": str(folder)}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        program, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("kind", "scheme"), [("rsa", "rsassa"), ("ecc", "ecdsa")])
def test_an_agent_is_enrolled_and_attested(
    kind: str, scheme: str, library: Path, tpm: Tpm, tmp_path: Path
) -> None:
    needs(shutil.which("tpm2_quote") is not None, "tpm2-tools are missing")

    def agent(script: str, **names: str) -> None:
        done = subprocess.run(
            ["bash", "-ec", script.format(**names)],
            cwd=tmp_path,
            env={**os.environ, **tpm.env},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    agent(ENROL, kind=kind, scheme=scheme)
    (tmp_path / "secret").write_bytes(os.urandom(32))
    verifier(library, tmp_path, "credential", "ek.pub", "ak.pub", "secret", "credential")
    agent(ACTIVATE)
    assert (tmp_path / "opened").read_bytes() == (tmp_path / "secret").read_bytes()
    measured = bytes(32)
    for turn in range(3):
        digest, nonce = hashlib.sha256(bytes([turn])).digest(), os.urandom(20)
        measured = hashlib.sha256(measured + digest).digest()
        (tmp_path / "nonce").write_bytes(nonce)
        agent(QUOTE, digest=digest.hex(), nonce=nonce.hex())
        words = ("quote", "ak.pub", "nonce", "quote", "signature", "pcrs")
        said: dict[str, str] = json.loads(verifier(library, tmp_path, *words))
        assert said == {"0": bytes(32).hex(), "16": measured.hex()}
