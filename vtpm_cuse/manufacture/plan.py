"""What a set-up is asked to make, and whom it works with.

Plain data and protocols: the sequences for TPM 2.0 and TPM 1.2 need no more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from vtpm_cuse.ca.certificates import Maker, TpmSpecification
from vtpm_cuse.engine.base import InfoFlag, Tpm
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.ca.certificates import CertificateKind


class KeyAlgorithm(Enum):
    """Of a primary key; the value is its name in options and of files, and a curve's everywhere."""

    RSA2048 = "rsa2048"
    RSA3072 = "rsa3072"
    RSA4096 = "rsa4096"
    P256 = "secp256r1"
    P384 = "secp384r1"
    P521 = "secp521r1"

    @property
    def rsa_bits(self) -> int:
        """Size of an RSA key; 0 for one on a curve."""
        return int(self.value[3:]) if self.value.startswith("rsa") else 0

    @property
    def shown(self) -> str:
        """As messages have it: "RSA 2048", "secp384r1"."""
        return f"RSA {self.rsa_bits}" if self.rsa_bits else self.value


RSA_BITS: Final = tuple(a.rsa_bits for a in KeyAlgorithm if a.rsa_bits)
"""The sizes of RSA keys that a set-up can make."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who owns a TPM 1.2: SHA-1 digests of the two passwords, 20 bytes each; never shown."""

    owner_auth: bytes = field(repr=False)
    srk_auth: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SetupPlan:
    """What to make of a TPM.

    Attributes:
        tpm2: A TPM 2.0, else a TPM 1.2.
        create_ek: Make the endorsement keys: those of `ek_algorithms`, or one RSA for a TPM 1.2.
        ek_algorithms: What they are; the platform's certificate is for the first.
        allow_signing: The endorsement keys may sign; templates of such keys are stored.
        decryption: They may decrypt all the same.
        spk: What the storage primary key is, None for none.
        iak: What the initial attestation key is, None for none; it needs `ek_certificate`.
        idevid: Likewise, the initial device identity key.
        ek_certificate: Certify the endorsement keys.
        platform_certificate: Make a platform certificate.
        lock_nvram: Lock what was written to NV.
        pcr_banks: Banks to activate; None leaves all as they are.
        ownership: Take ownership of a TPM 1.2.
        reconfigure: The TPM is there already: do nothing but activate PCR banks.
    """

    tpm2: bool
    create_ek: bool = False
    ek_algorithms: tuple[KeyAlgorithm, ...] = (KeyAlgorithm.RSA2048, KeyAlgorithm.P384)
    allow_signing: bool = False
    decryption: bool = False
    spk: KeyAlgorithm | None = None
    iak: KeyAlgorithm | None = None
    idevid: KeyAlgorithm | None = None
    ek_certificate: bool = False
    platform_certificate: bool = False
    lock_nvram: bool = False
    pcr_banks: tuple[str, ...] | None = ()
    ownership: Ownership | None = None
    reconfigure: bool = False

    @property
    def needs_certificates(self) -> bool:
        """Whether a certifier will be asked for anything."""
        if not self.tpm2:  # where a platform certificate comes with that of the EK only
            return self.ek_certificate
        return self.create_ek and (self.ek_certificate or self.platform_certificate)


@dataclass(frozen=True, slots=True)
class RsaKey:
    """Public half of an RSA key of the TPM's, of exponent 65537; modulus big-endian."""

    modulus: bytes

    @property
    def text(self) -> str:
        """As a certificate tool is given it."""
        return self.modulus.hex()


@dataclass(frozen=True, slots=True)
class EccKey:
    """Public half of an ECC key of the TPM's: a point, big-endian, and its curve's name."""

    x: bytes
    y: bytes
    curve: str

    @property
    def text(self) -> str:
        """As a certificate tool is given it."""
        return f"x={self.x.hex()},y={self.y.hex()},id={self.curve}"


TpmKey = RsaKey | EccKey


@dataclass(frozen=True, slots=True)
class TpmFacts:
    """What the certificates say about the TPM's make, as the TPM says it."""

    maker: Maker
    specification: TpmSpecification

    @classmethod
    def from_json(cls, text: str) -> TpmFacts:
        """From the text of TPMLIB_GetInfo. Raises UsageError when something is missing."""
        try:
            info: dict[str, Mapping[str, str | int]] = json.loads(text)
            specification, attributes = info["TPMSpecification"], info["TPMAttributes"]
            return cls(
                Maker(
                    str(attributes["manufacturer"]),
                    str(attributes["model"]),
                    str(attributes["version"]),
                ),
                TpmSpecification(
                    str(specification["family"]),
                    int(specification["level"]),
                    int(specification["revision"]),
                ),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise UsageError("Could not get the TPM spec and attribute parameters.") from exc


class SetupTpm(Tpm, Protocol):
    """A TPM on a state of its own, in this process or another.

    `process` raises OSError, too, and KeyboardInterrupt after `cancel`, which ends the work with
    the running command, or earlier.
    """

    def start(self) -> None:
        """Powers the TPM on, and starts it. Raises VtpmError."""

    def info(self, flags: int) -> str:
        """JSON text (TPMLIB_GetInfo). Raises OSError, VtpmError."""

    def finish(self) -> dict[str, bytes]:
        """Powers the TPM off; returns its state as it is to be stored. Raises VtpmError."""

    def close(self) -> None:
        """Gives everything up."""


class Certifier(Protocol):
    """Makes certificates."""

    def begin(self) -> None:
        """Begins what takes long."""

    def certify(
        self, kind: CertificateKind, key: TpmKey, facts: TpmFacts, tpm_serial: str = ""
    ) -> bytes:
        """The certificate, as it goes into NV; an IAK's or IDevID's says the TPM's serial number.

        Raises VtpmError.
        """

    def cancel(self) -> None:
        """Ends what runs. From any thread."""

    def close(self) -> None:
        """Gives everything up."""


class Reporter(Protocol):
    """Hears how the work goes on."""

    def line(self, text: str) -> None:
        """Something was done: a line of the log."""

    def step(self, text: str) -> None:
        """Something that may take a while begins."""


def find_facts(tpm: SetupTpm) -> TpmFacts:
    """Asks the TPM. Raises UsageError when it does not say."""
    return TpmFacts.from_json(tpm.info(InfoFlag.SPECIFICATION | InfoFlag.ATTRIBUTES))
