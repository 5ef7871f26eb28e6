"""From a command line to the configuration of a service."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import addresses
from vtpm_cuse.cli.words.commandline import CuseExit
from vtpm_cuse.config import (
    ChardevConfig,
    CuseConfig,
    FuseConfig,
    LandlockUse,
    LocalityConfig,
    LogConfig,
    PcapConfig,
    PidConfig,
    ProcessConfig,
    ProfileConfig,
    SeccompAction,
    SocketConfig,
    StartupConfig,
    StartupKind,
    StateConfig,
    User,
    VtpmConfig,
)
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import open_to_read
from vtpm_cuse.storage.locations import absolute, absolute_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.cli.words.suboptions import SubValues
    from vtpm_cuse.config import KeySource

_NAME_MAX: Final = 255
_PROXY_NAME: Final = "proxy0"
_LIMITS: Final = {
    "objects": range(3, 257),  # no TPM has less
    "sessions": range(3, 65),  # no TPM has more
    "sessions-of-a-user": range(3, 65),
    "abandoned": range(65),
    "clients-of-a-user": range(1, 901),
    "clients": range(1, 901),  # each may be a descriptor
}
_PROFILE_LIMIT: Final = 10 * 1024  # bytes that the C suite reads of a profile file


def cuse_config(line: CommandLine) -> CuseConfig:
    """All of ``swtpm cuse``. Raises UsageError."""
    config = CuseConfig(
        node_in_sight=not line.has("chroot"),
        major=line.number("maj", 0xFFFF),
        minor=line.number("min", 0xFFFF),
        name=device_name(line),
        process=process_config(line, background=not line.has("foreground")),
        vtpm=vtpm_config(line),
    )
    managed = _managed_device(line, config.name, config.vtpm)
    vtpm = _limited(line, config.vtpm, "--resource-manager" if managed is None else None)
    return config._replace(managed=managed, vtpm=vtpm)


def _managed_device(line: CommandLine, name: str, vtpm: VtpmConfig) -> str | None:
    """The name of the device with a resource manager, if there is to be one.

    It is by itself where nobody has named a place for the state; the C suite has none.
    """
    if line.has("resource-manager"):
        if not vtpm.tpm2:
            raise line.error("Error: The resource manager is for a TPM 2.0: give --tpm2")
        given = line.value("resource-manager")
        managed = _checked_device_name(given) if given else managed_name(name)
        if managed == name:
            raise UsageError(
                f"Error: '{name}' cannot be the name of both devices", CuseExit.NO_NAME
            )
        return managed
    own_place = vtpm.state is not None and vtpm.state.own_place
    return managed_name(name) if own_place and vtpm.tpm2 else None


def managed_name(name: str) -> str:
    """As the kernel has it: "vtpmrm0" for "vtpm0"."""
    begin, tpm, end = name.rpartition("tpm")
    return f"{begin}{tpm}rm{end}" if tpm else f"{name}rm"


def fuse_config(line: CommandLine) -> FuseConfig:
    """All of ``swtpm fuse``, whose defaults make a TPM that is ready to use. Raises UsageError."""
    name = file_name(line)
    mount = line.value("mount")
    if mount is None:
        mount = f"{_runtime_folder()}/vtpm"
    vtpm = vtpm_config(line)
    return FuseConfig(
        name=name,
        managed=managed_name(name),
        mount=absolute_path(mount),
        allow_other=line.has("allow-other"),
        process=process_config(line, background=not line.has("foreground")),
        vtpm=_limited(
            line,
            vtpm._replace(startup=_ready(vtpm.startup)),
            None if vtpm.tpm2 else "--tpm2",
        ),
    )


def _runtime_folder() -> str:
    """Of the user's own: another one could have root mount over any empty folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    reason = ""
    if not runtime:
        reason = "is not set"
    elif not os.path.isabs(runtime):
        reason = "is not an absolute path"
    elif os.path.lexists(runtime) and os.lstat(runtime).st_uid != os.geteuid():
        reason = f"is another user's: {runtime}"
    if reason:
        raise UsageError(f"Error: XDG_RUNTIME_DIR {reason}", hint="give --mount DIR")
    return runtime


def socket_config(line: CommandLine) -> SocketConfig:
    """All of ``swtpm socket``. Raises UsageError."""
    data, disconnect = addresses.data_channel(line)
    control, control_terminate = addresses.control_channel(line)
    vtpm = vtpm_config(line)
    managed = addresses.managed_channel(line, vtpm)
    return SocketConfig(
        vtpm=_limited(line, vtpm, "--managed" if managed is None else None),
        data=addresses.passed(line, "data", data),
        control=addresses.passed(line, "ctrl", control),
        managed=managed,
        disconnect=disconnect,
        terminate=line.has("terminate"),
        control_terminate=control_terminate,
        process=process_config(line, background=line.has("daemon")),
    )


def chardev_config(line: CommandLine) -> ChardevConfig:
    """All of ``swtpm chardev``. Raises UsageError."""
    proxy, path, fd = line.has("vtpm-proxy"), None, None
    given = line.first_of("chardev", "fd")
    if given == "chardev":
        path = absolute_path(line.value("chardev") or "")
    elif given == "fd":
        fd = addresses.data_fd(line, "Cannot parse character device file descriptor.")
    if proxy and given:
        raise line.error("Cannot use vTPM proxy with a provided device.")
    if not (proxy or given):
        raise line.error("Error: Missing character device or file descriptor")
    control, control_terminate = addresses.control_channel(line)
    vtpm = vtpm_config(line)
    managed = addresses.managed_channel(line, vtpm)
    vtpm = _limited(line, vtpm, "--managed" if managed is None else None)
    return ChardevConfig(
        vtpm=_ready_for_the_kernel(vtpm) if proxy else vtpm,
        proxy=proxy,
        path=path,
        fd=fd,
        control=addresses.passed(line, "ctrl", control),
        managed=managed,
        control_terminate=control_terminate,
        process=process_config(line, background=line.has("daemon")),
    )


def _ready_for_the_kernel(vtpm: VtpmConfig) -> VtpmConfig:
    """The kernel's driver uses the TPM as soon as there is a device, and sets its locality."""
    locality = vtpm.locality._replace(allow_set_locality=True)
    return vtpm._replace(startup=_ready(vtpm.startup), locality=locality)


def _ready(startup: StartupConfig) -> StartupConfig:
    """On as soon as it is there, and started."""
    return startup._replace(not_need_init=True, startup=startup.startup or "clear")


def process_config(line: CommandLine, *, background: bool) -> ProcessConfig:
    """The options about the process. Raises UsageError."""
    return ProcessConfig(
        background=background,
        log=log_config(line),
        pid=pid_config(line),
        runas=user(line),
        seccomp=_seccomp_action(line),
        landlock=_landlock_use(line),
    )


def enter_root(line: CommandLine) -> None:
    """``--chroot``, with all looked up and imported before that is out of reach afterwards.

    It has to be: what lies below the new root is not ours, and the C library would take from there
    who a user is, and run the code that says so.

    Raises:
        UsageError: This process may not, there is no such directory, or an option is wrong.
    """
    path = line.value("chroot")
    if path is not None:
        from vtpm_cuse.service.confine.preload import KEYRING, import_all
        from vtpm_cuse.service.confine.privileges import change_root
        from vtpm_cuse.service.confine.sandbox import note_inherited
        from vtpm_cuse.service.process import notify

        line.look_up()
        user(line)
        notify.keep()
        for name in import_all():
            if name != KEYRING or _takes_keyring(line):
                raise UsageError(f"{name} is missing, which --chroot needs", hint="install it")
        note_inherited()
        change_root(path)


def _takes_keyring(line: CommandLine) -> bool:
    keys = (line.subs("key"), line.subs("migration-key"))
    return any(given.has("keyring") for given in keys if given is not None)


def user(line: CommandLine) -> User | None:
    """``--runas``. Raises UsageError."""
    name = line.value("runas")
    if name is None:
        return None
    from vtpm_cuse.service.confine.privileges import find_user

    try:
        return find_user(name)
    except UsageError as exc:
        raise line.error(str(exc), line.program.no_user) from exc


def _seccomp_action(line: CommandLine) -> SeccompAction:
    given = line.subs("seccomp")
    action = given.text("action") if given else None
    actions: tuple[SeccompAction, ...] = ("kill", "log", "none")
    for known in actions:
        if action in {known, None}:
            return known
    raise line.error(f"Unsupported seccomp log action {action}")


def _landlock_use(line: CommandLine) -> LandlockUse:
    given = line.subs("seccomp")
    use = given.text("landlock") if given else None
    if use in {"try", None}:
        return "try"
    if use != "require":
        raise line.error(f"Unsupported seccomp landlock value {use}")
    if _seccomp_action(line) != "kill":
        raise line.error("landlock=require needs action=kill: no other action uses Landlock")
    return "require"


def vtpm_config(line: CommandLine) -> VtpmConfig:
    """The options about the TPM itself. Raises VtpmError."""
    state, startup = state_config(line), _startup_config(line)
    tpm2 = is_tpm2(line) if state is None else is_tpm2_in(state, line)
    if state is not None and state.own_place:
        startup = _ready(startup)
    migration = line.subs("migration")
    return VtpmConfig(
        tpm2=tpm2,
        state=state,
        startup=startup,
        locality=_locality_config(line),
        profile=_profile_config(line),
        key=_key_source(line, "key"),
        migration_key=_key_source(line, "migration-key"),
        incoming=migration is not None and migration.flag("incoming"),
        release_outgoing=migration is not None and migration.flag("release-lock-outgoing"),
        pcap=pcap_config(line),
    )


def _limited(line: CommandLine, vtpm: VtpmConfig, lacks: str | None) -> VtpmConfig:
    """With the limits of a resource manager, which an option that it *lacks* would make."""
    limits = managed_limits(line)
    if limits and lacks is not None:
        raise line.error(f"Error: --managed-limits is for a resource manager: give {lacks}")
    return vtpm._replace(limits=limits)


def managed_limits(line: CommandLine) -> tuple[tuple[str, int], ...]:
    """``--managed-limits``. Raises UsageError."""
    given = line.subs("managed-limits")
    limits: list[tuple[str, int]] = []
    for name, allowed in _LIMITS.items():
        value = None if given is None else given.integer(name)
        if value is None:
            continue
        if value not in allowed:
            bounds = f"{allowed[0]} to {allowed[-1]}"
            raise line.error(f"Error: {name}={value} of --managed-limits is not from {bounds}")
        limits.append((name.replace("-", "_"), value))
    return tuple(limits)


def is_tpm2(line: CommandLine) -> bool:
    """Whether a TPM 2.0 is meant, which it is by default in a FUSE mount. Raises UsageError."""
    if line.has("tpm2") and line.has("tpm12"):
        raise line.error("Error: --tpm2 and --tpm12 exclude each other")
    return line.has("tpm2") or (line.knows("mount") and not line.has("tpm12"))


def is_tpm2_in(state: StateConfig, line: CommandLine) -> bool:
    """Whether a TPM 2.0 is meant; where nobody has named a place it is, unless a 1.2 is there.

    Raises:
        UsageError: There is another one than is asked for.
        StorageError: The place cannot be looked into.
    """
    meant = is_tpm2(line)
    if not state.own_place:
        return meant
    kept = {version: _kept_in(state, tpm2=version) for version in (True, False)}
    asked = [v for v, option in ((True, "tpm2"), (False, "tpm12")) if line.has(option)]
    whole = [version for version, (is_whole, _) in kept.items() if is_whole]
    left = [version for version, (_, left) in kept.items() if left]
    tpm2 = [*asked, *whole, *left, True][0]
    if kept[tpm2] == (False, "") and (whole or left):
        what = kept[not tpm2][1]
        it = (f"{what} of an earlier" if what else "a") + f" TPM {'1.2' if tpm2 else '2.0'}"
        raise UsageError(
            f"Error: {state.uri.removeprefix('dir://')} holds {it}",
            hint=f"give --{'tpm12' if tpm2 else 'tpm2'}, or another place by --tpmstate dir=DIR",
        )
    return tpm2


def _kept_in(state: StateConfig, *, tpm2: bool) -> tuple[bool, str]:
    """Whether a TPM of that version is there, else what is left of one. Raises StorageError."""
    from vtpm_cuse.storage.stores import open_store

    store = open_store(state.uri, tpm2=tpm2, lock=False)
    try:
        left = store.remains()
        return bool(store.sizes()) and not left, left
    finally:
        store.close()


def log_config(line: CommandLine, unasked: LogConfig | None = None) -> LogConfig:
    """``--log``, or *unasked* without it. Raises UsageError."""
    given = line.subs("log")
    if given is None:
        return unasked or LogConfig()
    path = given.text("file")
    return LogConfig(
        path=path if path in {None, "-"} else absolute_path(path),
        fd=addresses.descriptor(given.integer("fd")),
        level=max(1, given.integer("level") or 1),
        prefix=given.text("prefix") or "",
        truncate=given.flag("truncate"),
        runas=user(line),
    )


def pcap_config(line: CommandLine) -> PcapConfig | None:
    """``--pcap``. Raises UsageError."""
    given = line.subs("pcap")
    if given is None:
        return None
    path, fd = _path(given, "file"), addresses.descriptor(given.integer("fd"))
    if path is None and fd is None:
        raise line.error("The file or fd parameter is required for the pcap option.")
    return PcapConfig(
        path=path,
        fd=fd,
        truncate=given.flag("truncate"),
        mode=given.integer("mode"),
        checksums=given.flag("checksums"),
    )


def pid_config(line: CommandLine) -> PidConfig | None:
    """``--pid``. Raises UsageError."""
    given = line.subs("pid")
    if given is None:
        return None
    path, fd = given.text("file"), addresses.descriptor(given.integer("fd"))
    if path is not None:
        return PidConfig(path=absolute_path(path))
    if fd is None:
        raise line.error("The file or fd parameter is required for the pid option.")
    if not _is_regular_file(fd):
        raise line.error(f"Bad filedescriptor {fd} for pid file")
    return PidConfig(fd=fd)


def state_config(line: CommandLine) -> StateConfig | None:
    """``--tpmstate``, else TPM_PATH, else the place for the TPM's name. Raises UsageError."""
    given = line.subs("tpmstate")
    if given is None:
        path = os.environ.get("TPM_PATH")
        return StateConfig(absolute(f"dir://{path}")) if path else _own_place(line)
    directory, uri = given.text("dir"), given.text("backend-uri")
    if directory is not None:
        uri = f"dir://{directory}"
    if uri is None:
        raise line.error("The dir or backend-uri parameters is required for the tpmstate option.")
    return StateConfig(
        uri=absolute(uri),  # the service leaves the directory that it was started in
        mode=given.integer("mode"),
        lock=given.flag("lock", default=True),
        fsync=given.flag("fsync", default=True),
        backup=given.flag("backup"),
    )


def _own_place(line: CommandLine) -> StateConfig | None:
    """Where the state is if nobody says; nowhere for a TPM without a name."""
    if line.knows("maj"):
        name = device_name(line) if line.has("name") else None
    elif line.knows("mount"):
        name = file_name(line)
    else:
        name = _proxy_name(line) if line.has("vtpm-proxy") else None
    if name is None:
        return None
    folder = os.environ.get("XDG_STATE_HOME", "")
    if os.geteuid() == 0:
        folder = "/var/lib"
    elif not folder.startswith("/"):
        folder = os.path.expanduser("~/.local/state")
    # As sysfs has it, so that no TPM is within another's folder.
    return StateConfig(
        absolute(f"dir://{folder}/vtpm-cuse/{name.replace('/', '!')}"), own_place=True
    )


def device_name(line: CommandLine) -> str:
    """``--name`` of a device. Raises UsageError."""
    name = line.value("name")
    if name is None:
        raise UsageError("Error: device name missing", CuseExit.NO_NAME)
    return _checked_device_name(name)


def _checked_device_name(name: str) -> str:
    name = name.removeprefix("/dev/")
    # "a/b" is fine, the kernel makes the directory; blanks it would strip or choke on.
    parts = name.split("/")
    if not name.isascii() or not name.isprintable() or " " in name or {"", ".", ".."} & {*parts}:
        raise UsageError(f"Error: '{name}' cannot be the name of a device", CuseExit.NO_NAME)
    return name


def file_name(line: CommandLine) -> str:
    """The name of the TPM in a FUSE mount; other names there are taken."""
    from vtpm_cuse.vtpm.attributes import is_attribute

    name = line.value("name")
    if name is None:
        raise UsageError("Error: device name missing", hint="give -n NAME")
    if not _is_simple(name) or is_attribute(name):
        raise UsageError(f"Error: '{name}' cannot be the name of the TPM's file")
    return name


def _proxy_name(line: CommandLine) -> str:
    """The kernel numbers its devices as they come; the TPM needs a name to be found again."""
    name = line.value("name")
    if name is None:
        return _PROXY_NAME
    if not _is_simple(name):
        raise UsageError(f"Error: '{name}' cannot be the name of a TPM")
    return name


def _is_simple(name: str) -> bool:
    fits = name.isascii() and name.isprintable() and " " not in name and "/" not in name
    return fits and name not in {"", ".", ".."} and len(name) <= _NAME_MAX


def _key_source(line: CommandLine, option: str) -> KeySource | None:
    given = line.subs(option)
    if given is None:
        return None
    from vtpm_cuse.config import KeySource
    from vtpm_cuse.storage.keys import CIPHER_KEY_SIZES, KDFS, KEY_FORMATS

    def one_of(name: str, allowed: Iterable[str], default: str, complaint: str) -> str:
        text = given.text(name) or default
        if text not in allowed:
            raise line.error(complaint.format(text))
        return text

    return KeySource(
        file=_path(given, "file"),
        fd=addresses.descriptor(given.integer("fd")),
        credential=given.text("credential"),
        keyring=given.text("keyring"),
        pwdfile=_path(given, "pwdfile"),
        pwdfd=addresses.descriptor(given.integer("pwdfd")),
        mode=one_of("mode", CIPHER_KEY_SIZES, "aes-128-cbc", "Unknown encryption mode '{}'."),
        format=one_of("format", KEY_FORMATS, "hex", "Unknown key format '{}'."),
        kdf=one_of("kdf", KDFS, "pbkdf2", "Unknown kdf '{}'."),
        remove=given.flag("remove"),
    )


def _path(given: SubValues, name: str) -> str | None:
    path = given.text(name)
    return None if path is None else absolute_path(path)


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
        with open(source if path is None else _opened_for_user(line, path), "rb") as file:
            return file.read(_PROFILE_LIMIT).decode().strip()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise line.error(f"Could not read the profile from '{source}': {reason}") from exc


def _opened_for_user(line: CommandLine, path: str) -> int:
    from vtpm_cuse.service.process.behalf import opening

    with opening(user(line), path):
        return open_to_read(path, streams=True)


def _is_regular_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False
