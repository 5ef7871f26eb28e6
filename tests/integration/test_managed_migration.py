"""The state of a TPM with managed clients, on its way to another process, and to the C suite's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tests.device.managed import SESSIONS_OF_A_USER, clients, opened
from tests.integration.test_managed_sockets import Managed
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.auditor import Auditor
from tests.support.commands import code_of

if TYPE_CHECKING:
    from pathlib import Path

PEER: Final = ("/usr/bin/swtpm",)
_KINDS: Final = (s.PERMANENT, s.VOLATILE, s.SAVESTATE)
_POLICY_PCR: Final = 0x17F


def exported(server: s.Server) -> list[tuple[int, bytes]]:
    with server.control() as control:
        blobs = [(kind, control.get_blob(kind)) for kind in _KINDS]
    return [(kind, blob) for kind, (result, _, blob) in blobs if result == 0]


def imported(server: s.Server, blobs: list[tuple[int, bytes]]) -> None:
    with server.control() as control:
        for kind, blob in blobs:
            assert control.set_blob(kind, blob) == 0
    assert server.init() == 0


class Left(NamedTuple):
    """What clients have of a TPM whose state has left."""

    blobs: list[tuple[int, bytes]]
    contexts: list[bytes]
    key: bytes
    digest: bytes


def left_by_clients(folder: Path) -> Left:
    """One client stays and one goes, each with a session that it has saved; one has much more."""
    contexts = []
    with Managed(folder, *s.RUNNING) as server, clients(server, 2) as (stays, greedy):
        with server.client() as goes:
            for client in (stays, goes):
                session = opened(client, m.start_session())
                assert code_of(client.command(m.policy_command_code(session, _POLICY_PCR))) == 0
                digest = client.command(m.policy_digest(session))
                contexts.append(client.command(m.save(session))[10:])
        key = stays.command(m.save(opened(stays, m.load_external(7))))[10:]
        for _ in range(16):
            opened(greedy, m.start_session())
            opened(greedy, m.load_external(1))
        return Left(exported(server), contexts, key, digest)


def check(client: s.Client, contexts: list[bytes], left: Left) -> None:
    for context in contexts:
        session = opened(client, m.load(context))
        assert client.command(m.policy_digest(session)) == left.digest
        assert code_of(client.command(m.load(context))) & 0xFFF == 0x1CB  # as ever, once
        assert code_of(client.command(m.flush(session))) == 0
    assert code_of(client.command(m.read_public(opened(client, m.load(left.key))))) == 0


def test_what_clients_have_saved_loads_at_the_destination(tmp_path: Path) -> None:
    left = left_by_clients(tmp_path / "from")
    with Managed(tmp_path / "to") as target:
        imported(target, left.blobs)
        with target.client() as client:
            assert m.listed(client.command(m.list_handles(0x80000000))) == []
            assert m.listed(client.command(m.list_handles(0x02000000))) == []
            assert len(m.listed(client.command(m.list_handles(0x03000000)))) == 2
            check(client, left.contexts, left)


def test_sessions_that_nobody_loads_are_in_nobodys_way_at_the_destination(tmp_path: Path) -> None:
    with Managed(tmp_path / "from", *s.RUNNING) as source, clients(source, 4) as there:
        for client in there:
            for _ in range(SESSIONS_OF_A_USER // 4):
                assert code_of(client.command(m.save(opened(client, m.start_session())))) == 0
        blobs = exported(source)
    with Managed(tmp_path / "to") as target:
        imported(target, blobs)
        with clients(target, 4) as there:
            for client in there:
                for _ in range(SESSIONS_OF_A_USER // 4):
                    assert opened(client, m.start_session())


def test_an_exclusive_audit_session_is_one_at_the_destination(tmp_path: Path) -> None:
    with Managed(tmp_path / "from", *s.RUNNING) as source:
        with source.client() as client:
            auditor = Auditor(client.command)
            assert auditor.is_exclusive
            context = client.command(m.save(auditor.handle))[10:]
        blobs = exported(source)
    with Managed(tmp_path / "to") as target:
        imported(target, blobs)
        with target.client() as client:
            assert opened(client, m.load(context)) == auditor.handle
            auditor.process = client.command
            assert auditor.is_exclusive


def test_by_way_of_the_c_suite(tmp_path: Path) -> None:
    left = left_by_clients(tmp_path / "from")
    with s.Server(tmp_path / "peer", program=PEER) as peer:
        imported(peer, left.blobs)
        with peer.data() as client:
            assert m.listed(client.command(m.list_handles(0x02000000))) == []
            check(client, left.contexts[:1], left)
        blobs = exported(peer)
    with Managed(tmp_path / "back") as target:
        imported(target, blobs)
        with target.client() as client:
            check(client, left.contexts[1:], left)
