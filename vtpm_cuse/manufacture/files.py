"""The configuration files of ``swtpm_setup``: where they are, how they are read and made."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca import configfile
from vtpm_cuse.ca.settings import (
    CONFIG_NAME,
    OPTIONS_NAME,
    STATE_FOLDER,
    CaSettings,
    machine_maker,
)
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import make_folder, write_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Self

DISTRO_PROFILES: Final = "/usr/share/swtpm/profiles"
_SETUP_FILE: Final = "swtpm_setup.conf"
_DEFAULT_PROFILE: Final = '{"Name":"default-v1"}'
_SETTINGS: Final = frozenset(
    {
        *{"create_certs_tool", "create_certs_tool_config", "create_certs_tool_options"},
        *{"active_pcr_banks", "rsa_keysize", "profile", "profile_file", "local_profiles_dir"},
        *{"ek1keyalgo", "ek2keyalgo", "iakkeyalgo", "idevidkeyalgo"},
    }
)
_LOCAL_CAS: Final = ("swtpm_localca", "swtpm-localca")
_WORDS: Final = frozenset({"overwrite", "root", "skip-if-exist"})


class ConfigFile:
    """What ``swtpm_setup.conf`` says."""

    def __init__(self, settings: Mapping[str, str], path: str | None = None) -> None:
        self._settings, self._path = settings, path

    @classmethod
    def load(cls, path: str | None, user: str) -> Self:
        """Reads *path*, else the user's own file, else the system's; without any it is empty.

        Raises:
            UsageError: The file is there, and *user*, who runs this, cannot read it; or it has
                text, and no setting.
        """
        path = path or configfile.find(_SETUP_FILE, os.environ, "--config")
        if path is None:
            path = os.path.join(configfile.SYSTEM_FOLDER, _SETUP_FILE)
            if not os.path.lexists(path):
                return cls({})
        try:
            text = configfile.read_text(path, surrogates=True)
        except OSError as exc:
            raise UsageError(
                f"User {user} cannot read config file {path}.", hint=exc.strerror or ""
            ) from exc
        settings = configfile.parse(text, os.environ, _SETTINGS, path)
        lines = (line.strip() for line in text.splitlines())
        if not settings and any(line and not line.startswith("#") for line in lines):
            raise UsageError(
                f"There is no setting in config file {path}",
                hint="a line is NAME = VALUE, from its beginning",
            )
        return cls(settings, path)

    def certificate_tool(self) -> str | None:
        """The program that makes certificates; None for the local CA, where there is no file.

        Raises:
            UsageError: There is a file, and it names none.
        """
        tool = self.value("create_certs_tool")
        if tool is None and self._path is not None:
            # Another CA than the one that was meant may be worse than no certificate.
            raise UsageError(
                f"No certificate can be made: config file {self._path} names no create_certs_tool"
            )
        return tool

    def value(self, name: str) -> str | None:
        """The value of a setting; None where there is none, or nothing in it."""
        return self._settings.get(name) or None


def deciding_files() -> tuple[str, ...]:
    """The files that decide what a set-up without options makes, and who signs its certificates.

    Raises:
        UsageError: One of them cannot be read.
    """
    setup = configfile.find(_SETUP_FILE, os.environ, "--config")
    config = ConfigFile.load(setup, configfile.user_name())
    ca = config.value("create_certs_tool_config")
    options = config.value("create_certs_tool_options")
    found = (
        setup,
        ca or configfile.find(CONFIG_NAME, os.environ, "--configfile"),
        options or configfile.find(OPTIONS_NAME, os.environ, "--optsfile"),
        CaSettings.load(ca, os.environ).issuer_certificate,
    )
    return tuple(path for path in found if path is not None)


def written_folders() -> tuple[str, ...] | None:
    """The folders of a local CA, to which a set-up without options writes.

    None where nobody can tell: a program that is no local CA makes certificates, or a token signs.

    Raises:
        UsageError: A file that says so cannot be read.
    """
    config = ConfigFile.load(configfile.find(_SETUP_FILE, os.environ, "--config"), "vtpmd")
    tool = os.path.basename(config.certificate_tool() or _LOCAL_CAS[0])
    ca = CaSettings.load(config.value("create_certs_tool_config"), os.environ)
    if tool not in _LOCAL_CAS or ca.signing_key.startswith("pkcs11:"):
        return None
    files = (ca.signing_key, ca.issuer_certificate, ca.serial_file)
    found = (ca.state_dir, *(os.path.dirname(path) for path in files))
    return tuple(dict.fromkeys(path for path in found if os.path.isabs(path)))


def create_config_files(how: str) -> Iterator[str]:
    """Writes a user's own configuration files; gives the name of each that is written.

    Raises:
        UsageError: *how* does not fit, or a file is there already.
        OSError: A file cannot be written.
    """
    words = {word for word in re.split(r"[,\s]+", how) if word}
    if unknown := words - _WORDS:
        raise UsageError(f"Error: unknown word '{min(unknown)}' for --create-config-files")
    if {"overwrite", "skip-if-exist"} <= words:
        raise UsageError("Error: overwrite and skip-if-exist cannot both be used")
    if os.geteuid() == 0 and "root" not in words:
        raise UsageError(
            "Requiring the 'root' flag since the configuration files will shadow those in "
            f"{configfile.SYSTEM_FOLDER}."
        )
    directory = configfile.user_folder(os.environ)
    if others := configfile.changed_by_others(directory):
        raise UsageError(f"Error: no configuration of root's can be in {directory}: {others}")
    try:
        texts = {
            os.path.join(directory, name): text.encode() for name, text in _texts(directory).items()
        }
    except UnicodeEncodeError:
        raise UsageError(f"Error: {directory} is not text in UTF-8") from None
    if "overwrite" not in words:
        for path in texts:
            if os.path.lexists(path):
                if "skip-if-exist" in words:
                    return
                raise UsageError(f"File {path} already exists. Refusing to overwrite.")
    # As the specification of XDG_CONFIG_HOME wants it.
    make_folder(directory, 0o700, umask=False)
    make_folder(_ca_directory(directory), 0o750, umask=False)
    for path, text in texts.items():
        yield path
        write_output(path, text, 0o644)


def _ca_directory(directory: str) -> str:
    return os.path.join(directory, STATE_FOLDER)


def _texts(directory: str) -> dict[str, str]:
    ca = _ca_directory(directory)
    machine = machine_maker()
    return {
        _SETUP_FILE: (
            f"create_certs_tool = {_localca()}\n"
            f"create_certs_tool_config = {os.path.join(directory, CONFIG_NAME)}\n"
            f"create_certs_tool_options = {os.path.join(directory, OPTIONS_NAME)}\n"
            "# Comma-separated list (no spaces) of PCR banks to activate by default\n"
            "active_pcr_banks = sha256\n"
            f"profile = {_DEFAULT_PROFILE}\n"
            "# profile_file =\n"
            f"local_profiles_dir = {os.path.join(directory, 'etc/swtpm/profiles')}/\n"
        ),
        CONFIG_NAME: (
            f"statedir = {ca}\n"
            f"signingkey = {ca}/signkey.pem\n"
            f"issuercert = {ca}/issuercert.pem\n"
            f"certserial = {ca}/certserial\n"
        ),
        OPTIONS_NAME: (
            f"--platform-manufacturer {machine.manufacturer}\n"
            f"--platform-version {machine.version}\n"
            f"--platform-model {machine.model}\n"
        ),
    }


def _localca() -> str:
    """The tool beside this program, if it is there, else by its name."""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "swtpm_localca")
    return beside if os.access(beside, os.X_OK) else "swtpm_localca"
