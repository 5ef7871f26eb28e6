"""Containers with a TPM, by other people's runtimes, and neighbours without: docs/containers.md."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.kernel.harness import PATIENCE, ROOT, Done, errno_from, needs, run
from tests.kernel.proxy import SWTPM, Proxy, next_number
from tests.support.commands import pcr_read, pcr_value
from tests.support.sockets import listens
from tests.support.vtpmd import running
from tests.support.waiting import wait_until
from vtpm_cuse.client.manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("warm")

HELPER: Final = str(ROOT / "kernel-helpers/tpm-device")
SESSION: Final = str(ROOT / "tests/support/tpm2_session.sh")
TCTI: Final = "TPM2TOOLS_TCTI=device:/dev/tpmrm0"
CGROUPS: Final = Path("/sys/fs/cgroup")
WORK: Final = "/srv"
"""A folder that the image has, and that is writable in the containers."""

RUNTIMES: Final = ("crun", "runc")
ORDINARY: Final = 65534
"""A user without a range of further ones, as whom podman needs no program for that."""


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    error = errno_from(lambda: os.close(os.open("/dev/vtpmx", os.O_RDWR)))
    needs(not error, f"/dev/vtpmx: {os.strerror(error)}; run kernel-helpers/lab -- ...")
    for program in (*RUNTIMES, "podman", "tpm2_getrandom"):
        needs(shutil.which(program) is not None, f"{program} is missing")
    if not (CGROUPS / "cgroup.controllers").exists():
        run("mount", "-t", "cgroup2", "none", CGROUPS)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root file system with tpm2-tools: this machine's own, without what is mounted in it."""
    folder = tmp_path_factory.mktemp("image")
    run("mount", "--bind", "/", folder)
    yield folder
    run("umount", folder)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(tmp_path_factory.mktemp("proxy")) as server:
        yield server
        assert server.end() == 0


def grant_for(proxy: Proxy) -> dict[str, Any]:
    """What the helper says a runtime's configuration is to have."""
    words = ("--owner", "0:4712", "--mode", "0640", "--for", "oci", proxy.device)
    found: dict[str, Any] = json.loads(run(HELPER, *words).stdout)["linux"]
    for path, device in zip((proxy.device, proxy.shared), found["devices"], strict=True):
        status = os.stat(path)
        assert (status.st_uid, status.st_gid, status.st_mode) == (0, 4712, stat.S_IFCHR | 0o640)
        assert (device["uid"], device["gid"], device["fileMode"]) == (0, 4712, 0o640)
        numbers = (os.major(status.st_rdev), os.minor(status.st_rdev))
        assert (device["major"], device["minor"]) == numbers
    return found


@pytest.fixture(scope="module")
def granted(proxy: Proxy) -> dict[str, Any]:
    return grant_for(proxy)


class Bundle:
    """A container of an OCI runtime: the runtime's own sample configuration, and a command."""

    def __init__(self, folder: Path, runtime: str, image: Path) -> None:
        self.folder, self.runtime = folder, runtime
        folder.mkdir()
        run(runtime, "spec", cwd=folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.config["root"] = {"path": str(image), "readonly": True}
        process = self.config["process"]
        process["terminal"] = False
        process["env"] += [TCTI, f"TMPDIR={WORK}"]
        self.config["mounts"].append({"destination": WORK, "type": "tmpfs", "source": "tmpfs"})

    def give(self, granted: dict[str, Any]) -> Bundle:
        """Adds the devices, and nothing else."""
        linux = self.config["linux"]
        linux.setdefault("devices", []).extend(granted["devices"])
        linux["resources"]["devices"].extend(granted["resources"]["devices"])
        return self

    def may(self, *capabilities: str) -> Bundle:
        for names in self.config["process"]["capabilities"].values():
            names.extend(capabilities)
        return self

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        self.config["process"]["args"] = list(command)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        words = [self.runtime, "run", "--bundle", str(self.folder), self.folder.name]
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


def test_session_in_a_container(
    image: Path, proxy: Proxy, granted: dict[str, Any], tmp_path: Path
) -> None:
    """Every tool works on /dev/tpmrm0, and what it changes is changed in this TPM."""
    before = (proxy.sysfs / "pcr-sha256/16").read_text()
    done = Bundle(tmp_path / "session", "crun", image).give(granted).run(SESSION)
    assert done.returncode == 0, done
    assert done.stdout.endswith("session passed\n")
    assert (proxy.sysfs / "pcr-sha256/16").read_text() != before


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_neighbour_cannot_reach_it(
    runtime: str, image: Path, proxy: Proxy, granted: dict[str, Any], tmp_path: Path
) -> None:
    """Not by its path, and not by a node of its own making; with what is given it could."""
    status = os.stat(proxy.shared)
    numbers = f"{os.major(status.st_rdev)} {os.minor(status.st_rdev)}"
    tool = "tpm2_getrandom --hex 8"

    neighbour = Bundle(tmp_path / f"{runtime}-plain", runtime, image).may("CAP_MKNOD")
    done = neighbour.run("sh", "-c", f"echo here; {tool}; test -e /dev/tpmrm0")
    assert (done.returncode, done.stdout) == (1, "here\n"), done

    own_node = f"mknod {WORK}/mine c {numbers} && {tool} -T device:{WORK}/mine"
    done = neighbour.run("sh", "-c", f"echo here; {own_node}")
    assert done.returncode != 0
    assert done.stdout == "here\n"
    assert "Operation not permitted" in done.stderr

    given = Bundle(tmp_path / f"{runtime}-tpm", runtime, image).give(granted)
    done = given.run("sh", "-c", tool)
    assert done.returncode == 0, done
    assert len(bytes.fromhex(done.stdout)) == 8

    rules = [{**rule, "access": "rwm"} for rule in granted["resources"]["devices"]]
    ruled = Bundle(tmp_path / f"{runtime}-ruled", runtime, image).may("CAP_MKNOD")
    ruled.give({"devices": [], "resources": {"devices": rules}})
    done = ruled.run("sh", "-c", own_node)
    assert done.returncode == 0, done
    assert len(bytes.fromhex(done.stdout)) == 8


def test_two_containers_with_a_tpm_each(
    image: Path, proxy: Proxy, granted: dict[str, Any], tmp_path: Path
) -> None:
    """Both call theirs /dev/tpmrm0."""
    extend = "tpm2_pcrextend 13:sha256=" + "77" * 32
    with Proxy(tmp_path / "other") as other:
        theirs = grant_for(other)
        assert {device["path"] for device in theirs["devices"]} == {"/dev/tpm0", "/dev/tpmrm0"}
        done = Bundle(tmp_path / "other-one", "crun", image).give(theirs).run("sh", "-c", extend)
        assert done.returncode == 0, done
        assert (other.sysfs / "pcr-sha256/13").read_text() != (
            proxy.sysfs / "pcr-sha256/13"
        ).read_text()
        assert other.end() == 0


# The lab's root is an overlay already, and it has no systemd.
PODMAN: Final = ("podman", "--cgroup-manager=cgroupfs", "--storage-driver=vfs")


def test_podman(image: Path, proxy: Proxy) -> None:
    options = run(HELPER, "--for", "podman", proxy.device).stdout.split()
    assert options[-1] == f"--device={proxy.shared}:/dev/tpmrm0:rw"
    start = (*PODMAN, "run", "--rm")
    plain = ("--network=none", "--rootfs", str(image))
    tool = ("tpm2_getrandom", "--hex", "8", "-T", "device:/dev/tpmrm0")
    assert len(bytes.fromhex(run(*start, *options, *plain, *tool).stdout)) == 8
    done = run(*start, *plain, *tool, status=None)
    assert done.status != 0
    assert "/dev/tpmrm0" in done.stderr


@pytest.fixture(scope="module")
def manager(cuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """One whose documents are where podman reads them."""
    folder = Path("/run/cdi")
    needs(not folder.exists(), f"{folder} is there already")
    with (
        running(tmp_path_factory.mktemp("vtpmd"), "--idle", "3600", seconds=PATIENCE) as daemon,
        Manager(str(daemon.path)) as found,
    ):
        yield found
        assert daemon.end() == 0
    folder.rmdir()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_tpm_of_the_manager_by_its_name(runtime: str, image: Path, manager: Manager) -> None:
    """It is its owner's in there, too, and nobody else's; it goes with its last container."""

    def contained(*words: str, user: int = 4711, status: int | None = 0) -> str:
        start = (*PODMAN, "--runtime", runtime, "run", "--rm", "--network=none", f"--user={user}")
        script = (
            "stat -c '%u %a' /dev/tpm*; tpm2_getrandom --hex 4 -T device:/dev/tpm0 &&"
            "tpm2_pcrextend 16:sha256=" + "77" * 32
        )
        done = run(*start, *words, "--rootfs", str(image), "sh", "-c", script, status=status)
        return done.stdout

    device = "--device=vtpm-cuse.org/vtpm=web1"
    manager.create("web1", interface="cuse", owner=4711, cdi="keep")
    manager.start("web1")
    assert manager.hibernate("web1").state == "asleep"
    found = contained(device).split()
    assert found[:4] == ["4711", "600"] * 2
    assert len(bytes.fromhex(found[4])) == 4
    assert contained(device, user=4712, status=None).split() == found[:4]
    assert contained(status=None) == ""
    tpm = manager.update("web1", cdi="remove")
    assert tpm.managed_device is not None
    with open(tpm.managed_device, "r+b", buffering=0) as shared:
        shared.write(pcr_read(16))
        assert pcr_value(shared.read(4096)) != bytes(32)
    assert contained(f"--device=vtpm-cuse.org/vtpm={tpm.id}").split()[:4] == found[:4]
    wait_until(lambda: manager.list() == [], "its removal, by who cleans up the container")


@pytest.fixture
def home() -> Iterator[Path]:
    """Of an ordinary user, with an image in it."""
    folder = Path(tempfile.mkdtemp(prefix="vtpm-podman-"))
    image = folder / "image"
    image.mkdir()
    os.chown(folder, ORDINARY, ORDINARY)
    run("mount", "--bind", "/", image)
    yield folder
    run("umount", image)
    shutil.rmtree(folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_ordinary_user_gives_a_tpm_of_his(runtime: str, manager: Manager, home: Path) -> None:
    """To a container of his own podman: it has no other rights than he has."""
    names = {"his": ORDINARY, "theirs": ORDINARY + 1}
    for name, owner in names.items():
        manager.create(name, interface="cuse", owner=owner, cdi="keep")
        manager.start(name)
    user = (f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups")
    places = (f"HOME={home}", f"XDG_RUNTIME_DIR={home}")
    start = ("setpriv", *user, "env", "-C", home, *places, *PODMAN, "--runtime", runtime, "run")
    script = "stat -c '%u %a' /dev/tpm*; tpm2_getrandom --hex 4 -T device:/dev/tpm0"

    def contained(name: str, status: int | None) -> str:
        words = ("--rm", "--network=none", f"--device=vtpm-cuse.org/rootless={name}", "--rootfs")
        return run(*start, *words, home / "image", "sh", "-c", script, status=status).stdout

    found = contained("his", 0).split()
    assert found[:4] == ["0", "600"] * 2  # as root of the container he is who he is here
    assert len(bytes.fromhex(found[4])) == 4
    assert contained("theirs", None).split() == ["65534", "600"] * 2
    for name in names:
        manager.remove(name, force=True)


def test_containerd(manager: Manager, tmp_path: Path) -> None:
    """That of Debian unstable, in its folder there; that of Debian 12 is too old for it."""
    folder = Path.home() / ".cache/vtpm-cuse/unstable"
    needs((folder / "usr/bin/ctr").exists(), f"{folder} has no containerd: kernel-helpers/unstable")
    system, place = tmp_path / "system", Path("/run/vtpm-containerd")
    socket, log = place / "socket", tmp_path / "log"
    place.mkdir()
    system.mkdir()
    image = place / "image"
    image.mkdir()
    for mounted in (image, system):
        run("mount", "--bind", folder, mounted)
    for name in ("proc", "sys", "dev", "run"):
        run("mount", "--rbind", f"/{name}", system / name)
    (place / "config.toml").write_text(
        f"version = 3\nroot = '{place}/root'\nstate = '{place}/state'\n"
        f"[grpc]\naddress = '{socket}'\n"
    )
    inside = ("env", "PATH=/usr/sbin:/usr/bin", "chroot", system)
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*inside, "containerd", "--config", place / "config.toml"], stderr=said
        ) as server,
    ):
        try:
            wait_until(
                partial(listens, socket), "containerd", process=server, log=log, seconds=PATIENCE
            )
            manager.create("web2", interface="cuse", owner=4711, cdi="keep")
            manager.start("web2")

            def contained(*words: str, status: int | None = 0) -> Done:
                start = (*inside, "ctr", "--address", socket, "run", "--rm", "--user", "4711")
                script = "id -u; stat -c %a /dev/tpm*; tpm2_getrandom --hex 4 -T device:/dev/tpm0"
                rest = ("--env", "PATH=/usr/bin", "--rootfs", image, "one", "/bin/sh", "-c", script)
                return run(*start, *words, *rest, status=status)

            assert contained(status=None).stdout == "4711\n"
            refused = contained("--device", "vtpm-cuse.org/vtpm=web3", status=1)
            assert "unresolvable" in refused.stderr
            found = contained("--device", "vtpm-cuse.org/vtpm=web2").stdout.split()
            assert found[:3] == ["4711", "600", "600"]
            assert len(bytes.fromhex(found[3])) == 4
            manager.remove("web2", force=True)
        finally:
            server.kill()
    run("umount", "--recursive", "--lazy", system)
    run("umount", "--lazy", image)


@pytest.fixture
def own_place() -> Iterator[Path]:
    """Where a container that writes to the lab's own file system keeps the state."""
    place = Path("/var/lib/vtpm-cuse")
    needs(not place.exists(), f"{place} is there already")
    yield place / "proxy0"
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(
    "words", ["", f"--tpm2 --tpmstate dir={WORK}/state"], ids=["one line", "a place of its own"]
)
def test_server_in_the_container(words: str, image: Path, own_place: Path, tmp_path: Path) -> None:
    """Given /dev/vtpmx, a container makes its TPM itself; the helper makes the nodes there."""
    control = os.stat("/dev/vtpmx").st_rdev
    vtpmx = {"type": "c", "major": os.major(control), "minor": os.minor(control)}
    granted = {
        "devices": [{"path": "/dev/vtpmx", **vtpmx, "fileMode": 0o600, "uid": 0, "gid": 0}],
        "resources": {"devices": [{"allow": True, "type": "c", "access": "rwm"}]},
    }
    server = f"{SWTPM} chardev --vtpm-proxy {words} -d"
    script = (
        f"mkdir state && {HELPER} --owner 0:4712 --mode 0640 -- {server} --pid file={WORK}/pid "
        "&& tpm2_getrandom --hex 8 -T device:$(echo /dev/tpmrm*) "
        "&& stat -c ' %u %g %a' /dev/tpm* && kill $(cat pid)"
    )
    bundle = Bundle(tmp_path / "own", "crun", image).give(granted)
    bundle.may("CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_CHOWN", "CAP_FOWNER")
    bundle.config["process"]["cwd"] = WORK
    bundle.config["root"]["readonly"] = bool(words)
    number = next_number()
    done = bundle.run("sh", "-c", script)
    assert done.returncode == 0, done
    assert done.stdout.endswith(" 0 4712 640\n 0 4712 640\n")
    if not words:
        assert f" is a TPM 2.0, whose state is in {own_place}." in done.stderr
    assert (own_place / "tpm2-00.permall").exists() is not bool(words)
    assert not Path(f"/sys/class/tpm/tpm{number}").exists()


# -- the helper -----------------------------------------------------------------------------


def test_helper_sleeps_until_the_device_comes(tmp_path: Path) -> None:
    """Started first, it hears of a device that is made afterwards."""
    number = next_number()
    helper = subprocess.Popen(
        [HELPER, "--for", "podman", f"/dev/tpm{number}"], stdout=subprocess.PIPE, text=True
    )
    with Proxy(tmp_path) as server:
        assert server.number == number
        out, _ = helper.communicate(timeout=PATIENCE)
        assert (helper.returncode, out.count("--device=")) == (0, 2)
        assert server.end() == 0
