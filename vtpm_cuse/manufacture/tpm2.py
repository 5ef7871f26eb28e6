"""The set-up of a TPM 2.0: keys, NV indexes, PCR banks. Source: as for `manufacture.templates`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca.certificates import CertificateKind
from vtpm_cuse.engine.base import InfoFlag
from vtpm_cuse.errors import TpmError, UsageError, WireError
from vtpm_cuse.manufacture.plan import EccKey, RsaKey, find_facts
from vtpm_cuse.manufacture.templates import (
    EK_PLACES,
    IAK,
    IDEVID,
    SPK_HANDLE,
    ek_template,
    identity_template,
    spk_template,
)
from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.tpm import TpmCc, TpmRc, TpmSu, shutdown_command
from vtpm_cuse.wire.tpm2 import EccPublic, PcrSelection, RsaPublic, TpmAlg

if TYPE_CHECKING:
    from vtpm_cuse.manufacture.plan import (
        Certifier,
        KeyAlgorithm,
        Reporter,
        SetupPlan,
        SetupTpm,
        TpmKey,
    )
    from vtpm_cuse.manufacture.templates import Identity
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
_PLATFORM_CERTIFICATE_INDEX: Final = 0x01C08000
_NV_CHUNK: Final = 1024
_KEY_ID_MAX: Final = 32
_ACTIVE_PROFILE: Final = '{"ActiveProfile":'

_NV_ATTRIBUTES: Final = (
    tpm2.TpmaNv.PPWRITE
    | tpm2.TpmaNv.WRITEDEFINE
    | tpm2.TpmaNv.PPREAD
    | tpm2.TpmaNv.OWNERREAD
    | tpm2.TpmaNv.AUTHREAD
    | tpm2.TpmaNv.NO_DA
    | tpm2.TpmaNv.PLATFORMCREATE
)


class Tpm2Setup:
    """One set-up.

    Attributes:
        certificates: The TPM's keys' certificates made so far, by the name of their file.
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
                self._create_spk(plan.spk)
            if plan.create_ek:
                for algorithm in plan.ek_algorithms:
                    self._create_ek(algorithm)
            for identity, wanted in ((IAK, plan.iak), (IDEVID, plan.idevid)):
                if wanted is not None:
                    self._create_identity(identity, wanted)
        if plan.pcr_banks is not None:
            self._activate_pcr_banks(plan.pcr_banks)
        answer = self._tpm.process(shutdown_command(TpmSu.TPM_SU_CLEAR))
        tpm2.read_response_untrusted("TPM2_Shutdown", answer)

    # -- keys -----------------------------------------------------------------------------

    def _create_spk(self, algorithm: KeyAlgorithm) -> None:
        self._report.step("Creating the storage primary key")
        self._create_primary(tpm2.TPM_RH_OWNER, spk_template(algorithm), SPK_HANDLE)
        self._report.line(f"Successfully created storage primary key with handle 0x{SPK_HANDLE:x}.")

    def _create_ek(self, algorithm: KeyAlgorithm) -> None:
        plan, place, name = self._plan, EK_PLACES[algorithm], f"{algorithm.shown} EK"
        self._report.step(f"Creating the {algorithm.shown} endorsement key")
        template = ek_template(
            algorithm, allow_signing=plan.allow_signing, decryption=plan.decryption
        )
        public = self._create_primary(tpm2.TPM_RH_ENDORSEMENT, template, place.handle)
        self._report.line(f"Successfully created {name} with handle 0x{place.handle:x}.")
        if plan.allow_signing:
            self._store(place.template_index, template.pack(), f"{name} template")
        key = _tpm_key(public, algorithm)
        if plan.ek_certificate:
            certificate = self._certify(CertificateKind.EK, key, place.certificate_index, name)
            self.certificates[f"ek-{algorithm.value}.crt"] = certificate
        if plan.platform_certificate and algorithm is plan.ek_algorithms[0]:
            index = _PLATFORM_CERTIFICATE_INDEX
            self._certify(CertificateKind.PLATFORM, key, index, "platform")

    def _create_identity(self, identity: Identity, algorithm: KeyAlgorithm) -> None:
        name = identity.name
        self._report.step(f"Creating the {name}")
        template = identity_template(identity, algorithm)
        public = self._create_primary(tpm2.TPM_RH_ENDORSEMENT, template, identity.handle)
        self._report.line(
            f"Successfully created {algorithm.shown} {name} primary key with handle "
            f"0x{identity.handle:x}."
        )
        key, index = _tpm_key(public, algorithm), identity.certificate_index
        certificate = self._certify(identity.kind, key, index, name)
        self.certificates[f"{identity.kind.value}-{algorithm.value}.crt"] = certificate

    def _certify(self, kind: CertificateKind, key: TpmKey, index: int, name: str) -> bytes:
        """A certificate, which is stored, too."""
        if self._certifier is None:
            raise UsageError("There is nobody who makes certificates")
        self._report.step(f"Creating the {name} certificate")
        serial = self._serial() if kind.is_identity else ""
        certificate = self._certifier.certify(kind, key, find_facts(self._tpm), serial)
        self._store(index, certificate, f"{name} certificate")
        return certificate

    def _serial(self) -> str:
        """The TPM's serial number: its maker, and which certificate its first EK has of whom."""
        from vtpm_cuse.ca.issuers import origin_of_untrusted

        key_id, number = origin_of_untrusted(next(iter(self.certificates.values()), b""))
        octets = self._manufacturer().to_bytes(4, "big").rstrip(b"\0")
        maker = "".join(chr(octet) if 0x20 < octet < 0x7F else "?" for octet in octets)
        return f"{maker}:{key_id[:_KEY_ID_MAX].hex()}:{number.hex()}"

    def _manufacturer(self) -> int:
        asked = tpm2.GetCapabilityParameters(
            tpm2.TPM_CAP_TPM_PROPERTIES, tpm2.TPM_PT_MANUFACTURER, 1
        )
        response = self._execute(TpmCc.TPM_CC_GetCapability, (), asked, authorized=False)
        for found in tpm2.PropertyCapability.unpack_untrusted(response.parameters).tpmProperty:
            if found.property == tpm2.TPM_PT_MANUFACTURER:
                return found.value
        raise UsageError("The TPM does not say who made it.")

    def _create_primary(self, hierarchy: int, template: Public, persistent: int) -> Public:
        """The public area of a new primary key, which is made persistent."""
        parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
        try:
            response = self._execute(
                TpmCc.TPM_CC_CreatePrimary, (hierarchy,), parameters, handles=1
            )
        except TpmError as exc:
            if exc.code == TpmRc.TPM_RC_VALUE_P2 and isinstance(template, RsaPublic):
                hint = f"does its profile have RSA {template.keyBits}? 'default-v2' may"
                raise UsageError(str(exc), hint=hint) from exc
            raise
        made = tpm2.CreatePrimaryResult.unpack_untrusted(response.parameters)
        self._make_persistent(response.handles[0], persistent)
        self._execute(TpmCc.TPM_CC_FlushContext, response.handles)
        return tpm2.read_public_untrusted(made.outPublic)

    def _make_persistent(self, handle: int, persistent: int) -> None:
        # The owner's authorisation serves for endorsement keys, too.
        self._execute(
            TpmCc.TPM_CC_EvictControl,
            (tpm2.TPM_RH_OWNER, handle),
            tpm2.EvictControlParameters(persistent),
        )

    # -- NV -------------------------------------------------------------------------------

    def _store(self, index: int, data: bytes, name: str) -> None:
        """Defines an index of the platform, writes it, and locks it if that is wanted."""
        public = tpm2.NvPublic(index, TpmAlg.TPM_ALG_SHA256, _NV_ATTRIBUTES, b"", len(data))
        parameters = tpm2.NvDefineParameters(b"", public.pack())
        try:
            self._execute(TpmCc.TPM_CC_NV_DefineSpace, (tpm2.TPM_RH_PLATFORM,), parameters)
        except TpmError as exc:
            if exc.code == TpmRc.TPM_RC_SIZE_P2:
                hint = f"the {name} has {len(data)} bytes; a CA with a shorter signature may do"
                raise UsageError(str(exc), hint=hint) from exc
            raise
        handles = tpm2.TPM_RH_PLATFORM, index
        for offset in range(0, len(data), _NV_CHUNK):
            chunk = tpm2.NvWriteParameters(data[offset : offset + _NV_CHUNK], offset)
            self._execute(TpmCc.TPM_CC_NV_Write, handles, chunk)
        if self._plan.lock_nvram:
            self._execute(TpmCc.TPM_CC_NV_WriteLock, handles)
        self._report.line(f"Successfully created NVRAM area 0x{index:x} for {name}.")

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


def _tpm_key(public: Public, algorithm: KeyAlgorithm) -> TpmKey:
    if isinstance(public, EccPublic):
        return EccKey(public.x, public.y, algorithm.value)
    if not public.unique:
        raise WireError("RSA modulus", 1, 0)
    return RsaKey(public.unique)
