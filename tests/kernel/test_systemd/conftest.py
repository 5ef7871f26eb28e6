"""The deployed units under systemd as process 1, with a live udevd; only ever in the kernel lab.

systemd gets namespaces of its own for processes and mounts, and udevd hears the kernel all the
same: the lab needs no second boot for it. Everything that "./setup deploy" puts into a system is
copied into the lab's file tree and taken out again by --uninstall, which is a test too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import ROOT, needs, run, wait_until
from tests.kernel.systemd import Systemd
from tests.support.sockets import listens

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOYED = ROOT / ".cache/deployed"
UNITS = Path("/etc/systemd/system")
VENV = Path("/usr/local/lib/vtpm-cuse/venv")

# Not ours, slow, or at odds with a file tree that the lab's own process 1 set up.
MASKED = (
    *("systemd-tmpfiles-setup", "systemd-tmpfiles-clean", "systemd-tmpfiles-setup-dev"),
    *("systemd-journal-flush", "systemd-timesyncd", "systemd-networkd", "systemd-sysctl"),
    *("systemd-update-utmp", "systemd-random-seed", "systemd-binfmt", "apparmor"),
)
TARGET = """\
[Unit]
Requires=sysinit.target systemd-udevd.service systemd-journald.service
After=sysinit.target systemd-udevd.service systemd-udev-trigger.service
"""


@pytest.fixture(scope="package")
def systemd(cuse: None) -> Iterator[Systemd]:
    """What was deployed, in the lab's file tree, with systemd and udevd at work on it."""
    needs("LAB_SCRATCH" in os.environ, "only in the kernel lab: it changes the system")
    needs(DEPLOYED.is_dir(), f"no {DEPLOYED}: ./setup deploy --root {DEPLOYED}")
    for tool in ("systemctl", "udevadm", "apparmor_parser"):
        needs(shutil.which(tool) is not None, f"{tool} is missing")
    shutil.copytree(DEPLOYED, "/", symlinks=True, dirs_exist_ok=True)
    if not os.path.ismount("/sys/kernel/security"):
        run("mount", "-t", "securityfs", "none", "/sys/kernel/security")
    run("systemd-sysusers", "vtpm-cuse.conf")
    run("systemd-tmpfiles", "--create", "vtpm-cuse.conf")
    run("apparmor_parser", "--replace", "--skip-cache", "/etc/apparmor.d/vtpm-cuse")
    for name in MASKED:
        (UNITS / f"{name}.service").unlink(missing_ok=True)
        (UNITS / f"{name}.service").symlink_to("/dev/null")
    (UNITS / "lab.target").write_text(TARGET)
    manager = Path("/etc/systemd/system.conf.d/lab.conf")
    manager.parent.mkdir(exist_ok=True)
    manager.write_text("[Manager]\nDefaultTimeoutStartSec=40\n")
    inside = (
        "mount --make-rshared / && "  # as process 1 does: so services see their credentials
        "mount -t proc proc /proc && { umount -l /sys/fs/cgroup; mount -t cgroup2 none "
        "/sys/fs/cgroup; } && "  # the one that tests of containers mounted has another root
        'exec env -i container=lab PATH="$PATH" /lib/systemd/systemd --system --unit=lab.target'
    )
    started = Systemd(
        subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--fork",
                "--mount",
                "--cgroup",
                "--kill-child",
                "sh",
                "-c",
                inside,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )
    bus = Path("/run/systemd/private")
    wait_until(partial(listens, bus), "systemd listens", process=started.process)
    assert started.systemctl("is-system-running", "--wait", status=None) == "running\n"
    yield started
    started.process.kill()  # and with it all that it runs
    started.process.wait()
    shutil.rmtree("/run/systemd")  # by which programs know that systemd runs
    shutil.rmtree("/run/cdi")
    for name in ("cuse", "vtpmx"):
        os.chown(f"/dev/{name}", 0, 0)
        os.chmod(f"/dev/{name}", 0o600)
