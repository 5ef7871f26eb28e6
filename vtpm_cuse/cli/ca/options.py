"""What the command lines of ``swtpm_cert`` and ``swtpm_localca`` have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.numbers import number
from vtpm_cuse.cli.words.table import Option
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.ca.certificates import Maker, TpmSpecification
    from vtpm_cuse.ca.keys import PublicKey
    from vtpm_cuse.cli.words.commandline import CommandLine

TPM_OPTIONS: Final = (
    Option(
        "tpm-manufacturer",
        "the TPM's manufacturer, as id:00001014",
        metavar="NAME",
        group="The TPM",
    ),
    Option("tpm-model", "the TPM's model, as swtpm", metavar="NAME", group="The TPM"),
    Option(
        "tpm-version",
        "the TPM's firmware version, as id:20240125",
        metavar="VERSION",
        group="The TPM",
    ),
    Option(
        "tpm-spec-family",
        "family of the specification that the TPM implements, as 2.0",
        metavar="FAMILY",
        group="The TPM",
    ),
    Option("tpm-spec-level", "its level, a number, as 0", metavar="LEVEL", group="The TPM"),
    Option("tpm-spec-revision", "its revision, a number", metavar="REVISION", group="The TPM"),
    Option(
        "tpm-serial-num",
        "the TPM's serial number, any text; for an iak or idevid",
        metavar="SERIAL",
        group="The TPM",
    ),
    Option("tpm2", "it is a TPM 2.0 and not a TPM 1.2", group="The TPM"),
    Option("allow-signing", "the EK of a TPM 2.0 may be used for signing", group="The TPM"),
    Option(
        "decryption",
        "the EK of a TPM 2.0 may be used for decryption; it may without --allow-signing, too",
        group="The TPM",
    ),
)
"""The options that say what the TPM is."""

_SPEC_MAX: Final = (1 << 31) - 1
_HEX_MAX: Final = 4096  # digits; an RSA key of 16384 bits
_RAW_HEX_MAX: Final = 10240


_NOTHING: Final[Mapping[str, str]] = {}


def maker(line: CommandLine, whose: str, otherwise: Mapping[str, str] = _NOTHING) -> Maker | None:
    """The three options of a "tpm" or "platform", *otherwise* by name; None if one is missing."""
    names = [f"{whose}-{part}" for part in ("manufacturer", "model", "version")]
    values = [line.value(name) if line.has(name) else otherwise.get(name) for name in names]
    if None in values:
        return None
    from vtpm_cuse.ca.certificates import Maker

    return Maker(*(readable(value or "", f"--{whose}-...") for value in values))


def required_tpm(line: CommandLine, otherwise: Mapping[str, str] = _NOTHING) -> Maker:
    """The TPM's maker. Raises UsageError."""
    found = maker(line, "tpm", otherwise)
    if found is None:
        raise UsageError(
            "--tpm-manufacturer and --tpm-model and --tpm version must all be provided"
        )
    return found


def required_specification(
    line: CommandLine, otherwise: Mapping[str, str] = _NOTHING
) -> TpmSpecification:
    """What the TPM implements. Raises UsageError."""
    from vtpm_cuse.ca.certificates import TpmSpecification

    names = [f"tpm-spec-{part}" for part in ("family", "level", "revision")]
    family, *numbers = (
        line.value(name) if line.has(name) else otherwise.get(name) for name in names
    )
    if family is None or None in numbers:
        raise UsageError(
            "--tpm-spec-family and --tpm-spec-level and --tpm-spec-revision must all be provided"
        )
    level, revision = (
        _spec_number(text or "", part)
        for text, part in zip(numbers, ("level", "revision"), strict=True)
    )
    return TpmSpecification(readable(family, "--tpm-spec-family"), level, revision)


def required_serial(line: CommandLine, otherwise: Mapping[str, str] = _NOTHING) -> str:
    """The TPM's serial number, of an IAK's or IDevID's certificate. Raises UsageError."""
    text = line.value("tpm-serial-num") or otherwise.get("tpm-serial-num")
    if not text:
        raise UsageError("--tpm-serial-num must be provided")
    if not line.has("tpm2"):
        raise UsageError("An iak or idevid is a TPM 2.0's", hint="see --tpm2")
    return readable(text, "--tpm-serial-num")


def hex_octets(text: str, option: str, most: int = _HEX_MAX) -> bytes:
    """An even number of hexadecimal digits, *most* at most. Raises UsageError."""
    strange = re.search(r"[^0-9a-fA-F]", text)
    if strange is not None:
        raise UsageError(f"Illegal hex character '{strange[0]}'.", hint=f"see {option}")
    if len(text) % 2:
        raise UsageError(f"Got an odd number of hex digits ({len(text)}).", hint=f"see {option}")
    if not 0 < len(text) <= most:
        raise UsageError(f"{option} needs 2 to {most} hex digits, and has {len(text)}")
    return bytes.fromhex(text)


def rsa_key(modulus: str, option: str, exponent: int = 65537) -> PublicKey:
    """An RSA key from its modulus. Raises UsageError."""
    from vtpm_cuse.ca.keys import PublicKey

    try:
        return PublicKey.from_rsa(_number(modulus, option), exponent)
    except ValueError as exc:
        raise UsageError(f"{option}: {exc}") from exc


def point_key(curve: str, x: str, y: str, option: str) -> PublicKey:
    """An elliptic curve key from its point. Raises UsageError."""
    from vtpm_cuse.ca.keys import CURVES, PublicKey

    if curve not in CURVES:
        raise UsageError(
            f"Unsupported ECC curve id: {curve}", hint=f"there are {', '.join(CURVES)}"
        )
    try:
        return PublicKey.from_point(curve, _number(x, f"{option} x"), _number(y, f"{option} y"))
    except ValueError as exc:
        raise UsageError(f"{option}: {exc}") from exc


def raw_key(kind: str, key: str, option: str) -> PublicKey:
    """A key that is no more than its bytes, ML-KEM and ML-DSA. Raises UsageError."""
    from vtpm_cuse.ca.keys import RAW_KINDS, PublicKey

    if kind not in RAW_KINDS:
        raise UsageError(
            f"Unsupported key type '{kind[:40]}'.", hint=f"there are {', '.join(RAW_KINDS)}"
        )
    try:
        return PublicKey.from_raw(kind, hex_octets(key, option, _RAW_HEX_MAX))
    except ValueError as exc:
        raise UsageError(f"{option}: {exc}") from exc


def readable(text: str, option: str) -> str:
    """The text, which goes into a certificate. Raises UsageError if it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"The value of {option} is not text in UTF-8") from None
    return text


def _number(text: str, option: str) -> int:
    return int.from_bytes(hex_octets(text, option), "big")


def _spec_number(text: str, part: str) -> int:
    found = number(text, 0, _SPEC_MAX)
    if found is None:
        raise UsageError(
            f"--tpm-spec-{part} must pass a positive number.",
            hint=f"'{text[:40]}' is none from 0 to {_SPEC_MAX}",
        )
    return found
