"""One stream of commands of several connections, for any resource manager of a TPM that is new.

The numbers of handles are each manager's own, so steps name what they use; what depends on chance is
left out of an answer, and a handle in it is written by its name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.commands import code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Make = Callable[["Known"], bytes]

_NOBODYS: Final = 0x80FF0000
_RETURNS_HANDLE: Final = frozenset({0x131, 0x157, 0x161, 0x167, 0x176, 0x186})
_BY_CHANCE: Final = frozenset({0x131, 0x15C, 0x162, 0x176, 0x17B})
"""Of these the code alone is compared: random numbers, contexts, keys of a seed, nonces."""


class Peer(Protocol):
    """A resource manager, and connections to it by name."""

    def open(self, name: str) -> None: ...
    def close(self, name: str) -> None:
        """On return the manager knows it."""

    def ask(self, name: str, command: bytes) -> bytes | str:
        """The response, or in words why there is none."""


@dataclass
class Known:
    """What the steps so far have given, by the names they gave it."""

    handles: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, bytes] = field(default_factory=dict)

    def handle(self, name: str) -> int:
        return self.handles.get(name, _NOBODYS)

    def name_of(self, client: str, handle: int) -> str:
        """Those of a client begin with its name; those of sessions are told apart by their index."""
        for name, known in self.handles.items():
            session = handle >> 24 in {2, 3} and known >> 24 in {2, 3}
            if session and known & 0xFFFFFF == handle & 0xFFFFFF:
                return f"{handle >> 24:02x} of {name}"
            if known == handle and name.startswith(client):
                return name
        return f"{handle >> 24:02x}"


@dataclass(frozen=True)
class Step:
    """A command of *client*; what its answer gives is called *gives*. No command: a close."""

    name: str
    client: str
    command: Make | None
    gives: str = ""


def _step(name: str, client: str, command: bytes | Make, gives: str = "") -> Step:
    make: Make = (lambda _: command) if isinstance(command, bytes) else command
    return Step(name, client, make, gives)


def _on(command: Callable[[int], bytes], name: str) -> Make:
    """A command whose handle is what *name* stands for."""
    return lambda known: command(known.handle(name))


def _load(name: str) -> Make:
    return lambda known: m.load(known.contexts.get(name, b""))


def _audited(handle: int) -> bytes:
    """GetRandom with an audit session."""
    area = m.u32(handle) + struct.pack(">HBH", 0, 0x81, 0)
    return tpm.tpm2(0x17B, m.u32(len(area)) + area + b"\0\x08", sessions=True)


def _by_wrong_mac(session: int) -> bytes:
    """CreatePrimary, authorized by a session that is to end with it, with a wrong HMAC."""
    area = m.u32(session) + b"\0\x10" + bytes(16) + b"\0" + b"\0\x20" + bytes(32)
    public = bytes.fromhex("0023000b00040072000000100018000b0003001000000000")
    body = m.u32(0x40000001, len(area)) + area + bytes.fromhex("000400000000")
    body += m.sized(public) + bytes(6)
    return tpm.tpm2(0x131, body, sessions=True)


def _property(number: int) -> bytes:
    return tpm.tpm2(0x17A, m.u32(6, number, 1))


def _clear() -> bytes:
    return tpm.tpm2(0x126, m.u32(0x4000000C) + m.PASSWORD, sessions=True)


def _objects() -> Iterator[Step]:
    yield _step("random", "A", tpm.get_random(8))
    yield _step("object", "A", m.load_external(1), "A1")
    yield _step("object of another", "B", m.load_external(2), "B1")
    yield _step("second object", "A", m.load_external(3), "A2")
    for client, name in (("A", "A1"), ("A", "A2"), ("B", "B1")):
        yield _step(f"{name} read", client, _on(m.read_public, name))
    yield _step("foreign object used", "B", _on(m.read_public, "A2"))
    yield _step("foreign object saved", "B", _on(m.save, "A2"))
    yield _step("foreign object flushed", "B", _on(m.flush, "A2"))
    yield _step("it is still there", "A", _on(m.read_public, "A2"))
    yield _step("list of objects", "A", m.list_handles(0x80000000))
    yield _step("list of one object", "A", m.list_handles(0x80000000, 1))
    yield _step("list from the second", "A", _on(m.list_handles, "A2"))
    yield _step("list of no object", "A", m.list_handles(0x80000000, 0))
    yield _step("list beyond all", "A", m.list_handles(0x80FFFFFF))
    yield _step("list of another", "B", m.list_handles(0x80000000))
    yield _step("object saved", "A", _on(m.save, "A1"), "A1 saved")
    yield _step("object handed over", "B", _load("A1 saved"), "B2")
    yield _step("object handed over, read", "B", _on(m.read_public, "B2"))
    yield _step("object handed over again", "B", _load("A1 saved"), "B3")
    yield _step("flush", "B", _on(m.flush, "B3"))
    yield _step("flush again", "B", _on(m.flush, "B3"))
    yield _step("flushed object used", "B", _on(m.read_public, "B3"))
    yield _step("sequence", "A", m.sequence_start(), "Aq")
    for part in (b"ab", b"cd"):
        update = _on(lambda handle, part=part: m.sequence_update(handle, part), "Aq")  # type: ignore[misc]
        yield _step(f"sequence update {part!r}", "A", update)
    yield _step("sequence complete", "A", _on(m.sequence_complete, "Aq"))
    yield _step("completed sequence used", "A", _on(m.sequence_complete, "Aq"))


def _sessions() -> Iterator[Step]:
    yield _step("session", "A", m.start_session(), "A session")
    yield _step("session of another", "B", m.start_session(), "B session")
    yield _step("policy", "A", _on(lambda h: m.policy_command_code(h, 0x17B), "A session"))
    yield _step("policy digest", "A", _on(m.policy_digest, "A session"))
    yield _step("list of loaded sessions", "A", m.list_handles(0x02000000))
    yield _step("list of saved sessions, none is", "A", m.list_handles(0x03000000))
    yield _step("foreign session used", "B", _on(m.policy_digest, "A session"))
    yield _step("foreign session saved", "B", _on(m.save, "A session"))
    yield _step("foreign session in the authorization area", "B", _on(_audited, "A session"))
    yield _step("it still goes on", "A", _on(m.policy_digest, "A session"))
    yield _step("HMAC session", "A", m.start_session(0), "A hmac")
    yield _step("wrong HMAC, to end with it", "A", _on(_by_wrong_mac, "A hmac"))
    yield _step("HMAC session after that", "A", _on(m.save, "A hmac"), "A hmac saved")
    yield _step("HMAC session saved by its client", "A", _on(_by_wrong_mac, "A hmac"))
    yield _step("HMAC session back", "A", _load("A hmac saved"), "A hmac")
    yield _step("HMAC session flushed", "A", _on(m.flush, "A hmac"))
    yield _step("session saved", "A", _on(m.save, "A session"), "A session saved")
    yield _step("saved session used", "A", _on(m.policy_digest, "A session"))
    yield _step("list of saved sessions, one is", "A", m.list_handles(0x03000000))
    yield _step("session handed over", "B", _load("A session saved"), "A session")
    yield _step("session handed over, used", "B", _on(m.policy_digest, "A session"))
    yield _step("session loaded twice", "A", _load("A session saved"))
    yield _step("session handed over, used again", "B", _on(m.policy_digest, "A session"))
    yield _step("session flushed", "B", _on(m.flush, "B session"))
    yield _step("session flushed again", "B", _on(m.flush, "B session"))


def _malformed() -> Iterator[Step]:
    area = m.u32(0x40000009) + struct.pack(">HBH", 0, 1, 0)
    for name, command in (
        ("unknown command", tpm.tpm2(0x1F0)),
        ("unknown vendor command", tpm.tpm2(0x20000001)),
        ("no handle", tpm.tpm2(0x173)),
        ("half a handle", tpm.tpm2(0x173, b"\x80\0")),
        ("no handle to flush", tpm.tpm2(0x165)),
        ("no handle to save", tpm.tpm2(0x162)),
        ("no context", m.load(b"")),
        ("context of zeros", m.load(bytes(40))),
        ("flush of a PCR", m.flush(0)),
        ("flush of 80FFFFFF", m.flush(0x80FFFFFF)),
        ("flush of 02000050", m.flush(0x02000050)),
        ("use of 80FFFFFF", m.read_public(0x80FFFFFF)),
        ("use of 03000050", m.policy_digest(0x03000050)),
        ("persistent object, none", m.read_public(0x81000077)),
        ("sessions where none may be", tpm.tpm2(0x165, m.u32(9) + area, sessions=True)),
        ("authorization area longer than all", tpm.tpm2(0x17B, m.u32(99) + area, sessions=True)),
        ("authorization area of 0", tpm.tpm2(0x17B, m.u32(0) + b"\0\x08", sessions=True)),
        ("bytes too many", tpm.tpm2(0x17B, b"\0\x08\0")),
        ("bytes too few", tpm.tpm2(0x17B, b"\0")),
        ("startup", tpm.TPM2_STARTUP_CLEAR),
    ):
        yield _step(name, "A", command)
    for number in (0x10E, 0x110, 0x111, 0x114, 0x11E, 0x203, 0x204, 0x205, 0x206, 0x207):
        yield _step(f"property {number:x}", "A", _property(number))
    for name, capability in (("algorithms", 0), ("commands", 2), ("PCRs", 5), ("curves", 8)):
        yield _step(f"capability: {name}", "A", tpm.tpm2(0x17A, m.u32(capability, 0, 254)))
    yield _step("NV index", "A", tpm.nv_define(tpm.NV_INDEX, 8))
    yield _step("NV index written by another", "B", tpm.nv_write(tpm.NV_INDEX, b"whatever"))
    yield _step("NV index read", "A", tpm.nv_read(tpm.NV_INDEX, 8))


def _ends() -> Iterator[Step]:
    for number in range(1, 66):
        yield _step(f"object {number} of one client", "C", m.load_external(number))
    yield Step("C closes", "C", None)
    for number in range(1, 18):
        yield _step(f"session {number} of one client", "D", m.start_session())
    yield Step("D closes", "D", None)
    for number in range(1, 7):
        name = f"E{number}"
        yield _step(f"{name}: session", name, m.start_session(), name)
        yield _step(f"{name}: saved", name, _on(m.save, name), f"{name} saved")
        yield Step(f"{name} closes", name, None)
    for number in range(1, 7):
        yield _step(f"session that E{number} left", "F", _load(f"E{number} saved"), f"E{number}")
        if number > 2:
            yield _step(f"session that E{number} left, ends", "F", _on(m.flush, f"E{number}"))
    yield _step("object, before a Clear", "G", m.load_external(1), "G1")
    yield _step("primary, before a Clear", "G", tpm.create_primary_rsa(), "G2")
    yield _step("Clear by another", "H", _clear())
    yield _step("primary, after it", "G", _on(m.read_public, "G2"))
    yield _step("object, after it", "G", _on(m.read_public, "G1"))
    yield _step("list after it", "G", m.list_handles(0x80000000))
    yield _step("victim's session", "V", m.start_session(), "V session")
    yield _step("foreign session flushed", "W", _on(m.flush, "V session"))
    yield _step("victim's session after that", "V", _on(m.policy_digest, "V session"))
    yield _step("victim's other commands", "V", tpm.get_random(8))


def _last() -> Iterator[Step]:
    """What a manager may not survive."""
    yield _step("unknown kind of handles", "A", m.list_handles(0x04000000))
    yield _step("unknown capability", "A", tpm.tpm2(0x17A, m.u32(0x55, 0, 1)))
    yield _step("random, after all", "A", tpm.get_random(8))


STREAM: Final = (*_objects(), *_sessions(), *_malformed(), *_ends(), *_last())


def answers(peer: Peer) -> dict[str, str]:
    """What came back, by the names of the steps."""
    known, there, found = Known(), set[str](), dict[str, str]()
    for step in STREAM:
        if step.command is None:
            peer.close(step.client)
            continue
        if step.client not in there:
            there.add(step.client)
            peer.open(step.client)
        command = step.command(known)
        answer = peer.ask(step.client, command)
        assert step.name not in found, "names are unique"
        found[step.name] = _shown(step, command, answer, known)
    return found


def _shown(step: Step, command: bytes, answer: bytes | str, known: Known) -> str:
    if isinstance(answer, str):
        return answer
    assert int.from_bytes(answer[2:6], "big") == len(answer), answer.hex()
    if code_of(answer):
        return f"{code_of(answer):#x}"
    code = int.from_bytes(command[6:10], "big")
    if code == 0x162:
        known.contexts[step.gives] = answer[10:]
    elif step.gives:
        known.handles[step.gives] = m.handle_of(answer)
    if code == 0x17A and command[10:14] == m.u32(1):
        return f"more {answer[10]}, {[known.name_of(step.client, h) for h in m.listed(answer)]}"
    if code in _BY_CHANCE or code in _RETURNS_HANDLE:
        return "success"
    return answer.hex()


def differing(some: Mapping[str, str], others: Mapping[str, str]) -> set[str]:
    """The steps whose answers are not the same."""
    assert some.keys() == others.keys()
    return {name for name, answer in some.items() if answer != others[name]}
