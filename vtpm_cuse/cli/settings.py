"""From a command line to the configuration of a service."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.commandline import CuseExit
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service.config import (
    CuseConfig,
    LocalityConfig,
    LogConfig,
    PidConfig,
    ProfileConfig,
    StartupConfig,
    StartupKind,
    StateConfig,
    VtpmConfig,
)

if TYPE_CHECKING:
    from vtpm_cuse.cli.commandline import CommandLine
    from vtpm_cuse.cli.suboptions import SubValues

_PROFILE_LIMIT: Final = 10 * 1024  # bytes that the C suite reads of a profile file


def cuse_config(line: CommandLine) -> CuseConfig:
    """All of ``swtpm cuse``. Raises UsageError."""
    return CuseConfig(
        major=line.number("maj", 0xFFFF),
        minor=line.number("min", 0xFFFF),
        name=_device_name(line),
        foreground=line.has("foreground"),
        log=log_config(line),
        pid=pid_config(line),
        vtpm=vtpm_config(line),
    )


def vtpm_config(line: CommandLine) -> VtpmConfig:
    """The options about the TPM itself. Raises UsageError."""
    return VtpmConfig(
        tpm2=line.has("tpm2"),
        state=state_config(line),
        startup=_startup_config(line),
        locality=_locality_config(line),
        profile=_profile_config(line),
    )


def log_config(line: CommandLine) -> LogConfig:
    """``--log``. Raises UsageError."""
    given = line.subs("log")
    if given is None:
        return LogConfig()
    path = given.text("file")
    return LogConfig(
        path=path if path in {None, "-"} else os.path.abspath(path),
        fd=_descriptor(given.integer("fd")),
        level=max(1, given.integer("level") or 1),
        prefix=given.text("prefix") or "",
        truncate=given.flag("truncate"),
    )


def pid_config(line: CommandLine) -> PidConfig | None:
    """``--pid``. Raises UsageError."""
    given = line.subs("pid")
    if given is None:
        return None
    path, fd = given.text("file"), _descriptor(given.integer("fd"))
    if path is not None:
        return PidConfig(path=os.path.abspath(path))
    if fd is None:
        raise line.error("The file or fd parameter is required for the pid option.")
    if not _is_regular_file(fd):
        raise line.error(f"Bad filedescriptor {fd} for pid file")
    return PidConfig(fd=fd)


def state_config(line: CommandLine) -> StateConfig | None:
    """``--tpmstate``, else TPM_PATH, else nothing. Raises UsageError."""
    given = line.subs("tpmstate")
    if given is None:
        path = os.environ.get("TPM_PATH")
        return StateConfig(_absolute(f"dir://{path}")) if path else None
    directory, uri = given.text("dir"), given.text("backend-uri")
    if directory is not None:
        uri = f"dir://{directory}"
    if uri is None:
        raise line.error("The dir or backend-uri parameters is required for the tpmstate option.")
    return StateConfig(
        uri=_absolute(uri),
        mode=given.integer("mode"),
        lock=given.flag("lock", default=not uri.startswith("file://")),
    )


def _device_name(line: CommandLine) -> str:
    name = line.value("name")
    if name is None:
        raise UsageError("Error: device name missing", CuseExit.NO_NAME)
    # "a/b" is fine, the kernel makes the directory; blanks it would strip or choke on.
    parts = name.split("/")
    if not name.isascii() or not name.isprintable() or " " in name or {"", ".", ".."} & {*parts}:
        raise UsageError(f"Error: '{name}' cannot be the name of a device", CuseExit.NO_NAME)
    return name


def _startup_config(line: CommandLine) -> StartupConfig:
    given = line.subs("flags")
    if given is None:
        return StartupConfig()
    kinds: tuple[StartupKind, ...] = ("clear", "state", "deactivated", "none")
    kind = next((kind for kind in kinds if given.flag(f"startup-{kind}")), None)
    return StartupConfig(
        not_need_init=given.flag("not-need-init") or kind not in {None, "none"},
        startup=kind,
        auto_shutdown=not given.flag("disable-auto-shutdown"),
    )


def _locality_config(line: CommandLine) -> LocalityConfig:
    given = line.subs("locality")
    if given is None:
        return LocalityConfig()
    return LocalityConfig(
        reject_locality_4=given.flag("reject-locality-4"),
        allow_set_locality=given.flag("allow-set-locality"),
    )


def _profile_config(line: CommandLine) -> ProfileConfig | None:
    given = line.subs("profile")
    if given is None:
        return None
    sources = ("profile", "name", "fd", "file")
    if sum(given.has(source) for source in sources) > 1:
        raise line.error(
            "Only one profile option parameter of 'profile', 'name', 'fd', or 'file' "
            "may be provided"
        )
    text = _profile_text(line, given)
    if text is None:
        raise line.error("No profile option parameter given to get a profile")
    return ProfileConfig(text, given.text("remove-disabled"))


def _profile_text(line: CommandLine, given: SubValues) -> str | None:
    name, fd, path = given.text("name"), given.integer("fd"), given.text("file")
    if name is not None:
        return json.dumps({"Name": name}, separators=(",", ":"))
    source = path if path is not None else fd
    if source is None:
        return given.text("profile")
    try:
        with open(source, "rb") as file:
            return file.read(_PROFILE_LIMIT).decode().strip()
    except (OSError, ValueError) as exc:
        raise line.error(f"Could not read the profile from '{source}': {exc}") from exc


def _absolute(uri: str) -> str:
    """The service leaves the directory it was started in, so relative paths must end here."""
    scheme, separator, path = uri.partition("://")
    return f"{scheme}://{os.path.abspath(path)}" if separator and path else uri


def _descriptor(number_given: int | None) -> int | None:
    return None if number_given is None or number_given < 0 else number_given


def _is_regular_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False
