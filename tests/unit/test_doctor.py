"""swtpm doctor on machines that are made up."""

from __future__ import annotations

import ctypes
import errno
import gzip
import json
import os
import pwd
import signal
import stat
import sys
from typing import TYPE_CHECKING, Never

import pytest

from vtpm_cuse.cli import swtpm_doctor
from vtpm_cuse.engine import libtpms
from vtpm_cuse.errors import NO_PROC, EngineUnavailable
from vtpm_cuse.service import doctor as machine
from vtpm_cuse.service import flaws
from vtpm_cuse.service.confine import landlock
from vtpm_cuse.service.doctor import Diagnosis, Finding, Machine, State, diagnose
from vtpm_cuse.storage.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALL_CAPABILITIES = "CapEff:\t000001ffffffffff\n"
NO_CAPABILITIES = "CapEff:\t0000000000000000\n"


class MadeUp(Machine):
    """A machine with the files given by the test, and nothing else."""

    def __init__(self, root: Path, denied: tuple[str, ...] = ()) -> None:
        super().__init__(root, str(root / "bin"))
        self.release = "6.1.0"
        self._denied = denied

    checkout = None

    def typed(self, name: str, *, sudo: bool = False) -> str:
        return f"/ours/{name}" if sudo else name

    def why_not(self, path: str, module: str) -> str:
        if path in self._denied:
            return "Permission denied"
        return "" if self.there(path) else super().why_not(path, module)

    def put(self, path: str, text: str = "") -> None:
        self.file(path).parent.mkdir(parents=True, exist_ok=True)
        self.file(path).write_text(text)


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUp:
    found = MadeUp(tmp_path)
    found.put("/proc/self/status", ALL_CAPABILITIES)
    return found


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    return next(finding for finding in diagnosis.findings if finding.name == name)


def works(diagnosis: Diagnosis) -> set[str]:
    return {offer.interface for offer in diagnosis.offers if offer.works}


def test_a_machine_with_nothing_still_has_sockets(made_up: MadeUp) -> None:
    diagnosis = diagnose(made_up)
    assert works(diagnosis) == {"socket"}
    assert diagnosis.healthy
    assert "swtpm socket" in diagnosis.next
    assert finding(diagnosis, "/dev/cuse").state is State.MISSING
    assert "no module cuse" in finding(diagnosis, "/dev/cuse").detail
    assert finding(diagnosis, "seccomp").state is State.MISSING
    assert finding(diagnosis, "TPM devices").detail == "none"


def test_a_module_that_could_be_loaded_is_the_next_step(made_up: MadeUp) -> None:
    names = "kernel/fs/fuse/cuse.ko.xz: kernel/fs/fuse/fuse.ko\nkernel/x/tpm_vtpm_proxy.ko:\n"
    made_up.put("/lib/modules/6.1.0/modules.dep", names)
    diagnosis = diagnose(made_up)
    assert diagnosis.next == "sudo modprobe cuse"
    assert finding(diagnosis, "/dev/vtpmx").state is State.LOADABLE
    assert finding(diagnosis, "/dev/vtpmx").command == "sudo modprobe tpm_vtpm_proxy"
    assert finding(diagnosis, "/dev/fuse").state is State.MISSING
    assert works(diagnosis) == {"socket"}


def test_with_every_device_everything_works(made_up: MadeUp) -> None:
    for name in ("cuse", "vtpmx", "fuse", "vtpm0", "tpm1", "tpmrm1", "tpmfoo"):
        made_up.put(f"/dev/{name}")
    made_up.put("/proc/sys/kernel/seccomp/actions_avail", "kill_process errno log allow")
    diagnosis = diagnose(made_up)
    assert {"cuse", "vtpm-proxy", "socket"} <= works(diagnosis)
    assert diagnosis.next.startswith("swtpm-cuse -n vtpm0")
    assert finding(diagnosis, "seccomp").state is State.OK
    assert finding(diagnosis, "TPM devices").detail == "/dev/tpm1, /dev/tpmrm1, /dev/vtpm0"


def test_a_device_for_others_is_the_next_step_with_sudo(tmp_path: Path) -> None:
    made_up = MadeUp(tmp_path, denied=("/dev/cuse", "/dev/vtpmx"))
    made_up.put("/dev/cuse")
    made_up.put("/proc/self/status", ALL_CAPABILITIES)
    diagnosis = diagnose(made_up)
    assert finding(diagnosis, "/dev/cuse").state is State.DENIED
    assert diagnosis.next == "sudo /ours/swtpm-cuse -n vtpm0"
    assert works(diagnosis) == {"socket"}


@pytest.mark.parametrize(
    ("checkout", "lab", "deploy"),
    [(None, "", ""), ("/a b", "'/a b/setup' lab --prepare", "sudo '/a b/setup' deploy")],
)
def test_only_who_has_a_checkout_is_told_to_use_it(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, checkout: str, lab: str, deploy: str
) -> None:
    monkeypatch.setattr(MadeUp, "checkout", checkout)
    diagnosis = diagnose(made_up)
    found = [finding(diagnosis, name) for name in ("lab", "deployed")]
    assert [each.command for each in found] == [lab, deploy]
    assert ["comes with a checkout" in found[0].detail, "package" in found[1].detail] == (
        [False, False] if checkout else [True, True]
    )


def test_a_checkout_is_where_the_programs_were_installed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (tmp_path / "setup").touch()
    assert Machine().checkout is None
    (tmp_path / "vtpm_cuse").mkdir()
    assert Machine().checkout == str(tmp_path)


def test_a_program_is_named_as_the_user_can_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a name that is the C suite's there, nor for sudo by one that it does not find."""
    ours, others, links = (tmp_path / name for name in ("our own", "others", "links"))
    for folder in (ours, others):
        folder.mkdir()
        (folder / "swtpm").write_text(folder.name)
        (folder / "swtpm").chmod(0o755)
    links.mkdir()
    (links / "swtpm").symlink_to(ours / "swtpm")
    monkeypatch.setattr(sys, "argv", [str(links / "swtpm")])
    quoted = f"'{ours}/swtpm'"
    assert Machine(path=str(ours)).typed("swtpm") == "swtpm"
    assert Machine(path=f"{links}:{others}").typed("swtpm") == "swtpm"
    assert Machine(path=f"{others}:{links}").typed("swtpm") == quoted
    assert Machine(path="").typed("swtpm") == quoted
    assert Machine(path=str(ours)).typed("swtpm", sudo=True) == quoted
    monkeypatch.setattr(machine, "_PATH_OF_SUDO", str(links))
    assert Machine(path="").typed("swtpm", sudo=True) == "swtpm"
    (others / "swtpm").write_text(ours.name)
    assert Machine(path=str(others)).typed("swtpm") == "swtpm"


def obstacles(diagnosis: Diagnosis) -> dict[str, str]:
    return {offer.interface: offer.obstacle for offer in diagnosis.offers}


def test_what_keeps_a_way_from_working_is_named(tmp_path: Path) -> None:
    made_up = MadeUp(tmp_path, denied=("/dev/vtpmx",))
    made_up.put("/proc/self/status", NO_CAPABILITIES)
    made_up.put("/dev/vtpmx")
    assert obstacles(diagnose(made_up)) == {
        "cuse": "/dev/cuse: No such file or directory",
        "vtpm-proxy": "/dev/vtpmx: Permission denied",
        "fuse": "/dev/fuse: No such file or directory",
        "socket": "",
    }


@pytest.mark.parametrize(("root", "obstacle"), [(True, "no right to mount"), (False, "")])
def test_root_of_a_container_may_not_be_able_to_mount(
    root: bool, obstacle: str, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MadeUp, "is_root", root)
    made_up.put("/proc/self/status", NO_CAPABILITIES)
    made_up.put("/dev/fuse")
    made_up.put("/bin/fusermount3")
    made_up.file("/bin/fusermount3").chmod(0o755)
    assert obstacles(diagnose(made_up))["fuse"] == obstacle


def test_a_file_in_a_devices_place_is_no_device(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/cuse").touch()
    assert machine.why_not("/dev/cuse", "cuse") == "Not a device"
    assert machine.why_not("/dev/fuse", "fuse") == "No such file or directory"
    assert finding(diagnose(machine), "/dev/cuse").state is State.MISSING
    assert Machine().why_not("/dev/null", "none") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to make a device node")
def test_a_device_whose_module_is_not_loaded_is_not_opened(tmp_path: Path) -> None:
    """To open it would load that; the number is nobody's here, so it could not be opened."""
    machine = Machine(tmp_path)
    (tmp_path / "dev").mkdir()
    os.mknod(tmp_path / "dev/vtpmx", stat.S_IFCHR | 0o600, os.makedev(510, 203))
    assert machine.why_not("/dev/vtpmx", "tpm_vtpm_proxy") == "No such device or address"
    modules = tmp_path / f"lib/modules/{machine.release}/modules.dep"
    modules.parent.mkdir(parents=True)
    modules.write_text("kernel/fs/fuse/tpm_vtpm_proxy.ko.xz:\n")
    assert machine.why_not("/dev/vtpmx", "tpm_vtpm_proxy") == ""
    (tmp_path / "sys/dev/char/510:203").mkdir(parents=True)
    assert machine.why_not("/dev/vtpmx", "tpm_vtpm_proxy") == "No such device or address"


def test_the_proxy_needs_a_capability(made_up: MadeUp) -> None:
    made_up.put("/dev/vtpmx")
    assert "vtpm-proxy" in works(diagnose(made_up))
    made_up.put("/proc/self/status", NO_CAPABILITIES)
    assert "vtpm-proxy" not in works(diagnose(made_up))


def test_without_libtpms_nothing_works(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EngineUnavailable("cannot load libtpms.so.0", "apt-get install libtpms0")

    monkeypatch.setattr(libtpms, "_open_library", missing)
    made_up.put("/dev/cuse")
    diagnosis = diagnose(made_up)
    assert (works(diagnosis), diagnosis.healthy) == (set(), False)
    assert diagnosis.next == "sudo apt-get install libtpms0"


def test_without_proc_that_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_callbacks() -> None:
        raise EngineUnavailable(*NO_PROC)

    monkeypatch.setattr(libtpms, "_open_library", no_callbacks)
    diagnosis = diagnose(MadeUp(tmp_path))
    command = "sudo mount -t proc proc /proc"
    assert diagnosis.findings[0] == ("/proc", State.MISSING, "/proc is not mounted", command)
    assert diagnosis.next == command
    assert set(obstacles(diagnosis).values()) == {"/proc is not mounted"}
    assert finding(diagnosis, "libtpms").command == command
    for name in ("seccomp", "CAP_SYS_ADMIN"):
        assert finding(diagnosis, name).detail.startswith("nobody can tell without /proc")


def test_a_broken_libtpms_is_to_be_installed_again(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libtpms, "_SONAME", str(made_up.root / "broken"))
    (made_up.root / "broken").write_bytes(b"")
    diagnosis = diagnose(made_up)
    assert diagnosis.next == "sudo apt-get install --reinstall libtpms0"
    assert obstacles(diagnosis)["socket"] == "libtpms cannot be used"
    (made_up.root / "broken").write_bytes(bytes(4096))
    assert diagnose(made_up).next == "sudo apt-get install --reinstall libtpms0"


def test_a_libtpms_that_cannot_be_used_is_not_called_missing(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> None:
        raise EngineUnavailable("this system has no memory", "let it map a memfd")

    monkeypatch.setattr(libtpms, "_open_library", forbidden)
    diagnosis = diagnose(made_up)
    found = finding(diagnosis, "libtpms")
    assert (found.detail, found.command) == ("this system has no memory; let it map a memfd", "")
    assert diagnosis.next == found.detail
    assert obstacles(diagnosis)["cuse"] == "libtpms cannot be used"


def test_another_device_in_the_place_of_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "dev").mkdir()
    try:
        os.mknod(tmp_path / "dev/fuse", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no right to make a device")
    assert machine.why_not("/dev/fuse", "fuse") == "Another device"
    found = finding(diagnose(machine), "/dev/fuse")
    assert found.state is State.MISSING
    assert "Another device" in found.detail


def test_a_cache_that_cannot_be_looked_into(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'a' * 300}")  # as root, the right would be there
    assert finding(diagnose(made_up), "lab").state is State.MISSING


# -- an odd machine: each thing is looked at, whatever the others say ----------------------------


@pytest.mark.parametrize("reason", list(landlock._MISSING.values()))
def test_without_landlock_it_says_why(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def missing() -> int:
        raise landlock.LandlockMissing(reason)

    monkeypatch.setattr(landlock, "version", missing)
    found = finding(diagnose(made_up), "landlock")
    assert found.state is State.MISSING
    assert found.detail == f"{reason}; nothing keeps the TPM off other files"
    assert works(diagnose(made_up)) == {"socket"}


def test_without_landlock_the_program_says_so_and_ends_well(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the system call as it fails on a kernel that has none."""

    def fail(*_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(landlock, "_call", fail)
    monkeypatch.setattr(machine, "Machine", lambda: made_up)
    assert swtpm_doctor.main([], "swtpm doctor") == 0
    assert "- landlock             this kernel has none; nothing" in capsys.readouterr().out


def test_no_process_can_be_started(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a limit of processes: then no flaw is tried."""

    def fail() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(flaws, "FLAWS", (FLAW._replace(tried=falls),))
    monkeypatch.setattr(os, "fork", fail)
    [(_, found, detail)] = flaw_findings(made_up)
    assert found == "flawed"
    assert detail.startswith("perhaps in this libtpms (its version;")


def test_a_device_that_goes_away_while_it_is_looked_at(tmp_path: Path) -> None:
    class Fleeting(MadeUp):
        def there(self, path: str) -> bool:
            return path == "/dev/cuse" or super().there(path)

    found = finding(diagnose(Fleeting(tmp_path)), "/dev/cuse")
    assert found.state is State.MISSING


def test_a_machine_without_proc_and_sys(tmp_path: Path) -> None:
    diagnosis = diagnose(MadeUp(tmp_path))
    assert finding(diagnosis, "CAP_SYS_ADMIN").state is State.DENIED
    assert works(diagnosis) == {"socket"}


def test_a_user_whom_nobody_knows_and_without_a_home(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_uid: int) -> Never:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "PATH"):
        monkeypatch.delenv(name, raising=False)
    assert finding(diagnose(made_up), "lab").state is State.MISSING


def test_fuse_needs_its_program(made_up: MadeUp) -> None:
    made_up.put("/dev/fuse")
    assert finding(diagnose(made_up), "fusermount3").command == "sudo apt-get install fuse3"
    assert "fuse" not in works(diagnose(made_up))
    made_up.put("/bin/fusermount3")
    made_up.file("/bin/fusermount3").chmod(0o755)
    assert finding(diagnose(made_up), "fusermount3").state is State.OK
    assert "fuse" in works(diagnose(made_up))
    assert diagnose(made_up).next == "swtpm fuse -n vtpm0"


def test_both_forms_say_the_same(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "Machine", lambda: made_up)
    assert swtpm_doctor.main(["--json"], "swtpm doctor") == 0
    found = json.loads(capsys.readouterr().out)
    assert swtpm_doctor.main([], "swtpm doctor") == 0
    text = capsys.readouterr().out
    for name, values in found["findings"].items():
        assert set(values) == {"state", "detail", "command"}
        assert f"{name} " in text
        assert values["detail"] in text
    assert text.endswith(f"Next:\n  {found['next']}\n")
    assert found["interfaces"]["socket"]["works"] is True
    assert swtpm_doctor.main(["extra"], "swtpm doctor") == 1
    assert "Unknown parameter 'extra'" in capsys.readouterr().err


# -- known flaws of libtpms ---------------------------------------------------------------

FLAW = flaws.Flaw(("CVE-1",), "a client can do harm", (0, 0, 0), ((0, 9, 7), (99, 10, 1)))
CHANGELOG = "libtpms (%d.%d.%d-3) unstable; urgency=medium\n\n  * CVE-1 (Closes: #1)\n"


def falls(_tpm: object) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def cannot_be_tried(_tpm: object) -> bool:
    raise ValueError


def flaw_findings(made_up: MadeUp) -> list[tuple[str, str, str]]:
    return [
        (found.name, found.state, found.detail)
        for found in diagnose(made_up).findings
        if found.name in {"CVE-1", "known flaws"}
    ]


def test_the_flaws_of_this_libtpms_are_told_from_those_mended(made_up: MadeUp) -> None:
    """What is installed where this runs is mended, and what can be tried was tried."""
    for verdict in flaws.verdicts(made_up, (0, 9, 2)):
        if verdict.flaw.tried:
            assert (verdict.there, verdict.why) == (False, "it was tried"), verdict.flaw.names
        else:
            assert verdict.there is None, verdict.flaw.names
    assert [verdict.flaw.names[0] for verdict in flaws.verdicts(made_up, (0, 10, 0))] == [
        "CVE-2026-21444",
        "CVE-2025-49133",
    ]
    assert not list(flaws.verdicts(made_up, (0, 10, 2)))


@pytest.mark.parametrize(
    ("tried", "state", "said"),
    [
        (falls, "flawed", "in this libtpms (it was tried): a client can do harm; mended in"),
        (lambda _: True, "flawed", "in this libtpms (it was tried): a client can do harm"),
        (lambda _: False, "ok", "mended in this libtpms: CVE-1 (it was tried)"),
        (cannot_be_tried, "flawed", "perhaps in this libtpms (its version; your distribution"),
        (None, "flawed", "perhaps in this libtpms (its version; your distribution"),
    ],
    ids=["dies", "has-it", "mended", "cannot-be-tried", "no-test"],
)
def test_a_flaw_is_told_as_surely_as_it_is_known(
    made_up: MadeUp,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[[object], bool] | None,
    state: str,
    said: str,
) -> None:
    monkeypatch.setattr(flaws, "FLAWS", (FLAW._replace(tried=tried),))
    [(_, found, detail)] = flaw_findings(made_up)
    assert found == state
    assert detail.startswith(said)


def test_a_flaw_that_the_distribution_mended(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flaws, "FLAWS", (FLAW,))
    version = libtpms.LibtpmsEngine(tpm2=True, nvram=MemoryStore()).version
    log = made_up.file("/usr/share/doc/libtpms0/changelog.Debian.gz")
    log.parent.mkdir(parents=True)
    log.write_bytes(gzip.compress((CHANGELOG % version).encode()))
    assert flaw_findings(made_up) == [
        ("known flaws", "ok", "mended in this libtpms: CVE-1 (its package's changelog)")
    ]
    torn = bytearray(log.read_bytes())
    torn[10] = 0xFF  # where the first block begins: of no kind that there is
    for other in (gzip.compress((CHANGELOG % (0, 1, 2)).encode()), b"damaged", bytes(torn)):
        log.write_bytes(other)
        assert flaw_findings(made_up)[0][:2] == ("CVE-1", "flawed")
