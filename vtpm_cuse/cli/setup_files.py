"""The configuration files of ``swtpm_setup``: where they are, how they are read and made."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM_DIRECTORY: Final = "/etc"
DISTRO_PROFILES: Final = "/usr/share/swtpm/profiles"
_SETUP_FILE: Final = "swtpm_setup.conf"
_CA_FILE: Final = "swtpm-localca.conf"
_CA_OPTIONS: Final = "swtpm-localca.options"
_DEFAULT_PROFILE: Final = '{"Name":"default-v1"}'
_WORDS: Final = frozenset({"overwrite", "root", "skip-if-exist"})


def user_directory() -> str:
    """Where a user's own configuration is; empty if that is nowhere."""
    base = os.environ.get("XDG_CONFIG_HOME")
    if base:
        return base
    home = os.environ.get("HOME")
    return os.path.join(home, ".config") if home else ""


def default_config_file() -> str:
    """The user's own configuration file if there is a readable one, else the system's."""
    directory = user_directory()
    own = os.path.join(directory, _SETUP_FILE)
    if directory and os.access(own, os.R_OK, effective_ids=True):
        return own
    return os.path.join(SYSTEM_DIRECTORY, _SETUP_FILE)


class ConfigFile:
    """A configuration file: ``name = value`` lines, of which the first with a name counts."""

    def __init__(self, path: str, user: str) -> None:
        """Reads it. Raises UsageError when *user*, who runs this, cannot."""
        try:
            self._text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as exc:
            hint = "" if os.path.exists(path) else "make one with --create-config-files"
            raise UsageError(f"User {user} cannot read config file {path}.", hint=hint) from exc

    def value(self, name: str) -> str | None:
        """The value with environment variables filled in; None where there is none."""
        found = re.search(rf"^{re.escape(name)}\s*=\s*([^#\n]*)", self._text, re.MULTILINE)
        if found is None:
            return None
        text = re.sub(r"\$\{([^}]*)\}", lambda name: os.environ.get(name[1], ""), found[1].rstrip())
        return text or None


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
            f"{SYSTEM_DIRECTORY}."
        )
    directory = user_directory()
    if not os.path.isabs(directory):
        raise UsageError("Neither HOME nor XDG_CONFIG_HOME says where your configuration is")
    texts = {os.path.join(directory, name): text for name, text in _texts(directory).items()}
    if "overwrite" not in words:
        for path in texts:
            if os.path.lexists(path):
                if "skip-if-exist" in words:
                    return
                raise UsageError(f"File {path} already exists. Refusing to overwrite.")
    os.makedirs(_ca_directory(directory), exist_ok=True)
    for path, text in texts.items():
        yield path
        _write(path, text)


def _ca_directory(directory: str) -> str:
    return os.path.join(directory, "var", "lib", "swtpm-localca")


def _texts(directory: str) -> dict[str, str]:
    ca = _ca_directory(directory)
    system = os.uname()
    return {
        _SETUP_FILE: (
            f"create_certs_tool = {_localca()}\n"
            f"create_certs_tool_config = {os.path.join(directory, _CA_FILE)}\n"
            f"create_certs_tool_options = {os.path.join(directory, _CA_OPTIONS)}\n"
            "# Comma-separated list (no spaces) of PCR banks to activate by default\n"
            "active_pcr_banks = sha256\n"
            f"profile = {_DEFAULT_PROFILE}\n"
            "# profile_file =\n"
            f"local_profiles_dir = {os.path.join(directory, 'etc/swtpm/profiles')}/\n"
        ),
        _CA_FILE: (
            f"statedir = {ca}\n"
            f"signingkey = {ca}/signkey.pem\n"
            f"issuercert = {ca}/issuercert.pem\n"
            f"certserial = {ca}/certserial\n"
        ),
        _CA_OPTIONS: (
            f"--platform-manufacturer {_word(system.sysname)}\n"
            f"--platform-version {_word(system.version)}\n"
            f"--platform-model {_word(system.sysname)}\n"
        ),
    }


def _word(text: str) -> str:
    return text.replace(" ", "_")


def _localca() -> str:
    """The tool beside this program, if it is there, else by its name."""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "swtpm_localca")
    return beside if os.access(beside, os.X_OK) else "swtpm_localca"


def _write(path: str, text: str) -> None:
    aside = f"{path}.new"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(aside, path)
