"""What a running vTPM is asked to be: the typed outcome of a command line.

Plain frozen data, so that a manager or a test can make one without any words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

StartupKind = Literal["none", "clear", "state", "deactivated"]


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Where messages go: *path*, else *fd*, else standard error.

    Attributes:
        path: Log file, appended to; "-" for no messages at all.
        level: Messages up to this level are written; 5 and more turn on libtpms' own.
        prefix: Starts every line.
        truncate: Empties the file first.
    """

    path: str | None = None
    fd: int | None = None
    level: int = 1
    prefix: str = "swtpm: "
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class PidConfig:
    """Where the process id is written: *path*, else *fd* (a regular file)."""

    path: str | None = None
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class StateConfig:
    """Where the TPM's state is.

    Attributes:
        uri: ``dir://PATH`` or ``file://PATH``.
        mode: Permission bits of the state files; None leaves them to default and umask.
        lock: Whether a second process is kept out.
    """

    uri: str
    mode: int | None = None
    lock: bool = True


@dataclass(frozen=True, slots=True)
class StartupConfig:
    """What happens to the TPM before its first and after its last command.

    Attributes:
        not_need_init: The TPM is powered on at start, without a PTM_INIT.
        startup: The Startup command sent then; "none" forbids one, None leaves it to the interface.
        auto_shutdown: TPM2_Shutdown is sent when the TPM is powered off without one.
    """

    not_need_init: bool = False
    startup: StartupKind | None = None
    auto_shutdown: bool = True


@dataclass(frozen=True, slots=True)
class LocalityConfig:
    """Which localities clients may choose."""

    reject_locality_4: bool = False
    allow_set_locality: bool = False


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """The profile of a TPM 2.0 yet to be made.

    Attributes:
        text: The profile as JSON.
        remove_disabled: "check" or "fips-host": a custom profile loses what OpenSSL disables.
    """

    text: str
    remove_disabled: str | None = None


@dataclass(frozen=True, slots=True)
class VtpmConfig:
    """The TPM itself, whatever interface it is served on."""

    tpm2: bool = False
    state: StateConfig | None = None
    startup: StartupConfig = field(default_factory=StartupConfig)
    locality: LocalityConfig = field(default_factory=LocalityConfig)
    profile: ProfileConfig | None = None


@dataclass(frozen=True, slots=True)
class CuseConfig:
    """A vTPM on a CUSE character device.

    Attributes:
        name: The device is ``/dev/NAME``.
        major: Device number; 0 lets the kernel choose.
        minor: Device number.
        foreground: Stay with the caller instead of going to the background.
    """

    name: str
    vtpm: VtpmConfig
    major: int = 0
    minor: int = 0
    foreground: bool = False
    log: LogConfig = field(default_factory=LogConfig)
    pid: PidConfig | None = None
