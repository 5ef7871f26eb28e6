"""`swtpm socket --managed`: each client has a TPM of its own, whatever the others do."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.device.managed import *  # noqa: F403
from tests.device.managed import clients, opened
from tests.device.managed_crowd import *  # noqa: F403
from tests.device.managed_hostile import *  # noqa: F403
from tests.device.managed_view import *  # noqa: F403
from tests.device.managed_view import vtpm
from tests.kernel.harness import needs, run
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of, create_primary_rsa, get_random, tpm2

if TYPE_CHECKING:
    from collections.abc import Iterator

RELAY = Path(__file__).parents[1] / "support/relay.py"
CLIENTS = 64


class Managed(s.Server):
    """One with a managed socket beside the data channel of a single client."""

    channel = "unix"

    def __init__(
        self, folder: Path, *words: str, state: Path | None = None, more: str = ""
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.managed_address = folder / "managed"
        with s.listener(self.managed_address) as sock:
            words += ("--managed", f"type=unixio,fd={sock.fileno()}{more}")
            super().__init__(folder, *words, pass_fds=[sock.fileno()], state=state)

    def client(self) -> s.Client:
        return s.connect(self.managed_address)

    def raw(self) -> s.Client:
        return self.data()

    def stop(self) -> None:
        assert self.request(s.STOP) == bytes(4)

    def volatile_blob(self) -> bytes:
        with self.control() as control:
            result, _, blob = control.get_blob(s.VOLATILE)
        assert result == 0
        return blob

    def place(self) -> tuple[str, ...]:
        return ("--unix", str(self.control_address))

    def tcti(self) -> str:
        return f"cmd:{sys.executable} {RELAY} {self.managed_address}"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Managed]:
    with Managed(tmp_path, *s.RUNNING) as found:
        yield found


def test_one_that_never_reads_holds_nobody_up(world: Managed) -> None:
    with clients(world, 2) as (deaf, other):
        deaf.socket.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += deaf.socket.send(m.list_handles(0x80000000) * 100)
        assert sent
        assert len(other.command(get_random(8))) == 20


def test_silent_clients_make_way(world: Managed) -> None:
    with world.client() as known:
        assert len(known.command(get_random(8))) == 20
        with clients(world, 3 * CLIENTS), world.client() as late:
            assert len(late.command(get_random(8))) == 20
            assert len(known.command(get_random(8))) == 20


def test_limits_of_a_user_and_of_a_client(tmp_path: Path) -> None:
    limits = ("--managed-limits", "clients-of-a-user=5,objects=3")
    with Managed(tmp_path, *s.RUNNING, *limits) as world, clients(world, 5) as there:
        for client in there:
            assert len(client.command(get_random(8))) == 20
        with world.client() as late:
            assert late.ended()
        for client in there:
            for number in range(3):
                opened(client, m.load_external(number))
            assert code_of(client.command(m.load_external(3))) == 0xB0902


def test_locality_is_of_one_command(world: Managed) -> None:
    """The prefix that names one; TPM2_PCR_Reset of PCR 20 tells them apart."""
    reset = tpm2(0x13D, s.u32(20) + m.PASSWORD, sessions=True)
    with clients(world, 2) as (here, there):
        prefixed = m.u32(8) + b"\x02" + s.u32(len(reset)) + reset
        here.send(prefixed)
        size = int.from_bytes(here.exactly(4), "big")
        assert code_of(here.exactly(size)) == 0
        assert here.exactly(4) == bytes(4)
        assert code_of(there.command(reset)) == 0x907
        assert code_of(here.command(reset)) == 0x907


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_while_many_use_it(tmp_path: Path, number: int) -> None:
    with Managed(tmp_path / "one", *s.RUNNING) as server, clients(server, 4) as there:
        for client in there:
            opened(client, m.load_external(1))
        there[0].send(create_primary_rsa(unique=b"x"))
        server.process.send_signal(number)
        assert server.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    again = Managed(tmp_path / "two", *s.RUNNING, state=server.state)
    with again as server, server.client() as client:
        assert opened(client, m.load_external(1)) == 0x80000000


def test_a_tpm_1_2_has_none(tmp_path: Path) -> None:
    done = s.run_swtpm(
        "--tpmstate", f"dir={tmp_path}", "--managed", f"type=unixio,path={tmp_path}/m"
    )
    assert done.returncode == 1
    assert "give --tpm2" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_state_that_was_handed_out_stays_away(tmp_path: Path) -> None:
    """Nothing of the manager's brings the lock back, whatever it has in the TPM."""
    words = (*s.RUNNING, "--migration", "release-lock-outgoing")
    with Managed(tmp_path, *words) as server, server.client() as client:
        opened(client, m.load_external(1))
        with server.control() as control:
            for kind in (s.PERMANENT, s.SAVESTATE):
                control.get_blob(kind)
            assert not s.is_locked(server.state)
            assert control.get_blob(s.VOLATILE)[0] == 0
            assert not s.is_locked(server.state)
        assert code_of(client.command(get_random(8))) == 0  # takes it back
        assert s.is_locked(server.state)


def test_clients_of_a_port_are_told_apart_by_their_addresses(tmp_path: Path) -> None:
    with s.listener() as listening:
        fd, port = listening.fileno(), listening.getsockname()[1]
        words = (*s.RUNNING, "--managed", f"type=tcp,fd={fd}")
        running = s.Server(tmp_path, *words, control="tcp", pass_fds=[fd])
    with running as server, s.connect(port) as client:
        assert opened(client, m.load_external(1))
        host, own = client.socket.getsockname()
        done = vtpm("clients", "--json", "--tcp", f":{server.control_address}")
        (found,) = json.loads(done.stdout)["clients"]
        assert (found["channel"], found["address"]) == ("tcp", f"{host}:{own}")
        assert (found["pid"], found["uid"]) == (None, None)


def test_a_tpm_without_a_manager_says_so(tmp_path: Path) -> None:
    with s.Server(tmp_path, *s.RUNNING) as server:
        done = vtpm("clients", "--unix", str(server.control_address))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vtpm clients: This TPM has no resource manager; start it with --resource-manager, or "
        "--managed on sockets\n"
    )


def test_where_there_is_no_socket_it_says_what_makes_one(tmp_path: Path) -> None:
    missing, other = tmp_path / "x", tmp_path / "y"
    other.touch()
    said = [vtpm("clients", "--unix", str(path)).stderr for path in (missing, other)]
    assert said == [
        "vtpm clients: Connect failed: No such file or directory; there is no socket "
        f"'{missing}'; a vTPM makes it with --ctrl type=unixio,path={missing}\n",
        f"vtpm clients: Connect failed: Connection refused; '{other}' is no socket\n",
    ]


def test_tpm2_tools_stay_connected(tmp_path: Path) -> None:
    """With netcat; their TCTI for the C suite is another client with each command."""
    needs(shutil.which("nc") is not None, "nc is missing")
    with Managed(tmp_path, *s.RUNNING) as server:
        address = server.managed_address
        address.with_name("managed.ctrl").symlink_to(str(server.control_address))
        tool = ("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", tmp_path / "primary")
        run(*tool, "-T", f"cmd:nc -U {address}")
        assert "0xB0918" in run(*tool, "-T", f"swtpm:path={address}", status=1).stderr
