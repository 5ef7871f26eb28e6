"""What can be said in the configuration files, for section 5 of the manual."""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.cli.words.table import Example, Term


class ConfigFile(NamedTuple):
    """One kind of file.

    Attributes:
        name: Of the file, and of its page.
        summary: As a man page's first line has it.
        description: Paragraphs: where it is looked for, how a line is written.
        keys: What may stand in it.
        examples: Whole files.
        files: Where it is.
        see_also: Man pages.
    """

    name: str
    summary: str
    description: tuple[str, ...]
    keys: tuple[Term, ...]
    examples: tuple[Example, ...]
    files: tuple[Term, ...] = ()
    see_also: tuple[str, ...] = ()


_ROOT: Final = (
    "Root does not use such a file if others could change it or a folder on its way, unless it "
    "is named by an option or in another file that root uses."
)


def _places(name: str) -> tuple[Term, ...]:
    return (
        Term(f"$XDG_CONFIG_HOME/{name}", "The user's, by default in ~/.config; it wins."),
        Term(f"/etc/{name}", "The machine's."),
    )


SETUP: Final = ConfigFile(
    "swtpm_setup.conf",
    "configuration of swtpm_setup",
    (
        "Says how swtpm_setup(8) makes certificates and which defaults a new TPM gets.",
        "A line is a name, an equals sign and a value, with blanks around the sign as you like; a "
        "number sign starts a comment. ${NAME} stands for an environment variable. The first of "
        "several equal names counts, and lines of another form are skipped; a file with nothing "
        "but such lines is an error.",
        _ROOT,
    ),
    (
        Term(
            "create_certs_tool",
            "The program that makes certificates, usually swtpm_localca; for root by its absolute "
            "path, or its name in PATH. Without it no certificate can be made.",
        ),
        Term(
            "create_certs_tool_config",
            "Its configuration file, passed with --configfile.",
        ),
        Term("create_certs_tool_options", "Its options file, passed with --optsfile."),
        Term("active_pcr_banks", "PCR banks to activate, with commas between; default: sha256."),
        Term("rsa_keysize", "Bits of RSA keys: 2048 (the default), 3072, 4096 or max."),
        Term(
            "ek1keyalgo",
            "Algorithm of the first endorsement key of a TPM 2.0: rsa2048, rsa3072, rsa4096, "
            "secp256r1, secp384r1 or secp521r1; by default RSA of rsa_keysize.",
        ),
        Term("ek2keyalgo", "Likewise, of the second; by default secp384r1."),
        Term(
            "iakkeyalgo",
            "Likewise, of an initial attestation key, which needs --create-ek-cert where endorsement "
            "keys are made; by default there is none.",
        ),
        Term("idevidkeyalgo", "Likewise, of an initial device identity key."),
        Term("profile", "Profile of a new TPM 2.0, as JSON text."),
        Term("profile_file", "File with such a profile; it wins over profile."),
        Term("local_profiles_dir", "Directory of the machine's own profiles, NAME.json each."),
    ),
    (
        Example(
            "",
            "create_certs_tool = /usr/bin/swtpm_localca\n"
            "create_certs_tool_config = /etc/swtpm-localca.conf\n"
            "create_certs_tool_options = /etc/swtpm-localca.options\n"
            "active_pcr_banks = sha256",
        ),
    ),
    _places("swtpm_setup.conf"),
    ("swtpm_setup(8)", "swtpm-localca.conf(5)", "swtpm-localca.options(5)"),
)

LOCALCA: Final = ConfigFile(
    "swtpm-localca.conf",
    "configuration of swtpm_localca",
    (
        "Says where swtpm_localca(8) keeps its certificate authority. Keys and certificates that "
        "are not there are made at the first use.",
        "A line is a name, an equals sign and a value; a number sign starts a comment. ${NAME} stands "
        "for an environment variable. The file may hold passwords: let nobody else read it.",
        _ROOT,
    ),
    (
        Term("statedir", "Directory of the lock and the serial number. Needed; made if missing."),
        Term(
            "signingkey",
            "Key that signs certificates: a file, also of a key that a TPM loads (TSS2 PRIVATE KEY); "
            "pkcs11:... for one in a token; handle:NUMBER for a persistent one in a TPM. Needed. One that "
            "was made elsewhere may be RSA, ECDSA, or for a TPM 2.0 EdDSA or ML-DSA; of ML-DSA, a "
            "certificate has more bytes than an NV index of today's libtpms holds.",
        ),
        Term("signingkey_password", "Password of that key."),
        Term(
            "signingkey_tpm",
            "Where the TPM of the key is: the path of a device or Unix socket, or HOST:PORT; "
            "default: /dev/tpmrm0. With it, a key file that is not there is made in that TPM, and "
            "one that is none of a TPM is refused. What is loaded to sign is flushed again; a resource "
            "manager, as /dev/tpmrm0 or --managed of swtpm(8), lets several sign at once, and ends "
            "what a program that was killed has left. Passwords go there as they are: use TCP "
            "within this machine alone.",
        ),
        Term(
            "parentkey_password",
            "Password of the key's parent in the TPM, or of the hierarchy of which that is made, "
            "usually the owner's.",
        ),
        Term("issuercert", "Certificate of the signing key, in PEM form. Needed."),
        Term(
            "certserial",
            "File with the last serial number, in decimal; by default certserial in statedir.",
        ),
        Term("SWTPM_PKCS11_PIN", "PIN for a PKCS#11 key, if there is no signingkey_password."),
        Term("env:NAME", "Environment variable to set for the use of a PKCS#11 key."),
    ),
    (
        Example(
            "",
            "statedir = /var/lib/swtpm-localca\n"
            "signingkey = /var/lib/swtpm-localca/signkey.pem\n"
            "issuercert = /var/lib/swtpm-localca/issuercert.pem\n"
            "certserial = /var/lib/swtpm-localca/certserial",
        ),
        Example(
            "With the key in a TPM",
            "statedir = /var/lib/swtpm-localca\n"
            "signingkey = /var/lib/swtpm-localca/tpm-key.pem\n"
            "signingkey_tpm = /dev/tpmrm0\n"
            "issuercert = /var/lib/swtpm-localca/issuercert.pem",
        ),
    ),
    _places("swtpm-localca.conf"),
    ("swtpm_localca(8)", "swtpm-create-tpmca(8)", "swtpm_cert(8)", "swtpm_setup.conf(5)"),
)

LOCALCA_OPTIONS: Final = ConfigFile(
    "swtpm-localca.options",
    "options for the certificates of swtpm_localca",
    (
        "Holds options of swtpm_cert(8) that swtpm_localca(8) adds to each of its calls, usually "
        "those about the platform.",
        'Words are split at blanks; a value in quotation marks, "Fedora XYZ", may have some.',
        _ROOT,
    ),
    (
        Term("--platform-manufacturer NAME", "Who made the platform."),
        Term("--platform-version VERSION", "Its version."),
        Term("--platform-model NAME", "Its model."),
        Term(
            "--tpm-manufacturer NAME, --tpm-model NAME, --tpm-version VERSION",
            "The TPM, where what calls swtpm_localca does not say it; so with --tpm-spec-family, "
            "--tpm-spec-level, --tpm-spec-revision and --tpm-serial-num.",
        ),
    ),
    (
        Example(
            "",
            "--platform-manufacturer Debian\n--platform-version 12\n--platform-model QEMU",
        ),
    ),
    _places("swtpm-localca.options"),
    ("swtpm_localca(8)", "swtpm_cert(8)", "swtpm-localca.conf(5)"),
)

CONFIG_FILES: Final = (SETUP, LOCALCA, LOCALCA_OPTIONS)
