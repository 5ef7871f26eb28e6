"""The certificates of a TPM and of its CA, as bytes: fields, identifiers and their order.

Pure: time, serial number and signer are arguments. The profile is the C suite's,
byte for byte, because verifiers of EK certificates look at string types and critical
bits. Sources: TCG EK Credential Profile for TPM 2.0; TCG Credential Profiles for
TPM 1.2; RFC 5280; of an IAK or IDevID TCG TPM 2.0 Keys for Device Identity and Attestation, and
RFC 4108, 5 (hardware module name).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from vtpm_cuse.ca import der
from vtpm_cuse.ca.names import directory_name

if TYPE_CHECKING:
    from vtpm_cuse.ca.keys import PublicKey

NEVER: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""The end of a certificate that does not expire. RFC 5280, 4.1.2.5."""

SERIAL_MAX: Final = (1 << 160) - 1

_SUBJECT_DIRECTORY_ATTRIBUTES: Final = "2.5.29.9"
_SUBJECT_KEY_IDENTIFIER: Final = "2.5.29.14"
_KEY_USAGE: Final = "2.5.29.15"
_SUBJECT_ALT_NAME: Final = "2.5.29.17"
_BASIC_CONSTRAINTS: Final = "2.5.29.19"
_AUTHORITY_KEY_IDENTIFIER: Final = "2.5.29.35"
_EXTENDED_KEY_USAGE: Final = "2.5.29.37"

_TCG_AT_TPM_SPECIFICATION: Final = "2.23.133.2.16"
_ID_ON_HARDWARE_MODULE_NAME: Final = "1.3.6.1.5.5.7.8.4"
_TCG_HW_TYPE_TPM2: Final = "2.23.133.1.2"
_TPM_NAMES: Final = ("2.23.133.2.1", "2.23.133.2.2", "2.23.133.2.3")
_PLATFORM_NAMES: Final = ("2.23.133.5.1.1", "2.23.133.5.1.4", "2.23.133.5.1.5")
_PLATFORM_NAMES_TPM12: Final = ("2.23.133.2.4", "2.23.133.2.5", "2.23.133.2.6")

# TCG_PCCLIENT_STORED_CERT (tag, type, size) with TCG_FULL_CERT, of the PC Client Specific
# Implementation Specification for TPM 1.2, 7.4.5.
_STORED: Final = struct.Struct(">HBH")
_TAG_STORED_CERTIFICATE: Final = 0x1001
_TAG_FULL_CERTIFICATE: Final = b"\x10\x02"

_DIGITAL_SIGNATURE: Final = 0
_KEY_ENCIPHERMENT: Final = 2
_KEY_AGREEMENT: Final = 4
_KEY_CERT_SIGN: Final = 5


class CertificateKind(Enum):
    """What a certificate speaks of; the value is the word on command lines."""

    EK = "ek"
    PLATFORM = "platform"
    AIK = "aik"
    IAK = "iak"
    IDEVID = "idevid"

    @property
    def is_identity(self) -> bool:
        """Whether the TPM is known by its serial number, and not by its maker."""
        return self in {CertificateKind.IAK, CertificateKind.IDEVID}

    @property
    def purpose(self) -> str | None:
        """The identifier of the extended key usage, tcg-kp-...Certificate, if it has one."""
        return _PURPOSES.get(self)


_PURPOSES: Final = {
    CertificateKind.EK: "2.23.133.8.1",
    CertificateKind.PLATFORM: "2.23.133.8.2",
    CertificateKind.AIK: "2.23.133.8.3",
}


def kind_shown(word: str) -> str:
    """The word for a kind as a message has it."""
    return "EK" if word == CertificateKind.EK.value else word


@dataclass(frozen=True, slots=True)
class Maker:
    """Who made a TPM or a platform: "id:00001014", "swtpm", "id:20240125"."""

    manufacturer: str
    model: str
    version: str

    def _attributes(self, identifiers: tuple[str, str, str]) -> bytes:
        values = (self.manufacturer, self.model, self.version)
        return der.sequence(
            *(
                der.set_of(der.sequence(der.oid(identifier), der.utf8_string(value)))
                for identifier, value in zip(identifiers, values, strict=True)
            )
        )

    @property
    def as_tpm(self) -> bytes:
        """The Name of a TPM."""
        return self._attributes(_TPM_NAMES)

    @property
    def as_platform(self) -> bytes:
        """The Name of a platform with a TPM 2.0."""
        return self._attributes(_PLATFORM_NAMES)

    @property
    def as_platform_tpm12(self) -> bytes:
        """The Name of a platform with a TPM 1.2."""
        return self._attributes(_PLATFORM_NAMES_TPM12)


@dataclass(frozen=True, slots=True)
class TpmSpecification:
    """What a TPM implements: "2.0", 0, 183."""

    family: str
    level: int
    revision: int


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """All that a certificate says besides its issuer, serial number and validity.

    Attributes:
        kind: What it speaks of.
        key: The key in it.
        tpm: The TPM's maker; needed for all but an IAK and IDevID.
        specification: Needed for an EK.
        platform: Needed for a platform.
        subject: Distinguished name as text, "CN=vm1"; a TPM 1.2 has none.
        is_tpm2: TPM 2.0 and not 1.2.
        allow_signing: The EK may sign (TPM 2.0).
        decryption: The EK may decrypt (TPM 2.0); that is so too when it may not sign.
        tpm_serial: The TPM's serial number; needed for an IAK and IDevID.
    """

    kind: CertificateKind
    key: PublicKey
    tpm: Maker | None = None
    specification: TpmSpecification | None = None
    platform: Maker | None = None
    subject: str = ""
    is_tpm2: bool = True
    allow_signing: bool = False
    decryption: bool = False
    tpm_serial: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for what can be no certificate."""
        if self.kind.is_identity and not (self.is_tpm2 and self.tpm_serial):
            raise ValueError(f"an {self.kind.value} is a TPM 2.0's, and says its serial number")
        if self.tpm is None and not self.kind.is_identity:
            raise ValueError("this certificate needs the TPM's maker")
        if self.kind is CertificateKind.EK and self.specification is None:
            raise ValueError("the certificate of an EK needs the TPM's specification")
        if self.kind is CertificateKind.PLATFORM and self.platform is None:
            raise ValueError("the certificate of a platform needs the platform's maker")
        self.subject_name()
        _alternative_name(self)
        _specification(self.specification)

    def subject_name(self) -> bytes:
        """The Name (DER) of the subject."""
        empty = not (self.is_tpm2 and self.subject)
        return der.sequence() if empty else directory_name(self.subject)


class Signer(Protocol):
    """A private key, wherever it is; hashes by their names, as "sha256"."""

    def digest(self, usual: str) -> str:
        """The hash that it signs with where *usual* is: "sha1" for a TPM 1.2, else "sha256".

        For the latter it may have a longer one, that of its size, or none (""). Raises
        CertificateError for a key without a hash where there must be SHA-1.
        """

    def algorithm(self, digest: str) -> bytes:
        """AlgorithmIdentifier of a signature over such a hash."""

    def sign(self, data: bytes, digest: str) -> bytes:
        """Signature over *data*. Raises CertificateError."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signs: its Name (DER), its subject key identifier, its key."""

    name: bytes
    key_id: bytes
    signer: Signer


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when, in UTC."""

    start: datetime
    end: datetime = NEVER

    @classmethod
    def of_days(cls, start: datetime, days: int) -> Validity:
        """So many days; for ever if negative, or if that goes beyond the calendar."""
        if days < 0:
            return cls(start)
        try:
            return cls(start, min(start + timedelta(days), NEVER))
        except OverflowError:
            return cls(start)


def tpm_certificate(
    request: CertificateRequest, issuer: Issuer, serial: int, validity: Validity
) -> bytes:
    """A certificate in DER.

    Raises:
        CertificateError: The signer failed.
    """
    kind = request.kind
    extensions = [
        _extension(_SUBJECT_ALT_NAME, _alternative_name(request), critical=not kind.is_identity),
        _extension(_BASIC_CONSTRAINTS, der.sequence(), critical=True),
        *_specification(request.specification),
        _authority(issuer.key_id),
        _extension(_KEY_USAGE, der.named_bits(*_key_usage(request)), critical=True),
    ]
    if kind.purpose is not None:
        usage = _extension(_EXTENDED_KEY_USAGE, der.sequence(der.oid(kind.purpose)))
        extensions.insert(len(extensions) if kind is CertificateKind.PLATFORM else 0, usage)
    usual = "sha256" if request.is_tpm2 else "sha1"
    subject = request.subject_name()
    return _signed(issuer, serial, validity, subject, request.key.spki, extensions, usual)


def ca_certificate(
    subject: bytes, key: PublicKey, issuer: Issuer, serial: int, validity: Validity
) -> bytes:
    """The certificate of a CA in DER; *subject* is its Name. A root is its own *issuer*.

    Raises:
        CertificateError: The signer failed.
    """
    own = _extension(_SUBJECT_KEY_IDENTIFIER, der.octet_string(key.key_id))
    extensions = [
        _extension(_BASIC_CONSTRAINTS, der.sequence(der.boolean(True)), critical=True),
        _extension(_KEY_USAGE, der.named_bits(_KEY_CERT_SIGN), critical=True),
        own,
        *([] if issuer.name == subject else [_authority(issuer.key_id)]),
    ]
    return _signed(issuer, serial, validity, subject, key.spki, extensions, "sha256")


def stored_form(certificate: bytes) -> bytes:
    """A certificate as it lies in the NVRAM of a TPM 1.2: behind a header of 7 bytes."""
    size = len(_TAG_FULL_CERTIFICATE) + len(certificate)
    return _STORED.pack(_TAG_STORED_CERTIFICATE, 0, size) + _TAG_FULL_CERTIFICATE + certificate


def bare_certificate(stored: bytes) -> bytes:
    """The certificate in what `stored_form` makes; other bytes stay as they are."""
    if len(stored) < _STORED.size:
        return stored
    tag, _, size = _STORED.unpack_from(stored)
    body = stored[_STORED.size :]
    if tag != _TAG_STORED_CERTIFICATE or size != len(body):
        return stored
    return body.removeprefix(_TAG_FULL_CERTIFICATE)


def _signed(
    issuer: Issuer,
    serial: int,
    validity: Validity,
    subject: bytes,
    spki: bytes,
    extensions: list[bytes],
    usual: str,
) -> bytes:
    digest = issuer.signer.digest(usual)
    algorithm = issuer.signer.algorithm(digest)
    body = der.sequence(
        der.context(0, der.integer(2)),
        der.integer(serial),
        algorithm,
        issuer.name,
        der.sequence(der.time(validity.start), der.time(validity.end)),
        subject,
        spki,
        der.context(3, der.sequence(*extensions)),
    )
    return der.sequence(body, algorithm, der.bit_string(issuer.signer.sign(body, digest)))


def _extension(identifier: str, value: bytes, *, critical: bool = False) -> bytes:
    flag = der.boolean(True) if critical else b""
    return der.sequence(der.oid(identifier), flag, der.octet_string(value))


def _authority(key_id: bytes) -> bytes:
    return _extension(_AUTHORITY_KEY_IDENTIFIER, der.sequence(der.tlv(0x80, key_id)))


def _alternative_name(request: CertificateRequest) -> bytes:
    """GeneralNames of one directoryName."""
    platform = request.platform if request.kind is CertificateKind.PLATFORM else None
    if request.tpm is None or request.kind.is_identity:
        name = _hardware_module_name(request.tpm_serial)
    elif platform is None:
        name = request.tpm.as_tpm
    elif request.is_tpm2:
        name = platform.as_platform
    else:
        # Two Names where there should be one: so the C suite has it, and so TPM 1.2 stacks read it.
        name = der.sequence(request.tpm.as_tpm, platform.as_platform_tpm12)
    return der.sequence(der.context(4, name))


def _hardware_module_name(serial: str) -> bytes:
    # PEER: an attribute of a directoryName, where RFC 4108 has an otherName.
    value = der.sequence(der.oid(_TCG_HW_TYPE_TPM2), der.octet_string(serial.encode()))
    attribute = der.sequence(der.oid(_ID_ON_HARDWARE_MODULE_NAME), value)
    return der.sequence(der.set_of(attribute))


def _specification(specification: TpmSpecification | None) -> list[bytes]:
    if specification is None:
        return []
    value = der.sequence(
        der.utf8_string(specification.family),
        der.integer(specification.level),
        der.integer(specification.revision),
    )
    attribute = der.sequence(der.oid(_TCG_AT_TPM_SPECIFICATION), der.set_of(value))
    return [_extension(_SUBJECT_DIRECTORY_ATTRIBUTES, der.sequence(attribute))]


def _key_usage(request: CertificateRequest) -> list[int]:
    if not request.is_tpm2:
        return [_KEY_ENCIPHERMENT]
    if request.kind is CertificateKind.AIK or request.kind.is_identity:
        return [_DIGITAL_SIGNATURE]
    bits = [_DIGITAL_SIGNATURE] if request.allow_signing else []
    if request.decryption or not request.allow_signing:
        bits.append(_KEY_AGREEMENT if request.key.agrees else _KEY_ENCIPHERMENT)
    return bits
