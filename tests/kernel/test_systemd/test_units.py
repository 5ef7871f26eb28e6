"""The units of single TPMs: their devices, users, settings, states, and what is beside them."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import ROOT, exchange, opened, wait_until
from tests.kernel.test_systemd.conftest import UNITS, VENV
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import (
    NV_INDEX,
    TPM12_STARTUP_CLEAR,
    code_of,
    get_random,
    nv_data,
    nv_define,
    nv_read,
    nv_write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.systemd import Systemd

STATES = Path("/var/lib/vtpm-cuse")
SETTINGS = Path("/etc/vtpm-cuse")
MANAGERS = Path("/run/swtpm-resource-manager")
SECRET = b"kept over a restart"
TRANSIENT_USERS = range(61184, 65520)  # systemd's numbers for DynamicUser=
INTRUDER = Path(__file__).with_name("intruder.py")


@pytest.fixture
def unit(systemd: Systemd, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instance that is stopped at the end."""
    name = f"swtpm-cuse@{instance_of(request)}.service"
    yield name
    systemd.systemctl("stop", name, status=None)
    systemd.systemctl("reset-failed", name, status=None)


_NUMBERS: dict[str, int] = {}


def instance_of(request: pytest.FixtureRequest) -> str:
    """A device name for each test."""
    return f"vtpm{_NUMBERS.setdefault(request.node.name, len(_NUMBERS) + 40)}"


def device_of(unit: str) -> Path:
    return Path("/dev", unit.partition("@")[2].removesuffix(".service"))


def state_of(unit: str) -> Path:
    """Where a user looks; systemd has a link there."""
    return STATES / device_of(unit).name


def ask(unit: str, command: bytes) -> bytes:
    """A command that must succeed."""
    with opened(device_of(unit)) as fd:
        answer = exchange(fd, command)
    assert code_of(answer) == 0
    return answer


def test_a_started_unit_is_a_device_that_works(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    # The unit is started when the TPM answers, and not before.
    assert len(ask(unit, get_random(8))) == 20
    device = device_of(unit)
    systemd.call("udevadm", "settle")
    found = device.stat()
    assert (found.st_uid, found.st_gid) == (pwd.getpwnam("tss").pw_uid, 0)
    assert found.st_mode & 0o777 == 0o660
    assert Path("/dev/vtpm/by-name", device.name).resolve() == device
    assert systemd.show(f"dev-{device.name}.device", "ActiveState") == "active"
    assert Path("/dev/cuse").stat().st_mode & 0o777 == 0o660


def test_a_unit_with_a_resource_manager(systemd: Systemd, unit: str) -> None:
    """Its second device is the group's alone, as the kernel's /dev/tpmrmN."""
    device = device_of(unit)
    managed = device.with_name(device.name.replace("vtpm", "vtpmrm"))
    options = "VTPM_OPTIONS=--tpm2 --flags startup-clear --resource-manager\n"
    (SETTINGS / f"{device.name}.env").write_text(options)
    systemd.systemctl("start", unit)
    with opened(managed) as one, opened(managed) as other:
        assert code_of(exchange(one, get_random(8))) == 0
        assert code_of(exchange(other, get_random(8))) == 0
    systemd.call("udevadm", "settle")
    found = managed.stat()
    assert (found.st_uid, found.st_gid) == (0, grp.getgrnam("tss").gr_gid)
    assert found.st_mode & 0o777 == 0o660
    assert Path("/dev/vtpm/by-name", managed.name).resolve() == managed
    systemd.systemctl("stop", unit)
    assert not managed.exists()


def test_its_process_has_no_more_than_it_needs(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    process = Path(f"/proc/{systemd.main_pid(unit)}")
    status = dict(
        line.split(":\t", 1)
        for line in (process / "status").read_text().splitlines()
        if ":\t" in line
    )
    (user,) = set(status["Uid"].split())
    assert int(user) in TRANSIENT_USERS
    assert status["Gid"].split() == [str(grp.getgrnam("vtpm-cuse").gr_gid)] * 4
    assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "CapInh")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert (process / "attr/current").read_text().strip() == "swtpm-cuse (enforce)"
    rights = {line.split()[1] for line in (process / "maps").read_text().splitlines()}
    assert not {right for right in rights if "w" in right and "x" in right}
    state = state_of(unit)
    assert (state.stat().st_uid, state.stat().st_mode & 0o777) == (int(user), 0o700)
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}


def test_its_state_survives_a_restart(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    ask(unit, nv_define(NV_INDEX, len(SECRET)))
    ask(unit, nv_write(NV_INDEX, SECRET))
    before = systemd.main_pid(unit)
    systemd.systemctl("restart", unit)
    assert systemd.main_pid(unit) != before
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET
    systemd.systemctl("stop", unit)
    assert not device_of(unit).exists()
    systemd.systemctl("start", unit)
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET


def test_a_killed_one_comes_back_with_its_state(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    ask(unit, nv_define(NV_INDEX, len(SECRET)))
    ask(unit, nv_write(NV_INDEX, SECRET))
    os.kill(systemd.main_pid(unit), signal.SIGKILL)
    wait_until(lambda: systemd.show(unit, "NRestarts") == "1", "systemd starts it again")
    wait_until(lambda: systemd.show(unit, "ActiveState") == "active", "it is ready")
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET


def test_the_daemon_is_the_main_process(systemd: Systemd) -> None:
    """With --daemon: the process that systemd has started ends, and the service goes on."""
    name, pid_file = "vtpm-daemon.service", Path("/run/vtpm-cuse/daemon.pid")
    (UNITS / name).write_text(
        "[Service]\nType=notify\nNotifyAccess=all\nExecStart=/usr/local/bin/swtpm socket --tpm2 "
        "--tpmstate backend-uri=mem:// --flags startup-clear --daemon "
        f"--ctrl type=unixio,path=/run/vtpm-cuse/daemon --pid file={pid_file}\n"
    )
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", name)
    # The first process writes the pid file and ends; systemd notices the end in its own time.
    wait_until(pid_file.exists, "the daemon is there")
    assert systemd.show(name, "MainPID") == pid_file.read_text()
    assert systemd.show(name, "ActiveState") == "active"
    systemd.systemctl("stop", name)
    assert systemd.show(name, "Result") == "success"


def test_a_service_can_be_ordered_after_the_device(systemd: Systemd, unit: str) -> None:
    device = device_of(unit)
    used = UNITS / "uses-tpm.service"
    node = f"dev-{device.name}.device"
    used.write_text(
        f"[Unit]\nRequires={node}\nAfter={node}\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=tpm2_getrandom -T device:{device} 4\n"
    )
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", "--no-block", used.name)
    assert systemd.show(used.name, "ActiveState") == "inactive"
    assert node in systemd.systemctl("list-jobs")
    systemd.systemctl("start", unit)
    wait_until(lambda: systemd.show(used.name, "ActiveState") != "inactive", "it is started")
    systemd.systemctl("start", used.name)  # waits for its end
    assert systemd.show(used.name, "Result") == "success"


def test_an_environment_file_has_options_for_one_instance(systemd: Systemd, unit: str) -> None:
    settings = SETTINGS / f"{device_of(unit).name}.env"
    key = settings.with_suffix(".key")
    key.write_text("00112233445566778899aabbccddeeff")
    key.chmod(0o640)
    shutil.chown(key, "root", "vtpm-cuse")
    settings.write_text(f"VTPM_OPTIONS=--flags not-need-init --key file={key}\n")
    systemd.systemctl("start", unit)
    ask(unit, TPM12_STARTUP_CLEAR)
    assert {path.name for path in state_of(unit).iterdir()} == {".lock", "tpm-00.permall"}


def test_a_key_as_a_credential(systemd: Systemd, unit: str) -> None:
    """Which only root and systemd can read."""
    settings = SETTINGS / f"{device_of(unit).name}.env"
    key = settings.with_suffix(".credential")
    key.write_text("00112233445566778899aabbccddeeff")
    key.chmod(0o600)
    settings.write_text("VTPM_OPTIONS=--tpm2 --flags startup-clear --key credential=state.key\n")
    addition = UNITS / f"{unit}.d/key.conf"
    addition.parent.mkdir()
    addition.write_text(f"[Service]\nLoadCredential=state.key:{key}\n")
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", unit)
    ask(unit, nv_define(NV_INDEX, len(SECRET)))
    ask(unit, nv_write(NV_INDEX, SECRET))
    assert SECRET not in (state_of(unit) / "tpm2-00.permall").read_bytes()
    systemd.systemctl("restart", unit)
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET
    key.write_text("ffeeddccbbaa99887766554433221100")
    systemd.systemctl("restart", unit, status=1)
    key.write_text("00112233445566778899aabbccddeeff")
    systemd.systemctl("start", unit)
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET


def test_a_state_that_is_damaged_fails_the_start_and_stays(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    ask(unit, get_random(1))
    systemd.systemctl("stop", unit)
    state = state_of(unit) / "tpm2-00.permall"
    damaged = state.read_bytes()[:-1]
    state.write_bytes(damaged)
    systemd.systemctl("start", unit, status=1)
    assert systemd.show(unit, "ActiveState") == "failed"  # and it is not tried again
    assert systemd.show(unit, "NRestarts") == "0"
    assert state.read_bytes() == damaged


@pytest.fixture(scope="module")
def neighbour(systemd: Systemd) -> Iterator[str]:
    """A running instance, with all kinds of secrets, that another is not to come near.

    One for all tests: each looks whether it still runs, and is as it was.
    """
    name = "vtpm38"
    unit = f"swtpm-cuse@{name}.service"
    for path in (
        SETTINGS / f"{name}.key",
        SETTINGS / name / "key",
        SETTINGS / f"{name}.credential",
    ):
        path.parent.mkdir(mode=0o750, exist_ok=True)
        shutil.chown(path.parent, "root", "vtpm-cuse")
        path.write_text("00112233445566778899aabbccddeeff")
        path.chmod(0o640)
        shutil.chown(path, "root", "vtpm-cuse")
    options = f"--tpm2 --flags startup-clear --key file={SETTINGS / name}.key"
    (SETTINGS / f"{name}.env").write_text(f"VTPM_OPTIONS={options}\n")
    addition = UNITS / f"{unit}.d/key.conf"
    addition.parent.mkdir(exist_ok=True)
    addition.write_text(f"[Service]\nLoadCredential=state.key:{SETTINGS / name}.credential\n")
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", unit)
    ask(unit, get_random(1))
    yield unit
    systemd.systemctl("stop", unit, status=None)


def probe(neighbour: str, systemd: Systemd) -> list[str]:
    """The command line of the intruder."""
    program = VENV / "intruder.py"
    program.write_text(INTRUDER.read_text())
    number = device_of(neighbour).stat().st_rdev
    numbers = (systemd.show(neighbour, "MainPID"), os.major(number), os.minor(number))
    words = [f"{VENV}/bin/python3", "-I", program, device_of(neighbour).name, *numbers]
    return [str(word) for word in words]


def test_root_can_do_to_an_instance_all_that_is_tried_below(
    systemd: Systemd, neighbour: str, tmp_path: Path
) -> None:
    words = ["env", f"STATE_DIRECTORY={tmp_path}", *probe(neighbour, systemd)]
    systemd.call(*words)
    worked, tried = json.loads((tmp_path / "worked").read_text())
    assert worked == tried


@pytest.mark.parametrize("profile", ["with AppArmor", "without AppArmor"])
@pytest.mark.parametrize("kind", ["swtpm-cuse@vtpm39", "swtpm-vtpm-proxy@vtpm39"])
def test_one_instance_can_do_nothing_to_another(
    systemd: Systemd, neighbour: str, kind: str, profile: str
) -> None:
    """Even before it has shut itself in: another program is run as the unit's would be."""
    addition = UNITS / f"{kind}.service.d/probe.conf"
    addition.parent.mkdir(exist_ok=True)
    settings = (
        f"Type=oneshot\nRestart=no\nExecStart=\nExecStart={' '.join(probe(neighbour, systemd))}"
    )
    off = "AppArmorProfile=\n" if profile == "without AppArmor" else ""
    addition.write_text(f"[Service]\n{settings}\n{off}")
    systemd.systemctl("daemon-reload")
    try:
        systemd.systemctl("start", kind)
        worked, _ = json.loads((STATES / "vtpm39/worked").read_text())
        assert worked == ["its own state"]
    finally:
        shutil.rmtree(addition.parent)
        systemd.systemctl("daemon-reload")
        shutil.rmtree((STATES / "vtpm39").resolve())
    assert systemd.show(neighbour, "ActiveState") == "active"


def test_two_instances_have_two_users(systemd: Systemd, unit: str, neighbour: str) -> None:
    systemd.systemctl("start", unit)
    owners = {state_of(name).stat().st_uid for name in (unit, neighbour)}
    assert len(owners) == 2
    assert owners <= set(TRANSIENT_USERS)


@pytest.mark.parametrize("name", ["vtpm-with-dashes", "vtpm_of_twenty_six_letters"])
def test_an_instance_with_an_odd_name(systemd: Systemd, name: str) -> None:
    unit = f"swtpm-cuse@{name}.service"
    systemd.systemctl("start", unit)
    ask(unit, get_random(8))
    systemd.systemctl("stop", unit)


def test_a_state_of_the_one_user_of_before_goes_on(systemd: Systemd, unit: str) -> None:
    """As earlier versions left it: a folder in its place that the user vtpm-cuse owns."""
    systemd.systemctl("start", unit)
    ask(unit, nv_define(NV_INDEX, len(SECRET)))
    ask(unit, nv_write(NV_INDEX, SECRET))
    systemd.systemctl("stop", unit)
    link = state_of(unit)
    folder = link.resolve()
    link.unlink()
    folder.rename(link)
    shutil.chown(STATES, "vtpm-cuse", "vtpm-cuse")
    for path in (link, *link.iterdir()):
        shutil.chown(path, "vtpm-cuse", "vtpm-cuse")
    systemd.systemctl("start", unit)
    assert nv_data(ask(unit, nv_read(NV_INDEX, len(SECRET)))) == SECRET
    assert {path.stat().st_uid for path in state_of(unit).iterdir()} <= set(TRANSIENT_USERS)


def test_a_client_that_is_not_root_is_served(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    systemd.call("udevadm", "settle")
    user = pwd.getpwnam("tss")
    as_tss = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    done = systemd.call(*as_tss, "tpm2_getrandom", "-T", f"device:{device_of(unit)}", "--hex", "4")
    assert len(done.stdout.strip()) == 8


def test_a_deployed_program_sees_nothing_of_the_callers_python(
    systemd: Systemd, tmp_path: Path
) -> None:
    for name in ("trio", "sitecustomize", "vtpm_cuse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)\n")
    compiled = sum(1 for _ in VENV.rglob("*.pyc"))
    for variable in ("PYTHONHOME=/x", f"PYTHONPATH={tmp_path}", "PYTHONMALLOC=x", "PYTHONUTF8=x"):
        call = ("env", "-C", str(tmp_path), variable, "/usr/local/bin/swtpm", "--version")
        done = systemd.call(*call)
        assert ("vtpm-cuse" in done.stdout, done.stderr) == (True, "")
    assert sum(1 for _ in VENV.rglob("*.pyc")) == compiled


def test_the_proxys_unit_is_a_tpm_of_the_kernels(systemd: Systemd) -> None:
    unit = "swtpm-vtpm-proxy@a.service"
    before = set(Path("/dev").glob("tpm*"))
    systemd.systemctl("start", unit)
    try:
        # The kernel shows them when it has tested the TPM; the unit is started then, not before.
        assert len(set(Path("/dev").glob("tpm*")) - before) == 2
        systemd.call("udevadm", "settle")
        plain, managed = sorted(set(Path("/dev").glob("tpm*")) - before)
        assert (plain.name[:3], managed.name[:5]) == ("tpm", "tpmrm")
        assert plain.stat().st_uid == pwd.getpwnam("tss").pw_uid  # by the rules of tpm-udev
        with opened(managed) as fd:
            assert code_of(exchange(fd, get_random(8))) == 0
        process = Path(f"/proc/{systemd.main_pid(unit)}")
        assert (
            int(re.findall(r"Uid:\t(\d+)", (process / "status").read_text())[0]) in TRANSIENT_USERS
        )
        assert (process / "attr/current").read_text().strip() == "swtpm-vtpm-proxy (enforce)"
        _manage(systemd, plain)
    finally:
        systemd.systemctl("stop", unit)
    wait_until(lambda: not plain.exists(), "the kernel takes them away")


def _manage(systemd: Systemd, tpm: Path) -> None:
    """The unit of a resource manager: a socket for the group, and who is there, for root to see."""
    unit, folder = f"swtpm-resource-manager@{tpm.name}.service", MANAGERS / tpm.name
    control = f"MANAGER_OPTIONS=--ctrl type=unixio,path={folder}/ctrl\n"
    (SETTINGS / f"{tpm.name}.env").write_text(control)
    systemd.systemctl("start", unit)
    try:
        user, found = pwd.getpwnam("tss"), (folder / "socket").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (*user[2:4], 0o660)
        assert folder.stat().st_mode & 0o777 == 0o750
        assert Path(f"/proc/{systemd.main_pid(unit)}").stat().st_uid == user.pw_uid
        with s.connect(folder / "socket") as client:
            keys = [m.handle_of(client.command(m.load_external(number))) for number in range(5)]
            assert m.listed(client.command(m.list_handles(keys[0]))) == keys
            words = ("clients", "--json", "--unix", f"{folder}/ctrl")
            (one,) = json.loads(systemd.call("/usr/local/bin/vtpm", *words).stdout)["clients"]
            assert [key["handle"] for key in one["objects"]] == [f"0x{key:08x}" for key in keys]
            assert one["uid"] == 0
    finally:
        systemd.systemctl("stop", unit)
    assert not folder.exists()
    with opened(tpm) as fd:  # as it was
        assert m.listed(exchange(fd, m.list_handles(0x80000000))) == []


def test_units_are_without_fault(systemd: Systemd) -> None:
    kinds = ("cuse@vtpm0", "vtpm-proxy@a", "resource-manager@tpm0")
    names = (*(f"swtpm-{kind}.service" for kind in kinds), "vtpmd.service", "vtpmd.socket")
    names = (*names, "vtpm-tree.service")
    done = systemd.call("systemd-analyze", "verify", "--man=no", *names)
    assert (done.stdout, done.stderr) == ("", "")


def test_units_as_systemd_has_them_are_hardened(systemd: Systemd) -> None:
    """In tenths, as for the files that they are made of."""
    units = {"swtpm-cuse@vtpm0": 5, "swtpm-vtpm-proxy@a": 10, "swtpm-resource-manager@tpm0": 10}
    for unit, exposure in {**units, "vtpmd": 21, "vtpm-tree": 37}.items():
        words = ("security", "--no-pager", f"--threshold={exposure}", f"{unit}.service")
        systemd.call("systemd-analyze", *words)


def test_udevadm_finds_no_fault_in_the_rules(systemd: Systemd, unit: str) -> None:
    systemd.systemctl("start", unit)
    device = device_of(unit)
    done = systemd.call("udevadm", "test", f"/sys/class/cuse/{device.name}")
    said = [line for line in done.stderr.splitlines() if "60-vtpm-cuse.rules" in line]
    assert any("Reading rules file" in line for line in said)
    assert not [line for line in said if "nvalid" in line or "gnoring" in line]
    assert "TAGS=:systemd:" in done.stdout


def test_doctor_sees_it(systemd: Systemd) -> None:
    text = systemd.call("/usr/local/bin/swtpm", "doctor").stdout
    for name in ("/dev/cuse", "/dev/vtpmx", "systemd", "deployed", "seccomp", "landlock"):
        assert f"\n+ {name} " in text
    assert "Next:\n  swtpm-cuse -n vtpm0" in text


def test_uninstall_takes_everything_but_the_state(systemd: Systemd, unit: str) -> None:
    """The last of these tests: after it there is nothing to start."""
    listed = Path("/usr/local/lib/vtpm-cuse/manifest").read_text().splitlines()
    systemd.systemctl("start", unit)
    refused = systemd.call(str(ROOT / "deploy/place"), "--uninstall", status=1)
    assert unit in refused.stderr.partition("systemctl stop ")[2].split()
    ask(unit, get_random(1))
    systemd.systemctl("stop", "swtpm-cuse@*")
    systemd.call(str(ROOT / "deploy/place"), "--uninstall")
    assert not [path for path in listed if path[-1] != "/" and os.path.lexists(f"/{path}")]
    assert (state_of(unit) / "tpm2-00.permall").stat().st_size > 0
    systemd.systemctl("start", unit, status=5)
