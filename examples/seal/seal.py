"""Keeps a secret that this TPM gives back as long as PCR 16 has the value that it has now.

seal.py seal FILE <secret      writes FILE, which is worth nothing on another machine
seal.py unseal FILE            prints the secret

Needs tpm2-pytss. The TPM is the one that TPM2TOOLS_TCTI names, else tpm2-tss finds one.
"""

from __future__ import annotations

import json
import os
import sys
from base64 import b64decode, b64encode
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPML_PCR_SELECTION,
    TPMS_SENSITIVE_CREATE,
    TPMT_SYM_DEF,
    TSS2_Exception,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PCR = "sha256:16"
# No password: the policy alone opens it.
ATTRIBUTES = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT
# The storage key, which a TPM makes the same each time.
PARENT = TPM2B_PUBLIC.parse(
    "ecc:aes128cfb", objectAttributes=TPMA_OBJECT.DEFAULT_TPM2_TOOLS_CREATEPRIMARY_ATTRS
)


@contextmanager
def policy(tpm: ESAPI, kind: TPM2_SE) -> Iterator[ESYS_TR]:
    """A session that asks for the PCR as it is now."""
    session = tpm.start_auth_session(
        ESYS_TR.NONE, ESYS_TR.NONE, kind, TPMT_SYM_DEF(TPM2_ALG.NULL), TPM2_ALG.SHA256
    )
    try:
        tpm.policy_pcr(session, b"", TPML_PCR_SELECTION.parse(PCR))
        yield session
    finally:
        tpm.flush_context(session)


def seal(tpm: ESAPI, secret: bytes) -> str:
    """The secret as text that only this TPM can open."""
    with policy(tpm, TPM2_SE.TRIAL) as session:
        digest = tpm.policy_get_digest(session)
    parent, *_ = tpm.create_primary(None, PARENT)
    public = TPM2B_PUBLIC.parse("keyedhash", objectAttributes=ATTRIBUTES, authPolicy=digest)
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=secret))
    private, public, *_ = tpm.create(parent, sensitive, public)
    parts = {"public": public, "private": private}
    return json.dumps({name: b64encode(part.marshal()).decode() for name, part in parts.items()})


def unseal(tpm: ESAPI, sealed: str) -> bytes:
    """The secret in what `seal` made."""
    parts = {name: b64decode(text) for name, text in json.loads(sealed).items()}
    public, _ = TPM2B_PUBLIC.unmarshal(parts["public"])
    private, _ = TPM2B_PRIVATE.unmarshal(parts["private"])
    parent, *_ = tpm.create_primary(None, PARENT)
    thing = tpm.load(parent, private, public)
    with policy(tpm, TPM2_SE.POLICY) as session:
        return bytes(tpm.unseal(thing, session1=session))


def main(words: list[str]) -> int:
    """The program; returns its exit status."""
    if len(words) != 2 or words[0] not in {"seal", "unseal"}:
        print(__doc__, file=sys.stderr)
        return 2
    verb, path = words[0], Path(words[1])
    try:
        with ESAPI(os.environ.get("TPM2TOOLS_TCTI")) as tpm:
            if verb == "seal":
                path.write_text(seal(tpm, sys.stdin.buffer.read()))
            else:
                sys.stdout.buffer.write(unseal(tpm, path.read_text()))
    except TSS2_Exception as exc:
        print(f"seal: the TPM refuses: {exc}", file=sys.stderr)
        return 1
    except (OSError, KeyError, ValueError) as exc:
        print(f"seal: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
