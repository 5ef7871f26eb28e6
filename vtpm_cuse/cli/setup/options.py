"""The options of ``swtpm_setup``."""

from __future__ import annotations

from typing import Final

from vtpm_cuse.cli.words.table import Option

_TPM: Final = "The TPM"
_KEYS: Final = "Keys and certificates"
_STATE: Final = "State"
_PROFILE: Final = "Profile of a TPM 2.0 (libtpms 0.10 or newer)"
_OTHER: Final = "Other"
_ALGORITHMS: Final = ("rsa2048", "rsa3072", "rsa4096", "secp256r1", "secp384r1", "secp521r1")

OPTIONS: Final = (
    Option(
        "tpm-state",
        "where the state of the TPM goes: a directory, dir://DIR or file://FILE; needed",
        metavar="DIR",
        group=_TPM,
    ),
    Option("tpmstate", "another name for --tpm-state", metavar="DIR", group=_TPM),
    Option("tpm2", "set up a TPM 2.0; otherwise a TPM 1.2", group=_TPM),
    Option(
        "pcr-banks",
        "PCR banks to activate, as in sha1,sha256; - leaves all as they are; by default those "
        "of the configuration file, or sha256; TPM 2.0 only",
        metavar="LIST",
        repeats=True,
        group=_TPM,
    ),
    Option(
        "reconfigure",
        "change the active PCR banks of the TPM that is there, and nothing else; TPM 2.0 only",
        group=_TPM,
    ),
    Option(
        "tpm",
        "command that starts the TPM to be set up, split at spaces, as in '/usr/bin/swtpm "
        "socket'; by default libtpms in this process",
        metavar="COMMAND",
        group=_TPM,
    ),
    Option(
        "createek",
        "create the endorsement keys: two in a TPM 2.0, by default RSA and ECC, and RSA in a TPM "
        "1.2",
        group=_KEYS,
    ),
    Option("create-ek-cert", "certify the endorsement keys; implies --createek", group=_KEYS),
    Option(
        "create-platform-cert",
        "create a platform certificate; implies --createek; with a TPM 1.2 it needs "
        "--create-ek-cert, too",
        group=_KEYS,
    ),
    Option(
        "vmid",
        "common name of the certificates' subject, or serial number of that of an IAK or IDevID",
        metavar="ID",
        group=_KEYS,
    ),
    Option(
        "write-ek-cert-files",
        "write the keys' certificates to this directory, too",
        metavar="DIR",
        group=_KEYS,
    ),
    Option(
        "rsa-keysize",
        "bits of RSA keys: 2048, 3072, 4096, or max for the most that libtpms can do; by default "
        "2048",
        metavar="BITS",
        choices=("2048", "3072", "4096", "max"),
        group=_KEYS,
    ),
    Option(
        "ek1keyalgo",
        "the first endorsement key, by default RSA of --rsa-keysize; TPM 2.0 only",
        metavar="ALGORITHM",
        choices=_ALGORITHMS,
        group=_KEYS,
        more="The curves have second names: ecc_nist_p256, ecc_nist_p384, ecc_nist_p521.",
    ),
    Option(
        "ek2keyalgo",
        "the second one, by default secp384r1; there is only one if both are the same",
        metavar="ALGORITHM",
        choices=_ALGORITHMS,
        group=_KEYS,
    ),
    Option(
        "iakkeyalgo",
        "create an initial attestation key (IAK) and its certificate; TPM 2.0 only, needs "
        "--create-ek-cert",
        metavar="ALGORITHM",
        choices=_ALGORITHMS,
        group=_KEYS,
    ),
    Option(
        "idevidkeyalgo",
        "create an initial device identity key (IDevID) and its certificate; likewise",
        metavar="ALGORITHM",
        choices=_ALGORITHMS,
        group=_KEYS,
    ),
    Option("no-iak", "accepted, without effect", group=_KEYS),
    Option(
        "allow-signing",
        "make endorsement keys that can sign, which is not standard; TPM 2.0 only",
        group=_KEYS,
    ),
    Option(
        "decryption",
        "make endorsement keys that can decrypt, the default without --allow-signing; TPM 2.0 only",
        group=_KEYS,
    ),
    Option("create-spk", "create a storage primary key; TPM 2.0 only", group=_KEYS),
    Option("ecc", "make the storage primary key an ECC key; TPM 2.0 only", group=_KEYS),
    Option("take-ownership", "take ownership, TPM 1.2 only; implies --createek", group=_KEYS),
    Option("ownerpass", "the owner's password, by default ooo", metavar="PASSWORD", group=_KEYS),
    Option("owner-well-known", "use 20 zero bytes as the owner's password", group=_KEYS),
    Option(
        "srkpass",
        "the storage root key's password, by default sss",
        metavar="PASSWORD",
        group=_KEYS,
    ),
    Option("srk-well-known", "use 20 zero bytes as the storage root key's password", group=_KEYS),
    Option("lock-nvram", "lock the NV areas that were written", group=_KEYS),
    Option(
        "overwrite",
        "replace a TPM that is there; otherwise that is an error. The old one stays as it was "
        "until the new one is complete",
        group=_STATE,
    ),
    Option(
        "not-overwrite",
        "leave a TPM that is there alone and end with status 0",
        group=_STATE,
    ),
    Option(
        "keyfile", "file with the key that encrypts the state, in hex", metavar="FILE", group=_STATE
    ),
    Option("keyfile-fd", "descriptor to read such a key from", metavar="FD", group=_STATE),
    Option(
        "pwdfile",
        "file with a passphrase, from which the key that encrypts the state is derived",
        metavar="FILE",
        group=_STATE,
    ),
    Option("pwdfile-fd", "descriptor to read such a passphrase from", metavar="FD", group=_STATE),
    Option(
        "cipher",
        "how the state is encrypted: aes-128-cbc (the default), aes-cbc or aes-256-cbc",
        metavar="CIPHER",
        choices=("aes-128-cbc", "aes-cbc", "aes-256-cbc"),
        group=_STATE,
    ),
    Option("profile", "a profile as JSON text", metavar="JSON", group=_PROFILE),
    Option(
        "profile-name",
        "a profile by its name: local, of the distribution or built in, in this order; "
        "local:NAME, distro:NAME and builtin:NAME choose",
        metavar="NAME",
        group=_PROFILE,
    ),
    Option("profile-file", "a profile in a file", metavar="FILE", group=_PROFILE),
    Option(
        "profile-file-fd", "a profile to be read from a descriptor", metavar="FD", group=_PROFILE
    ),
    Option(
        "profile-remove-disabled",
        "check or fips-host: take out of a custom profile what OpenSSL here cannot do",
        metavar="HOW",
        choices=("check", "fips-host"),
        group=_PROFILE,
    ),
    Option("config", "the configuration file", metavar="FILE", group=_OTHER),
    Option("logfile", "append messages to this file", metavar="FILE", group=_OTHER),
    Option("quiet", "say nothing but errors", group=_OTHER),
    Option("runas", "become this user first, a name or a number", metavar="USER", group=_OTHER),
    Option(
        "create-config-files",
        "write configuration files of your own; HOW is one or more of overwrite, root and "
        "skip-if-exist, with commas between",
        metavar="HOW",
        choices=("overwrite", "root", "skip-if-exist"),
        optional_value=True,
        group=_OTHER,
    ),
    Option("print-capabilities", "print what this program can do, as JSON, and end", group=_OTHER),
    Option(
        "print-profiles",
        "print the profiles there are, as JSON, and end; with --tpm2",
        group=_OTHER,
    ),
    Option("display", "accepted, without effect", group=_OTHER),
    Option("swtpm_ioctl", "accepted, without effect", metavar="FILE", group=_OTHER),
    Option("tcsd-system-ps-file", "accepted, without effect", metavar="FILE", group=_OTHER),
    Option("version", "print the version and end", group=_OTHER),
    Option("help", "print this help and end", letter="h", group=_OTHER),
)
