"""``swtpm resource-manager`` over the kernel's own /dev/tpmN and /dev/tpmrmN, on our vTPM proxy."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from tests.device.managed import clients, objects_of, opened
from tests.kernel.harness import PATIENCE, errno_from, needs, run, wait_until
from tests.kernel.proxy import SWTPM, Proxy
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of, create_primary_rsa, get_random
from tests.support.managed_device import DeviceClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.device.managed import Client

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module", autouse=True)
def _driver() -> None:
    error = errno_from(lambda: os.close(os.open("/dev/vtpmx", os.O_RDWR)))
    needs(not error, f"/dev/vtpmx: {os.strerror(error)}; run kernel-helpers/lab -- ...")
    needs(shutil.which("tpm2_getrandom") is not None, "tpm2-tools are missing")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One TPM of the kernel's for all tests; each leaves nothing in it."""
    with Proxy(tmp_path_factory.mktemp("proxy")) as found:
        yield found
        assert found.end() == 0


class Managed:
    """A manager in the foreground, with clients on a socket."""

    def __init__(self, device: Path, folder: Path, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.log, self.address = folder / "log", folder / "managed"
        self.address.unlink(missing_ok=True)
        with s.listener(self.address) as sock:
            managed = f"type=unixio,fd={sock.fileno()}"
            arguments = ["--tpm", str(device), "--managed", managed, "--log", f"file={self.log}"]
            self.process = subprocess.Popen(
                [SWTPM, "resource-manager", *arguments, *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[sock.fileno()],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE)
        assert "Traceback" not in self.said, self.said

    def client(self) -> s.Client:
        return s.connect(self.address)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def raw(self) -> Client:
        raise NotImplementedError

    def init(self) -> int:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def volatile_blob(self) -> bytes:
        raise NotImplementedError

    def tcti(self) -> str:
        raise NotImplementedError


@contextmanager
def many(world: Managed, count: int) -> Iterator[list[s.Client]]:
    """Clients with ten keys and four sessions each, all of which answer."""
    with clients(world, count) as there:
        keys = [
            [opened(c, m.load_external(10 * n + k)) for k in range(10)] for n, c in enumerate(there)
        ]
        sessions = [[opened(c, m.start_session()) for _ in range(4)] for c in there]
        names = [
            [m.unique_of(c.command(m.read_public(key))) for key in of]
            for c, of in zip(there, keys, strict=True)
        ]
        assert len({name for of in names for name in of}) == 10 * count
        for client, of, theirs, named in zip(there, keys, sessions, names, strict=True):
            assert [m.unique_of(client.command(m.read_public(key))) for key in of] == named
            assert all(code_of(client.command(m.policy_digest(one))) == 0 for one in theirs)
            assert objects_of(client) == of
        yield there


def held(proxy: Proxy) -> list[int]:
    """What the TPM holds when no manager has it."""
    with DeviceClient(proxy.device) as raw:
        kinds = (0x80000000, 0x02000000, 0x03000000)
        return [handle for kind in kinds for handle in m.listed(raw.command(m.list_handles(kind)))]


@pytest.mark.parametrize("name", ["device", "shared"])
def test_more_than_the_kernel_gives(proxy: Proxy, tmp_path: Path, name: str) -> None:
    """Over /dev/tpm0, and over /dev/tpmrm0, which refuses the fourth of anything."""
    with Managed(getattr(proxy, name), tmp_path / "manager") as world:
        with many(world, 3):
            pass
        with world.client() as client:
            client.send(create_primary_rsa(unique=os.urandom(8)))
            assert m.handle_of(client.response()) == 0x80000000
            world.process.terminate()
            assert world.process.wait(PATIENCE) == 0
    assert held(proxy) == []


def test_it_is_the_only_one_on_the_device(proxy: Proxy, tmp_path: Path) -> None:
    with Managed(proxy.device, tmp_path / "manager") as world, world.client() as client:
        assert len(client.command(get_random(8))) == 20
        error = errno_from(lambda: os.close(os.open(proxy.device, os.O_RDWR)))
        assert error == errno.EBUSY
        words = ("--tpm", proxy.device, "--managed", f"type=unixio,path={tmp_path}/second")
        done = run(SWTPM, "resource-manager", *words, status=1)
        assert "Device or resource busy; another program has it open" in done.stderr


def test_the_kernels_own_manager_has_room_beside_it(proxy: Proxy, tmp_path: Path) -> None:
    """In a pause: with all slots taken, each command of its clients with an object is EFAULT."""
    with Managed(proxy.device, tmp_path / "manager") as world, many(world, 2) as there:

        def has_room() -> bool:
            with DeviceClient(proxy.shared) as neighbour:
                try:
                    key = m.handle_of(neighbour.command(m.load_external(77)))
                    return code_of(neighbour.command(m.read_public(key))) == 0
                except (OSError, AssertionError):
                    return False

        wait_until(has_room, "the kernel's clients have room", process=world.process)
        for client in there:
            assert len(objects_of(client)) == 10
            for key in objects_of(client):
                assert code_of(client.command(m.read_public(key))) == 0


def test_the_kernels_other_clients_keep_what_they_have(proxy: Proxy, tmp_path: Path) -> None:
    """Over /dev/tpmrm0, and a session that one has saved, with --flush-all alone."""
    with DeviceClient(proxy.shared) as neighbour:
        key = m.handle_of(neighbour.command(m.load_external(77)))
        session = m.handle_of(neighbour.command(m.start_session()))
        context = neighbour.command(m.save(session))[10:]
        with Managed(proxy.shared, tmp_path / "one") as world:
            with many(world, 1):
                assert code_of(neighbour.command(m.read_public(key))) == 0
            assert world.end() == 0
        assert m.handle_of(neighbour.command(m.load(context))) == session
        assert code_of(neighbour.command(m.policy_digest(session))) == 0
        context = neighbour.command(m.save(session))[10:]
        with Managed(proxy.shared, tmp_path / "two", "--flush-all") as world:
            with world.client() as client:
                assert len(client.command(get_random(8))) == 20
            assert world.end() == 0
        assert code_of(neighbour.command(m.load(context))) == 0x1CB
        assert code_of(neighbour.command(m.read_public(key))) == 0


def test_a_device_of_its_own(proxy: Proxy, tmp_path: Path) -> None:
    """On CUSE, with tpm2-tools."""
    needs(os.access("/dev/cuse", os.R_OK | os.W_OK), "/dev/cuse is missing; modprobe cuse")
    pid, device = tmp_path / "pid", Path("/dev/vtpmrm77")
    words = ("--tpm", proxy.device, "-n", device.name, "--daemon", "--pid", f"file={pid}")
    run(SWTPM, "resource-manager", *words, "--log", f"file={tmp_path}/log")
    end = os.pidfd_open(int(pid.read_text()))
    try:
        env = {"TPM2TOOLS_TCTI": f"device:{device}"}
        run("tpm2_createprimary", "-Q", "-c", tmp_path / "primary", env=env)
        run("tpm2_readpublic", "-Q", "-c", tmp_path / "primary", env=env)
        with DeviceClient(device) as one, DeviceClient(device) as other:
            for client in (one, other):
                for number in range(5):
                    assert m.handle_of(client.command(m.load_external(number)))
        run("kill", pid.read_text().strip())
        assert s.readable(end, PATIENCE)
    finally:
        os.close(end)
    assert not device.exists()
    assert held(proxy) == []


def test_a_tpm_that_goes_away(tmp_path: Path) -> None:
    """The kernel answers EPIPE or ENODEV when whoever serves the TPM has ended."""
    with Proxy(tmp_path / "proxy") as proxy, Managed(proxy.device, tmp_path / "manager") as world:
        with world.client() as client:
            assert len(client.command(get_random(8))) == 20
            proxy.end(signal.SIGKILL)
            assert code_of(client.command(get_random(8))) & 0xFFFF == 0x101
            assert world.process.wait(PATIENCE) == 1
        assert "has gone away" in world.said
