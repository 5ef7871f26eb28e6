"""What the local CA is told by its two files: swtpm-localca.conf and swtpm-localca.options."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca import configfile
from vtpm_cuse.ca.certificates import Maker
from vtpm_cuse.ca.tpmkeys import KeyTpm
from vtpm_cuse.errors import UsageError
from vtpm_cuse.wire.tpm2 import TPM_RH_OWNER

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG_NAME: Final = "swtpm-localca.conf"
OPTIONS_NAME: Final = "swtpm-localca.options"
STATE_FOLDER: Final = "var/lib/swtpm-localca"
"""Below the root folder for root, below the configuration folder for others."""

_CONFIG_OPTION: Final = "--configfile or create_certs_tool_config"
_OPTIONS_OPTION: Final = "--optsfile or create_certs_tool_options"
_PKCS11_PIN: Final = "SWTPM_PKCS11_PIN"
_SETTINGS: Final = frozenset(
    {
        *{"statedir", "signingkey", "signingkey_password", "issuercert", "certserial"},
        *{"signingkey_tpm", "parentkey_password", _PKCS11_PIN, "env:"},
    }
)
_PKCS11_PIN_DEFAULT: Final = "swtpm-tpmca"

FLAGS: Final = frozenset({"allow-signing", "decryption"})
VALUES: Final = frozenset(
    {"subject", "platform-manufacturer", "platform-model", "platform-version"}
)
OF_THE_TPM: Final = frozenset(
    {
        *{"tpm-manufacturer", "tpm-model", "tpm-version"},
        *{"tpm-spec-family", "tpm-spec-level", "tpm-spec-revision", "tpm-serial-num"},
    }
)
"""Of the TPM, where what calls the CA does not say it."""

IGNORED: Final = frozenset({"days", "serial"})
"""Taken in the options file, but the CA knows better."""

_WORD: Final = re.compile(r"""(--[\w-]+=)?(?:"([^"\n]*)"|'([^'\n]*)')(?!\S)|(\S+)""")
"""A value in quotation marks may have blanks; any other mark is a character as others."""


@dataclass(frozen=True, slots=True)
class CaSettings:
    """Where a CA keeps what is its own.

    Attributes:
        state_dir: Folder, with the lock.
        signing_key: Path of the key, or its pkcs11: URI, or its handle in a TPM.
        issuer_certificate: Path.
        serial_file: Path.
        password: Of the signing key.
        pin: Of the token, if the key is in one.
        environment: For the token's library.
        tpm: Where the key is, if it is one of a TPM; where that is named, it is made there.
        new_key: What a key is that is made there: see `ca.tpmkeys.ALGORITHMS`.
        parent: Below what: see `ca.keyfiles.TpmKeyFile`.
        origin: The file that says so, for messages.
    """

    state_dir: str
    signing_key: str
    issuer_certificate: str
    serial_file: str
    password: bytes | None = field(default=None, repr=False)
    pin: bytes | None = field(default=None, repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    tpm: KeyTpm = field(default_factory=KeyTpm)
    new_key: str = "rsa2048"
    parent: int = TPM_RH_OWNER
    origin: str = "the built-in configuration"

    @classmethod
    def in_folder(cls, folder: str) -> CaSettings:
        """The usual names in one folder."""
        return cls(
            folder,
            os.path.join(folder, "signkey.pem"),
            os.path.join(folder, "issuercert.pem"),
            os.path.join(folder, "certserial"),
        )

    @classmethod
    def load(cls, path: str | None, environ: Mapping[str, str]) -> CaSettings:
        """Those of the file *path*, else of the user's or the system's file, else built in.

        Who is not root and cannot use the system's CA gets one in the home folder.

        Raises:
            UsageError: A file cannot be read, or lacks a setting.
        """
        if path is not None:
            return cls._parsed(path, environ)
        own = cls.in_folder(os.path.join(configfile.user_folder(environ), STATE_FOLDER))
        if (found := configfile.find(CONFIG_NAME, environ, _CONFIG_OPTION)) is not None:
            settings = cls._parsed(found, environ)
            is_users = os.path.dirname(found) != configfile.SYSTEM_FOLDER
            return settings if is_users or settings._may_be_used() else own
        return cls.in_folder(os.path.join("/", STATE_FOLDER)) if os.geteuid() == 0 else own

    @classmethod
    def _parsed(cls, path: str, environ: Mapping[str, str]) -> CaSettings:
        text = _read(path, "config", surrogates=True)
        settings = configfile.parse(text, environ, _SETTINGS, path)
        for name in ("statedir", "signingkey", "issuercert"):
            if not settings.get(name):
                raise UsageError(f"Missing '{name}' config value in config file {path}.")
        pin = settings.get(_PKCS11_PIN) or environ.get(_PKCS11_PIN) or _PKCS11_PIN_DEFAULT
        password = os.fsencode(settings.get("signingkey_password", "")) or None
        return cls(
            settings["statedir"],
            settings["signingkey"].replace("\\;", ";"),
            settings["issuercert"],
            settings.get("certserial") or os.path.join(settings["statedir"], "certserial"),
            password,
            password or os.fsencode(pin),
            {name[4:]: value for name, value in settings.items() if name.startswith("env:")},
            KeyTpm(
                settings.get("signingkey_tpm", ""),
                os.fsencode(settings.get("parentkey_password", "")),
            ),
            origin=path,
        )

    def _may_be_used(self) -> bool:
        """Whether this user may write into the folder, or make it."""
        folder = self.state_dir
        while not os.path.lexists(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        return os.access(folder, os.W_OK | os.X_OK)


@dataclass(frozen=True, slots=True)
class CaProfile:
    """What the CA writes into every certificate.

    Attributes:
        platform: The platform's maker; None if it is incomplete.
        subject: Instead of one from the name of the VM.
        allow_signing: Every EK may sign.
        decryption: Every EK may decrypt.
        tpm: What TPMs are if nobody says it, by the names of the options.
        origin: The file that says so, for messages.
    """

    platform: Maker | None = None
    subject: str | None = None
    allow_signing: bool = False
    decryption: bool = False
    tpm: Mapping[str, str] = field(default_factory=dict)
    origin: str = "the built-in options"

    @classmethod
    def load(cls, path: str | None, environ: Mapping[str, str]) -> CaProfile:
        """That of the file *path*, else of the user's or the system's, else of this machine.

        Raises:
            UsageError: The file cannot be read, or has words that are none of its options.
        """
        path = path if path is not None else configfile.find(OPTIONS_NAME, environ, _OPTIONS_OPTION)
        if path is None:
            return cls(machine_maker())
        return cls._parsed(_words(_read(path, "options")), path)

    @classmethod
    def _parsed(cls, words: list[str], path: str) -> CaProfile:
        given: dict[str, str] = {}
        rest = iter(words)
        for word in rest:
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or name not in FLAGS | VALUES | OF_THE_TPM | IGNORED:
                raise UsageError(
                    f"{path}: '{word}' is no option for a CA",
                    hint="there may be "
                    + ", ".join(f"--{name}" for name in sorted(FLAGS | VALUES | OF_THE_TPM)),
                )
            if name in FLAGS:
                if equals:
                    raise UsageError(f"{path}: option '--{name}' doesn't allow an argument")
            elif not equals and (value := next(rest, "")) == "":
                raise UsageError(f"{path}: option '--{name}' requires an argument")
            given[name] = value
        names = ("platform-manufacturer", "platform-model", "platform-version")
        complete = all(name in given for name in names)
        return cls(
            Maker(*(given[name] for name in names)) if complete else None,
            given.get("subject"),
            "allow-signing" in given,
            "decryption" in given,
            {name: given[name] for name in OF_THE_TPM & given.keys()},
            path,
        )


def _words(text: str) -> list[str]:
    return [
        f"{match[1] or ''}{match[2] or match[3] or ''}" if match[4] is None else match[4]
        for match in _WORD.finditer(text)
    ]


def machine_maker() -> Maker:
    """This machine as a platform, in the words of the C suite's own configuration files."""
    system = platform.uname()
    name = system.system.replace(" ", "_")
    return Maker(name, name, system.version.replace(" ", "_"))


def _read(path: str, what: str, *, surrogates: bool = False) -> str:
    try:
        return configfile.read_text(path, surrogates=surrogates)
    except OSError as exc:
        user = configfile.user_name()
        raise UsageError(
            f"Need read rights on {what} file {path} for user {user}.",
            hint=exc.strerror or str(exc),
        ) from exc
