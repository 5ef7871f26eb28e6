"""`vtpmd` where a service manager keeps descriptors: who comes behind a killed one goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.service_manager import Service
from tests.support.sockets import connect
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.wire.tpm import TpmRc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.sockets import Client
    from vtpm_cuse.wire.manager import Tpm

EXTEND: Final = tpm.pcr_extend(10, b"1" * 32)
SIZE: Final = 8
LAZY: Final = ("--idle", "3600")
DYING: Final = "import os, signal; die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL); "
"""For what is to be killed at a place of its own."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, *LAZY) as found:
        found.start()
        yield found


@contextlib.contextmanager
def started(service: Service, name: str) -> Iterator[tuple[Tpm, Client]]:
    """A new TPM whose PCR 10 is extended, and its client."""
    with Manager(str(service.path)) as manager:
        manager.create(name)
        found = manager.start(name)
    with connect(Path(found.sockets["data"])) as client:
        assert tpm.code_of(client.command(EXTEND)) == 0
        yield found, client


def pcr(client: Client) -> bytes:
    return tpm.pcr_value(client.command(tpm.pcr_read(10)))


def is_gone(pid: int | None) -> bool:
    return not Path(f"/proc/{pid}").exists()


def clock_is_safe(client: Client) -> bool:
    """Whether the TPM was shut down in order, as TPM2_ReadClock says."""
    response = client.command(bytes.fromhex("80010000000a00000181"))
    assert tpm.code_of(response) == 0
    return bool(response[-1])


def test_clients_see_nothing_of_a_killed_manager(service: Service) -> None:
    with started(service, "awake") as (awake, busy), started(service, "asleep") as (_, idle):
        extended = pcr(busy)
        with Manager(str(service.path)) as manager:
            manager.create("off")
            manager.hibernate("asleep")
        busy.send(tpm.create_primary_rsa())  # in the middle of it
        service.kill()
        assert tpm.code_of(busy.response()) == 0
        busy.send(tpm.nv_define(tpm.NV_INDEX, SIZE))  # what it stores waits
        idle.send(tpm.pcr_read(10))
        service.start()
        assert tpm.code_of(busy.response()) == 0
        assert tpm.pcr_value(idle.response()) == extended
        with Manager(str(service.path)) as manager:
            assert manager.wake("awake").pid == awake.pid
            manager.wake("asleep")  # it has answered, and may not be known to be awake yet
            assert [one.state for one in manager.list()] == ["awake", "awake", "stopped"]
            # Another one has nothing to do with that, and may come at once.
            manager.hibernate("awake")
            manager.hibernate("asleep")
        service.kill()
        service.start()
        for client in (busy, idle):
            assert pcr(client) == extended
        assert tpm.code_of(busy.command(tpm.nv_write(tpm.NV_INDEX, bytes(SIZE)))) == 0
        with Manager(str(service.path)) as manager:
            for name in ("awake", "asleep"):
                manager.remove(name, force=True)
        service.kill()
        service.start()
        with Manager(str(service.path)) as manager:
            assert [one.name for one in manager.list()] == ["off"]
        assert os.listdir(service.path.parent / "run/tpm") == []
    assert "Traceback" not in service.said


SERVED: Final = "from vtpm_cuse.fleet.manager import machine; machine.Machine._hear = die"
"""It has handed over what a TPM slept with, and heard nothing of it yet."""
NOT_SERVED: Final = "from vtpm_cuse.fleet.manager import machine; machine.Message = die"
"""That has not arrived."""


def test_a_manager_that_is_killed_while_it_wakes_a_tpm(service: Service) -> None:
    """What a TPM slept with was handed out by then: nobody is given it again."""
    with started(service, "one") as (_, client):
        extended = pcr(client)
        with Manager(str(service.path)) as manager:
            manager.hibernate("one")
        for place in (SERVED, NOT_SERVED):
            service.kill()
            service.start(DYING + place)
            with Manager(str(service.path)) as manager:
                if manager.describe("one").state != "asleep":
                    manager.hibernate("one")
            client.send(tpm.pcr_read(10))
            service.process.wait(PATIENCE_SECONDS)
            service.start()
            if place is SERVED:
                assert tpm.pcr_value(client.response()) == extended
        assert client.ended()
        with Manager(str(service.path)) as manager:
            wait_until(lambda: manager.describe("one").state == "failed", "its failure")
            found = manager.describe("one")
            assert "before it had handed the TPM over" in found.failure
            with connect(Path(found.sockets["data"])) as late:
                assert tpm.code_of(late.command(tpm.pcr_read(10))) == TpmRc.TPM_RC_FAILURE
                manager.reset("one")
                assert pcr(late) == bytes(32)


NOT_STORED: Final = "from vtpm_cuse.fleet.states.vault import Vault; Vault._store = die"
NOT_ANSWERED: Final = """
from vtpm_cuse.fleet.blocking import Ends
from vtpm_cuse.fleet.messages import Answer
send = Ends._send
Ends._send = lambda end, data, more: (die if data[0] == Answer.DONE else send)(end, data, more)
"""
NOT_HEARD: Final = "from vtpm_cuse.fleet.manager.machine import Machine; Machine._take_last = die"
NOT_TOLD: Final = """
from vtpm_cuse.fleet.manager.workers import WorkerProcess
end = WorkerProcess.die
async def die_behind_it(worker):
    await end(worker)
    die()
WorkerProcess.die = die_behind_it
"""


def test_what_a_killed_manager_has_not_answered_is_asked_of_the_next(service: Service) -> None:
    with started(service, "one") as (_, client):
        extended = pcr(client)
        service.kill()
        service.start(DYING + NOT_STORED)
        client.send(tpm.nv_define(tpm.NV_INDEX, SIZE))
        for place in (NOT_ANSWERED, NOT_HEARD):
            service.process.wait(PATIENCE_SECONDS)
            service.start(DYING + place)
        assert tpm.code_of(client.response()) == 0
        assert tpm.code_of(client.command(tpm.nv_write(tpm.NV_INDEX, bytes(SIZE)))) == 0
        with Manager(str(service.path)) as manager, contextlib.suppress(FrontendError):
            manager.hibernate("one")
        for place in (NOT_TOLD, ""):
            service.process.wait(PATIENCE_SECONDS)
            service.start(DYING + place)
        assert pcr(client) == extended
        assert tpm.code_of(client.command(tpm.nv_read(tpm.NV_INDEX, SIZE))) == 0


def test_a_restart_is_as_a_stop_that_nobody_has_seen(service: Service) -> None:
    """Who ends it cannot know whether another one is to come: TPMs are shut down, and go on."""
    with started(service, "awake") as (awake, busy), started(service, "asleep") as (_, idle):
        extended = pcr(busy)
        with Manager(str(service.path)) as manager:
            manager.hibernate("asleep")
        assert service.end() == 0
        wait_until(partial(is_gone, awake.pid), "the end of its process")
        service.start()
        for client in (busy, idle):
            assert pcr(client) == extended
        assert service.end() == 0
        service.forget()
        for client in (busy, idle):
            assert client.ended()
        service.start()
        with Manager(str(service.path)) as manager:
            found = manager.start("awake")
        with connect(Path(found.sockets["data"])) as client:
            assert clock_is_safe(client)
            assert pcr(client) == bytes(32)


def test_with_what_is_kept_all_ends(service: Service) -> None:
    with started(service, "one") as (found, client):
        service.kill()
        assert tpm.code_of(client.command(EXTEND)) == 0
        service.forget()
        assert client.ended()
        wait_until(partial(is_gone, found.pid), "the end of the worker")
        service.start()
        with Manager(str(service.path)) as manager:
            manager.start("one")


def test_a_reload_has_a_new_process_keep_what_a_dead_one_did(service: Service) -> None:
    with started(service, "one") as (_, client):
        extended = pcr(client)
        service.forget()  # the one end; the manager has the other
        (depot,) = _children(service.process.pid, "vtpm_cuse.fleet.depot")
        os.kill(depot, signal.SIGKILL)
        service.process.send_signal(signal.SIGUSR2)
        service.hear("READY=1")
        service.kill()
        service.start()
        assert pcr(client) == extended


def _children(pid: int, program: str) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(one) for one in found if program.encode() in Path(f"/proc/{one}/cmdline").read_bytes()
    ]
