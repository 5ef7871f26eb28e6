"""``swtpm_localca``: a certificate for a TPM by the local CA, which is made if there is none."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse import faults
from vtpm_cuse.ca.certificates import CertificateKind, kind_shown
from vtpm_cuse.cli.ca import options as common
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, run_program, version_text
from vtpm_cuse.cli.words.report import SetupReport
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import CertificateError, UsageError, VtpmError
from vtpm_cuse.service.confine import secrecy

if TYPE_CHECKING:
    from vtpm_cuse.ca.certificates import CertificateRequest
    from vtpm_cuse.ca.keys import PublicKey
    from vtpm_cuse.ca.localca import LocalCa

_KINDS: Final = ("ek", "platform", "iak", "idevid")
_RAW: Final = re.compile(r"pubkey=([^,]*),algo=([^,]*)")
_POINT: Final = re.compile(r"x=([^,]*),y=([^,]*)(?:,id=([^,]*))?")

PROGRAM: Final = Program(
    "swtpm_localca",
    "local CA that creates certificates for TPMs",
    (
        Option(
            "type",
            "what the certificate is for; it is written to ek.cert, platform.cert and so on",
            metavar="TYPE",
            choices=_KINDS,
        ),
        Option(
            "ek",
            "the TPM's key: modulus of an RSA key in hex, x=HEX,y=HEX,id=CURVE, or "
            "pubkey=HEX,algo=ALGORITHM for ML-KEM and ML-DSA",
            metavar="KEY",
        ),
        Option("key", "the same as --ek", metavar="KEY"),
        Option("dir", "write the certificate into this folder; default: here", metavar="DIR"),
        Option("vmid", "name of the VM, the certificate's subject", metavar="NAME"),
        Option("optsfile", "options file of the CA", metavar="FILE"),
        Option("configfile", "configuration file of the CA", metavar="FILE"),
        Option("logfile", "append messages to this file", metavar="FILE"),
        Option("version", "display the version and exit"),
        Option("help", "display this help and exit", letter="h"),
        *common.TPM_OPTIONS,
    ),
    aliases=("swtpm-localca",),
    description=(
        "Creates the certificate of an endorsement key (ek), of a platform with a TPM (platform), "
        "or of the initial attestation key (iak) or device identity key (idevid) of a TPM 2.0, for "
        "swtpm_setup(8). The CA's folder, key and certificate are named in a configuration file; "
        "a root CA and a CA below it are made the first time. What is left of an interrupted run "
        "is completed by the next one, and no key that is there is ever replaced.",
        "Without configuration files, the CA is in /var/lib/swtpm-localca for root and in "
        "~/.config/var/lib/swtpm-localca for others; so it is for users who cannot use the CA "
        "of the machine's configuration.",
    ),
    examples=(
        Example(
            "Certificate of an endorsement key of a TPM 2.0, on the curve P-384",
            'swtpm_localca --tpm2 --type ek --ek "x=$X,y=$Y,id=secp384r1" --vmid vm1 \\\n'
            "  --tpm-manufacturer id:00001014 --tpm-model swtpm \\\n"
            "  --tpm-version id:20240125 --tpm-spec-family 2.0 \\\n"
            "  --tpm-spec-level 0 --tpm-spec-revision 183 --dir /tmp/vm1",
        ),
    ),
    environment=(
        Term("SWTPM_ROOTCA_PASSWORD", "Password of the root CA's key."),
        Term("SWTPM_PKCS11_PIN", "PIN of the token, if the configuration has none."),
        Term("XDG_CONFIG_HOME", "Where configuration files are looked for; default: ~/.config."),
    ),
    files=(
        Term("/etc/swtpm-localca.conf", "Where the CA is: swtpm-localca.conf(5)."),
        Term("/etc/swtpm-localca.options", "What it certifies: swtpm-localca.options(5)."),
    ),
    see_also=(
        *("swtpm_cert(8)", "swtpm_setup(8)", "swtpm-create-tpmca(8)", "swtpm-localca.conf(5)"),
    ),
)


def main() -> int:
    """The program swtpm_localca."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    line = CommandLine(PROGRAM, words)
    if line.has("help"):
        print(help_text(PROGRAM), end="")
        return 0
    if line.has("version"):
        print(version_text("local CA ", "TPM"))
        return 0
    secrecy.hide_process()  # before keys and passwords are in memory
    report = SetupReport(line.value("logfile"))
    try:
        _issue(line, report)
    except (VtpmError, OSError) as exc:
        report.error(f"Could not create {kind_shown(line.value('type') or '')} certificate locally")
        report.error(str(exc))
        return faults.exit_status(exc)
    return 0


def _issue(line: CommandLine, report: SetupReport) -> None:
    from vtpm_cuse.ca.localca import LocalCa
    from vtpm_cuse.files import write_output

    ca = LocalCa.from_files(line.value("configfile"), line.value("optsfile"), report.line)
    request = _request(line, ca)
    folder = line.value("dir") or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"There is no folder {folder} that can be written to", hint="see --dir")
    path = os.path.join(folder, f"{request.kind.value}.cert")
    certificate = ca.issue(request)
    try:
        write_output(path, certificate, 0o600)
    except OSError as exc:
        raise CertificateError(path, exc.strerror or str(exc)) from exc
    done = f"Successfully created {kind_shown(request.kind.value)} certificate locally."
    report.line(done)
    report.done(done)


def _request(line: CommandLine, ca: LocalCa) -> CertificateRequest:
    word = line.value("type")
    if word not in _KINDS:
        # PEER: takes any other word for an EK and fails later, speaking of a platform.
        raise UsageError(f"Unknown certificate type '{word or ''}'.", hint="see --type")
    kind = CertificateKind(word)
    key = line.value(line.last_of("ek", "key") or "ek")
    if key is None:
        raise UsageError("The TPM's key is required.", hint="see --ek")
    return ca.request(
        kind,
        _public_key(key),
        None if kind.is_identity else common.required_tpm(line, ca.tpm),
        common.required_specification(line, ca.tpm) if kind is CertificateKind.EK else None,
        common.readable(line.value("vmid") or "", "--vmid"),
        common.required_serial(line, ca.tpm) if kind.is_identity else "",
        is_tpm2=line.has("tpm2"),
        allow_signing=line.has("allow-signing"),
        decryption=line.has("decryption"),
    )


def _public_key(text: str) -> PublicKey:
    if "=" not in text:
        return common.rsa_key(text, "--ek")
    if (raw := _RAW.fullmatch(text)) is not None:
        return common.raw_key(raw[2], raw[1], "--ek")
    found = _POINT.fullmatch(text)
    if found is None:
        raise UsageError(f"'{text[:40]}' of --ek is neither a modulus nor x=HEX,y=HEX,id=CURVE")
    return common.point_key(found[3] or "secp256r1", found[1], found[2], "--ek")
