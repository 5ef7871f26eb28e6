"""`swtpm resource-manager`: our own FUSE file plays the machine's TPM, and its second one /dev/tpmrm0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from tests.device import managed
from tests.device.managed import (
    clients,
    objects_of,
    opened,
    test_a_long_chain_of_tools_that_flush_nothing,
    test_a_long_command_holds_nobody_up_for_ever,
    test_any_mix_of_clients_against_a_model_without_limits,
    test_more_objects_than_a_tpm_holds_for_each_of_many_clients,
    test_no_client_reaches_anothers,
)
from tests.device.managed_view import vtpm
from tests.kernel.harness import Server, child, servers, wait_child
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of, create_primary_rsa, get_random
from tests.support.fuse import FuseServer, needs_fuse
from tests.support.managed_device import DeviceClient
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.device.managed import Client

__all__ = [
    "test_a_long_chain_of_tools_that_flush_nothing",
    "test_a_long_command_holds_nobody_up_for_ever",
    "test_any_mix_of_clients_against_a_model_without_limits",
    "test_more_objects_than_a_tpm_holds_for_each_of_many_clients",
    "test_no_client_reaches_anothers",
]

RELAY = Path(__file__).parents[1] / "support/relay.py"
FLUSH = m.flush(0x80000000)
TPM1_2 = "is a TPM 1.2"


def manager(*words: str | Path, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """One call that is expected to end by itself."""
    return subprocess.run(
        [*s.OURS, "resource-manager", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        pass_fds=pass_fds,
        env=s.environment(),
    )


class Managed:
    """A running one, over *device*: on sockets, or with *file* on a file of a FUSE mount."""

    def __init__(self, device: Path, folder: Path, *words: str | Path, file: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.device, self.log = device, folder / "log"
        self.control_address = folder / "ctrl"
        self.address = folder / "mount/tpm9" if file else folder / "managed"
        self.file = file
        arguments = [*s.OURS, "resource-manager", "--tpm", device, "--log", f"file={self.log}"]
        fds: list[int] = []
        listeners = []
        if file:
            arguments += ["-n", "tpm9", "--mount", folder / "mount"]
        else:
            for option, path in (("managed", self.address), ("ctrl", self.control_address)):
                path.unlink(missing_ok=True)
                listeners.append(s.listener(path))
                fds.append(listeners[-1].fileno())
                arguments += [f"--{option}", f"type=unixio,fd={fds[-1]}"]
        self.process = subprocess.Popen(
            [str(word) for word in (*arguments, *words)],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            env=s.environment(),
        )
        for one in listeners:
            one.close()
        if file:
            wait_until(self.address.exists, "the file is there", process=self.process, log=self.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.wait()
        assert "Traceback" not in self.said, self.said

    def client(self) -> s.Client | DeviceClient:
        return DeviceClient(self.address) if self.file else s.connect(self.address)

    def control(self) -> s.Client:
        return s.connect(self.control_address)

    def tcti(self) -> str:
        if self.file:
            return f"device:{self.address}"
        return f"cmd:{sys.executable} {RELAY} {self.address}"

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    # For `tests.device.managed.World`: nobody else can use the TPM, or take its power.

    def raw(self) -> Client:
        raise NotImplementedError

    def init(self) -> int:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def volatile_blob(self) -> bytes:
        raise NotImplementedError


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    needs_fuse()
    yield from servers(tmp_path, FuseServer)


@pytest.fixture
def tpm(make: Callable[..., Server]) -> Path:
    """A TPM that is somebody else's, as a file that takes one program at a time."""
    return make("tpm0").start().device


@pytest.fixture(params=["socket", "file", "below"])
def world(request: pytest.FixtureRequest, tpm: Path, tmp_path: Path) -> Iterator[Managed]:
    """Over /dev/tpm0 as a socket and as a file, and over /dev/tpmrm0."""
    device = tpm.with_name("tpmrm0") if request.param == "below" else tpm
    with Managed(device, tmp_path / "manager", file=request.param == "file") as found:
        yield found


@pytest.mark.parametrize("world", ["socket", "file"], indirect=True)
def test_quotas_are_one_clients(world: Managed) -> None:
    """What plays the kernel's manager has a quota of its own, of as many sessions."""
    managed.test_quotas_are_one_clients(world)


def held(tpm: Path) -> list[int]:
    """What the TPM holds when no manager has it."""
    with DeviceClient(tpm) as raw:
        kinds = (0x80000000, 0x02000000, 0x03000000)
        return [handle for kind in kinds for handle in m.listed(raw.command(m.list_handles(kind)))]


def test_who_is_there_is_told_and_can_be_ended(tpm: Path, tmp_path: Path) -> None:
    """By the program for people, while the TPM itself is used on another thread."""
    with Managed(tpm, tmp_path / "manager") as world, world.client() as client:
        keys = [opened(client, m.load_external(number)) for number in range(5)]
        where = ("--unix", str(world.control_address))
        (one,) = json.loads(vtpm("clients", "--json", *where).stdout)["clients"]
        assert [held["handle"] for held in one["objects"]] == [f"0x{key:08x}" for key in keys]
        assert (one["pid"], one["uid"]) == (os.getpid(), os.getuid())
        done = vtpm("flush", "--client", str(one["client"]), *where, f"0x{keys[0]:08x}")
        assert (done.returncode, done.stderr) == (0, "")
        assert m.listed(client.command(m.list_handles(keys[0]))) == keys[1:]


# -- its end --------------------------------------------------------------------------------


def test_nothing_stays_of_anybody_when_it_ends(tpm: Path, tmp_path: Path) -> None:
    with Managed(tpm, tmp_path / "manager") as world, clients(world, 3) as there:
        for number, client in enumerate(there):
            for _ in range(4):
                opened(client, m.load_external(number))
                session = opened(client, m.start_session())
            assert code_of(client.command(m.save(session))) == 0
        world.process.terminate()
        assert world.wait() == 0
    assert held(tpm) == []


def test_a_client_that_goes_leaves_nothing(tpm: Path, tmp_path: Path) -> None:
    with Managed(tpm, tmp_path / "manager") as world:
        for _ in range(30):
            with world.client() as client:
                for number in range(3):
                    opened(client, m.load_external(number))
                    opened(client, m.start_session())
        world.process.kill()
        world.wait()
        assert len(held(tpm)) <= 6  # of the last one, if at all


def test_a_process_that_connects_anew_for_each_command(tpm: Path, tmp_path: Path) -> None:
    path = tmp_path / "anew"
    words = ("--managed", f"type=unixio,path={path},per-process")
    with Managed(tpm, tmp_path / "one", *words) as server:
        wait_until(partial(s.listens, path), "it listens", process=server.process)
        server.address = path

        def ask(command: bytes) -> bytes:
            with server.client() as client:
                return client.command(command)

        keys = [m.handle_of(ask(m.load_external(number))) for number in range(5)]

        def elsewhere() -> None:
            assert code_of(ask(m.read_public(keys[0]))) == 0xB0910
            m.handle_of(ask(m.load_external(9)))

        with child(elsewhere) as pid:
            assert wait_child(pid) == 0
        assert [code_of(ask(m.read_public(key))) for key in keys] == [0] * 5
    assert held(tpm) == []


def test_it_ends_in_the_middle_of_a_command(tpm: Path, tmp_path: Path) -> None:
    with Managed(tpm, tmp_path / "manager") as world, clients(world, 2) as (slow, other):
        opened(other, m.load_external(1))
        slow.send(create_primary_rsa(unique=os.urandom(8)))
        world.process.terminate()
        assert world.wait() == 0
    assert held(tpm) == []


@pytest.mark.parametrize("flush_all", [False, True])
def test_one_that_was_killed_and_the_next(tpm: Path, tmp_path: Path, *, flush_all: bool) -> None:
    first = Managed(tpm, tmp_path / "one")
    with first.client() as client:
        sessions = [opened(client, m.start_session()) for _ in range(5)]
        first.process.kill()
        first.wait()
    assert [handle & 0xFFFFFF for handle in sorted(sessions)] == list(range(5))
    words = ("--flush-all",) if flush_all else ()
    with Managed(tpm, tmp_path / "two", *words) as second:
        with second.client() as client:
            assert opened(client, m.start_session()) & 0xFFFFFF == (0 if flush_all else 5)
            client.command(m.flush(sessions[-1] if not flush_all else 0x02000099))
            assert objects_of(client) == []
        told = "The TPM holds 0 objects and 5 sessions of others; --flush-all" in second.said
        assert told is not flush_all
    assert len(held(tpm)) == (0 if flush_all else 5)


def test_one_whose_tpm_goes_away(make: Callable[..., Server], tmp_path: Path) -> None:
    """Who waits is answered, in the middle of a command, too."""
    server = make("tpm0").start()
    with Managed(server.device, tmp_path / "manager") as world, clients(world, 3) as there:
        key = opened(there[1], m.load_external(1))
        there[0].send(create_primary_rsa(unique=os.urandom(8)))
        for client in there[1:]:
            client.send(m.read_public(key))
        server.signal(signal.SIGKILL)
        assert code_of(there[0].response()) in {0, 0x101}
        assert code_of(there[1].response()) in {0, 0x101, 0x000B0101}
        assert code_of(there[2].response()) in {0x101, 0x000B0910}
        assert world.wait() == 1
        lines = [line for line in world.said.splitlines() if "has gone away" in line]
        assert len(lines) == 1, world.said
    server.gone(pid_file=True)


# -- while it runs --------------------------------------------------------------------------


def test_objects_leave_the_tpm_in_a_pause(tpm: Path, tmp_path: Path) -> None:
    capture = tmp_path / "capture"
    with (
        Managed(tpm, tmp_path / "manager", "--pcap", f"file={capture}") as world,
        world.client() as client,
    ):
        key = opened(client, m.load_external(1))
        wait_until(lambda: FLUSH in capture.read_bytes(), "it is taken out", process=world.process)
        assert code_of(client.command(m.read_public(key))) == 0


def test_nothing_stays_in_the_place_that_a_manager_below_gives(tpm: Path, tmp_path: Path) -> None:
    """After a command, and beside others that use it."""
    capture, below = tmp_path / "capture", tpm.with_name("tpmrm0")
    with (
        Managed(below, tmp_path / "manager", "--pcap", f"file={capture}") as world,
        world.client() as client,
        DeviceClient(below) as neighbour,
    ):
        theirs = opened(neighbour, m.load_external(2))
        session = opened(client, m.start_session())
        save = m.save(session)
        wait_until(lambda: save in capture.read_bytes(), "it is saved", process=world.process)
        assert code_of(client.command(m.policy_digest(session))) == 0
        assert code_of(neighbour.command(m.read_public(theirs))) == 0


def test_it_shuts_itself_in(tpm: Path, tmp_path: Path) -> None:
    with Managed(tpm, tmp_path / "manager") as world, world.client() as client:
        assert len(client.command(get_random(8))) == 20
        status = Path(f"/proc/{world.process.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status


def test_what_its_control_channel_can_do(tpm: Path, tmp_path: Path) -> None:
    """Nothing that is the TPM's: no power, no state, no way past the manager."""
    with Managed(tpm, tmp_path / "manager") as world, world.client() as client:
        with world.control() as control:
            offered = control.control(s.GET_CAPABILITY, size=8)
            assert offered[4:] == m.u32(1 << 1 | 1 << 3 | 1 << 5 | 1 << 11)
            assert control.result(s.INIT, m.u32(0)) == 0xA
            assert control.result(s.STOP) == 0xA
            assert control.result(s.GET_STATEBLOB, m.u32(1, s.VOLATILE, 0)) == 0xA
            assert control.result(s.SET_LOCALITY, m.u32(0)[:1]) == 0
            assert control.result(s.SET_LOCALITY, b"\1") != 0
            with s.socket_pair() as (_, theirs):
                assert control.set_data_fd(theirs.fileno()) != 0
            assert len(client.command(get_random(8))) == 20
            assert control.result(s.SHUTDOWN) == 0
        assert world.wait() == 0
    assert held(tpm) == []


def test_in_the_background_as_another_user(tpm: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    path, pid, log = (tmp_path / name for name in ("managed", "pid", "log"))
    with s.listener(path) as sock:
        number = sock.fileno()
        words = ["--managed", f"type=unixio,fd={number}", "--pid", f"file={pid}"]
        words += ["--log", f"file={log}", "--daemon", "--runas", "nobody"]
        done = manager("--tpm", tpm, *words, pass_fds=(number,))
    assert (done.returncode, done.stderr) == (0, ""), log.read_text()
    end = os.pidfd_open(int(pid.read_text()))
    try:
        with s.connect(path) as client:
            assert opened(client, m.load_external(1)) == 0x80000000
            status = Path(f"/proc/{pid.read_text().strip()}/status").read_text()
            assert "Uid:\t65534\t65534\t65534\t65534" in status
            signal.pidfd_send_signal(end, signal.SIGTERM)
            assert s.readable(end, PATIENCE_SECONDS)
    finally:
        os.close(end)
    assert held(tpm) == []


# -- what cannot be -------------------------------------------------------------------------


def test_only_one_program_has_the_tpm(tpm: Path, tmp_path: Path) -> None:
    with Managed(tpm, tmp_path / "manager") as world, world.client() as client:
        opened(client, m.load_external(1))
        done = manager("--tpm", tpm, "--managed", f"type=unixio,path={tmp_path}/second")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "Device or resource busy; another program has it open" in done.stderr
        assert not (tmp_path / "second").exists()
        assert objects_of(client) == [0x80000000]


def test_a_tpm_1_2_needs_none(make: Callable[..., Server], tmp_path: Path) -> None:
    old = make("tpm0", tpm2=False, more=("--tpm12",)).start()
    done = manager("--tpm", old.device, "--managed", f"type=unixio,path={tmp_path}/second")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert TPM1_2 in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-n", "tpm9"), "Give --tpm DEVICE"),
        (("--tpm", "/dev/null"), "Where are clients to come?"),
        (("--tpm", "/dev/null", "-n", "a", "--managed", "type=tcp,port=1"), "Where are clients"),
        (("--tpm", "/dev/null", "--managed", "type=tcp,port=1", "--mount", "/x"), "--mount is for"),
        (("--tpm", "/dev/null", "-n", "a", "--ctrl", "type=tcp,port=1"), "--ctrl is for"),
        (("--tpm", "/nowhere", "--managed", "type=unixio,path=/nowhere/s"), "is there a TPM?"),
        (("--tpm", "/etc/passwd", "--managed", "type=tcp,port=1"), "is no TPM device"),
    ],
)
def test_what_it_cannot_do_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = manager(*words)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
