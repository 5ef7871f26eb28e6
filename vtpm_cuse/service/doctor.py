"""What a machine offers to virtual TPMs: one look, nothing changed and no module loaded.

Each finding has a state that scripts can test and, where something can be done about it, the
command that does it.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shlex
import stat
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import NO_PROC, EngineUnavailable
from vtpm_cuse.programs import find_program, own_program
from vtpm_cuse.service import flaws
from vtpm_cuse.service.confine import landlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class State(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    LOADABLE = "loadable"  # a kernel module that root can load
    DENIED = "denied"  # there, but not for this user
    MISSING = "missing"
    FLAWED = "flawed"  # there, with a known flaw


class Finding(NamedTuple):
    """One thing looked at: what was found, and the command that would better it (or nothing)."""

    name: str
    state: State
    detail: str
    command: str = ""


class Offer(NamedTuple):
    """A way to serve a TPM, the command for it, and why it does not work here and now, if so."""

    interface: str
    obstacle: str
    what: str
    command: str

    @property
    def works(self) -> bool:
        """Whether it does."""
        return not self.obstacle


class Diagnosis(NamedTuple):
    """All findings, the ways to serve a TPM, the best first, and what to type next."""

    findings: tuple[Finding, ...]
    offers: tuple[Offer, ...]
    next: str

    @property
    def healthy(self) -> bool:
        """Whether a TPM can be served in some way."""
        return any(offer.works for offer in self.offers)


class Machine:
    """The machine as this process sees it.

    Args:
        root: Where its file tree is.
        path: Where programs are looked for, as in PATH.
    """

    def __init__(self, root: Path = Path("/"), path: str | None = None) -> None:
        self.root = root
        self._path = path
        self.release = os.uname().release

    def file(self, path: str) -> Path:
        """A file, by its absolute path."""
        return self.root / path.lstrip("/")

    def there(self, path: str) -> bool:
        """Whether there is such a file, as far as this process may know."""
        return os.path.exists(self.file(path))

    def names(self, path: str, pattern: str = "*") -> list[str]:
        """What is in a folder, sorted; nothing if it cannot be looked into."""
        try:
            return sorted(found.name for found in self.file(path).glob(pattern))
        except OSError:
            return []

    def text(self, path: str) -> str:
        """What a file of the kernel's says, empty if it cannot be read."""
        try:
            return self.file(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def why_not(self, path: str, module: str) -> str:
        """Why this process cannot open a device of that module, empty if it can.

        To open it while the module is not loaded would load that, so then permissions have to do.
        """
        file = self.file(path)
        try:
            found = file.stat()
            if not stat.S_ISCHR(found.st_mode):
                return "Not a device"
            if found.st_rdev != _NUMBERS.get(path, found.st_rdev):
                return "Another device"
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            if self.there(f"/sys/dev/char/{number}") or not self.module_there(module):
                os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))
            elif not os.access(file, os.R_OK | os.W_OK):
                return os.strerror(errno.EACCES)
        except OSError as exc:
            return exc.strerror or str(exc)
        return ""

    @property
    def is_root(self) -> bool:
        """Whether this process is root's, here or in a container."""
        return os.geteuid() == 0

    def program(self, name: str) -> bool:
        """Whether there is such a program."""
        return find_program(name, self._path) is not None

    def typed(self, name: str, *, sudo: bool = False) -> str:
        """What starts that program of this package: its path, where PATH leads to none or another."""
        own = own_program(name)
        found = find_program(name, _PATH_OF_SUDO if sudo else self._path)
        if own is None or (found and _are_alike(found, own)):
            return name
        return shlex.quote(own)

    @property
    def checkout(self) -> str | None:
        """The folder of the sources, if this runs from what its ``setup`` has installed there."""
        folder = os.path.dirname(sys.prefix)
        there = all(os.path.exists(os.path.join(folder, name)) for name in ("setup", "vtpm_cuse"))
        return folder if there else None

    def module_there(self, name: str) -> bool:
        """Whether the kernel's modules have it."""
        wanted = name.replace("_", "-")
        listed = self.text(f"/lib/modules/{self.release}/modules.dep").splitlines()
        names = (line.partition(":")[0].rpartition("/")[2].partition(".")[0] for line in listed)
        return any(found.replace("_", "-") == wanted for found in names)


def _are_alike(one: str, other: str) -> bool:
    """Whether two programs are one, or a copy, as Debian's vtpm-cuse-swtpm has them in PATH."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # not to be read
        return False


_PATH_OF_SUDO: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where Debian's sudo looks, whatever the caller's PATH says."""
# The module of a device, and what it is good for.
_DEVICES: Final = {
    "/dev/cuse": ("cuse", "swtpm-cuse makes devices on it"),
    "/dev/vtpmx": ("tpm_vtpm_proxy", "the kernel makes TPM devices on it"),
    "/dev/fuse": ("fuse", "a TPM can be a file on it"),
}
# Where the kernel has a fixed number for it.
_NUMBERS: Final = {"/dev/cuse": os.makedev(10, 203), "/dev/fuse": os.makedev(10, 229)}
_DENIALS: Final = {os.strerror(errno.EACCES), os.strerror(errno.EPERM)}


def diagnose(machine: Machine) -> Diagnosis:
    """Looks at everything."""
    findings = tuple(_findings(machine))
    by_name = {finding.name: finding for finding in findings}
    state = {finding.name: finding.state for finding in findings}
    no_library = "" if state["libtpms"] is State.OK else _why_no_library(by_name)
    no_right = "" if state["CAP_SYS_ADMIN"] is State.OK else "it takes CAP_SYS_ADMIN"
    no_program = "" if state["fusermount3"] is State.OK else "fusermount3 is missing"
    # Users have the right by fusermount3, which is root's; root of a container has not.
    no_mount = "no right to mount" if no_right and machine.is_root else ""

    def no_device(path: str) -> str:
        reason = machine.why_not(path, _DEVICES[path][0])
        return f"{path}: {reason}" if reason else ""

    offers = (
        Offer(
            "cuse",
            no_library or no_device("/dev/cuse"),
            "a character device /dev/NAME",
            f"{machine.typed('swtpm-cuse')} -n vtpm0",
        ),
        Offer(
            "vtpm-proxy",
            no_library or no_device("/dev/vtpmx") or no_right,
            "a TPM device of the kernel's, /dev/tpmN",
            f"{machine.typed('swtpm')} chardev --vtpm-proxy",
        ),
        Offer(
            "fuse",
            no_library or no_device("/dev/fuse") or no_program or no_mount,
            "a file in a mount of your own, without root",
            f"{machine.typed('swtpm')} fuse -n vtpm0",
        ),
        Offer(
            "socket",
            no_library,
            "TPM commands over Unix sockets, for QEMU; a TCP port would be open to every user",
            f"mkdir -p -m 700 ~/tpm && {machine.typed('swtpm')} socket --tpm2 --tpmstate dir=$HOME/tpm "
            "--flags startup-clear --server type=unixio,path=$HOME/tpm/data "
            "--ctrl type=unixio,path=$HOME/tpm/ctrl",
        ),
    )
    return Diagnosis(findings, offers, _next(machine, findings, offers))


def _why_no_library(by_name: dict[str, Finding]) -> str:
    if _PROC in by_name:
        return by_name[_PROC].detail
    missing = by_name["libtpms"].command == _INSTALL
    return "libtpms is missing" if missing else "libtpms cannot be used"


def _next(machine: Machine, findings: tuple[Finding, ...], offers: tuple[Offer, ...]) -> str:
    """What brings a device nearer, else the best that works."""
    by_name = {finding.name: finding for finding in findings}
    library, device = by_name["libtpms"], by_name["/dev/cuse"]
    if _PROC in by_name:
        return by_name[_PROC].command
    if library.state is not State.OK:
        return library.command or library.detail
    if device.state is State.LOADABLE:
        return device.command
    if device.state is State.DENIED:
        return f"sudo {machine.typed('swtpm-cuse', sudo=True)} -n vtpm0"
    return next(offer.command for offer in offers if offer.works)


def _findings(machine: Machine) -> Iterator[Finding]:
    if not _has_proc(machine):
        reason, command = NO_PROC
        yield Finding(_PROC, State.MISSING, reason, f"sudo {command}")
    yield Finding("kernel", State.OK, machine.release)
    library, version = _library()
    yield library
    if version is not None:
        yield from _flaws(machine, version)
    for path, (module, purpose) in _DEVICES.items():
        yield _device(machine, path, module, purpose)
    yield _capability(machine)
    yield _program(machine, "fusermount3", "fuse3", "lets users mount a TPM as a file")
    yield from _sandbox(machine)
    yield _present(
        machine, "systemd", ("/run/systemd/system",), "runs units such as swtpm-cuse@vtpm0.service"
    )
    yield _deployed(machine)
    yield _program(machine, "tpm2_getrandom", "tpm2-tools", "uses a TPM 2.0")
    yield _program(machine, "qemu-system-x86_64", "qemu-system-x86", "runs VMs and the kernel lab")
    yield _lab(machine)
    yield _devices_there(machine)


_PROC: Final = "/proc"
_INSTALL: Final = "sudo apt-get install libtpms0"
_COMMANDS: Final = ("apt-get ", "mount ")
_NOT_TOLD: Final = "nobody can tell without /proc"


def _has_proc(machine: Machine) -> bool:
    return machine.there("/proc/self/status")


def _library() -> tuple[Finding, flaws.Version | None]:
    try:
        from vtpm_cuse.service.compose import bare_engine, supported_versions

        engine = bare_engine(tpm2=True)
        versions = " and ".join(sorted(supported_versions()))
    except EngineUnavailable as exc:
        if not exc.hint.startswith(_COMMANDS):
            return Finding("libtpms", State.MISSING, str(exc)), None
        return Finding("libtpms", State.MISSING, exc.feature, f"sudo {exc.hint}"), None
    profiles = "with profiles" if engine.has_profiles else "no profiles (they need 0.10)"
    number = ".".join(map(str, engine.version))
    detail = f"{number}, TPM {versions}, {profiles}"
    return Finding("libtpms", State.OK, detail), engine.version


_UPGRADE: Final = "sudo apt-get install --only-upgrade libtpms0"


def _flaws(machine: Machine, version: flaws.Version) -> Iterator[Finding]:
    """One for each flaw that the library has or may have; one that says there is none."""
    mended = []
    for flaw, there, why in flaws.verdicts(machine, version):
        names = " ".join(flaw.names)
        if there is False:
            mended.append(f"{names} ({why})")
            continue
        sure = "" if there else "perhaps "
        versions = " or ".join(".".join(map(str, version)) for version in flaw.mended[-2:])
        detail = f"{sure}in this libtpms ({why}): {flaw.harm}; mended in {versions}"
        yield Finding(names, State.FLAWED, detail, _UPGRADE)
    if mended:
        yield Finding("known flaws", State.OK, f"mended in this libtpms: {', '.join(mended)}")


def _device(machine: Machine, path: str, module: str, purpose: str) -> Finding:
    if not machine.there(path):
        if machine.module_there(module):
            return Finding(
                path,
                State.LOADABLE,
                f"module {module} is not loaded; {purpose}",
                f"sudo modprobe {module}",
            )
        return Finding(path, State.MISSING, f"this kernel has no module {module}; {purpose}")
    try:
        found = machine.file(path).stat()
    except OSError as exc:  # it has just gone away
        return Finding(path, State.MISSING, f"{exc.strerror}; {purpose}")
    who = f"{stat.filemode(found.st_mode)} uid {found.st_uid} gid {found.st_gid}"
    if reason := machine.why_not(path, module):
        state = State.DENIED if reason in _DENIALS else State.MISSING
        return Finding(path, state, f"{who}: {reason}; {purpose}")
    return Finding(path, State.OK, f"{who}; {purpose}")


_CAP_SYS_ADMIN: Final = 21


def _capability(machine: Machine) -> Finding:
    lines = machine.text("/proc/self/status").splitlines()
    masks = [line.split()[1] for line in lines if line.startswith("CapEff:")]
    mask = int(masks[0], 16) if masks else 0
    state = State.OK if mask >> _CAP_SYS_ADMIN & 1 else State.DENIED
    detail = "the kernel asks for it when it makes a TPM device"
    if not _has_proc(machine):
        detail = f"{_NOT_TOLD}; {detail}"
    return Finding("CAP_SYS_ADMIN", state, detail)


def _sandbox(machine: Machine) -> Iterator[Finding]:
    actions = machine.text("/proc/sys/kernel/seccomp/actions_avail")
    wanted = {"kill_process", "log", "errno"} <= set(actions.split())
    detail = "filters system calls" if wanted else "this kernel cannot filter system calls"
    if not _has_proc(machine):
        detail = _NOT_TOLD
    yield Finding("seccomp", State.OK if wanted else State.MISSING, detail)
    try:
        detail = f"version {landlock.version()}; keeps the TPM off other files"
    except landlock.LandlockMissing as exc:
        yield Finding("landlock", State.MISSING, f"{exc}; nothing keeps the TPM off other files")
    else:
        yield Finding("landlock", State.OK, detail)


def _present(machine: Machine, name: str, paths: tuple[str, ...], purpose: str) -> Finding:
    if any(map(machine.there, paths)):
        return Finding(name, State.OK, purpose)
    return Finding(name, State.MISSING, f"no {' nor '.join(paths)}")


def _deployed(machine: Machine) -> Finding:
    paths = ("/usr/local/lib/vtpm-cuse/manifest", "/usr/lib/vtpm-cuse/bin")
    found = _present(machine, "deployed", paths, "programs, units and udev rules are in the system")
    if found.state is State.OK:
        return found
    return _by_setup(machine, found, "sudo {} deploy", "Debian's package vtpm-cuse brings them")


def _by_setup(machine: Machine, found: Finding, command: str, otherwise: str) -> Finding:
    """With what the checkout's ``setup`` can do about it; elsewhere with what else could."""
    if machine.checkout is None:
        return found._replace(detail=f"{found.detail}; {otherwise}")
    setup = shlex.quote(os.path.join(machine.checkout, "setup"))
    return found._replace(command=command.format(setup))


def _program(machine: Machine, name: str, package: str, purpose: str) -> Finding:
    if machine.program(name):
        return Finding(name, State.OK, purpose)
    return Finding(name, State.MISSING, purpose, f"sudo apt-get install {package}")


def _lab(machine: Machine) -> Finding:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kernels = machine.names(f"{cache}/vtpm-cuse", "linux-*")
    if kernels and machine.program("qemu-system-x86_64"):
        return Finding("lab", State.OK, f"{kernels[-1]}; a kernel with /dev/cuse in QEMU")
    detail = "a kernel with /dev/cuse in QEMU, for machines without one"
    found = Finding("lab", State.MISSING, detail)
    return _by_setup(machine, found, "{} lab --prepare", "it comes with a checkout")


_KINDS: Final[tuple[tuple[str, Callable[[str], bool]], ...]] = (
    ("vtpm", lambda rest: rest != "x"),
    ("tpm", str.isdigit),
    ("tpmrm", str.isdigit),
)


def _devices_there(machine: Machine) -> Finding:
    found = [
        name
        for name in machine.names("/dev")
        if any(name.startswith(kind) and fits(name[len(kind) :]) for kind, fits in _KINDS)
    ]
    detail = ", ".join(f"/dev/{name}" for name in found) or "none"
    return Finding("TPM devices", State.OK if found else State.MISSING, detail)
