"""debian/: packages that replace Debian's swtpm, in a system where that is installed."""

from __future__ import annotations

import json
import re
import subprocess
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import pytest

from tests.support import unstable
from tests.support.debian import PACKAGES, SYSTEM, System, is_new
from tests.support.unstable import ROOT
from tools.package import day_of_release
from vtpm_cuse import PEER_VERSION, __version__

STATE: Final = "var/lib/vtpm-cuse/vtpm0/tpm2-00.permall"
KEY: Final = "etc/vtpm-cuse/vtpm0.key"


# A machine with a TPM that has no disk, and starts all the same.
LIBVIRT: Final = """
mount -t tmpfs -o mode=755 tmpfs /etc/libvirt
mount -t tmpfs -o mode=755 tmpfs /var/lib/libvirt
mount -t sysfs -o ro sysfs /sys
printf 'cgroup_controllers = []\\nnamespaces = []\\n' >/etc/libvirt/qemu.conf
cat >/run/domain.xml <<END
<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
END
virtlogd --daemon
libvirtd --daemon
virsh define /run/domain.xml
virsh start guest >&2 || { cat /var/log/libvirt/qemu/guest.log /var/log/swtpm/libvirt/qemu/guest* >&2; exit 1; }
virsh domstate guest
virsh qemu-monitor-command guest --hmp info tpm
ps -C swtpm -o args= -ww
cat /var/log/swtpm/libvirt/qemu/guest*
find /var/lib/libvirt/swtpm -name '*permall' -printf '%u %p\\n'
virsh destroy guest
virsh undefine guest
echo left:
find /var/lib/libvirt/swtpm -mindepth 1
"""


@pytest.fixture(scope="module")
def system(bare_system: System) -> System:
    """With vtpm-cuse installed beside Debian's swtpm."""
    bare_system.install(*PACKAGES[:2])
    return bare_system


def test_version_and_day_are_those_of_the_changelog() -> None:
    first, *_, last = (ROOT / "debian/changelog").read_text().split("\n\n", 3)[:3]
    day = parsedate_to_datetime(last.partition(">  ")[2].strip())
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert first.startswith(f"vtpm-cuse ({__version__}) ")
    assert day.date() == day_of_release(changes, __version__)


def test_they_are_as_the_policy_says(debs: Path) -> None:
    """But for what debian/*.lintian-overrides name, with reasons; none of them is without need."""
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", *sorted(debs.glob("*.deb"))],
        env=SYSTEM,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_they_go_along_with_the_c_suite(system: System) -> None:
    said = system.say("swtpm --version; swtpm-cuse --version; dpkg-query -W swtpm-tools")
    suite, ours, tools = said.splitlines()
    assert "vtpm-cuse" not in suite
    assert f"(vtpm-cuse {__version__})" in ours
    assert tools


def test_the_programs_work_and_do_not_hear_the_callers_python(system: System) -> None:
    script = """
        mkdir -p /run/x/bin
        cd /run/x
        echo 'raise SystemExit(77)' >trio.py
        echo 'home = /usr/bin' >pyvenv.cfg
        vtpm run -- tpm2_getrandom --hex 8
    """
    said = system.say(script, PYTHONPATH="/run/x", PYTHONEXECUTABLE="/run/x/bin/python")
    assert len(bytes.fromhex(said)) == 8


def test_doctor_sees_them(system: System) -> None:
    found = json.loads(system.say("vtpm doctor --json || :"))
    assert found["findings"]["deployed"]["state"] == "ok"


def test_units_and_profiles_name_what_is_there(system: System) -> None:
    said = system.say("""
        units="/usr/lib/systemd/system/swtpm-*@.service /usr/lib/systemd/*/vtpmd.service"
        cat $units /etc/apparmor.d/abstractions/vtpm-cuse
        for program in $(sed -n 's/^ExecStart=\\([^ ]*\\).*/\\1/p' $units)
        do test -x "$program" && "$program" --help >/dev/null; done
        apparmor_parser --skip-kernel-load --skip-cache /etc/apparmor.d/vtpm-cuse
        getent passwd vtpm-cuse; getent passwd vtpmd; test -d /etc/vtpm-cuse
    """)
    assert said.count("\nExecPaths=/usr/bin/env /usr/lib/vtpm-cuse /usr/bin/python3\n") == 4
    assert "/usr/local/lib/vtpm-cuse" not in said
    assert "/usr/local/bin/" not in said


@pytest.fixture(scope="module")
def emulator(system: System) -> System:
    """With the package, too, that is in the place of the C suite."""
    system.install(PACKAGES[2])
    return system


def test_their_own_tests_pass(emulator: System) -> None:
    """Those of debian/tests, run by autopkgtest; what they depend on is there already."""
    names = ("run", "library", "swtpm")  # the fourth makes a device in /dev
    chosen = " ".join(f"--test-name {name}" for name in names)
    script = """
        mkdir -p /run/tree/debian
        cd /run/tree/debian
        cp -r /mnt/tree/debian/control /mnt/tree/debian/changelog /mnt/tree/debian/tests .
        sed -n 's/^Depends: //p' tests/control | xargs -d '\\n' apt-get --simulate satisfy >/run/said
        grep '^0 upgraded, 0 newly installed' /run/said
        sed -i 's/^Depends: .*/Depends:/' tests/control
        autopkgtest --no-built-binaries -B /run/tree $CHOSEN -- null 2>&1
    """
    said = emulator.say(script, CHOSEN=chosen, PYTHONDONTWRITEBYTECODE="1")
    results = dict(re.findall(r"^(\w+) +(PASS|FAIL|SKIP)", said, re.MULTILINE))
    assert results == dict.fromkeys(names, "PASS"), said


def test_one_of_them_is_in_the_place_of_the_c_suite(emulator: System) -> None:
    said = emulator.say("""
        dpkg-query -W -f '${Package} ${db:Status-Status}\\n' swtpm swtpm-tools || :
        swtpm --version
        /usr/share/swtpm/swtpm-localca --version
        test -f /usr/include/swtpm/tpm_ioctl.h
        stat -c %U:%a /var/lib/swtpm-localca
        mkdir /tmp/tpm
        chown tss /tmp/tpm
        # As libvirt does, whose user has no home.
        setpriv --reuid tss --regid tss --clear-groups env HOME=/nonexistent swtpm_setup --tpm2 \\
            --tpm-state /tmp/tpm --create-ek-cert --create-platform-cert >/dev/null
        apt-get check >/dev/null
    """)
    assert said.count(f"version {PEER_VERSION} (vtpm-cuse {__version__})") == 2
    assert "installed" not in said.split()
    assert "tss:750" in said


def test_libvirt_starts_a_machine_with_them(emulator: System) -> None:
    """As installed, but for what a container does not have; nothing tells it of our programs."""
    if "libvirt-qemu:" not in Path("/etc/passwd").read_text():
        pytest.skip("needs libvirt-daemon-system")
    said = emulator.say(LIBVIRT)
    assert "\nrunning\n" in said
    assert "type=emulator" in said
    assert "EK certificate locally" in said  # by our swtpm_setup, for the other is gone
    assert re.search(
        r"^/usr/bin/python3 -IB /usr/bin/swtpm socket .*--terminate", said, re.MULTILINE
    )
    assert re.search(
        r"^tss /var/lib/libvirt/swtpm/[-0-9a-f]{36}/tpm2/tpm2-00.permall$", said, re.MULTILINE
    )
    assert said.endswith("left:\n")


def test_with_all_of_them_purged_nothing_is_left_but_the_tpms(emulator: System) -> None:
    emulator.say(f"mkdir -p /{Path(STATE).parent}; echo state >/{STATE}; echo key >/{KEY}")
    emulator.say("echo key >/var/lib/swtpm-localca/signkey.pem")
    emulator.say(f"apt-get purge -y {' '.join(PACKAGES)}")
    ca = {name for name in emulator.changed() if name.startswith("var/lib/swtpm-localca/")}
    assert ca
    folders = {str(path) for name in (STATE, KEY) for path in Path(name).parents}
    assert emulator.changed() - ca == {STATE, KEY} | set(filter(is_new, folders))


@pytest.mark.parametrize(
    "below",
    [
        pytest.param(
            unstable.FOLDER,
            marks=pytest.mark.skipif(not unstable.is_ready(), reason=unstable.REASON),
        ),
        pytest.param(
            unstable.TRIXIE,
            marks=pytest.mark.skipif(not unstable.has_trixie(), reason=unstable.TRIXIE_REASON),
        ),
    ],
    ids=lambda folder: folder.name,
)
def test_the_same_packages_are_for_newer_debians(below: Path, debs: Path, tmp_path: Path) -> None:
    """With their Python and libraries, and in the place of the C suite, if it is there."""
    newest = System(tmp_path, debs, below)
    newest.install(*PACKAGES)
    random, versions = newest.say("""
        vtpm run -- tpm2_getrandom --hex 8; echo
        swtpm --version; swtpm-cuse --version; vtpm --version
    """).split("\n", 1)
    assert len(bytes.fromhex(random)) == 8
    assert versions.count(f"vtpm-cuse {__version__}") == 3
    newest.say(f"apt-get purge -y {' '.join(PACKAGES)}")
    assert newest.run("vtpm --version").returncode == 127
