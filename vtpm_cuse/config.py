"""What a running vTPM is asked to be: the typed outcome of a command line.

Plain frozen data, so that a manager or a test can make one without any words; named tuples and
not dataclasses, which cost a start ten times as much.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vtpm_cuse.storage.locations import Location, parse

StartupKind = Literal["none", "clear", "state", "deactivated"]
SeccompAction = Literal["kill", "log", "none"]
LandlockUse = Literal["try", "require"]


class KeySource(NamedTuple):
    """One ``--key`` or ``--migration-key``; the first of the sources counts, in this order.

    With none of them, who has the key gives it, whenever it is needed.

    Attributes:
        file: Path of a file with the key.
        fd: Descriptor to read the key from.
        credential: Name of a file with the key in systemd's ``$CREDENTIALS_DIRECTORY``.
        keyring: Description of a "user" key in a keyring of the kernel that this process searches.
        pwdfile: Path of a file with a passphrase.
        pwdfd: Descriptor to read a passphrase from.
        mode: One of `storage.keys.CIPHER_KEY_SIZES`.
        format: One of `storage.keys.KEY_FORMATS`, for all but passphrases.
        kdf: One of `storage.keys.KDFS`, for passphrases.
        remove: Remove the files after reading.
    """

    file: str | None = None
    fd: int | None = None
    credential: str | None = None
    keyring: str | None = None
    pwdfile: str | None = None
    pwdfd: int | None = None
    mode: str = "aes-128-cbc"
    format: str = "hex"
    kdf: str = "pbkdf2"
    remove: bool = False

    @property
    def is_given(self) -> bool:
        """Whether nothing says where it is."""
        places = self.file, self.fd, self.credential, self.keyring, self.pwdfile, self.pwdfd
        return places.count(None) == len(places)


class Secret:
    """A key that was given, of as many bytes as its cipher has; it is never shown."""

    def __init__(self, value: bytes) -> None:
        self.value = value


class User(NamedTuple):
    """Whom a process runs as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


class Exits(NamedTuple):
    """Exit statuses by which callers of an interface tell failures to start apart."""

    start: int = 1
    pid: int = 1
    groups: int = 1
    gid: int = 1
    uid: int = 1
    sandbox: int = 1


class LogConfig(NamedTuple):
    """Where messages go: *path*, else *fd*, else standard error.

    Attributes:
        path: Log file, appended to; "-" for no messages at all.
        level: Messages up to this level are written; 5 and more turn on libtpms' own.
        prefix: Starts every line.
        truncate: Empties the file first.
        runas: Whose a new file is; None leaves it the caller's.
    """

    path: str | None = None
    fd: int | None = None
    level: int = 1
    prefix: str = "swtpm: "
    truncate: bool = False
    runas: User | None = None


class PidConfig(NamedTuple):
    """Where the process id is written: *path*, else *fd* (a regular file)."""

    path: str | None = None
    fd: int | None = None


class ProcessConfig(NamedTuple):
    """The process that serves a vTPM, whatever interface it is served on.

    Attributes:
        background: Go to the background; the caller's process ends once clients are served.
        log: Where messages go.
        pid: Where the process id is written, if anywhere.
        runas: Whom it runs as once it has what needs the caller's privileges.
        seccomp: What becomes of a process that leaves its sandbox: "kill" ends it, "log" has the
            kernel write it down, "none" makes no sandbox.
        landlock: "require" does not serve where the kernel has no Landlock for the sandbox.
    """

    background: bool = False
    log: LogConfig = LogConfig()
    pid: PidConfig | None = None
    runas: User | None = None
    seccomp: SeccompAction = "kill"
    landlock: LandlockUse = "try"


class StateConfig(NamedTuple):
    """Where the TPM's state is.

    Attributes:
        uri: ``dir://PATH``, ``file://PATH`` or ``mem://``.
        mode: Permission bits of the state files; None leaves them to default and umask.
        lock: Whether a second process is kept out.
        fsync: Whether each change is on the disk before it is acknowledged.
        backup: Whether the last good generation of the permanent state is kept.
        own_place: Nobody has named a place; this one is made for the TPM's name.
    """

    uri: str
    mode: int | None = None
    lock: bool = True
    fsync: bool = True
    backup: bool = False
    own_place: bool = False

    @property
    def location(self) -> Location:
        """What the URI says."""
        return parse(self.uri)


class StartupConfig(NamedTuple):
    """What happens to the TPM before its first and after its last command.

    Attributes:
        not_need_init: The TPM is powered on at start, without a PTM_INIT.
        startup: The Startup command sent then; "none" forbids one, None leaves it to the interface.
        auto_shutdown: TPM2_Shutdown is sent when the TPM is powered off without one.
    """

    not_need_init: bool = False
    startup: StartupKind | None = None
    auto_shutdown: bool = True


class LocalityConfig(NamedTuple):
    """Which localities clients may choose."""

    reject_locality_4: bool = False
    allow_set_locality: bool = False


class ProfileConfig(NamedTuple):
    """The profile of a TPM 2.0 yet to be made.

    Attributes:
        text: The profile as JSON.
        remove_disabled: "check" or "fips-host": a custom profile loses what OpenSSL disables.
    """

    text: str
    remove_disabled: str | None = None


class PcapConfig(NamedTuple):
    """Where a packet capture of commands and responses goes: *path*, else *fd*.

    Attributes:
        path: File, appended to.
        fd: Open descriptor; of a file, appended to.
        truncate: Empties the file first.
        mode: Permission bits of the file, an older one's, too; None is 0640, or less where an older
            one has less.
        checksums: Whether packets have them.
    """

    path: str | None = None
    fd: int | None = None
    truncate: bool = False
    mode: int | None = None
    checksums: bool = False


class ChipConfig(NamedTuple):
    """A TPM that is not ours, which a resource manager is put in front of.

    Attributes:
        path: Its device.
        below_manager: That is a resource manager's, as the kernel's /dev/tpmrmN.
        exclusive: Nobody else is to use the TPM, where the kernel can see to that.
        flush_all: What others have left in it is ended at the start.
    """

    path: str
    below_manager: bool = False
    exclusive: bool = False
    flush_all: bool = False


class VtpmConfig(NamedTuple):
    """The TPM itself, whatever interface it is served on.

    Attributes:
        chip: It is this one, and nothing else here but `pcap` and `limits` counts.
        key: Where the key comes from that encrypts stored state.
        migration_key: Where the key comes from that encrypts state on its way to another TPM.
        incoming: A migration brings the state, whose lock is still held elsewhere.
        release_outgoing: The lock goes with the last blob, whatever takes it away.
        pcap: Where commands and responses are captured, if anywhere.
        limits: Of the resource manager (`resmgr.quota.Limits`), by name; what is left out has its
            default.
    """

    tpm2: bool = False
    state: StateConfig | None = None
    startup: StartupConfig = StartupConfig()
    locality: LocalityConfig = LocalityConfig()
    profile: ProfileConfig | None = None
    key: KeySource | None = None
    migration_key: KeySource | None = None
    incoming: bool = False
    release_outgoing: bool = False
    pcap: PcapConfig | None = None
    chip: ChipConfig | None = None
    limits: tuple[tuple[str, int], ...] = ()


class CuseConfig(NamedTuple):
    """A vTPM on a CUSE character device.

    Attributes:
        name: The device is ``/dev/NAME``.
        major: Device number; 0 lets the kernel choose.
        minor: Device number.
        managed: If there is to be a device with a resource manager, that is ``/dev/MANAGED``. In
            front of a chip it is the only one, and has the *name*.
        node_in_sight: It can be seen when it is there: this process has no other root.
    """

    name: str
    vtpm: VtpmConfig
    major: int = 0
    minor: int = 0
    managed: str | None = None
    node_in_sight: bool = True
    process: ProcessConfig = ProcessConfig()


class FuseConfig(NamedTuple):
    """A vTPM as a file in a FUSE mount.

    Attributes:
        name: The file is ``MOUNT/NAME``.
        mount: Absolute path of the directory to mount on.
        managed: Where the TPM is a 2.0, the one with a resource manager is ``MOUNT/MANAGED``. In
            front of a chip it is the only one, and has the *name*.
        allow_other: Other users may use them too.
    """

    name: str
    mount: str
    vtpm: VtpmConfig
    managed: str | None = None
    allow_other: bool = False
    process: ProcessConfig = ProcessConfig()


class SocketAddress(NamedTuple):
    """One end of a channel: a descriptor if there is one, else a path, else a port.

    Attributes:
        kind: ``tcp`` or ``unixio``.
        port: TCP port.
        bindaddr: Numeric IPv4 or IPv6 address to listen on.
        ifname: Network interface, for IPv6 link-local addresses.
        path: Path of a Unix socket.
        mode: Permission bits of that path.
        uid: Owner of that path; None leaves it.
        gid: Group of that path; None leaves it.
        fd: An open socket: a listening one, but for TCP data a connected one.
        clientfd: A connected socket of a control channel.
        per_process: Of the resource manager: a client is a process, not a connection.
    """

    kind: Literal["tcp", "unixio"]
    port: int | None = None
    bindaddr: str = "127.0.0.1"
    ifname: str | None = None
    path: str | None = None
    mode: int = 0o770
    uid: int | None = None
    gid: int | None = None
    fd: int | None = None
    clientfd: int | None = None
    per_process: bool = False


class SocketConfig(NamedTuple):
    """A vTPM on sockets.

    Attributes:
        data: Where TPM commands come from (``--server``, ``--port``, ``--fd``).
        control: Where control commands come from (``--ctrl``).
        managed: Where clients of the resource manager connect (``--managed``).
        disconnect: Close a data connection after each response.
        terminate: End when there is no data connection after there was one.
        control_terminate: End when the control connection is closed.
    """

    vtpm: VtpmConfig
    data: SocketAddress | None = None
    control: SocketAddress | None = None
    managed: SocketAddress | None = None
    disconnect: bool = False
    terminate: bool = False
    control_terminate: bool = False
    process: ProcessConfig = ProcessConfig()


class ChardevConfig(NamedTuple):
    """A vTPM that takes its commands from a character device.

    Attributes:
        proxy: Ask the kernel for a device, /dev/tpmN.
        path: Else the device to open.
        fd: Else an open descriptor; or a socket.
        control: Where control commands come from (``--ctrl``).
        managed: Where clients of the resource manager connect (``--managed``).
        control_terminate: End when the control connection is closed.
    """

    vtpm: VtpmConfig
    proxy: bool = False
    path: str | None = None
    fd: int | None = None
    control: SocketAddress | None = None
    managed: SocketAddress | None = None
    control_terminate: bool = False
    process: ProcessConfig = ProcessConfig()
