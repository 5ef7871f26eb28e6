"""The manager's interface: who is answered what, and whom a bad client costs something."""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
import varlink as varlink_client

from tests.support.fake_fleet import OTHER_USER, FakeFleet, Raw, served, with_manager, with_raw
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError, FrontendError, StorageError
from vtpm_cuse.fleet.base import Event, Spec
from vtpm_cuse.fleet.manager import api
from vtpm_cuse.wire import varlink
from vtpm_cuse.wire.manager import Key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vtpm_cuse.fleet.base import Tpm

MANAGER = "org.vtpmcuse.Manager"
SERVICE = "org.varlink.service"


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manager.sock"


@pytest.fixture
def as_another(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets who connects be somebody whose user has this number."""

    def become(uid: int) -> None:
        monkeypatch.setattr(api, "_asker", lambda _: api._Asker(uid, 1))

    return become


# -- what the client of the package gets --------------------------------------------------


def test_a_tpm_is_made_used_and_removed(fleet: FakeFleet, path: Path) -> None:
    def use(manager: Manager) -> None:
        made = manager.create("web1", profile="null", labels={"vm": "7"})
        assert made == manager.describe("web1") == manager.describe(made.id)
        assert (made.name, made.owner, made.state) == ("web1", os.geteuid(), "stopped")
        assert made.labels == {"vm": "7"}
        assert made.counters == dict.fromkeys(("commands", "wakes", "sleeps", "failures"), 0)
        assert made.sockets["managed"] == "/run/vtpm/web1/managed"
        assert manager.start("web1").state == "asleep"
        assert manager.wake("web1").state == "awake"
        assert manager.hibernate("web1").state == "asleep"
        assert manager.reset("web1").state == "awake"
        assert manager.stop("web1").state == "stopped"
        manager.snapshot("web1", "before")
        manager.restore("web1", "before")
        assert manager.clone("web1", "web2", identity="same").name == "web2"
        assert manager.update("web2", new_name="web3", labels={"a": "b"}).labels == {"a": "b"}
        assert [tpm.name for tpm in manager.list()] == ["web1", "web3"]
        manager.remove("web1", force=True)
        assert [tpm.name for tpm in manager.list()] == ["web3"]
        manager.remove("web3")
        assert manager.list() == []

    with_manager(fleet, path, use)
    (spec,) = fleet.specs
    assert spec == Spec("web1", os.geteuid(), "null", labels=(("vm", "7"),))
    assert ("clone", "web1", "web2", "same") in fleet.asked
    assert ("remove", "web1", True) in fleet.asked
    assert ("remove", "web3", False) in fleet.asked


def test_a_refusal_is_the_fleets_own(fleet: FakeFleet, path: Path) -> None:
    def use(manager: Manager) -> FleetError:
        with pytest.raises(FleetError) as info:
            manager.start("web9")
        return info.value

    refusal = with_manager(fleet, path, use)
    assert (refusal.fault, refusal.tpm, refusal.reason) == ("NoSuchTpm", "web9", "there is none")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (StorageError("/var/lib/vtpm/x", "no space"), "/var/lib/vtpm/x: no space"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ZeroDivisionError("secret"), "the manager has a fault"),
    ],
)
def test_what_the_fleet_did_not_foresee_is_an_answer_and_costs_no_other_call(
    fleet: FakeFleet, path: Path, trouble: Exception, said: str
) -> None:
    fleet.add("web1")
    fleet.trouble = trouble

    def use(manager: Manager) -> str:
        with pytest.raises(FrontendError) as info:
            manager.wake("web1")
        assert manager.describe("web1").state == "stopped"
        return str(info.value)

    refusal = with_manager(fleet, path, use)
    assert said in refusal
    assert "secret" not in refusal


def test_a_watch_misses_nothing_from_its_begin(fleet: FakeFleet, path: Path) -> None:
    def use(manager: Manager) -> None:
        events = manager.watch()
        with Manager(str(path)) as other:
            other.create("web1")
            other.start("web1")
            other.remove("web1")
        told = [next(events) for _ in range(4)]
        assert [(event.kind, event.tpm.state) for event in told] == [
            ("created", "stopped"),
            ("changed", "asleep"),
            ("changed", "stopped"),
            ("removed", "stopped"),
        ]

    with_manager(fleet, path, use)


def test_no_manager_says_what_to_type(path: Path) -> None:
    with pytest.raises(FrontendError, match=f"No manager answers at {path} .*'vtpmd"):
        Manager(str(path))


@pytest.mark.parametrize("answer", [b"", b"220 mail ready\r\n\0", b'{"parameters": {"tpm": 1}}\0'])
def test_what_is_no_manager_is_no_traceback(path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Manager(str(path), patience=30) as manager:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                with pytest.raises(FrontendError):
                    manager.describe("web1")


# -- whose TPM it is ----------------------------------------------------------------------


def test_others_see_and_manage_their_own_alone(
    fleet: FakeFleet, path: Path, as_another: Callable[[int], None]
) -> None:
    fleet.add("mine")
    theirs = fleet.add("theirs", OTHER_USER + 1)
    as_another(OTHER_USER)
    calls: list[Callable[[Manager], object]] = [
        *(
            partial(verb, name=key)
            for verb in (*CHANGING, Manager.describe)
            for key in ("theirs", theirs.id)
        ),
        lambda manager: manager.remove("theirs", force=True),
        lambda manager: manager.update("theirs", new_name="mine2"),
        lambda manager: manager.snapshot("theirs", "s"),
        lambda manager: manager.restore("theirs", "s"),
        lambda manager: manager.clone("theirs", "mine2"),
        lambda manager: manager.export("theirs"),
        lambda manager: manager.logs("theirs"),
        lambda manager: manager.create("mine2", owner=OTHER_USER + 1),
        lambda manager: manager.create("mine2", owner=0),
        lambda manager: manager.create("mine2", key=Key(file="/etc/shadow")),
        lambda manager: manager.create("mine2", interface="cuse", cdi="keep"),
        lambda manager: manager.update("mine", cdi="remove"),
    ]

    def use(manager: Manager) -> None:
        for call in calls:
            with pytest.raises(FleetError) as info:
                call(manager)
            assert info.value.fault == "NotOwner"
        assert [tpm.name for tpm in manager.list()] == ["mine"]
        assert fleet.asked == fleet.specs == []
        with Manager(str(path)) as watcher:
            events = watcher.watch()
            trio.from_thread.run_sync(fleet.tell, Event("changed", theirs))
            assert manager.create("mine2").owner == OTHER_USER
            assert next(events).tpm.name == "mine2"

    with_manager(fleet, path, use)


CHANGING = (Manager.start, Manager.stop, Manager.reset, Manager.hibernate, Manager.wake)


class Swapping(FakeFleet):
    """Whoever looks at a TPM, has its name given to another's before he can do anything."""

    async def describe(self, name: str) -> Tpm:
        found = await super().describe(name)
        self.add(found.name, OTHER_USER + 1)
        return found


def test_a_name_that_is_anothers_by_now_is_not_meant(
    path: Path, as_another: Callable[[int], None]
) -> None:
    as_another(OTHER_USER)
    fleet = Swapping()

    def use(manager: Manager) -> None:
        calls: list[Callable[[Manager], object]] = [
            *(partial(verb, name="mine") for verb in CHANGING),
            lambda manager: manager.remove("mine", force=True),
            lambda manager: manager.update("mine", new_name="mine2"),
            lambda manager: manager.restore("mine", "s"),
            lambda manager: manager.clone("mine", "mine2"),
        ]
        for call in calls:
            fleet.add("mine")
            with pytest.raises(FleetError, match="any more") as info:
                call(manager)
            assert info.value.fault == "NoSuchTpm"
        assert fleet.asked == []
        assert list(fleet.tpms) == ["mine"]

    with_manager(fleet, path, use)


@pytest.mark.parametrize("nobody", [65534, 0xFFFFFFFF])
def test_who_cannot_be_told_owns_nothing(
    fleet: FakeFleet, path: Path, as_another: Callable[[int], None], nobody: int
) -> None:
    fleet.add("nobodys", nobody)
    as_another(nobody)

    def use(manager: Manager) -> None:
        assert manager.list() == []
        for call in (manager.start, manager.create):
            with pytest.raises(FleetError, match="another user") as info:
                call("nobodys")
            assert info.value.fault == "NotOwner"

    with_manager(fleet, path, use)


def test_who_asks_is_whom_the_kernel_names(fleet: FakeFleet, path: Path) -> None:
    fleet.add("theirs", os.geteuid() + 1)
    assert with_manager(fleet, path, lambda manager: manager.list()[0].name) == "theirs"

    async def main() -> api._Asker:
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            return api._asker(trio.SocketStream(ours))

    assert trio.run(main) == (os.geteuid(), os.getpid())


# -- varlink ------------------------------------------------------------------------------


def test_varlinks_own_library_understands_it(fleet: FakeFleet, path: Path) -> None:
    """It reads the description, and calls nothing that is not in there."""
    fleet.add("web1", vm="7")

    def use(_: Manager) -> None:
        with varlink_client.Client(f"unix:{path}") as client, client.open(MANAGER) as asked:
            assert asked.Describe("web1")["tpm"]["labels"] == {"vm": "7"}
            fleet.add("web2")
            assert [reply["tpm"]["name"] for reply in asked.List(_more=True)] == ["web1", "web2"]
            assert asked.Start("web1")["tpm"]["state"] == "asleep"
            with pytest.raises(varlink_client.VarlinkError) as info:
                asked.Start("web9")
            assert info.value.error() == f"{MANAGER}.NoSuchTpm"
            assert info.value.parameters() == {"tpm": "web9", "reason": "there is none"}

    with_manager(fleet, path, use)


def test_many_replies_come_each_whole_and_in_order(fleet: FakeFleet, path: Path) -> None:
    names = [f"tpm{number:03}" for number in range(3 * api._TOGETHER + 1)]
    for name in names:
        fleet.add(name)

    async def use(raw: Raw) -> None:
        await raw.say(f"{MANAGER}.List", more=True)
        replies = [await raw.hear() for _ in names]
        assert [reply["parameters"]["tpm"]["name"] for reply in replies] == names
        assert [reply.get("continues", False) for reply in replies] == [
            *(True,) * (len(names) - 1),
            False,
        ]
        assert (await raw.ask(f"{MANAGER}.Describe", parameters={"name": names[0]}))["parameters"]

    with_raw(fleet, path, use)


def test_the_service_tells_of_itself(fleet: FakeFleet, path: Path) -> None:
    async def use(raw: Raw) -> None:
        info = (await raw.ask(f"{SERVICE}.GetInfo"))["parameters"]
        assert info["interfaces"] == [SERVICE, MANAGER]
        for name in info["interfaces"]:
            told = await raw.ask(
                f"{SERVICE}.GetInterfaceDescription", parameters={"interface": name}
            )
            assert f"interface {name}\n" in told["parameters"]["description"]

    with_raw(fleet, path, use)


@pytest.mark.parametrize(
    ("method", "rest", "error", "parameters"),
    [
        ("no.such.Method", {}, "InterfaceNotFound", {"interface": "no.such"}),
        ("Method", {}, "InterfaceNotFound", {"interface": ""}),
        (f"{MANAGER}.Burn", {}, "MethodNotFound", {"method": f"{MANAGER}.Burn"}),
        (f"{MANAGER}.Start", {}, "InvalidParameter", {"parameter": "name"}),
        (
            f"{MANAGER}.Start",
            {"parameters": {"name": 7}},
            "InvalidParameter",
            {"parameter": "name"},
        ),
        (
            f"{MANAGER}.Remove",
            {"parameters": {"name": "web1", "froce": True}},
            "InvalidParameter",
            {"parameter": "froce"},
        ),
        (
            f"{MANAGER}.Clone",
            {"parameters": {"name": "web1", "newName": "b", "identity": "old"}},
            "InvalidParameter",
            {"parameter": "identity"},
        ),
        (
            f"{MANAGER}.Create",
            {"parameters": {"name": "b", "owner": -1}},
            "InvalidParameter",
            {"parameter": "owner"},
        ),
        *(
            (
                f"{MANAGER}.Create",
                {"parameters": {"name": "b", "key": key}},
                "InvalidParameter",
                {"parameter": wrong},
            )
            for key, wrong in (
                ({}, "key"),
                ({"file": "/a", "credential": "a"}, "key"),
                ({"file": "a"}, "key.file"),
                ({"fd": 3}, "key.fd"),
            )
        ),
        (f"{MANAGER}.List", {}, "ExpectedMore", {}),
        (f"{MANAGER}.Watch", {}, "ExpectedMore", {}),
        (
            f"{MANAGER}.List",
            {"more": True, "upgrade": True},
            "MethodNotImplemented",
            {"method": f"{MANAGER}.List"},
        ),
    ],
)
def test_errors_have_varlinks_names(
    fleet: FakeFleet,
    path: Path,
    method: str,
    rest: dict[str, object],
    error: str,
    parameters: dict[str, str],
) -> None:
    fleet.add("web1")

    async def use(raw: Raw) -> None:
        reply = await raw.ask(method, **rest)
        assert reply == {"error": f"{SERVICE}.{error}", "parameters": parameters}

    with_raw(fleet, path, use)
    assert fleet.asked == []
    assert list(fleet.tpms) == ["web1"]


def test_a_list_is_a_reply_for_each(fleet: FakeFleet, path: Path) -> None:
    async def use(raw: Raw) -> None:
        assert await raw.ask(f"{MANAGER}.List", more=True) == {"parameters": {}}
        fleet.add("a")
        fleet.add("b")
        first = await raw.ask(f"{MANAGER}.List", more=True)
        second = await raw.hear()
        assert (first["parameters"]["tpm"]["name"], first["continues"]) == ("a", True)
        assert second["parameters"]["tpm"]["name"] == "b"
        assert "continues" not in second
        one = await raw.ask(f"{MANAGER}.List", parameters={"name": "b"})
        assert one == second

    with_raw(fleet, path, use)


def test_a_oneway_call_is_done_and_not_answered(fleet: FakeFleet, path: Path) -> None:
    fleet.add("web1")

    async def use(raw: Raw) -> None:
        for method in ("Start", "Burn"):
            await raw.say(f"{MANAGER}.{method}", parameters={"name": "web1"}, oneway=True)
        reply = await raw.ask(f"{SERVICE}.GetInfo")
        assert reply["parameters"]["product"] == "vtpmd"
        assert fleet.tpms["web1"].state == "asleep"

    with_raw(fleet, path, use)


class Slow(FakeFleet):
    """A wake of its takes as long as a test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = trio.Event(), trio.Event()

    async def wake(self, name: str) -> Tpm:
        self.begun.set()
        await self.go_on.wait()
        return await super().wake(name)


def test_what_has_been_begun_is_done_when_the_manager_ends(path: Path) -> None:
    fleet = Slow()
    fleet.add("web1")

    async def later() -> None:
        await trio.testing.wait_all_tasks_blocked()
        fleet.go_on.set()

    async def main() -> None:
        async with (
            trio.open_nursery() as nursery,
            served(fleet, path),
            await trio.open_unix_socket(str(path)) as stream,
        ):
            await Raw(stream).say(f"{MANAGER}.Wake", parameters={"name": "web1"})
            await fleet.begun.wait()
            nursery.start_soon(later)

    trio.run(main)
    assert fleet.asked == [("wake", "web1")]


# -- bad clients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        *(b"\0", b"{}\0", b"[]\0", b"\xff\0", b'{"method": 1}\0', b"GET / HTTP/1.1\r\n\r\n\0"),
        b'{"method": "a.b", "parameters": []}\0',
        b"[" * 60_000 + b"\0",
        b"x" * (varlink.CALL_MAX + 1),
    ],
)
def test_who_speaks_no_varlink_is_cut_off_alone(fleet: FakeFleet, path: Path, sent: bytes) -> None:
    async def use(raw: Raw) -> None:
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(sent)
            assert await Raw(stream).hear() == {}
        assert "parameters" in await raw.ask(f"{SERVICE}.GetInfo")

    with_raw(fleet, path, use)


def untimed() -> dict[str, trio.abc.Clock]:
    """Time that passes when there is nothing else to do."""
    return {"clock": trio.testing.MockClock(autojump_threshold=0)}


def test_who_sends_no_end_is_cut_off_and_who_is_silent_is_not(fleet: FakeFleet, path: Path) -> None:
    async def use(raw: Raw) -> None:
        begun = trio.current_time()
        async with await trio.open_unix_socket(str(path)) as slow:
            await slow.send_all(b'{"method": ')
            await trio.sleep(api.PATIENCE_SECONDS - 1)
            await slow.send_all(b'"a.b"')  # a byte now and then is no end, either
            assert await Raw(slow).hear() == {}
            assert trio.current_time() - begun == pytest.approx(api.PATIENCE_SECONDS)
        await trio.sleep(3600)
        assert "parameters" in await raw.ask(f"{SERVICE}.GetInfo")

    with_raw(fleet, path, use, **untimed())


def test_who_reads_nothing_is_cut_off(fleet: FakeFleet, path: Path) -> None:
    fleet.tpms["web1"] = fleet.add("web1")._replace(failure="x" * 100_000)
    calls = 20

    async def use(raw: Raw) -> None:
        for _ in range(calls):
            await raw.say(f"{MANAGER}.Describe", parameters={"name": "web1"})
        await trio.sleep(api.PATIENCE_SECONDS + 1)
        heard = 0
        while await raw.hear():
            heard += 1
        assert 0 < heard < calls

    with_raw(fleet, path, use, **untimed())


def test_a_watcher_who_leaves_is_not_served_any_longer(fleet: FakeFleet, path: Path) -> None:
    async def use(raw: Raw) -> None:
        async with await trio.open_unix_socket(str(path)) as stream:
            assert (await Raw(stream).ask(f"{MANAGER}.Watch", more=True))["continues"]
            assert len(fleet.watchers) == 1
        await trio.testing.wait_all_tasks_blocked()
        await raw.ask(f"{SERVICE}.GetInfo")
        assert fleet.watchers == []

    with_raw(fleet, path, use)


def test_a_user_has_so_many_connections(
    fleet: FakeFleet, path: Path, as_another: Callable[[int], None]
) -> None:
    as_another(OTHER_USER)

    async def connected() -> Raw:
        return Raw(await trio.open_unix_socket(str(path)))

    async def use(raw: Raw) -> None:
        clients = [raw, *[await connected() for _ in range(api.USER_CONNECTIONS_MAX - 1)]]
        for client in clients:
            assert "error" not in await client.ask(f"{SERVICE}.GetInfo")
        refused = await connected()
        assert (await refused.hear())["error"] == f"{MANAGER}.OverLimit"
        assert await refused.hear() == {}
        as_another(OTHER_USER + 1)
        clients.append(await connected())
        assert "error" not in await clients[-1].ask(f"{SERVICE}.GetInfo")
        as_another(OTHER_USER)
        await clients[1].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        clients[1] = await connected()
        assert "error" not in await clients[1].ask(f"{SERVICE}.GetInfo")
        for client in (refused, *clients):
            await client.stream.aclose()

    with_raw(fleet, path, use)


def test_all_users_together_keep_nobody_out_who_manages_all(
    fleet: FakeFleet,
    path: Path,
    as_another: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "CONNECTIONS_MAX", 1)
    as_another(OTHER_USER)

    async def use(raw: Raw) -> None:
        assert "error" not in await raw.ask(f"{SERVICE}.GetInfo")
        for uid, error in ((OTHER_USER + 1, f"{MANAGER}.OverLimit"), (0, None)):
            as_another(uid)
            async with await trio.open_unix_socket(str(path)) as stream:
                assert (await Raw(stream).ask(f"{SERVICE}.GetInfo")).get("error") == error

    with_raw(fleet, path, use)
