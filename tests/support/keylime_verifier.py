"""What keylime's registrar and verifier do with what a TPM gave; run where keylime can be imported.

keylime_verifier.py credential EK AK SECRET CREDENTIAL
keylime_verifier.py quote AK NONCE QUOTE SIGNATURE PCRS
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

objects: Any = import_module("keylime.tpm.tpm2_objects")
util: Any = import_module("keylime.tpm.tpm_util")


def credential(*paths: Path) -> None:
    """Seals a secret to an attestation key that is beside the endorsement key; TPM2B_PUBLICs."""
    ek, ak, secret, made = paths
    name = bytes.fromhex(objects.get_tpm2b_public_name(ak.read_bytes()))
    made.write_bytes(util.makecredential(ek.read_bytes(), secret.read_bytes(), name))


def quote(*paths: Path) -> None:
    """Prints the PCRs that a quote is about, if it is one."""
    ak, nonce, attest, signature, pcrs = (path.read_bytes() for path in paths)
    serialization = import_module("cryptography.hazmat.primitives.serialization")
    pem = objects.pubkey_from_tpm2b_public(ak).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    json.dump(util.checkquote(pem, nonce, signature, attest, pcrs, "sha256"), sys.stdout)


if __name__ == "__main__":
    {"credential": credential, "quote": quote}[sys.argv[1]](*map(Path, sys.argv[2:]))
