"""What swtpm_setup says about PCR banks of a TPM that knows more of them than we do."""

from __future__ import annotations

from tests.support.setup_tpms import Lines, MadeUpTpm
from vtpm_cuse.manufacture.plan import SetupPlan
from vtpm_cuse.manufacture.tpm2 import Tpm2Setup

SHA256, NEWER = b"\x00\x0b", b"\x00\x99"
ALL = b"\x03\xff\xff\xff"


def response(body: bytes, *, authorized: bool = False) -> bytes:
    if authorized:
        body = len(body).to_bytes(4, "big") + body + bytes.fromhex("0000 01 0000")
    tag = 0x8002 if authorized else 0x8001
    return tag.to_bytes(2, "big") + (10 + len(body)).to_bytes(4, "big") + bytes(4) + body


class NewerTpm(MadeUpTpm):
    def process(self, command: bytes) -> bytes:
        match int.from_bytes(command[6:10], "big"):
            case 0x17A:  # GetCapability: no more data, TPM_CAP_PCRS, two banks
                return response(bytes.fromhex("00 00000005 00000002") + SHA256 + ALL + NEWER + ALL)
            case 0x12B:  # PCR_Allocate: YES, and three sizes
                return response(bytes.fromhex("01") + bytes(12), authorized=True)
        return response(b"")


def test_a_bank_without_a_name_is_shown_by_its_number() -> None:
    lines = Lines()
    plan = SetupPlan(tpm2=True, pcr_banks=("sha256",), reconfigure=True)
    Tpm2Setup(NewerTpm(), plan, None, lines).run()
    assert lines.said == ["Successfully activated PCR banks sha256 among sha256,0x99."]
