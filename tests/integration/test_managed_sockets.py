"""`swtpm socket --managed`: each client has a TPM of its own, whatever the others do."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of, create_primary_rsa, get_random, tpm2
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

RELAY = Path(__file__).parents[1] / "support/relay.py"
OBJECTS = 64
SESSIONS = 16
CLIENTS = 64


class Managed(s.Server):
    """One with a managed socket beside the data channel of a single client."""

    def __init__(self, folder: Path, *words: str, state: Path | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.managed_address = folder / "managed"
        with s.listener(self.managed_address) as sock:
            words += ("--managed", f"type=unixio,fd={sock.fileno()}")
            super().__init__(folder, *words, pass_fds=[sock.fileno()], state=state)

    def client(self) -> s.Client:
        return s.connect(self.managed_address)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Managed]:
    with Managed(tmp_path, *s.RUNNING) as found:
        yield found


@contextmanager
def clients(server: Managed, count: int) -> Iterator[list[s.Client]]:
    with ExitStack() as stack:
        yield [stack.enter_context(server.client()) for _ in range(count)]


def opened(client: s.Client, command: bytes) -> int:
    """The handle of a successful command."""
    return m.handle_of(client.command(command))


def objects_of(client: s.Client) -> list[int]:
    return m.listed(client.command(m.list_handles(0x80000000)))


def test_more_objects_than_a_tpm_holds_for_each_of_many_clients(server: Managed) -> None:
    with clients(server, 5) as there:
        keys = {
            number * 8 + i: (client, opened(client, m.load_external(number * 8 + i)))
            for number, client in enumerate(there)
            for i in range(8)
        }
        first = {n: m.unique_of(c.command(m.read_public(h))) for n, (c, h) in keys.items()}
        again = {n: m.unique_of(c.command(m.read_public(h))) for n, (c, h) in keys.items()}
        assert first == again
        assert len(set(first.values())) == 40
        for client in there:
            assert objects_of(client) == list(range(0x80000000, 0x80000008))


def test_no_client_reaches_anothers(server: Managed) -> None:
    with clients(server, 2) as (owner, thief):
        key, session = opened(owner, m.load_external(1)), opened(owner, m.start_session())
        for foreign in (m.read_public(key), m.flush(key), m.save(key)):
            assert code_of(thief.command(foreign)) & 0xFFFF0000 == 0x000B0000
        for foreign in (m.policy_digest(session), m.flush(session), m.save(session)):
            assert code_of(thief.command(foreign)) & 0xFFFF0000 == 0x000B0000
        assert objects_of(thief) == []
        assert code_of(owner.command(m.read_public(key))) == 0
        assert code_of(owner.command(m.policy_digest(session))) == 0


def test_nothing_stays_of_a_client_that_has_gone(server: Managed) -> None:
    for _ in range(40):
        with server.client() as client:
            for number in range(3):
                opened(client, m.load_external(number))
                opened(client, m.start_session())
    with server.data() as raw:
        wait_until(
            lambda: not m.listed(raw.command(m.list_handles(0x80000000))), "no object is left"
        )
        assert m.listed(raw.command(m.list_handles(0x02000000))) == []
        assert m.listed(raw.command(m.list_handles(0x03000000))) == []


def test_quotas_are_one_clients(server: Managed) -> None:
    with clients(server, 2) as (greedy, modest):
        mine = opened(modest, m.load_external(9999))
        for number in range(OBJECTS):
            opened(greedy, m.load_external(number))
        assert code_of(greedy.command(m.load_external(OBJECTS))) == 0x000B0902
        for _ in range(SESSIONS):
            opened(greedy, m.start_session())
        assert code_of(greedy.command(m.start_session())) == 0x000B0903
        assert code_of(modest.command(m.read_public(mine))) == 0
        assert opened(modest, m.start_session())


def test_a_reset_ends_all_objects_and_no_client(server: Managed) -> None:
    with clients(server, 2) as there:
        handles = [opened(client, m.load_external(1)) for client in there]
        assert server.init() == 0
        with server.control() as control:
            assert code_of(there[0].command(get_random(8))) == 0x100  # not started
            assert control.result(s.INIT, s.u32(0)) == 0
        assert code_of(there[0].command(tpm2(0x144, struct.pack(">H", 0)))) == 0
        for client, handle in zip(there, handles, strict=True):
            assert objects_of(client) == []
            assert code_of(client.command(m.read_public(handle))) == 0x000B0910
            assert opened(client, m.load_external(2))


def test_sessions_of_an_earlier_life_are_in_nobodys_way(server: Managed) -> None:
    for _ in range(6):
        with clients(server, 4) as there:
            for client in there:
                for _ in range(SESSIONS):
                    opened(client, m.start_session())
            assert server.init() == 0
            assert code_of(there[0].command(tpm2(0x144, struct.pack(">H", 0)))) == 0


def test_a_stopped_tpm_answers_every_client(server: Managed) -> None:
    with clients(server, 2) as there:
        key = opened(there[0], m.load_external(1))
        assert server.request(s.STOP) == bytes(4)
        for client in there:
            assert code_of(client.command(get_random(4))) == 0x101
        assert code_of(there[0].command(m.read_public(key))) & 0xFFF == 0x101


def test_state_leaves_without_the_clients_objects(server: Managed) -> None:
    with server.client() as client:
        key, session = opened(client, m.load_external(1)), opened(client, m.start_session())
        with server.control() as control:
            result, _, blob = control.get_blob(s.VOLATILE)
            assert result == 0
            assert blob
        with server.data() as raw:
            assert m.listed(raw.command(m.list_handles(0x80000000))) == []
            assert m.listed(raw.command(m.list_handles(0x02000000))) == []
        assert code_of(client.command(m.read_public(key))) == 0x000B0910
        assert code_of(client.command(m.policy_digest(session))) == 0x000B0910


def test_the_single_client_of_the_other_channel_keeps_what_it_has(server: Managed) -> None:
    with server.data() as raw, server.client() as client:
        mine = opened(raw, m.load_external(1))
        opened(raw, m.start_session())
        handles = [opened(client, m.load_external(number)) for number in range(2, 8)]
        assert all(code_of(client.command(m.read_public(handle))) == 0 for handle in handles)
        assert code_of(raw.command(m.read_public(mine))) == 0
        assert len(m.listed(raw.command(m.list_handles(0x02000000)))) == 1


def test_a_long_command_holds_nobody_up_for_ever(server: Managed) -> None:
    with clients(server, 3) as (slow, *others):
        slow.send(create_primary_rsa(unique=b"unique"))
        keys = [opened(client, m.load_external(1)) for client in others]
        assert len(keys) == 2
        assert m.handle_of(slow.response()) == 0x80000000


def test_a_client_that_vanishes_in_the_middle_of_a_command(server: Managed) -> None:
    with server.client() as other:
        key = opened(other, m.load_external(1))
        for _ in range(5):
            with server.client() as client:
                client.send(create_primary_rsa(unique=os.urandom(8)))
        assert code_of(other.command(m.read_public(key))) == 0
    with server.data() as raw:
        wait_until(
            lambda: not m.listed(raw.command(m.list_handles(0x80000000))), "no object is left"
        )


def test_one_that_never_reads_holds_nobody_up(server: Managed) -> None:
    with clients(server, 2) as (deaf, other):
        deaf.socket.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += deaf.socket.send(m.list_handles(0x80000000) * 100)
        assert sent
        assert len(other.command(get_random(8))) == 20


def test_silent_clients_make_way(server: Managed) -> None:
    with server.client() as known:
        assert len(known.command(get_random(8))) == 20
        with clients(server, 3 * CLIENTS), server.client() as late:
            assert len(late.command(get_random(8))) == 20
            assert len(known.command(get_random(8))) == 20


def test_locality_is_of_one_command(server: Managed) -> None:
    """The prefix that names one; TPM2_PCR_Reset of PCR 20 tells them apart."""
    reset = tpm2(0x13D, s.u32(20) + m.PASSWORD, sessions=True)
    with clients(server, 2) as (here, there):
        prefixed = s.u32(8) + b"\x02" + s.u32(len(reset)) + reset
        here.send(prefixed)
        size = int.from_bytes(here.exactly(4), "big")
        assert code_of(here.exactly(size)) == 0
        assert here.exactly(4) == bytes(4)
        assert code_of(there.command(reset)) == 0x907
        assert code_of(here.command(reset)) == 0x907


def test_any_mix_of_clients_against_a_model_without_limits(server: Managed) -> None:
    """Objects stay what they were, and each sequence is hashlib's, however they are interleaved."""
    choose = random.Random(15)  # noqa: S311
    with clients(server, 6) as there:
        objects: list[dict[int, bytes]] = [{} for _ in there]
        sequences: list[dict[int, list[bytes]]] = [{} for _ in there]
        made = 0
        for _ in range(1500):
            i = choose.randrange(len(there))
            client, mine, running = there[i], objects[i], sequences[i]
            match choose.choice("ooouuussffc"):
                case "o" if len(mine) < 20:
                    made += 1
                    handle = opened(client, m.load_external(made))
                    mine[handle] = m.unique_of(client.command(m.read_public(handle)))
                case "u" if mine:
                    handle = choose.choice(list(mine))
                    assert m.unique_of(client.command(m.read_public(handle))) == mine[handle]
                case "s" if len(running) < 5:
                    running[opened(client, m.sequence_start())] = []
                case "f" if mine:
                    handle = choose.choice(list(mine))
                    del mine[handle]
                    assert code_of(client.command(m.flush(handle))) == 0
                    assert code_of(client.command(m.read_public(handle))) == 0x000B0910
                case "c" if running:
                    handle = choose.choice(list(running))
                    if choose.random() < 0.7:
                        part = choose.randbytes(choose.randrange(1, 60))
                        running[handle].append(part)
                        assert code_of(client.command(m.sequence_update(handle, part))) == 0
                    else:
                        data = b"".join(running.pop(handle))
                        digest = m.digest_in(client.command(m.sequence_complete(handle)))
                        assert digest == hashlib.sha256(data).digest()
            if choose.random() < 0.02:
                assert objects_of(client) == sorted([*mine, *running])


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


def tool(server: Managed, folder: Path, *words: str | Path) -> str:
    """The output of a program of tpm2-tools that has succeeded, on a connection of its own."""
    relay = f"cmd:{sys.executable} {RELAY} {server.managed_address}"
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**os.environ, "TPM2TOOLS_TCTI": relay},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def test_a_long_chain_of_tools_that_flush_nothing(server: Managed, tmp_path: Path) -> None:
    """Each leaves what it has made to its end; their contexts are the bridge."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "text").write_text("what is to be kept")
    tool(server, work, "tpm2_createprimary", "-C", "o", "-c", "primary")
    for n in range(6):
        pair = ("-u", f"{n}.pub", "-r", f"{n}.priv")
        tool(server, work, "tpm2_create", "-C", "primary", *pair)
        tool(server, work, "tpm2_load", "-C", "primary", *pair, "-c", f"{n}.ctx")
        tool(server, work, "tpm2_sign", "-c", f"{n}.ctx", "-o", f"{n}.sig", "text")
    for n in range(6):
        words = ("-c", f"{n}.ctx", "-m", "text", "-s", f"{n}.sig")
        tool(server, work, "tpm2_verifysignature", *words)
    tool(server, work, "tpm2_startauthsession", "-S", "session", "--policy-session")
    tool(server, work, "tpm2_policypcr", "-S", "session", "-l", "sha256:0,1", "-L", "policy")
    tool(server, work, "tpm2_flushcontext", "session")
    assert tool(server, work, "tpm2_getcap", "handles-transient") == ""
    assert tool(server, work, "tpm2_getcap", "handles-saved-session") == ""
