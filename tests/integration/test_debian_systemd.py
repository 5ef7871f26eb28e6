"""debian/: installed, upgraded and removed under systemd, while TPMs are used."""

from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.systemd import Systemd
from tests.support import commands as tpm
from tests.support.debian import EARLIER, PACKAGES, System, earlier
from tests.support.sockets import connect
from tests.support.waiting import wait_until
from vtpm_cuse import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.sockets import Client

# Of what starts with a system only the log; no unit or script is to change this machine.
BOOT: Final = """
rm -f /usr/sbin/policy-rc.d # by which a container forbids services
ln -sf /bin/true /usr/sbin/modprobe
ln -sf /bin/true /usr/bin/udevadm
find /lib/systemd/system/sysinit.target.wants ! -name '*journald*' -type l -delete
rm -rf /etc/systemd/system/*.wants
for unit in dev-cuse.device modprobe@cuse.service
do ln -sf /dev/null /etc/systemd/system/$unit; done
mkdir -p /etc/systemd/system/swtpm-cuse@vtpm0.service.d
cat >/etc/systemd/system/swtpm-cuse@vtpm0.service.d/socket.conf <<END
[Service]
ExecStart=
ExecStart=/usr/lib/vtpm-cuse/bin/swtpm socket --tpm2 --tpmstate dir=\\${STATE_DIRECTORY} \\
    --flags startup-clear --server type=unixio,path=\\${STATE_DIRECTORY}/socket
END
useradd --create-home --uid 4711 somebody
for unit in user@ user-runtime-dir@
do mkdir -p /etc/systemd/system/$unit.service.d; done
cat >/etc/systemd/system/user@.service.d/alone.conf <<END
[Service]
PAMName=
Environment=XDG_RUNTIME_DIR=/run/user/%i
END
cat >/etc/systemd/system/user-runtime-dir@.service.d/alone.conf <<END
[Service]
ExecStart=
ExecStart=install --directory --mode 700 --owner %i /run/user/%i
ExecStop=
END
printf '[Unit]\\nRequires=sysinit.target systemd-journald.service\\n' >/etc/systemd/system/test.target
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount --make-rshared /
exec env -i container=test PATH="$PATH" /lib/systemd/systemd --system --unit=test.target
"""
UNIT: Final = "swtpm-cuse@vtpm0.service"
PCR: Final = 10
USER: Final = 4711


@pytest.fixture
def systemd(bare_system: System, debs: Path, tmp_path: Path) -> Iterator[Systemd]:
    """One that has booted in a system of its own, with earlier versions of the packages."""
    earlier(debs, PACKAGES[:2])
    with (tmp_path / "log").open("wb") as log:
        process = bare_system.start(BOOT, log)
    try:
        found = Systemd(process)
        wait_until(partial(runs, found), "systemd", process=process, log=tmp_path / "log")
        found.call(
            "sh", "-ec", f"dpkg -i {' '.join(f'/mnt/earlier/{name}.deb' for name in PACKAGES[:2])}"
        )
        yield found
    finally:
        process.kill()
        process.wait()


def runs(systemd: Systemd) -> bool:
    """Whether it has started all that it was to start; before it is there, none answers."""
    return "running" in systemd.systemctl("is-system-running", "--wait", status=None)


def root_of(systemd: Systemd) -> Path:
    return Path(f"/proc/{systemd.pid}/root")


def as_user(systemd: Systemd, *words: str) -> str:
    """What a program says to the user who is not root."""
    become = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--reset-env")
    return systemd.call(*become, "env", f"XDG_RUNTIME_DIR=/run/user/{USER}", *words).stdout


def extended(client: Client) -> bytes:
    """The answer that tells a PCR, which was extended."""
    assert tpm.code_of(client.command(tpm.pcr_extend(PCR, b"1" * 32))) == 0
    return client.command(tpm.pcr_read(PCR))


def version_of(manager: Path) -> str:
    """Of the program that answers there."""
    with socket.socket(socket.AF_UNIX) as asked, asked.makefile("rb") as answer:
        asked.connect(str(manager))
        asked.sendall(b'{"method": "org.varlink.service.GetInfo"}\0')
        said = b"".join(iter(lambda: answer.read(1), b"\0"))
    version: str = json.loads(said)["parameters"]["version"]
    return version


def test_an_upgrade_and_what_follows(systemd: Systemd) -> None:
    """No client notices an upgrade, managers are the new ones; at a removal all TPMs end, in order."""
    root = root_of(systemd)
    systemd.systemctl("start", "vtpmd.socket", UNIT, f"user@{USER}.service")
    as_user(systemd, "systemctl", "--user", "start", "vtpmd.socket")
    as_user(systemd, "vtpm", "create", "own")
    own = json.loads(as_user(systemd, "vtpm", "start", "own", "--json"))
    systemd.call("vtpm", "create", "one")
    told = json.loads(systemd.call("vtpm", "start", "one", "--json").stdout)
    managers = [root / f"run/{name}/manager.sock" for name in ("vtpm", f"user/{USER}/vtpmd")]
    units = ("vtpmd.service", UNIT)
    before = [systemd.show(unit, "MainPID") for unit in units]
    assert [version_of(manager) for manager in managers] == [EARLIER] * 2
    with (
        connect(root / told["sockets"]["data"].lstrip("/")) as managed,
        connect(root / own["sockets"]["data"].lstrip("/")) as users,
        connect(root / "var/lib/private/vtpm-cuse/vtpm0/socket") as alone,
    ):
        clients = (managed, users, alone)
        values = [extended(client) for client in clients]
        debs = " ".join(f"/mnt/{name}_{__version__}_all.deb" for name in PACKAGES[:2])
        systemd.call("sh", "-ec", f"dpkg -i {debs}")
        assert [version_of(manager) for manager in managers] == [__version__] * 2
        assert [systemd.show(unit, "MainPID") for unit in units] == before
        assert [client.command(tpm.pcr_read(PCR)) for client in clients] == values
        systemd.call("dpkg", "--remove", *reversed(PACKAGES[:2]))
        assert all(client.ended() for client in clients)
    assert {systemd.show(unit, "ActiveState") for unit in units} == {"inactive"}
    systemd.call("dpkg", "--purge", *reversed(PACKAGES[:2]))
    left = systemd.call("find", "/run/vtpm-cuse", "/etc/vtpm-cuse", status=None)
    assert left.stdout == ""
    assert (root / "var/lib/private/vtpm-cuse/vtpm0/tpm2-00.permall").stat().st_size > 0
    assert list(root.glob("var/lib/vtpm/*"))
