"""A fleet without TPMs, and its interface on a socket: what is asked of it, and by whom."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import uuid
from typing import TYPE_CHECKING, Any

import trio

from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.base import Bundle, Event, Note, Spec, Tpm
from vtpm_cuse.fleet.manager import api
from vtpm_cuse.wire import varlink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from vtpm_cuse.config import Secret
    from vtpm_cuse.fleet.base import Fleet, Identity, Offer, State

OTHER_USER = 4242


class FakeFleet:
    """Remembers TPMs by name.

    Attributes:
        trouble: Raised by a wake.
        bundles: What was imported.
        state: Of all that are exported.
        looks: What each TPM that is awake says of itself.
        before_list: Called before each list.
        token: Of the event loop that serves it, for a test in another thread.
    """

    token: trio.lowlevel.TrioToken

    def __init__(self) -> None:
        self.tpms: dict[str, Tpm] = {}
        self.specs: list[Spec] = []
        self.bundles: list[Bundle] = []
        self.state = b"state"
        self.looks: dict[str, bytes] = {}
        self.asked: list[tuple[object, ...]] = []
        self.trouble: Exception | None = None
        self.secrets: list[bytes | None] = []
        self.before_list: Callable[[], None] | None = None
        self.watchers: list[trio.MemorySendChannel[Event]] = []

    def add(self, name: str, owner: int = OTHER_USER, **more: str) -> Tpm:
        sockets = {kind: f"/run/vtpm/{name}/{kind}" for kind in ("data", "control", "managed")}
        tpm = Tpm(
            name=name,
            id=str(uuid.uuid4()),
            owner=owner,
            state="stopped",
            interface="socket",
            sockets=sockets,  # type: ignore[arg-type]  # their names, as text
            generation=0,
            last_used=None,
            commands=0,
            wakes=0,
            pid=None,
            failure="",
            labels=tuple(more.items()),
        )
        self.tpms[name] = tpm
        return tpm

    def tell(self, event: Event) -> None:
        for watcher in self.watchers:
            watcher.send_nowait(event)

    def end_watches(self) -> None:
        for watcher in self.watchers:
            watcher.close()

    async def create(self, spec: Spec, secret: Secret | None = None) -> Tpm:
        self.secrets.append(None if secret is None else secret.value)
        if spec.name in self.tpms:
            raise FleetError("TpmExists", spec.name, "there is one already")
        self.specs.append(spec)
        tpm = self.add(spec.name, spec.owner, **dict(spec.labels))
        self.tell(Event("created", tpm))
        return tpm

    async def start(self, name: str, secret: Secret | None = None) -> Tpm:
        self.secrets.append(None if secret is None else secret.value)
        return self._become(name, "asleep", "start")

    async def stop(self, name: str) -> Tpm:
        return self._become(name, "stopped", "stop")

    async def reset(self, name: str) -> Tpm:
        return self._become(name, "awake", "reset")

    async def remove(self, name: str, *, force: bool = False) -> None:
        tpm = self._become(name, "stopped", "remove", force)
        del self.tpms[tpm.name]
        self.tell(Event("removed", tpm))

    async def list(self, names: Sequence[str] | None = None) -> Sequence[Tpm]:
        if self.before_list is not None:
            self.before_list()
        return [self.tpms[name] for name in sorted(self.tpms) if names is None or name in names]

    async def describe(self, name: str) -> Tpm:
        for tpm in self.tpms.values():
            if name in {tpm.name, tpm.id}:
                return tpm
        raise FleetError("NoSuchTpm", name, "there is none")

    async def update(
        self,
        name: str,
        new_name: str | None = None,
        labels: tuple[tuple[str, str], ...] | None = None,
        cdi: Offer | None = None,
    ) -> Tpm:
        tpm = self._become(name, "stopped", "update", new_name)._replace(cdi=cdi or "off")
        del self.tpms[tpm.name]
        tpm = tpm._replace(name=new_name or tpm.name, labels=labels or tpm.labels)
        self.tpms[tpm.name] = tpm
        return tpm

    async def snapshot(self, name: str, snapshot: str) -> None:
        self.asked.append(("snapshot", name, snapshot))

    async def restore(self, name: str, snapshot: str) -> Tpm:
        return self._become(name, "stopped", "restore", snapshot)

    async def clone(self, name: str, new_name: str, identity: Identity = "new") -> Tpm:
        tpm = self._become(name, "stopped", "clone", new_name, identity)
        return self.add(new_name, tpm.owner)

    async def export(self, name: str) -> Bundle:
        tpm = self._become(name, "stopped", "export")
        return Bundle(tpm.id, Spec(tpm.name, tpm.owner, labels=tpm.labels), self.state)

    async def take_in(self, bundle: Bundle, secret: Secret | None = None) -> Tpm:
        self.bundles.append(bundle)
        return await self.create(bundle.spec, secret)

    async def look(self, name: str, what: str) -> bytes | None:
        tpm = await self.describe(name)
        if tpm.state != "awake":
            raise FleetError("Busy", tpm.name, "it is not woken")
        return self.looks.get(what)

    async def logs(self, name: str) -> Sequence[Note]:
        return [Note(0.0, f"{(await self.describe(name)).name} was \x1b[2Jmade")]

    async def hibernate(self, name: str) -> Tpm:
        return self._become(name, "asleep", "hibernate")

    async def wake(self, name: str) -> Tpm:
        if self.trouble is not None:
            raise self.trouble
        return self._become(name, "awake", "wake")

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[Event]]:
        send, receive = trio.open_memory_channel[Event](math.inf)
        self.watchers.append(send)
        try:
            yield receive
        finally:
            self.watchers.remove(send)

    def _become(self, key: str, state: State, *asked: object) -> Tpm:
        tpm = next((tpm for tpm in self.tpms.values() if key in {tpm.name, tpm.id}), None)
        if tpm is None:
            raise FleetError("NoSuchTpm", key, "there is none any more")
        self.asked.append((*asked[:1], tpm.name, *asked[1:]))
        self.tpms[tpm.name] = tpm = tpm._replace(state=state)
        self.tell(Event("changed", tpm))
        return tpm


@contextlib.asynccontextmanager
async def served(fleet: Fleet, path: Path) -> AsyncIterator[str]:
    """The path of its socket."""
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.serve, fleet, trio.SocketListener(listener))
        yield str(path)
        nursery.cancel_scope.cancel()


def with_manager(fleet: FakeFleet, path: Path, use: Callable[[Manager], Any]) -> Any:  # noqa: ANN401
    """What a client of the package gets."""

    def work() -> Any:  # noqa: ANN401
        with Manager(str(path)) as manager:
            return use(manager)

    async def main() -> Any:  # noqa: ANN401
        async with served(fleet, path):
            return await trio.to_thread.run_sync(work)

    return trio.run(main)


class Raw:
    """A connection that says what a test says."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._messages = varlink.Messages(varlink.REPLY_MAX)

    async def say(self, method: str, **rest: object) -> None:
        await self.stream.send_all(json.dumps({"method": method, **rest}).encode() + b"\0")

    async def hear(self) -> dict[str, Any]:
        """The next reply; empty at the end."""
        while (message := self._messages.take()) is None:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:  # it has not read all that was sent
                return {}
            if not data:
                return {}
            self._messages.feed(data)
        found: dict[str, Any] = json.loads(message)
        return found

    async def ask(self, method: str, **rest: object) -> dict[str, Any]:
        await self.say(method, **rest)
        return await self.hear()


def with_raw(
    fleet: FakeFleet,
    path: Path,
    use: Callable[[Raw], Awaitable[None]],
    **run: Any,  # noqa: ANN401
) -> None:
    async def main() -> None:
        async with served(fleet, path) as place, await trio.open_unix_socket(place) as stream:
            await use(Raw(stream))

    trio.run(main, **run)
