"""The set-up of a TPM 1.2: endorsement key, ownership, certificates in NV."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca.certificates import CertificateKind, bare_certificate
from vtpm_cuse.errors import UsageError, WireError
from vtpm_cuse.manufacture.plan import RsaKey, find_facts
from vtpm_cuse.wire import tpm12
from vtpm_cuse.wire.tpm import TpmOrdinal

if TYPE_CHECKING:
    from vtpm_cuse.manufacture.plan import Certifier, Ownership, Reporter, SetupPlan, SetupTpm
    from vtpm_cuse.wire.marshal import TpmStruct

_EK_CERTIFICATE_INDEX: Final = 0x1000F000
_PLATFORM_CERTIFICATE_INDEX: Final = 0x1000F002
_FILE_NAME: Final = "ek-rsa2048.crt"
# Both are only there to be different each time against a TPM that is not our own.
_ANTI_REPLAY: Final = bytes.fromhex("38f03081072b0ca9109808c04b0511c9502352c4")
_NONCE_ODD: Final = bytes.fromhex("010203040506") + bytes(14)
_RSA_2048: Final = tpm12.KeyParms(
    tpm12.TPM_ALG_RSA,
    tpm12.TPM_ES_RSAESOAEP_SHA1_MGF1,
    tpm12.TPM_SS_NONE,
    tpm12.RsaKeyParms(2048, 2, b"").pack(),
)
_ANY_PCRS: Final = tpm12.PcrInfoShort(3, 0, 0, 0, tpm12.TPM_LOC_ALL, bytes(20))
_CERTIFICATE_ATTRIBUTES: Final = tpm12.TPM_NV_PER_OWNERREAD | tpm12.TPM_NV_PER_OWNERWRITE

WELL_KNOWN: Final = bytes(20)
"""The password that everybody knows."""


def auth_digest(password: bytes) -> bytes:
    """A password as a TPM 1.2 takes it: 20 bytes."""
    return hashlib.sha1(password, usedforsecurity=False).digest()


class Tpm12Setup:
    """One set-up.

    Attributes:
        certificates: The endorsement key's certificate by the name of its file.
    """

    def __init__(
        self, tpm: SetupTpm, plan: SetupPlan, certifier: Certifier | None, report: Reporter
    ) -> None:
        self._tpm, self._plan, self._certifier, self._report = tpm, plan, certifier, report
        self.certificates: dict[str, bytes] = {}

    def run(self) -> None:
        """All that the plan asks for. Raises VtpmError, OSError."""
        plan = self._plan
        self._switch_on()
        if plan.create_ek:
            key = self._create_ek()
            if plan.ownership is not None:
                self._take_ownership(key, plan.ownership)
            if plan.ek_certificate and self._certifier is not None:
                self._certify(key, self._certifier)
        if plan.lock_nvram:
            self._define(tpm12.TPM_NV_INDEX_LOCK, 0, 0)
            self._report.line("Successfully locked NVRAM access.")

    def _switch_on(self) -> None:
        presences = tpm12.TPM_PHYSICAL_PRESENCE_CMD_ENABLE, tpm12.TPM_PHYSICAL_PRESENCE_PRESENT
        for presence in presences:
            self._execute(TpmOrdinal.TSC_ORD_PhysicalPresence, tpm12.Value16(presence))
        self._execute(TpmOrdinal.TPM_ORD_PhysicalEnable)
        self._execute(TpmOrdinal.TPM_ORD_PhysicalSetDeactivated, tpm12.Value8(0))

    def _create_ek(self) -> RsaKey:
        self._report.step("Creating the endorsement key")
        parameters = tpm12.CreateEndorsementKeyPairParameters(_ANTI_REPLAY, _RSA_2048)
        answer = self._execute(TpmOrdinal.TPM_ORD_CreateEndorsementKeyPair, parameters)
        modulus = tpm12.CreateEndorsementKeyPairResult.unpack_untrusted(answer).pubKey
        if len(modulus) != 256:
            raise WireError("RSA modulus", 256, len(modulus))
        self._report.line("Successfully created EK.")
        return RsaKey(modulus)

    def _take_ownership(self, key: RsaKey, ownership: Ownership) -> None:
        self._report.step("Taking ownership")
        oiap = tpm12.OiapResult.unpack_untrusted(self._execute(TpmOrdinal.TPM_ORD_OIAP))
        storage_key = tpm12.Key12(
            tag=tpm12.TPM_TAG_KEY12,
            fill=0,
            keyUsage=tpm12.TPM_KEY_STORAGE,
            keyFlags=0,
            authDataUsage=tpm12.TPM_AUTH_ALWAYS,
            algorithmParms=_RSA_2048,
            PCRInfo=b"",
            pubKey=b"",
            encData=b"",
        )
        parameters = tpm12.TakeOwnershipParameters(
            tpm12.TPM_PID_OWNER,
            _encrypt(key, ownership.owner_auth),
            _encrypt(key, ownership.srk_auth),
            storage_key,
        )
        ordinal = TpmOrdinal.TPM_ORD_TakeOwnership
        digest = hashlib.sha1(
            ordinal.to_bytes(4, "big") + parameters.pack(), usedforsecurity=False
        ).digest()
        message = digest + oiap.nonceEven + _NONCE_ODD + b"\0"
        proof = hmac.digest(ownership.owner_auth, message, "sha1")
        auth = tpm12.Authorization1(oiap.authHandle, _NONCE_ODD, 0, proof)
        self._execute(ordinal, parameters, auth)
        self._report.line("Successfully took ownership of the TPM.")

    def _certify(self, key: RsaKey, certifier: Certifier) -> None:
        """All certificates are there before any is stored."""
        facts = find_facts(self._tpm)
        self._report.step("Creating certificates")
        certificate = certifier.certify(CertificateKind.EK, key, facts)
        platform = b""
        if self._plan.platform_certificate:
            platform = certifier.certify(CertificateKind.PLATFORM, key, facts)
        self._store(_EK_CERTIFICATE_INDEX, certificate)
        self.certificates[_FILE_NAME] = bare_certificate(certificate)
        self._report.line("Successfully created NVRAM area for EK certificate.")
        if platform:
            self._store(_PLATFORM_CERTIFICATE_INDEX, platform)
            self._report.line("Successfully created NVRAM area for Platform certificate.")

    def _store(self, index: int, data: bytes) -> None:
        self._define(index, _CERTIFICATE_ATTRIBUTES, len(data))
        self._execute(TpmOrdinal.TPM_ORD_NV_WriteValue, tpm12.NvWriteParameters(index, 0, data))

    def _define(self, index: int, attributes: int, size: int) -> None:
        parameters = tpm12.NvDefineParameters(
            tag=tpm12.TPM_TAG_NV_DATA_PUBLIC,
            nvIndex=index,
            pcrInfoRead=_ANY_PCRS,
            pcrInfoWrite=_ANY_PCRS,
            attributesTag=tpm12.TPM_TAG_NV_ATTRIBUTES,
            attributes=attributes,
            bReadSTClear=0,
            bWriteSTClear=0,
            bWriteDefine=0,
            dataSize=size,
            encAuth=bytes(20),
        )
        self._execute(TpmOrdinal.TPM_ORD_NV_DefineSpace, parameters)

    def _execute(
        self,
        ordinal: TpmOrdinal,
        parameters: TpmStruct | None = None,
        auth: tpm12.Authorization1 | None = None,
    ) -> bytes:
        answer = self._tpm.process(tpm12.command(ordinal, parameters, auth))
        return tpm12.read_response_untrusted(ordinal.name.replace("_ORD_", "_"), answer)


def _encrypt(key: RsaKey, secret: bytes) -> bytes:
    """RSA-OAEP as TPM 1.2 does it (Main Part 1, section 31.1.1). Raises UsageError."""
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA1

    sha1 = SHA1()  # noqa: S303 - TPM 1.2 knows no other
    scheme = padding.OAEP(mgf=padding.MGF1(sha1), algorithm=sha1, label=b"TCPA")
    try:
        public = rsa.RSAPublicNumbers(65537, int.from_bytes(key.modulus, "big")).public_key()
        return public.encrypt(secret, scheme)
    except ValueError as exc:
        raise UsageError(f"The TPM's endorsement key cannot be used: {exc}") from exc
