"""From the command line and the configuration file of ``swtpm_setup`` to one `SetupConfig`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.setup import profiles as setup_profiles
from vtpm_cuse.cli.words.numbers import FD_MAX, number
from vtpm_cuse.errors import UsageError
from vtpm_cuse.manufacture.config import CertificateConfig, Existing, SetupConfig
from vtpm_cuse.manufacture.plan import RSA_BITS, KeyAlgorithm, Ownership, SetupPlan
from vtpm_cuse.storage.locations import absolute, absolute_path, parse

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.config import KeySource
    from vtpm_cuse.manufacture.files import ConfigFile
    from vtpm_cuse.manufacture.makers import TpmMakers

_TPM2_ONLY: Final = (
    "ecc",
    "create-spk",
    "reconfigure",
    "allow-signing",
    "decryption",
    "pcr-banks",
)
_OWNER_PASSWORD: Final = "ooo"  # noqa: S105 - the documented default
_SRK_PASSWORD: Final = "sss"  # noqa: S105
_DEFAULT_BANKS: Final = "sha256"
_ALGORITHMS: Final = {
    **{algorithm.value: algorithm for algorithm in KeyAlgorithm},
    "ecc_nist_p256": KeyAlgorithm.P256,
    "ecc_nist_p384": KeyAlgorithm.P384,
    "ecc_nist_p521": KeyAlgorithm.P521,
}
_IDENTITIES: Final = ("iakkeyalgo", "idevidkeyalgo")


def state_uri(line: CommandLine) -> str:
    """Where the state goes. Raises UsageError."""
    given = line.last_of("tpm-state", "tpmstate")
    if given is None:
        raise UsageError("--tpm-state must be provided")
    text = line.value(given) or ""
    where = parse(text)
    if where.scheme == "mem":
        raise UsageError("A TPM in memory is gone at once", hint="give --tpm-state a directory")
    if where.scheme:
        return str(where)
    return absolute("dir://" if text in {"dir://", "file://"} else f"dir://{text}")


def check_options(line: CommandLine) -> None:
    """What can be said about the options without the configuration. Raises UsageError."""
    tpm2 = line.has("tpm2")
    if tpm2 and line.has("take-ownership"):
        raise UsageError("Taking ownership is not supported for TPM 2.")
    for name in _TPM2_ONLY:
        if line.has(name) and not tpm2:
            raise UsageError(f"--{name} requires --tpm2.")
    if line.has("reconfigure") and _creates_ek(line):
        raise UsageError("Reconfiguration is not supported with creation of EK or certificates")
    setup_profiles.check_options(line)


def existing(line: CommandLine) -> Existing:
    """What is to become of a TPM that is there."""
    if line.has("reconfigure"):
        return Existing.RECONFIGURE
    if line.has("not-overwrite"):
        return Existing.KEEP
    return Existing.REPLACE if line.has("overwrite") else Existing.REFUSE


def setup_config(
    line: CommandLine, config: ConfigFile, makers: TpmMakers, user: str, uri: str
) -> SetupConfig:
    """All of it. Raises UsageError."""
    logfile = line.value("logfile")
    plan = _plan(line, config, makers)
    profile = None
    if plan.tpm2 and not plan.reconfigure:
        profile = setup_profiles.profile_config(line, config, makers.profiles())
    return SetupConfig(
        plan=plan,
        uri=uri,
        existing=existing(line),
        key=_key_source(line, user),
        profile=profile,
        certificates=CertificateConfig(
            tool=config.certificate_tool() if plan.needs_certificates else None,
            configfile=config.value("create_certs_tool_config"),
            optsfile=config.value("create_certs_tool_options"),
            vmid=line.value("vmid"),
            logfile=logfile,
        ),
        certificate_directory=line.value("write-ek-cert-files"),
        command=makers.command,
        logfile=logfile,
    )


def _creates_ek(line: CommandLine) -> bool:
    names = ("createek", "create-ek-cert", "create-platform-cert", "take-ownership")
    return any(line.has(name) for name in names)


def _plan(line: CommandLine, config: ConfigFile, makers: TpmMakers) -> SetupPlan:
    tpm2 = line.has("tpm2")
    identities = _identities(line, config, makers) if tpm2 else (None, None)
    return SetupPlan(
        tpm2=tpm2,
        create_ek=_creates_ek(line),
        ek_algorithms=_ek_algorithms(line, config, makers) if tpm2 else (),
        allow_signing=line.has("allow-signing"),
        decryption=line.has("decryption"),
        spk=_spk(line, config, makers) if line.has("create-spk") else None,
        iak=identities[0],
        idevid=identities[1],
        ek_certificate=line.has("create-ek-cert"),
        platform_certificate=line.has("create-platform-cert"),
        lock_nvram=line.has("lock-nvram"),
        pcr_banks=_pcr_banks(line, config) if tpm2 else None,
        ownership=_ownership(line) if line.has("take-ownership") else None,
        reconfigure=line.has("reconfigure"),
    )


def _ek_algorithms(
    line: CommandLine, config: ConfigFile, makers: TpmMakers
) -> tuple[KeyAlgorithm, ...]:
    first = _algorithm(line, config, makers, "ek1keyalgo") or _rsa(line, config, makers)
    second = _algorithm(line, config, makers, "ek2keyalgo") or KeyAlgorithm.P384
    return tuple(dict.fromkeys((first, second)))


def _identities(
    line: CommandLine, config: ConfigFile, makers: TpmMakers
) -> tuple[KeyAlgorithm | None, KeyAlgorithm | None]:
    """IAK and IDevID; what the configuration says of them is for set-ups that make keys."""
    if not _creates_ek(line) and not any(line.has(name) for name in _IDENTITIES):
        return None, None
    iak, idevid = (_algorithm(line, config, makers, name) for name in _IDENTITIES)
    if (iak or idevid) and not line.has("create-ek-cert"):
        raise UsageError(
            "When creating IAK and/or IDevID keys, then an EK certificate must be created as well.",
            hint="see --create-ek-cert",
        )
    return iak, idevid


def _spk(line: CommandLine, config: ConfigFile, makers: TpmMakers) -> KeyAlgorithm:
    return KeyAlgorithm.P384 if line.has("ecc") else _rsa(line, config, makers)


def _algorithm(
    line: CommandLine, config: ConfigFile, makers: TpmMakers, name: str
) -> KeyAlgorithm | None:
    """That of an option, else of the setting of the same name; None without either."""
    text = line.value(name) if line.has(name) else config.value(name)
    if text is None:
        return None
    found = _ALGORITHMS.get(text.lower())
    if found is None:
        raise UsageError(f"Key algorithm {text} is not supported.", hint=f"see --{name}")
    return _supported(found, makers)


def _rsa(line: CommandLine, config: ConfigFile, makers: TpmMakers) -> KeyAlgorithm:
    text = line.value("rsa-keysize") or config.value("rsa_keysize") or "2048"
    if text == "max":
        return _ALGORITHMS[f"rsa{max(makers.rsa_sizes(), default=2048)}"]
    if text not in map(str, RSA_BITS):
        raise UsageError(f"Unsupported RSA key size {text}.")
    return _supported(_ALGORITHMS[f"rsa{text}"], makers)


def _supported(algorithm: KeyAlgorithm, makers: TpmMakers) -> KeyAlgorithm:
    bits = algorithm.rsa_bits
    if bits > RSA_BITS[0] and bits not in makers.rsa_sizes():
        raise UsageError(f"{bits} bit RSA keys are not supported by libtpms.")
    return algorithm


def _pcr_banks(line: CommandLine, config: ConfigFile) -> tuple[str, ...] | None:
    text = ",".join(line.values("pcr-banks")) or config.value("active_pcr_banks") or _DEFAULT_BANKS
    if text == "-":
        return None
    return tuple(bank.strip() for bank in text.split(",") if bank.strip())


def _ownership(line: CommandLine) -> Ownership:
    from vtpm_cuse.manufacture.tpm12 import WELL_KNOWN, auth_digest

    def digest(option: str, well_known: str, default: str) -> bytes:
        password = WELL_KNOWN
        if not line.has(well_known):
            password = (line.value(option) or default).encode(errors="surrogateescape")
        return auth_digest(password)

    return Ownership(
        digest("ownerpass", "owner-well-known", _OWNER_PASSWORD),
        digest("srkpass", "srk-well-known", _SRK_PASSWORD),
    )


def _key_source(line: CommandLine, user: str) -> KeySource | None:
    cipher = line.value("cipher") or "aes-128-cbc"
    from vtpm_cuse.config import KeySource
    from vtpm_cuse.storage.keys import CIPHER_KEY_SIZES

    if cipher not in CIPHER_KEY_SIZES:
        raise UsageError(f"Unsupported cipher {cipher}.")
    if (path := line.value("keyfile")) is not None:
        return KeySource(file=_readable(path, "keyfile", user), mode=cipher)
    if (path := line.value("pwdfile")) is not None:
        return KeySource(pwdfile=_readable(path, "passphrase file", user), mode=cipher)
    if line.has("keyfile-fd"):
        return KeySource(fd=_descriptor(line, "keyfile-fd"), mode=cipher)
    if line.has("pwdfile-fd"):
        return KeySource(pwdfd=_descriptor(line, "pwdfile-fd"), mode=cipher)
    return None


def key_message(source: KeySource) -> str:
    """What the log says about the key."""
    derived = source.pwdfile is not None or source.pwdfd is not None
    how = "using a key derived from a passphrase" if derived else "with a provided key"
    by_fd = "" if source.file is not None or source.pwdfile is not None else " (fd)"
    return f"  The TPM's state will be encrypted {how}{by_fd}."


def _readable(path: str, what: str, user: str) -> str:
    if not os.access(path, os.R_OK, effective_ids=True):
        raise UsageError(f"User {user} cannot read {what} {path}.")
    return absolute_path(path)


def _descriptor(line: CommandLine, name: str) -> int:
    text = line.value(name) or ""
    found = number(text, 0, FD_MAX, base=10)
    if found is None:
        raise UsageError(f"Invalid file descriptor '{text[:40]}' for --{name}")
    return found
