"""``vtpmd``: many TPMs of one host, each with a process only while it is used."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_server
from vtpm_cuse.cli.words.table import (
    Example,
    InterfaceName,
    Kind,
    Option,
    Program,
    SubOption,
    Term,
)
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine

_IDLE_MAX: Final = 86_400
_POOL_MAX: Final = 1024
_CDI: Final = "/run/cdi"
_SOCKET: Final = options_of(InterfaceName.SOCKET)

PROGRAM: Final = Program(
    "vtpmd",
    "manager of many virtual TPMs",
    (
        Option("user", "keep everything in the user's own folders; without it, root's"),
        Option("state", "folder of the TPMs, made if it is missing", metavar="DIR"),
        Option("run", "folder of their sockets, made if it is missing", metavar="DIR"),
        Option(
            "idle",
            "seconds without a command after which a TPM sleeps, by default 1",
            metavar="SECONDS",
        ),
        Option(
            "pool",
            "how many manufactured TPMs are made ahead of time, when nothing else is to be done; by "
            "default 2, once somebody has wanted one",
            metavar="NUMBER",
        ),
        Option(
            "quota",
            "what one user may have",
            noun="quota",
            subs=(
                SubOption("tpms", "TPMs, by default 1024", Kind.UINT, "NUMBER"),
                SubOption(
                    "mib",
                    "MiB of all of them with their snapshots, by default 1024",
                    Kind.UINT,
                    "NUMBER",
                ),
            ),
        ),
        Option(
            "group", "members of this group may ask it, each for TPMs of his own", metavar="GROUP"
        ),
        Option(
            "metrics-file",
            "write every 15 seconds what the TPMs do, for node_exporter's textfile collector",
            metavar="PATH",
        ),
        Option(
            "cdi",
            "folder of the documents by which containers find TPMs, by default of root's /run/cdi",
            metavar="DIR",
        ),
        *(option for option in _SOCKET if option.name in {"log", "help"}),
        Option("version", "print the version and end", letter="v"),
    ),
    description=(
        "Keeps any number of TPM 2.0, in the foreground. One that is started listens on three Unix "
        "sockets: for commands (data), for PTM requests (data.ctrl), and for clients of its "
        "resource manager (managed), or is a pair of devices (vtpm create --interface). While nobody "
        "uses it, it sleeps: it has no process, and clients stay connected. What comes from one wakes "
        "it.",
        "Each TPM that is awake has a process of its own, in a sandbox that can open no path, and "
        "of root's manager as the user vtpmd, or nobody. What it stores goes to the manager, which puts it on the disk before the client is answered. "
        "The manager reads nothing of what clients send.",
        "It is asked on a Unix socket, manager.sock in the folder of the sockets: by root and its "
        "own user about all TPMs, by members of --group about those that are theirs.",
        "A TPM whose process dies has lost what it had in memory. It is not started again by "
        "itself, for its PCRs would be empty: it refuses all commands until it is reset.",
        "SIGUSR2 has it begin anew, as the program that is installed by then, in the same process. "
        "All TPMs go on, asleep or awake, with all their clients; only who asks the manager itself "
        "has to connect again. A version that cannot go on with what TPMs have saved is refused, and "
        "the manager stays as it is, until it is stopped and started.",
        "SIGTERM and SIGINT end the manager in order: each TPM is shut down as by TPM2_Shutdown. "
        "Behind a crash of the manager, TPMs are as after a power cut: what was acknowledged is "
        "there.",
        "Where a service manager keeps a descriptor for it (see FDSTORE), that is otherwise: TPMs outlive its "
        "death and its restart, with their clients. A process that only keeps what is theirs, and ends when "
        "nothing of that is kept any more, waits for the next manager.",
    ),
    examples=(
        Example("", "vtpmd --user"),
        Example("", "sudo vtpmd --idle 10 --log file=/var/log/vtpmd.log"),
    ),
    exits=(
        Term("0", "It was ended in order."),
        Term("1", "It could not begin; standard error or the log has the reason."),
    ),
    environment=(
        Term(
            "XDG_STATE_HOME", "With --user, its folder vtpm has the TPMs; default: ~/.local/state."
        ),
        Term("XDG_RUNTIME_DIR", "With --user, its folder vtpmd has the sockets."),
        Term("XDG_CONFIG_HOME", "Where swtpm_setup finds its configuration; see swtpm_setup(8)."),
        Term("NOTIFY_SOCKET", "Where a service manager waits for it to be ready."),
        Term(
            "FDSTORE",
            "Whether the service manager keeps descriptors, as a number of them above 0; older versions of "
            "systemd than 254 do not say so, and vtpmd.service does.",
        ),
        Term(
            "LISTEN_FDS, LISTEN_FDNAMES",
            "A socket called manager that a service manager has opened: it is asked there; and one called depot, "
            "which it has kept.",
        ),
    ),
    files=(
        Term("/var/lib/vtpm/NAME", "A TPM of root's manager: tpm.json, its state, its snapshots."),
        Term("/run/vtpm/manager.sock", "Where vtpm(8) and others ask it, in varlink."),
        Term("/run/vtpm/metrics", "What its TPMs do, in OpenMetrics, by HTTP on a Unix socket."),
        Term("/run/vtpm/tpm/NAME", "Its sockets: data, data.ctrl, managed."),
        Term("/run/cdi/vtpm-cuse.org-vtpm_ID.json", "How containers find it; see vtpm_cdi(8)."),
    ),
    see_also=("vtpm(8)", "swtpm_socket(8)", "swtpm_setup(8)"),
)


def main() -> int:
    """Runs ``vtpmd``."""
    return run_server(PROGRAM, sys.argv[1:], "vtpmd", _serve)


def _serve(line: CommandLine) -> int:
    from vtpm_cuse.fleet import heritage
    from vtpm_cuse.service.confine.preload import import_trio
    from vtpm_cuse.service.process import logs, notify
    from vtpm_cuse.service.process.held import HeldSignals

    held = HeldSignals(already=heritage.is_there())
    try:
        import_trio()
        from vtpm_cuse.fleet.manager import daemon
        from vtpm_cuse.fleet.manager.manager import Settings
        from vtpm_cuse.fleet.manager.quota import Limits

        found = Settings(
            line.value("state") or _state_folder(line),
            line.value("run") or _run_folder(line),
            idle=line.number("idle", _IDLE_MAX) or 1,
            level=settings.log_config(line).level,
            messages=next(iter(logs.descriptors()), None),
            limits=Limits(**_limits(line)),
            group=line.group("group"),
            own=line.has("user") or os.geteuid() != 0,
            pool=line.number("pool", _POOL_MAX) if line.has("pool") else None,
            metrics_file=line.value("metrics-file"),
            cdi=line.value("cdi") or (None if line.has("user") else _CDI),
        )
        return daemon.run(found, notify.connect(), held)
    finally:
        held.release()


def _limits(line: CommandLine) -> dict[str, int]:
    """Those that are given."""
    given = line.subs("quota")
    tpms, mib = (given.integer("tpms"), given.integer("mib")) if given else (None, None)
    found = {"tpms": tpms, "bytes": None if mib is None else mib << 20}
    return {name: most for name, most in found.items() if most is not None}


def _state_folder(line: CommandLine) -> str:
    if not line.has("user"):
        return "/var/lib/vtpm"
    folder = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.local/state")
    return f"{folder}/vtpm"


def _run_folder(line: CommandLine) -> str:
    if not line.has("user"):
        return "/run/vtpm"
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isabs(folder):
        raise UsageError("Error: XDG_RUNTIME_DIR names no folder", hint="give --run DIR")
    return f"{folder}/vtpmd"  # "vtpm" is where `swtpm fuse` mounts
