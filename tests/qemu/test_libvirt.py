"""libvirt, and the calls it makes, with our swtpm.

libvirtd runs for one user, in folders of its own; to root it must not look like
root, for whom it would be the system's: it gets a user namespace. What creates
the TPM's state is the swtpm_setup that is installed, and with our swtpm.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.qemu.boards import PC
from tests.qemu.facts import check, extend, look, prepare
from tests.qemu.fleet import BOOT_SECONDS, CRB2, TIS1
from tests.qemu.guest import Shell
from tests.qemu.machine import OURS, PATIENCE_SECONDS, Emulator
from tests.support.files import open_files
from tests.support.sockets import listens
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.qemu.fleet import Fleet, Kind

LIBVIRTD: Final = shutil.which("libvirtd", path="/usr/sbin:/usr/bin")
VIRSH: Final = shutil.which("virsh")
SETUP: Final = shutil.which("swtpm_setup", path="/usr/bin")
NAME: Final = "guest"
ENCRYPTION: Final = "9b8b0d3c-7f5f-4d8e-8a3c-2f1d60f0a5b1"

needs_setup: Final = pytest.mark.skipif(SETUP is None, reason="needs Debian's swtpm-tools")


class Libvirt:
    """A libvirtd of one user.

    Attributes:
        folder: Where it has its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {"PATH": f"{folder}/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
        for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            (folder / name).mkdir(mode=0o700)
            self._environment[name] = str(folder / name)
        (folder / "bin").mkdir()
        for program in ("swtpm", "swtpm_ioctl"):
            assert OURS.command is not None
            (folder / "bin" / program).symlink_to(Path(OURS.command).with_name(program))
        self._as_user = ["setpriv", "--pdeathsig", "KILL", "--"]
        if os.geteuid() == 0:
            self._as_user += ["unshare", "--user", "--map-user=65534", "--map-group=65534", "--"]
        with (folder / "libvirtd.log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [*self._as_user, str(LIBVIRTD)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._socket = folder / "XDG_RUNTIME_DIR/libvirt/libvirt-sock"
        wait_until(
            partial(listens, self._socket),
            "the socket of libvirtd",
            process=self._daemon,
            log=folder / "libvirtd.log",
            seconds=PATIENCE_SECONDS,
        )

    def close(self) -> None:
        """Ends the daemon; machines outlive it."""
        self._daemon.terminate()
        self._daemon.wait(PATIENCE_SECONDS)

    def virsh(self, *arguments: str | Path) -> str:
        """What virsh prints. Fails the test when virsh does."""
        assert VIRSH is not None
        done = subprocess.run(
            [*self._as_user, VIRSH, "--connect", "qemu:///session", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            log = (self.folder / "libvirtd.log").read_text()
            pytest.fail(f"virsh {arguments}: {done.stderr}\n{log}", pytrace=False)
        return done.stdout

    def attach(self) -> tuple[Shell, socket.socket]:
        """The shell of the machine, which must not have said anything yet."""
        serial = socket.socket(socket.AF_UNIX)
        serial.connect(str(self.folder / "serial"))
        return Shell(serial), serial

    def emulator(self) -> int:
        """The process of the machine's TPM."""
        (pid_file,) = self.folder.glob("XDG_RUNTIME_DIR/libvirt/qemu/run/swtpm/*.pid")
        return int(pid_file.read_text())


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    if LIBVIRTD is None or VIRSH is None:
        pytest.skip("needs libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients")
    # Paths of Unix sockets must be short.
    with tempfile.TemporaryDirectory(prefix="lv") as folder, ExitStack() as stack:
        if os.geteuid() == 0:
            probe = subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False)
            if probe.returncode:
                pytest.skip(f"needs user namespaces: {probe.stderr.decode()}")
        libvirt = Libvirt(Path(folder))
        stack.callback(libvirt.close)
        yield libvirt


def domain(fleet: Fleet, kind: Kind, folder: Path, *, encrypted: bool) -> str:
    encryption = f"<encryption secret='{ENCRYPTION}'/>" if encrypted else ""
    kernel = fleet.kernel(PC)
    return f"""
        <domain type='qemu'>
          <name>{NAME}</name>
          <uuid>{uuid.uuid4()}</uuid>
          <memory unit='MiB'>256</memory>
          <os>
            <type arch='x86_64' machine='q35'>hvm</type>
            <kernel>{kernel.image}</kernel>
            <initrd>{kernel.initramfs}</initrd>
            <cmdline>{PC.words}</cmdline>
          </os>
          <features><acpi/></features>
          <on_reboot>destroy</on_reboot>
          <devices>
            <emulator>{shutil.which(PC.program)}</emulator>
            <serial type='file'><source path='{folder}/console'/><target port='0'/></serial>
            <serial type='unix'>
              <source mode='bind' path='{folder}/serial'/><target port='1'/>
            </serial>
            <tpm model='{kind.model}'>
              <backend type='emulator' version='{"2.0" if kind.tpm2 else "1.2"}'>
                {encryption}
              </backend>
            </tpm>
            <controller type='usb' model='none'/>
            <memballoon model='none'/>
          </devices>
        </domain>
    """


@needs_setup
@pytest.mark.parametrize(
    ("kind", "encrypted"),
    [(CRB2, False), (CRB2, True), (TIS1, False)],
    ids=["tpm2", "tpm2-encrypted", "tpm1"],
)
def test_life_of_a_machine(
    libvirt: Libvirt, fleet: Fleet, kind: Kind, encrypted: bool, tmp_path: Path
) -> None:
    """Created, used, saved, restored, destroyed."""
    virsh, tpm2 = libvirt.virsh, kind.tpm2
    if encrypted:
        define_secret(libvirt, tmp_path)
    description = tmp_path / "domain.xml"
    description.write_text(domain(fleet, kind, libvirt.folder, encrypted=encrypted))
    with ExitStack() as stack:
        stack.callback(destroy, libvirt)
        virsh("create", description, "--paused")
        shell, serial = libvirt.attach()
        with serial:
            virsh("resume", NAME)
            shell.wait_ready(BOOT_SECONDS)
            arguments = Path(f"/proc/{libvirt.emulator()}/cmdline").read_bytes().split(b"\0")
            assert str(libvirt.folder / "bin/swtpm").encode() in arguments
            assert (b"--migration-key" in arguments) == encrypted
            facts = prepare(shell, tpm2=tpm2)
        before = os.pidfd_open(libvirt.emulator())
        stack.callback(os.close, before)
        virsh("save", NAME, tmp_path / "saved")
        ended(before)
        virsh("restore", tmp_path / "saved")
        shell, serial = libvirt.attach()
        with serial:
            assert look(shell, facts.handle, tpm2=tpm2) == facts
            extend(shell, 0x88, tpm2=tpm2)
            check(shell, look(shell, facts.handle, tpm2=tpm2), tpm2=tpm2)
        after = os.pidfd_open(libvirt.emulator())
        stack.callback(os.close, after)
        virsh("destroy", NAME)
        ended(after)


def ended(pidfd: int) -> None:
    """Waits for the end of a process that is not our child."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE_SECONDS * 1000), "the emulator lives on"


def destroy(libvirt: Libvirt) -> None:
    """Leaves no machine behind."""
    if NAME in libvirt.virsh("list", "--name").split():
        libvirt.virsh("destroy", NAME)


def define_secret(libvirt: Libvirt, folder: Path) -> None:
    description = folder / "secret.xml"
    description.write_text(
        f"<secret ephemeral='yes' private='yes'><uuid>{ENCRYPTION}</uuid>"
        "<usage type='vtpm'><name>guest</name></usage></secret>"
    )
    (folder / "passphrase").write_text("a passphrase")
    libvirt.virsh("secret-define", description)
    libvirt.virsh("secret-set-value", ENCRYPTION, "--file", folder / "passphrase", "--plain")


# -- the same calls, without libvirt ------------------------------------------------------


def test_features_that_libvirt_asks_for() -> None:
    assert OURS.command is not None
    command = [OURS.command, "socket", "--print-capabilities"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["type"] == "swtpm"
    wanted = {"tpm-1.2", "tpm-2.0", "cmdarg-pwd-fd", "cmdarg-migration", "nvram-backend-dir"}
    assert wanted <= set(answer["features"])


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm1"])
def test_start_and_end_as_libvirt_does(tpm2: bool, tmp_path: Path) -> None:
    """Keys come through pipes; the open, locked file with the process number stays open."""
    pid_file = os.open(tmp_path / "pid", os.O_RDWR | os.O_CREAT)
    fcntl.flock(pid_file, fcntl.LOCK_EX)
    passphrases = [os.pipe() for _ in range(2)]
    for _, write_end in passphrases:
        os.write(write_end, b"a passphrase")
        os.close(write_end)
    key, migration_key = (read_end for read_end, _ in passphrases)
    options = ["--key", f"pwdfd={key},mode=aes-256-cbc"]
    options += ["--migration-key", f"pwdfd={migration_key},mode=aes-256-cbc"]
    options += ["--migration", "release-lock-outgoing"]
    fds = (pid_file, key, migration_key)
    with Emulator(tmp_path / "tpm", *options, tpm2=tpm2, pass_fds=fds) as emulator:
        for fd in fds[1:]:
            os.close(fd)
        assert emulator.control.stat().st_mode & 0o777 == 0o600
        assert OURS.command is not None
        ioctl = [str(Path(OURS.command).with_name("swtpm_ioctl")), "--unix", str(emulator.control)]
        subprocess.run([*ioctl, "-i"], check=True)
        (state,) = emulator.state.glob("*permall")
        assert state.stat().st_mode & 0o777 == 0o600
        assert str(tmp_path / "pid") in open_files(emulator.process.pid).values()
        subprocess.run([*ioctl, "-s"], check=True)
        assert emulator.wait() == 0
        assert not emulator.control.exists()
    os.close(pid_file)
