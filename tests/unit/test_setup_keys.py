"""Keys of a set-up, and their certificates, where TPM and certificate tool are not as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import CERTS
from tests.support.setup_tpms import Lines, MadeUpTpm
from vtpm_cuse.ca.certificates import CertificateKind, CertificateRequest, Maker, TpmSpecification
from vtpm_cuse.ca.issuers import origin_of_untrusted
from vtpm_cuse.ca.keys import PublicKey
from vtpm_cuse.errors import CertificateError, TpmError, UsageError
from vtpm_cuse.manufacture.certify import ToolCertifier
from vtpm_cuse.manufacture.config import CertificateConfig
from vtpm_cuse.manufacture.plan import KeyAlgorithm, RsaKey, SetupPlan, TpmFacts
from vtpm_cuse.manufacture.tpm2 import Tpm2Setup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EK = (CERTS / "tpm2-ek-rsa2048.der").read_bytes()
FACTS = TpmFacts(Maker("id:00001014", "swtpm", "id:2"), TpmSpecification("2.0", 0, 183))


class AnsweringTpm(MadeUpTpm):
    """Answers with one response after the other."""

    def __init__(self, *answers: str) -> None:
        self._answers: Iterator[str] = iter(answers)

    def process(self, command: bytes) -> bytes:
        assert command[:1] == b"\x80"
        return bytes.fromhex(next(self._answers))


@pytest.mark.parametrize(
    ("algorithm", "code", "kind", "message"),
    [
        (KeyAlgorithm.RSA4096, "000002c4", UsageError, "0x2c4; does its profile have RSA 4096?"),
        (KeyAlgorithm.RSA4096, "000002c3", TpmError, "0x2c3"),
        (KeyAlgorithm.P521, "000002c4", TpmError, "0x2c4"),
    ],
)
def test_a_key_that_the_profile_does_not_have(
    algorithm: KeyAlgorithm, code: str, kind: type[Exception], message: str
) -> None:
    plan = SetupPlan(tpm2=True, create_ek=True, ek_algorithms=(algorithm,))
    tpm = AnsweringTpm(f"8001 0000000a {code}")
    with pytest.raises(kind, match="TPM2_CreatePrimary failed: ") as caught:
        Tpm2Setup(tpm, plan, None, Lines()).run()
    assert message in str(caught.value)


def test_a_certificate_that_no_index_can_hold() -> None:
    """The C suite's manual says what signs such ones; this one that the size is at fault."""
    setup = Tpm2Setup(AnsweringTpm("8001 0000000a 000002d5"), SetupPlan(tpm2=True), None, Lines())
    with pytest.raises(
        UsageError, match="NV_DefineSpace failed: 0x2d5; the X has 5000 bytes; a CA"
    ):
        setup._store(0x1C00002, bytes(5000), "X")


@pytest.mark.parametrize(
    ("value", "maker"), [("49424d00", "IBM"), ("58595a31", "XYZ1"), ("0a00ff20", "????")]
)
def test_the_serial_number_of_a_tpm(value: str, maker: str) -> None:
    """Whatever it says of its maker, it is text that can stand on a command line."""
    tpm = AnsweringTpm(f"8001 0000001b 00000000 00 00000006 00000001 00000105 {value}")
    setup = Tpm2Setup(tpm, SetupPlan(tpm2=True), None, Lines())
    setup.certificates = {"ek-rsa2048.crt": EK, "ek-secp384r1.crt": b""}
    key_id, number = origin_of_untrusted(EK)
    assert number.hex() == "015498d555e6b4a7ed"
    assert setup._serial() == f"{maker}:{key_id.hex()}:015498d555e6b4a7ed"


@pytest.mark.parametrize("damage", [b"", b"junk", EK[:-1], (CERTS / "issuercert.pem").read_bytes()])
def test_a_certificate_that_does_not_say_whose_it_is(damage: bytes) -> None:
    with pytest.raises(CertificateError, match="The endorsement key's certificate"):
        origin_of_untrusted(damage)


TOOL = """#!/bin/sh
printf '%s\\n' "$@" > "{path}/words"
while [ "$1" != --dir ]; do shift; done
for kind in ek platform iak; do echo $kind > "$2/$kind.cert"; done
"""


@pytest.mark.parametrize(
    ("kind", "flags", "first", "last"),
    [
        (CertificateKind.EK, True, "--ek", "--decryption"),
        (CertificateKind.PLATFORM, True, "--ek", "--tpm2"),
        (CertificateKind.IAK, True, "--key", "--tpm-serial-num IBM:ab:01"),
    ],
)
def test_what_a_certificate_tool_is_told(
    kind: CertificateKind, flags: bool, first: str, last: str, tmp_path: Path
) -> None:
    tool = tmp_path / "tool"
    tool.write_text(TOOL.format(path=tmp_path))
    tool.chmod(0o755)
    plan = SetupPlan(tpm2=True, allow_signing=flags, decryption=flags)
    certifier = ToolCertifier(str(tool), CertificateConfig(), Lines(), plan)
    try:
        made = certifier.certify(kind, RsaKey(b"\xab"), FACTS, "IBM:ab:01")
    finally:
        certifier.close()
    assert made == f"{kind.value}\n".encode()
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:4] == ["--type", kind.value, first, "ab"]
    assert " ".join(words).endswith(last)
    assert ("--tpm-serial-num" in words) is (kind is CertificateKind.IAK)


def test_no_identity_without_a_serial_number_or_in_a_tpm12() -> None:
    key = PublicKey.from_rsa(77)
    for kind in (CertificateKind.IAK, CertificateKind.IDEVID):
        assert CertificateRequest(kind, key, tpm_serial="x").tpm_serial == "x"
        with pytest.raises(ValueError, match="says its serial number"):
            CertificateRequest(kind, key)
        with pytest.raises(ValueError, match="is a TPM 2"):
            CertificateRequest(kind, key, is_tpm2=False, tpm_serial="x")
    with pytest.raises(ValueError, match="maker"):
        CertificateRequest(CertificateKind.EK, key, specification=FACTS.specification)
