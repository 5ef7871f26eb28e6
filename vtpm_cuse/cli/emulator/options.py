"""The one option table of the emulator's interfaces, whose programs take their rows from it.

To add an option is to add a row here and to read it in `cli.emulator.settings`;
a row with ``available=False`` names an option of the C suite that is not built
yet: it is refused with a clear sentence and left out of the help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.keys import KEY
from vtpm_cuse.cli.words.table import InterfaceName, Kind, Option, SubOption

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL: Final = frozenset(InterfaceName)
CUSE: Final = frozenset({InterfaceName.CUSE})
FUSE: Final = frozenset({InterfaceName.FUSE})
SOCKET: Final = frozenset({InterfaceName.SOCKET})
CHARDEV: Final = frozenset({InterfaceName.CHARDEV})
STREAMS: Final = SOCKET | CHARDEV


def _switches(**helps: str) -> tuple[SubOption, ...]:
    return tuple(SubOption(name.replace("_", "-"), text, Kind.BOOL) for name, text in helps.items())


def _address(*, default_type: str) -> tuple[SubOption, ...]:
    needed = f", by default {default_type}" if default_type else ""
    return (
        SubOption("type", f"tcp or unixio{needed}", metavar="TYPE", choices=("tcp", "unixio")),
        SubOption("port", "TCP port to listen on, which is open to every user", Kind.INT, "PORT"),
        SubOption("bindaddr", "address to listen on, by default 127.0.0.1", metavar="ADDR"),
        SubOption("ifname", "interface, for an IPv6 link-local address", metavar="NAME"),
        SubOption("path", "path of the Unix socket", metavar="PATH"),
        SubOption("mode", "permissions of the path, by default 0770", Kind.MODE, "0..."),
        SubOption("uid", "owner of the path", Kind.UID, "UID"),
        SubOption("gid", "group of the path", Kind.GID, "GID"),
    )


_TPMSTATE: Final = (
    SubOption("dir", "directory of the state files", metavar="DIR"),
    SubOption(
        "backend-uri",
        "dir://DIR for a directory; file://PATH for one file or a block device; mem:// for a TPM "
        "that is gone when the program ends",
        metavar="URI",
    ),
    SubOption(
        "mode",
        "permissions of the state files in octal, by default 0640; the owner must have 0600",
        Kind.MODE,
        metavar="0...",
    ),
    SubOption("lock", "false lets other processes use the same state", Kind.BOOL, "BOOL"),
    SubOption(
        "fsync",
        "false acknowledges a change before it is on the disk: faster, and a power cut may lose it",
        Kind.BOOL,
        "BOOL",
    ),
    SubOption(
        "backup",
        "keep the last good generation of the permanent state as *.bak, in a directory; a TPM 2.0 "
        "starts from it where the state is missing or damaged, and says so",
        Kind.BOOL,
    ),
)

_FLAGS: Final = _switches(
    not_need_init="power the TPM on at once, without waiting for an INIT",
    startup_clear="power it on and send Startup(CLEAR)",
    startup_state="power it on and send Startup(STATE)",
    startup_deactivated="power it on and send Startup(DEACTIVATED), TPM 1.2 only",
    startup_none="send no Startup",
    disable_auto_shutdown="send no TPM2_Shutdown when a client omitted it",
)

_OWN_PLACE: Final = (
    "in /var/lib/vtpm-cuse/NAME for root, and in $XDG_STATE_HOME/vtpm-cuse/NAME "
    "(~/.local/state/vtpm-cuse/NAME) for others"
)
_ITS_TPM: Final = (
    "Where nobody names a place, the directory is made with permissions for its owner alone, and "
    "the TPM is powered on and started at once: a TPM 2.0, unless a TPM 1.2 is there already or "
    "--tpm12 is given. Only one program can have it at a time."
)

OPTIONS: Final[Sequence[Option]] = (
    Option(
        "name",
        "name of the device: the TPM appears as /dev/NAME",
        letter="n",
        metavar="NAME",
        interfaces=CUSE,
        # PEER: so does its loop, for this option alone.
        first_counts=True,
    ),
    Option(
        "name",
        "name of the TPM, by default proxy0; with --vtpm-proxy, its state is kept under it if no "
        "other place is named",
        letter="n",
        metavar="NAME",
        interfaces=CHARDEV,
    ),
    Option(
        "name",
        "name of the file that is the TPM",
        letter="n",
        metavar="NAME",
        interfaces=FUSE,
    ),
    Option(
        "resource-manager",
        "make a second device, of which every client gets a TPM 2.0 of its own, as from the "
        "kernel's /dev/tpmrmN: any number of objects and sessions, and none of another client's; "
        "by default /dev/vtpmrm0 for vtpm0",
        metavar="NAME",
        optional_value=True,
        interfaces=CUSE,
        more="It is there by itself if neither --tpmstate nor TPM_PATH is given.",
    ),
    Option(
        "mount",
        "empty directory to mount on, made if it is missing; by default $XDG_RUNTIME_DIR/vtpm",
        metavar="DIR",
        interfaces=FUSE,
    ),
    Option(
        "allow-other",
        "let all users use the TPM; for an ordinary user /etc/fuse.conf must permit it with "
        "user_allow_other",
        interfaces=FUSE,
    ),
    Option(
        "maj",
        "major number of the device; by default, or with 0, the kernel chooses one",
        letter="M",
        metavar="NUMBER",
        interfaces=CUSE,
    ),
    Option("min", "minor number of the device", letter="m", metavar="NUMBER", interfaces=CUSE),
    Option(
        "foreground",
        "stay in the foreground, as service managers want it; without it the program returns "
        "as soon as the device answers, and the TPM runs on in the background",
        interfaces=CUSE | FUSE,
    ),
    Option(
        "vtpm-proxy",
        "ask the kernel for a TPM device: /dev/tpmN, and for a TPM 2.0 /dev/tpmrmN too",
        interfaces=CHARDEV,
        more="Its path is the first line of the output. The TPM is powered on and started at "
        "once, and the kernel may choose the locality, as it does when it sets a TPM up.",
    ),
    Option(
        "chardev",
        "take the TPM commands from this device",
        letter="c",
        metavar="DEVICE",
        interfaces=CHARDEV,
        first_counts=True,
    ),
    Option(
        "fd",
        "take the TPM commands from this open descriptor: a device, a socket, or what the "
        "ioctl VTPM_PROXY_IOC_NEW_DEV gave",
        letter="f",
        metavar="FD",
        interfaces=CHARDEV,
        first_counts=True,
    ),
    Option(
        "server",
        "where clients connect to send TPM commands",
        noun="server",
        subs=(
            *_address(default_type="tcp"),
            SubOption("fd", "open socket: listening for unixio, connected for tcp", Kind.INT, "FD"),
            SubOption("disconnect", "close a connection after each response", Kind.BOOL),
        ),
        interfaces=SOCKET,
    ),
    Option(
        "port",
        "listen on this TCP port of 127.0.0.1, which is open to every user, and close a "
        "connection after each response",
        letter="p",
        metavar="PORT",
        interfaces=SOCKET,
    ),
    Option(
        "fd",
        "take TPM commands from this connected socket or this terminal, and end with it",
        letter="f",
        metavar="FD",
        interfaces=SOCKET,
    ),
    Option(
        "ctrl",
        "where the control channel is",
        noun="ctrl",
        subs=(
            *_address(default_type=""),
            SubOption("fd", "open listening socket", Kind.INT, "FD"),
            SubOption("clientfd", "open connected socket, unixio only", Kind.INT, "FD"),
            SubOption("terminate", "end when the control client goes away", Kind.BOOL),
        ),
        interfaces=STREAMS,
    ),
    Option(
        "managed",
        "where clients connect that each get a TPM 2.0 of their own, as from the kernel's resource "
        "manager: any number of objects and sessions, and none of another client's",
        noun="managed",
        subs=(
            *_address(default_type=""),
            SubOption("fd", "open listening socket", Kind.INT, "FD"),
            SubOption(
                "per-process",
                "a client is a process with all of its connections, and keeps what it has until it "
                "ends, as the TCTI swtpm of tpm2-tss needs, which connects anew for each command; "
                "unixio only, with Linux 6.5 or newer",
                Kind.BOOL,
            ),
        ),
        interfaces=STREAMS,
    ),
    Option(
        "managed-limits",
        "what clients of the resource manager may have, and how many there may be",
        noun="managed-limits",
        subs=(
            SubOption("objects", "objects of a client, by default 64", Kind.UINT, "N"),
            SubOption("sessions", "sessions of a client, by default 16", Kind.UINT, "N"),
            SubOption(
                "sessions-of-a-user",
                "sessions of one user's clients, by default 46",
                Kind.UINT,
                "N",
            ),
            SubOption(
                "abandoned",
                "sessions in all that clients saved before they went, for others to load, by "
                "default 4",
                Kind.UINT,
                "N",
            ),
            SubOption(
                "clients-of-a-user",
                "clients of one user, by default 64; those on TCP count as one user's",
                Kind.UINT,
                "N",
            ),
            SubOption("clients", "clients in all, by default 256", Kind.UINT, "N"),
        ),
    ),
    Option(
        "terminate",
        "end when the client that sends TPM commands goes away",
        letter="t",
        interfaces=SOCKET,
    ),
    Option(
        "daemon",
        "go to the background; the program returns when clients can connect",
        letter="d",
        interfaces=STREAMS,
    ),
    Option("tpm2", "be a TPM 2.0; otherwise the TPM is a TPM 1.2", interfaces=SOCKET),
    Option(
        "tpm2",
        "be a TPM 2.0, which it is by default if neither --tpmstate nor TPM_PATH is given; "
        "otherwise the TPM is a TPM 1.2",
        interfaces=CUSE | CHARDEV,
    ),
    Option("tpm2", "be a TPM 2.0, which it is by default", interfaces=FUSE),
    Option("tpm12", "be a TPM 1.2", interfaces=ALL - SOCKET),
    Option(
        "tpmstate",
        "where the state of the TPM is kept; needed unless the environment variable TPM_PATH "
        "names a directory",
        noun="tpmstate",
        subs=_TPMSTATE,
        interfaces=SOCKET,
    ),
    Option(
        "tpmstate",
        "where the state of the TPM is kept; by default in the directory that the environment "
        f"variable TPM_PATH names, else {_OWN_PLACE}",
        noun="tpmstate",
        subs=_TPMSTATE,
        interfaces=CUSE | FUSE,
        more=_ITS_TPM,
    ),
    Option(
        "tpmstate",
        "where the state of the TPM is kept; by default in the directory that the environment "
        f"variable TPM_PATH names, else, with --vtpm-proxy, {_OWN_PLACE}",
        noun="tpmstate",
        subs=_TPMSTATE,
        interfaces=CHARDEV,
        more=_ITS_TPM,
    ),
    Option(
        "flags",
        "how the TPM starts and ends",
        noun="flags",
        subs=_FLAGS,
        interfaces=ALL - FUSE,
    ),
    Option(
        "flags",
        "how the TPM starts and ends; it is always powered on, by default with startup-clear",
        noun="flags",
        subs=_FLAGS,
        interfaces=FUSE,
    ),
    Option(
        "locality",
        "which localities clients may use",
        noun="locality",
        subs=_switches(
            reject_locality_4="refuse locality 4",
            allow_set_locality="let the kernel's SetLocality command choose",
        ),
    ),
    Option(
        "profile",
        "profile of a TPM 2.0 that is made anew; needs libtpms 0.10 or newer",
        noun="profile",
        subs=(
            SubOption("name", "a profile by its name, see --print-profiles", metavar="NAME"),
            SubOption("profile", "a profile as JSON text", metavar="JSON"),
            SubOption("file", "a profile in a file", metavar="PATH"),
            SubOption("fd", "a profile to be read from a descriptor", Kind.INT, "FD"),
            SubOption(
                "remove-disabled",
                "check or fips-host: take out of a custom profile what OpenSSL here cannot do",
                metavar="HOW",
                choices=("check", "fips-host"),
            ),
        ),
    ),
    Option(
        "log",
        "where messages go, by default to standard error",
        noun="logging",
        subs=(
            SubOption("file", "file to append to; '-' for no messages at all", metavar="PATH"),
            SubOption("fd", "open descriptor to write to", Kind.INT, "FD"),
            SubOption(
                "level",
                "1 for the operator, 2 and more for details, 5 and more for libtpms' own messages",
                Kind.UINT,
                "N",
            ),
            SubOption("prefix", "text to start every line with", metavar="TEXT"),
            SubOption("truncate", "empty the file first", Kind.BOOL),
        ),
    ),
    Option(
        "pid",
        "where the process id is written; the file is removed at the end",
        noun="pid",
        subs=(
            SubOption("file", "path of the file", metavar="PATH"),
            SubOption("fd", "open descriptor of a file", Kind.INT, "FD"),
        ),
    ),
    Option("key", "key that encrypts the state files", noun="key", subs=KEY),
    Option("migration-key", "key that encrypts state blobs on their way", noun="key", subs=KEY),
    Option(
        "migration",
        "how the state comes and goes in a migration",
        noun="migration",
        subs=_switches(
            incoming="another host still holds the state: lock it when it has arrived",
            release_lock_outgoing="release the lock with the last blob, which the control channel "
            "always does",
        ),
    ),
    Option(
        "pcap",
        "capture all commands and responses, secrets included, as packets for Wireshark",
        noun="pcap",
        subs=(
            SubOption("file", "file to append to", metavar="PATH"),
            SubOption("fd", "open descriptor of a file to append to", Kind.INT, "FD"),
            SubOption("truncate", "empty the file first", Kind.BOOL),
            SubOption(
                "mode", "permissions of the file, by default 0640 for a new one", Kind.MODE, "0..."
            ),
            SubOption("checksums", "give the packets their checksums", Kind.BOOL),
        ),
    ),
    Option(
        "seccomp",
        "what becomes of the process if it leaves its sandbox",
        noun="seccomp",
        subs=(
            SubOption(
                "action",
                "kill (the default) ends it; log refuses nothing, the kernel's audit log has what "
                "kill would refuse; none makes no sandbox",
                metavar="ACTION",
            ),
            SubOption(
                "landlock",
                "require ends the program where the kernel has no Landlock, without which all "
                "files of its user stay open to it; try (the default) says so in the log and "
                "serves; only with action=kill",
                metavar="try|require",
            ),
        ),
    ),
    Option(
        "runas",
        "run as this user, by name with its groups or by number; what needs the caller's "
        "privileges, such as a device, the log and the pid file, is opened before",
        letter="r",
        metavar="USER",
    ),
    Option(
        "chroot",
        "take this directory as the root of all paths, also of those in the other options",
        letter="R",
        metavar="DIR",
        interfaces=ALL - FUSE,
    ),
    Option("print-capabilities", "print what this program can do, as JSON, and end"),
    Option("print-states", "print which state there is, as JSON, and end"),
    Option("print-profiles", "print the profiles of libtpms, as JSON, and end"),
    Option(
        "print-info",
        "print facts about the TPM, as JSON, and end; NUMBER adds up 1 specification, "
        "2 attributes, 4 features, 8 algorithms, 0x10 commands, 0x20 active profile, "
        "0x40 profiles, 0x80 runtime attributes",
        metavar="NUMBER",
    ),
    Option("help", "print this help and end", letter="h"),
    Option("version", "print the version and end", letter="v", interfaces=CUSE | FUSE),
)


def options_of(interface: InterfaceName) -> tuple[Option, ...]:
    """The options of one interface, those not available included."""
    return tuple(option for option in OPTIONS if interface in option.interfaces)
