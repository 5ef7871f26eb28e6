"""Clients of a resource manager as the owner of the TPM sees them, and their end at his wish."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Protocol

from tests.device.managed import Client, World, clients, opened
from tests.support import managed as m
from tests.support.commands import code_of
from tests.support.sockets import environment
from tests.support.vtpm_run import VTPM
from tests.support.waiting import PATIENCE_SECONDS


class ViewedWorld(World[Client], Protocol):
    """Clients, and where to ask about them."""

    channel: str

    def place(self) -> tuple[str, ...]:
        """As the command line of ``vtpm clients`` has it."""


def vtpm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VTPM, *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


# Any: JSON.
def viewed(world: ViewedWorld) -> dict[str, Any]:
    done = vtpm("clients", "--json", *world.place())
    assert (done.returncode, done.stderr) == (0, ""), done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def flushed(world: ViewedWorld, *words: str) -> tuple[int, str]:
    done = vtpm("flush", *world.place(), *words)
    assert done.stdout == ""
    return done.returncode, done.stderr


def places(held: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(one["handle"], one["kind"], one["place"]) for one in held]


def test_who_has_what(world: ViewedWorld) -> None:
    with clients(world, 2) as (rich, poor):
        for number in range(4):
            opened(rich, m.load_external(number))
        opened(poor, m.sequence_start())
        kept, saved = opened(poor, m.start_session()), opened(poor, m.start_session(kind=0))
        assert code_of(poor.command(m.save(saved))) == 0
        found = viewed(world)
        first, second = found["clients"]
        for one in (first, second):
            assert one["channel"] == world.channel
            assert (one["pid"], one["uid"]) == (os.getpid(), os.getuid())
            assert 0 <= one["idle"] <= one["connected"] <= PATIENCE_SECONDS
        assert first["client"] < second["client"]
        assert (first["commands"], second["commands"]) == (4, 4)
        swapped = [place for _, kind, place in places(first["objects"])]
        assert (swapped.count("swapped"), swapped.count("loaded")) == (2, 2)
        assert places(second["objects"]) == [("0x80000000", "sequence", "loaded")]
        assert places(second["sessions"]) == [
            (f"0x{kept:08x}", "policy", "loaded"),
            (f"0x{saved:08x}", "hmac", "saved"),
        ]
        assert found["abandoned"] == []
        assert found["swaps"] == {"objects": 2, "sessions": 0}
        assert found["limits"]["objects"] == 64
    assert viewed(world)["clients"] == []
    (left,) = viewed(world)["abandoned"]
    assert left["handle"] == f"0x{saved:08x}"


def test_a_table_for_people(world: ViewedWorld) -> None:
    with world.client() as client:
        for number in range(4):
            opened(client, m.load_external(number))
        done = vtpm("clients", "--handles", *world.place())
        assert done.returncode == 0, done
        head, row, *_ = done.stdout.splitlines()
        assert head.split()[:4] == ["CLIENT", "CHANNEL", "PID", "USER"]
        assert row.split()[1:3] == [world.channel, str(os.getpid())]
        assert row.endswith("4         4 (1)    0")
        assert f"{row.split()[0]} 0x80000000 object swapped" in done.stdout.splitlines()


def test_one_object_or_session_is_flushed_and_no_other(world: ViewedWorld) -> None:
    with clients(world, 2) as (one, other):
        keys = [opened(client, m.load_external(1)) for client in (one, other)]
        session = opened(one, m.start_session())
        mine = str(viewed(world)["clients"][0]["client"])
        status, said = flushed(world, f"0x{keys[0]:08x}")  # both have one of this number
        assert status == 1
        assert "name one by --client" in said
        assert flushed(world, f"0x{keys[0]:08x}", "--client", mine) == (0, "")
        assert code_of(one.command(m.read_public(keys[0]))) == 0x000B0910
        assert code_of(one.command(m.policy_digest(session))) == 0
        assert flushed(world, f"0x{session:08x}") == (0, "")
        assert code_of(one.command(m.policy_digest(session))) == 0x000B0910
        assert code_of(other.command(m.read_public(keys[1]))) == 0


def test_all_that_a_client_has_is_flushed_and_it_goes_on(world: ViewedWorld) -> None:
    with clients(world, 2) as (one, other):
        for client in (one, other):
            for number in range(5):
                opened(client, m.load_external(number))
                opened(client, m.start_session())
        mine = str(viewed(world)["clients"][0]["client"])
        assert flushed(world, "--client", mine) == (0, "")
        first, second = viewed(world)["clients"]
        assert (first["objects"], first["sessions"]) == ([], [])
        assert (len(second["objects"]), len(second["sessions"])) == (5, 5)
        assert opened(one, m.load_external(9))
        assert code_of(other.command(m.read_public(0x80000004))) == 0


def test_an_abandoned_session_is_flushed(world: ViewedWorld) -> None:
    with world.client() as client:
        session = opened(client, m.start_session())
        context = client.command(m.save(session))[10:]
    (left,) = viewed(world)["abandoned"]
    assert flushed(world, left["handle"]) == (0, "")
    assert viewed(world)["abandoned"] == []
    with world.client() as client:
        assert code_of(client.command(m.load(context))) & 0xFFF == 0x1CB


def test_what_nobody_has(world: ViewedWorld) -> None:
    status, said = flushed(world, "0x80000000")
    assert (status, said.count("\n")) == (1, 1)
    assert "Nobody has 0x80000000" in said
    gone = flushed(world, "--client", "77")
    assert gone == (1, "vtpm flush: There is no client 77; vtpm clients lists them\n")
