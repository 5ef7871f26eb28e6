"""What Windows 11 and the firmware before it do with a TPM 2.0, from the specifications.

Sources: TCG PC Client Platform TPM Profile and Platform Firmware Profile (PCRs, banks), EK
Credential Profile (template L-1, NV indexes), TPM v2.0 Provisioning Guidance (handles, dictionary
attack parameters), TPM 2.0 Library Part 3 (commands).
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.support.tpm2_auth import (
    CONTINUE,
    DECRYPT,
    ENCRYPT,
    HMAC_SESSION,
    POLICY_SESSION,
    Fields,
    Refused,
    Session,
    Stack,
    sized,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OWNER, LOCKOUT, ENDORSEMENT, PLATFORM = 0x40000001, 0x4000000A, 0x4000000B, 0x4000000C
EK, SRK = 0x81010001, 0x81000001
EK_CERTIFICATE, COUNTER = 0x01C00002, 0x01500001
SHA1, SHA256 = 0x0004, 0x000B
SEALED_TO: Final = (7, 11)
"""The PCRs of BitLocker with Secure Boot."""
CAPPED: Final = 11
AUTH_FAIL, POLICY_FAIL, LOCKED_OUT = 0x98E, 0x99D, 0x921
_PART: Final = 512  # of an NV index, in one TPM2_NV_Read
_EK_POLICY: Final = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"


def rsa_template(attributes: int, rest: str, policy: str = "", unique: int = 0) -> bytes:
    """TPMT_PUBLIC of an RSA key; *rest* is its cipher and scheme in hex."""
    head = struct.pack(">HHI", 0x0001, SHA256, attributes) + sized(bytes.fromhex(policy))
    return head + bytes.fromhex(rest) + struct.pack(">HI", 2048, 0) + sized(bytes(unique))


EK_TEMPLATE: Final = rsa_template(0x000300B2, "0006 0080 0043 0010", _EK_POLICY, 256)
SRK_TEMPLATE: Final = rsa_template(0x00030472, "0006 0080 0043 0010", "", 256)
AIK_TEMPLATE: Final = rsa_template(0x00050072, "0010 0014 000b")


def selection(*pcrs: int) -> bytes:
    """TPML_PCR_SELECTION of the SHA-256 bank."""
    bits = sum(1 << pcr for pcr in pcrs)
    return struct.pack(">IHB", 1, SHA256, 3) + bits.to_bytes(3, "little")


class Windows:
    """One installation; its disk keeps key blobs, the password of its AIK and that for lockouts."""

    def __init__(self, run: Callable[[bytes], bytes]) -> None:
        self.stack = Stack(run)
        self.secret = os.urandom(44)  # a volume master key, in its envelope
        self.aik_password, self.lockout_password = os.urandom(20), os.urandom(20)
        self.starts = 0
        self.certificate = self.srk_modulus = self.aik_modulus = b""
        self.sealed: tuple[bytes, bytes] = (b"", b"")
        self.aik: tuple[bytes, bytes] = (b"", b"")

    # -- firmware -------------------------------------------------------------------------

    def active_banks(self) -> dict[int, bool]:
        """Banks that the TPM implements, and whether they have PCRs."""
        _, fields = self.stack.execute(0x17A, (), struct.pack(">III", 5, 0, 64))
        fields.take(5)
        found = {}
        for _ in range(fields.number(4)):
            bank, bits = fields.number(2), fields.take(fields.number(1))
            found[bank] = any(bits)
        return found

    def switch_to_sha256(self) -> None:
        """TPM2_PCR_Allocate; it takes effect at the next start."""
        rows = b"".join(
            struct.pack(">HB3s", bank, 3, (b"\xff" if bank == SHA256 else b"\0") * 3)
            for bank in self.active_banks()
        )
        body = struct.pack(">I", len(rows) // 6) + rows
        _, fields = self.stack.execute(0x12B, (PLATFORM,), body, (b"",))
        assert fields.take(1) == b"\1"

    def define(self, hierarchy: int, index: int, attributes: int, size: int) -> None:
        """TPM2_NV_DefineSpace."""
        public = struct.pack(">IHIHH", index, SHA256, attributes, 0, size)
        self.stack.execute(0x12A, (hierarchy,), sized(b"") + sized(public), (b"",))

    def manufacture(self, certificate: bytes) -> None:
        """Has the EK's certificate in NV, as the platform's maker puts it there."""
        self.define(PLATFORM, EK_CERTIFICATE, 0x42072001, len(certificate))
        for at in range(0, len(certificate), _PART):
            body = sized(certificate[at : at + _PART]) + struct.pack(">H", at)
            self.stack.execute(0x137, (PLATFORM, EK_CERTIFICATE), body, (b"",))
        self.certificate = certificate

    def measure(self) -> None:
        """Firmware: self test, PCRs 0 to 7 with their separators, and the platform is nobody's."""
        self.stack.execute(0x143, (), b"\1")
        for pcr in range(8):
            self.extend(pcr, b"what is measured into %d" % pcr)
            self.extend(pcr, b"\0\0\0\0")
        self.stack.execute(0x129, (PLATFORM,), sized(os.urandom(32)), (b"",))

    def extend(self, pcr: int, event: bytes) -> None:
        """TPM2_PCR_Extend of the SHA-256 bank."""
        body = struct.pack(">IH", 1, SHA256) + hashlib.sha256(event).digest()
        self.stack.execute(0x182, (pcr,), body, (b"",))

    # -- the first start ------------------------------------------------------------------

    def provision(self) -> None:
        """Ownership: EK and SRK, protection against guesses, an attestation key, a counter."""
        assert self.read_nv() == self.certificate
        for hierarchy, template, place in (
            (ENDORSEMENT, EK_TEMPLATE, EK),
            (OWNER, SRK_TEMPLATE, SRK),
        ):
            body = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + bytes(4)
            (handle,), _ = self.stack.execute(0x131, (hierarchy,), body, (b"",), returned=1)
            self.stack.execute(0x120, (OWNER, handle), struct.pack(">I", place), (b"",))
            self.stack.execute(0x165, (), struct.pack(">I", handle))
        self.srk_modulus = self.read_public(SRK)
        self.read_public(EK)
        self.stack.execute(0x129, (LOCKOUT,), sized(self.lockout_password), (b"",))
        self.reset_guesses()
        self.limit_guesses(32)
        password = sized(sized(self.aik_password) + sized(b""))
        body = password + sized(AIK_TEMPLATE) + sized(b"") + bytes(4)
        self.aik = self._created(body, self.salted(HMAC_SESSION, DECRYPT))
        self.define(OWNER, COUNTER, 0x02040014, 8)
        self.stack.execute(0x134, (COUNTER, COUNTER), b"", (b"",))
        self.starts = self.counted()

    def counted(self) -> int:
        """The value of a counter that shows a TPM that was set back."""
        body = struct.pack(">HH", 8, 0)
        _, fields = self.stack.execute(0x14E, (COUNTER, COUNTER), body, (b"",))
        return int.from_bytes(fields.sized(), "big")

    def count(self) -> None:
        """One more start: TPM2_NV_Increment."""
        self.stack.execute(0x134, (COUNTER, COUNTER), b"", (b"",))
        self.starts += 1
        assert self.counted() == self.starts

    def reset_guesses(self) -> None:
        """TPM2_DictionaryAttackLockReset."""
        self.stack.execute(0x139, (LOCKOUT,), b"", (self.lockout_password,))

    def limit_guesses(self, tries: int) -> None:
        """TPM2_DictionaryAttackParameters: one is forgotten in two hours, a lockout in a day."""
        body = struct.pack(">III", tries, 7200, 86400)
        self.stack.execute(0x13A, (LOCKOUT,), body, (self.lockout_password,))

    def salted(self, kind: int, attributes: int = 0) -> Session:
        """A session that only who has the SRK's private half could read along."""
        return self.stack.start_session(kind, SRK, self.srk_modulus, attributes | CONTINUE)

    def _created(self, parameters: bytes, session: Session) -> tuple[bytes, bytes]:
        """TPM2_Create below the SRK: private and public half. The session ends."""
        session.attributes &= ~CONTINUE
        _, fields = self.stack.execute(0x153, (SRK,), parameters, (session,))
        return fields.sized(), fields.sized()

    def seal(self, session: Session | None = None) -> None:
        """BitLocker: the key goes to the TPM encrypted, with a policy of the PCRs' values now."""
        values = hashlib.sha256(b"".join(self.pcr(pcr) for pcr in SEALED_TO)).digest()
        policy = hashlib.sha256(
            bytes(32) + struct.pack(">I", 0x17F) + selection(*SEALED_TO) + values
        ).digest()
        public = struct.pack(">HHI", 0x0008, SHA256, 0x00000412) + sized(policy)
        public += struct.pack(">H", 0x0010) + sized(b"")
        body = sized(sized(b"") + sized(self.secret)) + sized(public) + sized(b"") + bytes(4)
        session = session or self.salted(HMAC_SESSION)
        session.attributes |= DECRYPT | ENCRYPT
        self.sealed = self._created(body, session)

    # -- each start -----------------------------------------------------------------------

    def load(self, blob: tuple[bytes, bytes]) -> int:
        """TPM2_Load below the SRK."""
        body = sized(blob[0]) + sized(blob[1])
        (handle,), fields = self.stack.execute(0x157, (SRK,), body, (b"",), returned=1)
        self.stack.names[handle] = fields.sized()
        return handle

    def flush(self, handle: int) -> None:
        self.stack.execute(0x165, (), struct.pack(">I", handle))
        self.stack.names.pop(handle, None)

    def saved(self, handle: int) -> bytes:
        """TPM2_ContextSave."""
        return self.stack.execute(0x162, (handle,))[1].rest()

    def restored(self, context: bytes) -> int:
        """TPM2_ContextLoad."""
        (handle,), _ = self.stack.execute(0x161, (), context, returned=1)
        return handle

    def with_policy(self) -> Session:
        """A policy session in which the PCRs are as they are now."""
        session = self.salted(POLICY_SESSION, ENCRYPT)
        self.stack.execute(0x17F, (session.handle,), sized(b"") + selection(*SEALED_TO))
        return session

    def unseal(self, session: Session) -> bytes:
        """What BitLocker has sealed; the session ends with that, unless it is refused."""
        handle = self.load(self.sealed)
        session.attributes &= ~CONTINUE
        try:
            return self.stack.execute(0x15E, (handle,), b"", (session,))[1].sized()
        finally:
            self.flush(handle)

    def cap(self) -> None:
        """The boot manager, before what it starts could ask for the key."""
        self.extend(CAPPED, b"that was all")

    def refuses_the_key(self) -> bool:
        """Whether the PCRs are no longer those of the boot manager."""
        session = self.with_policy()
        try:
            self.unseal(session)
        except Refused as exc:
            self.flush(session.handle)
            return exc.code == POLICY_FAIL
        return False

    # -- attestation ----------------------------------------------------------------------

    def activate(self, aik: int) -> None:
        """An attestation CA's challenge: only this TPM's EK opens it, and only for this AIK."""
        challenge = os.urandom(32)
        body = sized(challenge) + sized(self.stack.names[aik])
        _, fields = self.stack.execute(0x168, (EK,), body)
        blob = fields.rest()
        policy = self.stack.start_session(POLICY_SESSION)
        body = sized(b"") * 3 + bytes(4)
        self.stack.execute(0x151, (ENDORSEMENT, policy.handle), body, (b"",))
        policy.attributes = 0
        _, fields = self.stack.execute(0x147, (aik, EK), blob, (self.aik_password, policy))
        assert fields.sized() == challenge

    def quote(self, aik: int, password: bytes | None = None) -> bytes:
        """Attests the PCRs, as the AIK's public half confirms. Raises Refused."""
        nonce = os.urandom(20)
        body = sized(nonce) + struct.pack(">H", 0x0010) + selection(*range(24))
        auth = self.aik_password if password is None else password
        _, fields = self.stack.execute(0x158, (aik,), body, (auth,))
        attested = fields.sized()
        assert fields.take(4) == bytes.fromhex("0014 000b")
        public = Fields(self.aik[1])
        public.take(8)
        assert not public.sized()
        public.take(12)
        key = rsa.RSAPublicNumbers(65537, int.from_bytes(public.sized(), "big")).public_key()
        key.verify(fields.sized(), attested, padding.PKCS1v15(), hashes.SHA256())
        assert sized(nonce) in attested
        return attested[-32:]

    # -- looking --------------------------------------------------------------------------

    def pcr(self, number: int) -> bytes:
        _, fields = self.stack.execute(0x17E, (), selection(number))
        fields.take(18)
        return fields.sized()

    def read_public(self, handle: int) -> bytes:
        """The modulus of an RSA key without a scheme; its name is kept."""
        _, fields = self.stack.execute(0x173, (handle,))
        public, self.stack.names[handle] = Fields(fields.sized()), fields.sized()
        public.take(8)
        public.sized()
        public.take(14)
        return public.sized()

    def read_nv(self) -> bytes:
        """The EK's certificate, in parts."""
        _, fields = self.stack.execute(0x169, (EK_CERTIFICATE,))
        size = int.from_bytes(fields.sized()[-2:], "big")
        found = b""
        while len(found) < size:
            body = struct.pack(">HH", min(_PART, size - len(found)), len(found))
            handles = (EK_CERTIFICATE, EK_CERTIFICATE)
            found += self.stack.execute(0x14E, handles, body, (b"",))[1].sized()
        return found

    def capability(self, kind: int, first: int) -> bytes:
        _, fields = self.stack.execute(0x17A, (), struct.pack(">III", kind, first, 254))
        return fields.rest()

    def state(self) -> dict[str, object]:
        """What can be seen of all that a TPM keeps, but for its clock."""
        _, clock = self.stack.execute(0x181)
        clock.take(16)
        tops = {"objects": 0x80 << 24, "HMAC": 2 << 24, "policy": 3 << 24, "persistent": 0x81 << 24}
        handles = {
            name: self.capability(1, first) for name, first in (tops | {"NV": 1 << 24}).items()
        }
        return {
            "resets": clock.rest(),
            "handles": handles,
            "properties": self.capability(6, 0x200),
            "banks": self.active_banks(),
            "PCRs": [self.pcr(number) for number in range(24)],
            "keys": [self.read_public(handle) for handle in (SRK, EK)],
            "certificate": self.read_nv(),
            "starts": self.counted(),
        }
