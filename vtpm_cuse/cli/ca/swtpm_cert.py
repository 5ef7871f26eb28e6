"""``swtpm_cert``: one certificate for a TPM, signed with a given key."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse import PEER_VERSION
from vtpm_cuse.cli.ca import options as common
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.numbers import number
from vtpm_cuse.cli.words.program import complain, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import CertificateError, UsageError
from vtpm_cuse.service.confine import secrecy

if TYPE_CHECKING:
    from vtpm_cuse.ca.certificates import CertificateKind, CertificateRequest, Issuer
    from vtpm_cuse.ca.keys import PublicKey

_KINDS: Final = ("ek", "platform", "aik", "iak", "idevid")
_SERIAL_DIGITS: Final = 49
_DAYS: Final = 365
_DAYS_MAX: Final = (1 << 31) - 1
_EXPONENT_MAX: Final = (1 << 32) - 1
_WHERE_FORMS: Final = (
    "A password is given as pass:PASSWORD, fd:NUMBER of a descriptor, file:PATH or env:VARIABLE. "
    "A file has at most 255 bytes, all of which count, a line feed at its end too."
)

PROGRAM: Final = Program(
    "swtpm_cert",
    "create a certificate for a TPM's key without the private half of that key",
    (
        Option("type", "what the certificate is for; default: ek", metavar="TYPE", choices=_KINDS),
        Option("subject", "distinguished name, as C=US,O=Org,CN=vm1; TPM 2.0 only", metavar="NAME"),
        Option("serial", "serial number, decimal; default: 1", metavar="NUMBER"),
        Option("days", "days of validity, -1 for ever; default: 365", metavar="NUMBER"),
        Option("out-cert", "write the certificate there and not to the output", metavar="FILE"),
        Option("pem", "write PEM and not DER"),
        Option(
            "add-header",
            "put before it the header with which a TPM 1.2 keeps a certificate in its NVRAM",
        ),
        Option("print-capabilities", "print as JSON what this program can do, and exit"),
        Option("version", "display the version and exit"),
        Option("help", "display this help and exit"),
        Option("pubkey", "PEM file of the public key", metavar="FILE", group="The TPM's key"),
        Option("modulus", "modulus of an RSA key, hex", metavar="HEX", group="The TPM's key"),
        Option("exponent", "its exponent; default: 65537", metavar="NUMBER", group="The TPM's key"),
        Option("ecc-x", "x of an elliptic curve key, hex", metavar="HEX", group="The TPM's key"),
        Option("ecc-y", "y of it", metavar="HEX", group="The TPM's key"),
        Option(
            "ecc-curveid",
            "its curve; default: secp256r1",
            metavar="CURVE",
            choices=("secp256r1", "secp384r1", "secp521r1"),
            group="The TPM's key",
        ),
        Option(
            "public",
            "a key for ML-KEM or ML-DSA as it is, hex; with --keyalgo",
            metavar="HEX",
            group="The TPM's key",
        ),
        Option(
            "keyalgo",
            "what it is for",
            metavar="ALGORITHM",
            choices=(
                *("ml-kem-512", "ml-kem-768", "ml-kem-1024"),
                *("ml-dsa-44", "ml-dsa-65", "ml-dsa-87"),
            ),
            group="The TPM's key",
        ),
        Option(
            "signkey",
            "PEM file of the CA's key, also of one that a TPM loads; or pkcs11: URI of one in a "
            "token, or handle:NUMBER of a persistent one in a TPM",
            metavar="FILE",
            group="The CA",
        ),
        Option(
            "signkey-tpm",
            "where the TPM of such a key is: path of a device or Unix socket, or HOST:PORT; "
            "default: /dev/tpmrm0",
            metavar="PATH",
            group="The CA",
            more="With it, no key that is none of a TPM is taken.",
        ),
        Option(
            "signkey-password",
            "its password; others can see it, so better use --signkey-pwd",
            metavar="PASSWORD",
            group="The CA",
        ),
        Option(
            "signkey-pwd",
            "where its password is: fd:N, file:FILE, env:NAME or pass:PASSWORD",
            metavar="WHERE",
            group="The CA",
            more=_WHERE_FORMS,
        ),
        Option(
            "parentkey-password",
            "password of the parent of a key in a TPM, or of the hierarchy of which that is made; "
            "others can see it",
            metavar="PASSWORD",
            group="The CA",
        ),
        Option(
            "parentkey-pwd",
            "where that password is, as with --signkey-pwd",
            metavar="WHERE",
            group="The CA",
        ),
        Option("issuercert", "PEM file of the CA's certificate", metavar="FILE", group="The CA"),
        *common.TPM_OPTIONS,
        Option(
            "platform-manufacturer", "manufacturer", metavar="NAME", group="The platform with it"
        ),
        Option("platform-model", "model", metavar="NAME", group="The platform with it"),
        Option("platform-version", "version", metavar="VERSION", group="The platform with it"),
    ),
    operands=(),
    description=(
        "Makes an X.509 certificate with the fields that the Trusted Computing Group asks for: "
        "for an endorsement key (ek), a platform with a TPM (platform), an attestation key (aik), "
        "or the initial attestation key (iak) or device identity key (idevid) of a TPM 2.0.",
        "Nothing is written unless the certificate is whole.",
    ),
    examples=(
        Example(
            "Certificate of an RSA endorsement key of a TPM 2.0",
            "swtpm_cert --tpm2 --type ek --pubkey ek.pem --subject CN=vm1 \\\n"
            "  --signkey signkey.pem --issuercert issuercert.pem --serial 7 \\\n"
            "  --tpm-manufacturer id:00001014 --tpm-model swtpm \\\n"
            "  --tpm-version id:20240125 --tpm-spec-family 2.0 \\\n"
            "  --tpm-spec-level 0 --tpm-spec-revision 183 --out-cert ek.cert",
        ),
        Example(
            "The same with the CA's key in a PKCS #11 token: as --signkey",
            "'pkcs11:token=ca;object=signkey;type=private'",
        ),
        Example(
            "The same with the CA's key in a TPM: as --signkey and --signkey-tpm",
            "tpm-key.pem --signkey-tpm /dev/tpmrm0",
        ),
    ),
    environment=(Term("SWTPM_PKCS11_PIN", "The PIN of the PKCS #11 token."),),
    see_also=("swtpm_localca(8)", "swtpm_setup(8)"),
    banner=version_text("certificate tool ", "TPM"),
    long_only=True,
)


def main() -> int:
    """The program swtpm_cert."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    line = CommandLine(PROGRAM, words)
    if line.has("help"):
        print(help_text(PROGRAM), end="")
    elif line.has("version"):
        print(version_text("certificate tool ", "TPM"))
    elif line.has("print-capabilities"):
        print(
            '{ "type": "swtpm_cert", "features": [ "cmdarg-signkey-pwd", "cmdarg-parentkey-pwd", '
            '"cmdarg-tpm-serial-num", "supports-iak-idevid", "cmdarg-public", '
            f'"cmdarg-keyalgo" ], "version": "{PEER_VERSION}" }}'
        )
    else:
        _certify(line)
    return 0


def _certify(line: CommandLine) -> None:
    from datetime import UTC, datetime

    from vtpm_cuse.ca.certificates import Validity, stored_form, tpm_certificate

    secrecy.hide_process()  # before keys and passwords are in memory
    request = _request(line)
    serial, days = _serial(line), _days(line)
    certificate = tpm_certificate(
        request, _issuer(line), serial, Validity.of_days(datetime.now(UTC), days)
    )
    if line.has("pem"):
        from vtpm_cuse.ca.issuers import pem_certificate

        certificate = pem_certificate(certificate)
    elif line.has("add-header"):
        certificate = stored_form(certificate)
    _write(line.value("out-cert"), certificate)


def _request(line: CommandLine) -> CertificateRequest:
    from vtpm_cuse.ca.certificates import CertificateKind, CertificateRequest

    kind = _kind(line)
    key = _public_key(line)
    tpm = None if kind.is_identity else common.required_tpm(line)
    platform = common.maker(line, "platform")
    if kind is CertificateKind.PLATFORM and platform is None:
        raise UsageError(
            "--platform-manufacturer and --platform-model and --platform version must all be "
            "provided"
        )
    specification = None
    if kind is CertificateKind.EK:
        specification = common.required_specification(line)
    subject = line.value("subject")
    try:
        return CertificateRequest(
            kind,
            key,
            tpm,
            specification,
            platform,
            common.readable(subject or "", "--subject"),
            line.has("tpm2"),
            line.has("allow-signing"),
            line.has("decryption"),
            common.required_serial(line) if kind.is_identity else "",
        )
    except ValueError as exc:
        raise UsageError(
            f"Could not set DN on CRT: Error in parsing. --subject '{subject}': {exc}"
        ) from exc


def _kind(line: CommandLine) -> CertificateKind:
    from vtpm_cuse.ca.certificates import CertificateKind

    word = line.value("type") or "ek"
    if word.lower() not in _KINDS:
        raise UsageError(f"Unknown certificate type '{word}'.")
    return CertificateKind(word.lower())


def _public_key(line: CommandLine) -> PublicKey:
    modulus, x, y = (line.value(name) for name in ("modulus", "ecc-x", "ecc-y"))
    if modulus is not None and (x is not None or y is not None):
        raise UsageError("RSA modulus and ECC parameters cannot both be given.")
    if (x is None) != (y is None):
        raise UsageError("ECC x and y parameters must both be given.")
    kind, raw = line.value("keyalgo"), line.value("public")
    given = "rsa" if modulus is not None else "ecc" if x is not None else ""
    if given and (kind is not None or raw is not None):
        raise UsageError(
            f"Already found options for '{given}' key; cannot switch to '{kind or 'ml-kem'}'."
        )
    if line.has("pubkey"):
        return _key_of_file(line.value("pubkey") or "")
    if modulus is not None:
        return common.rsa_key(modulus, "--modulus", _exponent(line))
    if x is not None and y is not None:
        return common.point_key(line.value("ecc-curveid") or "secp256r1", x, y, "--ecc")
    if kind is not None or raw is not None:
        return _raw_key(kind, raw)
    raise UsageError("Missing public EK file and modulus or ECC parameters.")


def _raw_key(kind: str | None, raw: str | None) -> PublicKey:
    if kind is None:
        raise UsageError("--public requires --keyalgo to specify the key algorithm.")
    if raw is None:
        raise UsageError(f"Missing --public option for key type {kind}.")
    return common.raw_key(kind, raw, "--public")


def _key_of_file(path: str) -> PublicKey:
    from vtpm_cuse.ca.keys import PublicKey
    from vtpm_cuse.files import read_small

    try:
        return PublicKey.from_pem(read_small(path, streams=True))
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no public key in PEM"
        raise CertificateError(f"Could not import EK. --pubkey {path}", str(reason)) from exc


def _exponent(line: CommandLine) -> int:
    text = line.value("exponent")
    if text is None:
        return 65537
    found = number(text, 1, _EXPONENT_MAX)
    if found is None:
        raise UsageError(
            "Exponent is wrong and cannot be 0.",
            hint=f"'{text[:40]}' of --exponent is no number below 2^32",
        )
    return found


def _serial(line: CommandLine) -> int:
    from vtpm_cuse.ca.certificates import SERIAL_MAX

    text = (line.value("serial") if line.has("serial") else "1") or ""
    if not (text.isascii() and text.isdigit() and len(text) <= _SERIAL_DIGITS and int(text)):
        raise UsageError("Serial number is invalid.", hint="it is decimal and above zero")
    if int(text) > SERIAL_MAX:
        raise UsageError("Serial number is too large.")
    return int(text)


def _days(line: CommandLine) -> int:
    text = line.value("days")
    if text is None:
        return _DAYS
    found = number(text, -1, _DAYS_MAX, base=10)
    if found is None:
        raise UsageError(
            f"Days value of '{text[:40]}' is outside valid range.",
            hint=f"--days takes a number from 0 to {_DAYS_MAX}, and -1",
        )
    return found


def _issuer(line: CommandLine) -> Issuer:
    key, certificate = line.value("signkey"), line.value("issuercert")
    if certificate is None:
        raise UsageError("The issuer certificate name is required.", hint="see --issuercert")
    if key is None:
        raise UsageError("Missing signature key.", hint="see --signkey")
    from vtpm_cuse.ca.issuers import open_issuer
    from vtpm_cuse.ca.tpmkeys import KeyTpm

    password = _password(line, "signkey")
    pin = os.fsencode(os.environ.get("SWTPM_PKCS11_PIN", ""))
    tpm = KeyTpm(line.value("signkey-tpm") or "", _password(line, "parentkey") or b"")
    return open_issuer(certificate, key, password, password or pin or None, tpm=tpm, streams=True)


def _password(line: CommandLine, whose: str) -> bytes | None:
    """The last of the two options for the password of a key counts. Raises UsageError."""
    from vtpm_cuse.ca.passwords import read_password

    option = line.last_of(f"{whose}-password", f"{whose}-pwd")
    if option is None:
        return None
    value = line.value(option) or ""
    return read_password(value, option) if option.endswith("-pwd") else os.fsencode(value)


def _write(path: str | None, data: bytes) -> None:
    if path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    from vtpm_cuse.files import write_output

    try:
        write_output(path, data, 0o600, streams=True)
    except OSError as exc:
        raise CertificateError(
            f"Could not open {path} for writing the certificate", exc.strerror or str(exc)
        ) from exc
