"""The set-up of a TPM 2.0: keys, NV indexes, PCR banks.

Handles, indexes and templates are those of the TCG EK Credential Profile for
TPM Family 2.0 (templates L-1, H-1, H-3 and H-6) and the TPM v2.0 Provisioning
Guidance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.ca.certificates import CertificateKind
from vtpm_cuse.engine.base import InfoFlag
from vtpm_cuse.errors import UsageError, WireError
from vtpm_cuse.manufacture.plan import (
    EccKey,
    EndorsementKey,
    RsaKey,
    find_facts,
)
from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.tpm import TpmCc, TpmSu, shutdown_command
from vtpm_cuse.wire.tpm2 import EccPublic, PcrSelection, RsaPublic, Symmetric, TpmAlg

if TYPE_CHECKING:
    from vtpm_cuse.manufacture.plan import Certifier, Reporter, SetupPlan, SetupTpm
    from vtpm_cuse.wire.marshal import TpmStruct
    from vtpm_cuse.wire.tpm2 import Public, Response

PCR_BANKS: Final = {
    "sha1": TpmAlg.TPM_ALG_SHA1,
    "sha256": TpmAlg.TPM_ALG_SHA256,
    "sha384": TpmAlg.TPM_ALG_SHA384,
    "sha512": TpmAlg.TPM_ALG_SHA512,
    "sm3-256": TpmAlg.TPM_ALG_SM3_256,
    "sha3-256": TpmAlg.TPM_ALG_SHA3_256,
    "sha3-384": TpmAlg.TPM_ALG_SHA3_384,
    "sha3-512": TpmAlg.TPM_ALG_SHA3_512,
}
"""What users call a PCR bank."""

_ALL_PCRS: Final = b"\xff\xff\xff"
_SPK_HANDLE: Final = 0x81000001
_PLATFORM_CERTIFICATE_INDEX: Final = 0x01C08000
_NV_CHUNK: Final = 1024
_ACTIVE_PROFILE: Final = '{"ActiveProfile":'
_CURVE: Final = "secp384r1"

_NV_ATTRIBUTES: Final = (
    tpm2.TpmaNv.PPWRITE
    | tpm2.TpmaNv.WRITEDEFINE
    | tpm2.TpmaNv.PPREAD
    | tpm2.TpmaNv.OWNERREAD
    | tpm2.TpmaNv.AUTHREAD
    | tpm2.TpmaNv.NO_DA
    | tpm2.TpmaNv.PLATFORMCREATE
)
_FIXED: Final = (
    tpm2.TpmaObject.FIXED_TPM | tpm2.TpmaObject.FIXED_PARENT | tpm2.TpmaObject.SENSITIVE_DATA_ORIGIN
)
_STORAGE: Final = (
    _FIXED
    | tpm2.TpmaObject.USER_WITH_AUTH
    | tpm2.TpmaObject.NO_DA
    | tpm2.TpmaObject.RESTRICTED
    | tpm2.TpmaObject.DECRYPT
)

# PolicySecret(TPM_RH_ENDORSEMENT), and that or a policy of the authorized index 0x01C07F02.
_POLICY_A_SHA256: Final = bytes.fromhex(
    "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
)
_POLICY_B_SHA384: Final = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419ca"
    "cb47ba09699646150f9fc000f3f80e12"
)


class EkPlace(NamedTuple):
    """Where an endorsement key and what belongs to it are put."""

    name: str
    handle: int
    certificate_index: int
    template_index: int
    file_name: str


_RSA_PLACES: Final = {
    2048: EkPlace("RSA 2048", 0x81010001, 0x01C00002, 0x01C00004, "ek-rsa2048.crt"),
    3072: EkPlace("RSA 3072", 0x8101001C, 0x01C0001C, 0x01C0001D, "ek-rsa3072.crt"),
}
_ECC_PLACE: Final = EkPlace("ECC", 0x81010016, 0x01C00016, 0x01C00017, f"ek-{_CURVE}.crt")

RSA_BITS: Final = tuple(_RSA_PLACES)
"""The sizes of RSA keys that have a place."""


def rsa_ek_template(plan: SetupPlan) -> RsaPublic:
    """The public area from which the RSA endorsement key is made."""
    small = _is_small(plan)
    return _rsa(
        plan,
        _ek_attributes(plan, user_with_auth=not small),
        _POLICY_A_SHA256 if small else _POLICY_B_SHA384,
        _ek_symmetric(plan, 128 if small else 256),
        bytes(plan.rsa_bits // 8) if small else b"",
    )


def ecc_ek_template(plan: SetupPlan) -> EccPublic:
    """The public area from which the ECC endorsement key is made."""
    return _p384(
        _ek_attributes(plan, user_with_auth=True), _POLICY_B_SHA384, _ek_symmetric(plan, 256), b""
    )


def spk_template(plan: SetupPlan) -> Public:
    """The public area from which the storage primary key is made."""
    if plan.spk == "ecc":
        return _p384(_STORAGE, b"", Symmetric(256), bytes(48))
    symmetric = Symmetric(128 if _is_small(plan) else 256)
    return _rsa(plan, _STORAGE, b"", symmetric, bytes(plan.rsa_bits // 8))


def _is_small(plan: SetupPlan) -> bool:
    """Whether RSA keys have the size for which the profile has templates of their own."""
    return plan.rsa_bits == 2048


def _rsa(
    plan: SetupPlan, attributes: int, policy: bytes, symmetric: Symmetric | None, unique: bytes
) -> RsaPublic:
    return RsaPublic(
        type=TpmAlg.TPM_ALG_RSA,
        nameAlg=TpmAlg.TPM_ALG_SHA256 if _is_small(plan) else TpmAlg.TPM_ALG_SHA384,
        objectAttributes=attributes,
        authPolicy=policy,
        symmetric=symmetric,
        scheme=TpmAlg.TPM_ALG_NULL,
        keyBits=plan.rsa_bits,
        exponent=0,
        unique=unique,
    )


def _p384(
    attributes: int, policy: bytes, symmetric: Symmetric | None, coordinate: bytes
) -> EccPublic:
    return EccPublic(
        type=TpmAlg.TPM_ALG_ECC,
        nameAlg=TpmAlg.TPM_ALG_SHA384,
        objectAttributes=attributes,
        authPolicy=policy,
        symmetric=symmetric,
        scheme=TpmAlg.TPM_ALG_NULL,
        curveID=tpm2.TPM_ECC_NIST_P384,
        kdf=TpmAlg.TPM_ALG_NULL,
        x=coordinate,
        y=coordinate,
    )


def _ek_attributes(plan: SetupPlan, *, user_with_auth: bool) -> int:
    attributes = _FIXED | tpm2.TpmaObject.ADMIN_WITH_POLICY
    if user_with_auth:
        attributes |= tpm2.TpmaObject.USER_WITH_AUTH
    if not plan.allow_signing:
        return attributes | tpm2.TpmaObject.RESTRICTED | tpm2.TpmaObject.DECRYPT
    if plan.decryption:
        attributes |= tpm2.TpmaObject.DECRYPT
    return attributes | tpm2.TpmaObject.SIGN


def _ek_symmetric(plan: SetupPlan, bits: int) -> Symmetric | None:
    return None if plan.allow_signing else Symmetric(bits)


class Tpm2Setup:
    """One set-up.

    Attributes:
        certificates: The endorsement keys' certificates made so far, by the name of their file.
    """

    def __init__(
        self, tpm: SetupTpm, plan: SetupPlan, certifier: Certifier | None, report: Reporter
    ) -> None:
        self._tpm, self._plan, self._certifier, self._report = tpm, plan, certifier, report
        self._session = tpm2.PasswordSession()
        self.certificates: dict[str, bytes] = {}

    def run(self) -> None:
        """All that the plan asks for. Raises VtpmError, OSError."""
        plan = self._plan
        profile = self._tpm.info(InfoFlag.ACTIVE_PROFILE).strip()
        if profile.startswith(_ACTIVE_PROFILE):  # libtpms 0.9 has none
            self._report.line(f"Active profile: {profile[len(_ACTIVE_PROFILE) : -1]}")
        if not plan.reconfigure:
            if plan.spk is not None:
                self._create_spk()
            if plan.create_ek:
                self._create_ek(_RSA_PLACES[plan.rsa_bits], rsa_ek_template(plan), platform=True)
                self._create_ek(_ECC_PLACE, ecc_ek_template(plan), platform=False)
        if plan.pcr_banks is not None:
            self._activate_pcr_banks(plan.pcr_banks)
        answer = self._tpm.process(shutdown_command(TpmSu.TPM_SU_CLEAR))
        tpm2.read_response_untrusted("TPM2_Shutdown", answer)

    # -- keys -----------------------------------------------------------------------------

    def _create_spk(self) -> None:
        self._report.step("Creating the storage primary key")
        handle, _ = self._create_primary(tpm2.TPM_RH_OWNER, spk_template(self._plan))
        self._make_persistent(handle, _SPK_HANDLE)
        self._execute(TpmCc.TPM_CC_FlushContext, (handle,))
        self._report.line(
            f"Successfully created storage primary key with handle 0x{_SPK_HANDLE:x}."
        )

    def _create_ek(self, place: EkPlace, template: Public, *, platform: bool) -> None:
        plan, report = self._plan, self._report
        report.step(f"Creating the {place.name} endorsement key")
        handle, public = self._create_primary(tpm2.TPM_RH_ENDORSEMENT, template)
        self._make_persistent(handle, place.handle)
        report.line(f"Successfully created {place.name} EK with handle 0x{place.handle:x}.")
        if plan.allow_signing:
            what = f"{place.name} EK template"
            self._store(place.template_index, template.pack())
            report.line(f"Successfully created NVRAM area 0x{place.template_index:x} for {what}.")
        key = _endorsement_key(public)
        if plan.ek_certificate and self._certifier is not None:
            report.step(f"Creating the certificate of the {place.name} endorsement key")
            certificate = self._certifier.certify(CertificateKind.EK, key, find_facts(self._tpm))
            index = place.certificate_index
            self._store(index, certificate)
            self.certificates[place.file_name] = certificate
            report.line(
                f"Successfully created NVRAM area 0x{index:x} for {place.name} EK certificate."
            )
        if platform and plan.platform_certificate and self._certifier is not None:
            report.step("Creating the platform certificate")
            certificate = self._certifier.certify(
                CertificateKind.PLATFORM, key, find_facts(self._tpm)
            )
            index = _PLATFORM_CERTIFICATE_INDEX
            self._store(index, certificate)
            report.line(f"Successfully created NVRAM area 0x{index:x} for platform certificate.")

    def _create_primary(self, hierarchy: int, template: Public) -> tuple[int, Public]:
        """The transient handle and the public area of a new primary key."""
        parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
        response = self._execute(TpmCc.TPM_CC_CreatePrimary, (hierarchy,), parameters, handles=1)
        made = tpm2.CreatePrimaryResult.unpack_untrusted(response.parameters)
        return response.handles[0], tpm2.read_public_untrusted(made.outPublic)

    def _make_persistent(self, handle: int, persistent: int) -> None:
        # The owner's authorisation serves for endorsement keys, too.
        self._execute(
            TpmCc.TPM_CC_EvictControl,
            (tpm2.TPM_RH_OWNER, handle),
            tpm2.EvictControlParameters(persistent),
        )

    # -- NV -------------------------------------------------------------------------------

    def _store(self, index: int, data: bytes) -> None:
        """Defines an index of the platform, writes it, and locks it if that is wanted."""
        public = tpm2.NvPublic(index, TpmAlg.TPM_ALG_SHA256, _NV_ATTRIBUTES, b"", len(data))
        parameters = tpm2.NvDefineParameters(b"", public.pack())
        self._execute(TpmCc.TPM_CC_NV_DefineSpace, (tpm2.TPM_RH_PLATFORM,), parameters)
        handles = tpm2.TPM_RH_PLATFORM, index
        for offset in range(0, len(data), _NV_CHUNK):
            chunk = tpm2.NvWriteParameters(data[offset : offset + _NV_CHUNK], offset)
            self._execute(TpmCc.TPM_CC_NV_Write, handles, chunk)
        if self._plan.lock_nvram:
            self._execute(TpmCc.TPM_CC_NV_WriteLock, handles)

    # -- PCR banks ------------------------------------------------------------------------

    def _activate_pcr_banks(self, wanted: tuple[str, ...]) -> None:
        parameters = tpm2.GetCapabilityParameters(tpm2.TPM_CAP_PCRS, 0, 64)
        response = self._execute(TpmCc.TPM_CC_GetCapability, (), parameters, authorized=False)
        found = tpm2.PcrCapability.unpack_untrusted(response.parameters)
        implemented = [selection.hash for selection in found.assignedPCR]
        chosen = [bank for bank in dict.fromkeys(wanted) if PCR_BANKS.get(bank) in implemented]
        if not chosen:
            raise UsageError(
                "No PCR banks could be allocated. None of the selected algorithms are supported."
            )
        active = [PCR_BANKS[bank] for bank in chosen]
        # A bank that is not mentioned would keep its setting.
        rest = [algorithm for algorithm in implemented if algorithm not in active]
        allocation = tuple(PcrSelection(algorithm, _ALL_PCRS) for algorithm in active)
        allocation += tuple(PcrSelection(algorithm, bytes(3)) for algorithm in rest)
        response = self._execute(
            TpmCc.TPM_CC_PCR_Allocate,
            (tpm2.TPM_RH_PLATFORM,),
            tpm2.PcrAllocateParameters(allocation),
        )
        result = tpm2.PcrAllocateResult.unpack_untrusted(response.parameters)
        if not result.allocationSuccess:
            raise UsageError(f"The TPM has no room for the PCR banks {','.join(chosen)}.")
        names = {int(algorithm): name for name, algorithm in PCR_BANKS.items()}
        among = ",".join(names.get(number, hex(number)) for number in implemented)
        self._report.line(f"Successfully activated PCR banks {','.join(chosen)} among {among}.")

    # -- commands -------------------------------------------------------------------------

    def _execute(
        self,
        code: TpmCc,
        handles_in: tuple[int, ...],
        parameters: TpmStruct | None = None,
        *,
        authorized: bool = True,
        handles: int = 0,
    ) -> Response:
        """One command, with an empty password for its authorisation."""
        session = self._session if authorized and code != TpmCc.TPM_CC_FlushContext else None
        answer = self._tpm.process(tpm2.command(code, handles_in, parameters, session))
        name = f"TPM2_{code.name.removeprefix('TPM_CC_')}"
        return tpm2.read_response_untrusted(name, answer, handles=handles)


def _endorsement_key(public: Public) -> EndorsementKey:
    if isinstance(public, EccPublic):
        return EccKey(public.x, public.y, _CURVE)
    if not public.unique:
        raise WireError("RSA modulus", 1, 0)
    return RsaKey(public.unique)
