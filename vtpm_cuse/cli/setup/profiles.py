"""Profiles of ``swtpm_setup``: which one a TPM 2.0 is made with, and which there are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse.cli.words.numbers import FD_MAX, number
from vtpm_cuse.config import ProfileConfig
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import read_small
from vtpm_cuse.manufacture.files import DISTRO_PROFILES

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.manufacture.files import ConfigFile

_OPTIONS: Final = ("profile", "profile-name", "profile-file", "profile-file-fd")
_NAME_MAX: Final = 32
_TEXT_MAX: Final = 1 << 16
_HOW: Final = ("check", "fips-host")


def check_options(line: CommandLine) -> None:
    """What can be said about the options without the configuration. Raises UsageError."""
    given = [name for name in _OPTIONS if line.has(name)]
    if len(given) > 1:
        raise UsageError(
            "Only one of --profile, --profile-name, --profile-file, and --profile-file-fd may "
            "be given."
        )
    if given and not line.has("tpm2"):
        raise UsageError("There's no --profile support for TPM 1.2")
    if given and line.has("reconfigure"):
        raise UsageError("Reconfiguration does not accept a (new) profile.")
    how = line.value("profile-remove-disabled")
    if how is not None and how not in _HOW:
        raise UsageError(f"Unsupported parameter for --profile-remove-disabled: {how}")


def profile_config(
    line: CommandLine, config: ConfigFile, builtin: frozenset[str]
) -> ProfileConfig | None:
    """The profile that the options, else the configuration ask for; *builtin* are libtpms'.

    Raises:
        UsageError: It does not exist, cannot be read, or is none.
    """
    given = any(line.has(name) for name in _OPTIONS)
    if not builtin and not given:
        return None  # a libtpms without profiles; the configuration may be a newer one's
    text = _given(line, config, builtin) if given else _configured(config)
    if text is None:
        return None
    try:
        name = str(json.loads(text)["Name"])
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise UsageError(f"Failed to get 'Name' from profile '{text}'.") from exc
    if not _is_builtin(name, builtin):
        raise UsageError(f"swtpm does not support a profile with name '{name}'")
    return ProfileConfig(text, line.value("profile-remove-disabled"))


def _given(line: CommandLine, config: ConfigFile, builtin: frozenset[str]) -> str:
    if (text := line.value("profile")) is not None:
        return text
    if (path := line.value("profile-file")) is not None:
        return _read(path)
    if (fd := line.value("profile-file-fd")) is not None:
        found = number(fd, 0, FD_MAX, base=10)
        if found is None:
            raise UsageError(f"Invalid file descriptor '{fd[:40]}'")
        return _read(found)
    return _by_name(line.value("profile-name") or "", config, builtin)


def _configured(config: ConfigFile) -> str | None:
    path = config.value("profile_file")
    if path is not None:
        return _read(path)
    profile = config.value("profile")
    if profile is not None and re.search(r"[\udc80-\udcff]", profile):
        raise UsageError("The profile in the config file is not text in UTF-8.")
    return profile


def _by_name(name: str, config: ConfigFile, builtin: frozenset[str]) -> str:
    if len(name) > _NAME_MAX:
        raise UsageError(f"Profile name must not exceed {_NAME_MAX} characters.")
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", name):
        raise UsageError(f"Profile name '{name}' contains unacceptable characters.")
    prefix, colon, rest = name.partition(":")
    directories = {"local": config.value("local_profiles_dir"), "distro": DISTRO_PROFILES}
    if colon and prefix in directories:
        directory = directories[prefix]
        if directory is None or not os.path.exists(path := os.path.join(directory, f"{rest}.json")):
            raise UsageError(f"Could not find or access profile '{name}'.")
        return _read(path)
    if colon and prefix == "builtin":
        name = rest
    else:
        for directory in directories.values():
            path = os.path.join(directory or "", f"{name}.json")
            if directory and os.path.exists(path):
                return _read(path)
    if not _is_builtin(name, builtin):
        raise UsageError(f"swtpm does not support a profile with name '{name}'")
    return json.dumps({"Name": name}, separators=(",", ":"))


def _is_builtin(name: str, builtin: frozenset[str]) -> bool:
    return name in builtin or (name.startswith("custom:") and "custom" in builtin)


def _read(source: str | int) -> str:
    # The emulator reads one in its own words, and no more of it than the C suite's does: 10 KiB.
    try:
        if isinstance(source, str):
            return read_small(source, streams=True).decode().strip()
        with open(source, "rb") as file:
            return file.read(_TEXT_MAX).decode().strip()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise UsageError(f"Could not open profile file '{source}': {reason}") from exc


# Any: JSON whose shape is the profile's to choose.
def profiles_text(config: ConfigFile, builtin: list[dict[str, Any]]) -> str:
    """All profiles as JSON text: ``local``, ``distro`` and ``builtin``, those that there are."""
    found = {
        "local": _in_directory(config.value("local_profiles_dir")),
        "distro": _in_directory(DISTRO_PROFILES),
        "builtin": builtin or None,
    }
    there = {where: profiles for where, profiles in found.items() if profiles is not None}
    return json.dumps(there, separators=(",", ":"))


def _in_directory(directory: str | None) -> list[dict[str, Any]] | None:
    """The profiles of a folder, under the names by which they are asked for; None without it."""
    if directory is None or not os.path.isdir(directory):
        return None
    found = []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            profile = json.loads(read_small(str(path)))
        except (OSError, ValueError, RecursionError):
            continue  # one bad file must not hide the others
        if isinstance(profile, dict) and "Name" in profile:
            found.append({**profile, "Name": path.stem})
    return found
