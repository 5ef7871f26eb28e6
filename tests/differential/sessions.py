"""All sessions that both programs are asked: hand-written and generated, from one seed.

`MASKS` in masks.py says which bytes of an answer are random.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Final

from tests.differential.exchanges import (
    BODIES,
    CANCEL,
    GET_CAPABILITY,
    GET_CONFIG,
    GET_ESTABLISHED,
    HASH_DATA,
    HASH_END,
    HASH_START,
    INIT,
    LOCK_STORAGE,
    PERMANENT,
    RESET_ESTABLISHED,
    SAVESTATE,
    SET_BLOB,
    SET_BUFFERSIZE,
    SET_DATAFD,
    SET_LOCALITY,
    STOP,
    STORE_VOLATILE,
    VOLATILE,
    Exchange,
    Session,
    Way,
    get_blob,
    get_info,
    hash_data,
    prefixed,
    ptm,
    set_blob,
    u32,
    vendor_set_locality,
    version,
)
from tests.differential.stories import (
    NOT_CHANGED,
    NOT_CHANGED_12,
    OBJECT,
    OWNER,
    PASSWORD,
    tpm2_last_story,
    tpm2_story,
    tpm12_story,
)
from tests.support import commands as tpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED: Final = 20240607


def sessions() -> list[Session]:
    """All of them."""
    return [
        *(_data_session(tpm2=tpm2) for tpm2 in (True, False)),
        *(_control_session(tpm2=tpm2) for tpm2 in (True, False)),
        *(_framing_session(tpm2=tpm2) for tpm2 in (True, False)),
        *_life_sessions(),
        *_locality_sessions(),
        _seeds_session(),
        *_key_sessions(),
    ]


def _changed(rng: random.Random, command: bytes) -> bytes:
    """The command with some of its body changed; header and its size fit."""
    body = bytearray(command[10:])
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(5):
            case 0 if body:
                body[rng.randrange(len(body))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 1 if body:
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            case 2 if body:
                del body[rng.randrange(len(body)) :]
            case 3:
                body += rng.randbytes(rng.choice((1, 2, 4, 50)))
            case _ if body:
                place = rng.randrange(len(body))
                body[place:place] = rng.randbytes(rng.randint(1, 4))
    return command[:2] + struct.pack(">I", 10 + len(body)) + command[6:10] + bytes(body)


def _random_command(rng: random.Random, *, tpm2: bool) -> bytes:
    """A header that fits a random body."""
    excluded = NOT_CHANGED if tpm2 else NOT_CHANGED_12
    if tpm2:
        tag = rng.choice((0x8001, 0x8002, 0x8001, 0x8002, 0xC1, 0x8003, 0))
        code = rng.randrange(0x11D, 0x1A0) if rng.random() < 0.9 else rng.getrandbits(32)
    else:
        tag = rng.choice((0xC1, 0xC1, 0xC2, 0xC3, 0xC4, 0x8001, 0))
        code = rng.randrange(0x100) if rng.random() < 0.9 else rng.getrandbits(32)
    if code in excluded:
        code = 0x17B if tpm2 else 0x46
    body = rng.choice((b"", u32(OWNER), u32(OBJECT), u32(0))) + rng.choice((b"", PASSWORD))
    body += rng.randbytes(rng.choice((0, 1, 2, 4, 8, 20, 100)))
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def _data_session(*, tpm2: bool) -> Session:
    """The story, then changed and random commands."""
    rng = random.Random(SEED + tpm2)  # noqa: S311 - not for secrets
    story = tpm2_story() if tpm2 else tpm12_story()
    excluded = NOT_CHANGED if tpm2 else NOT_CHANGED_12
    templates = [
        command for _, command in story if int.from_bytes(command[6:10], "big") not in excluded
    ]
    found = [Exchange("init", Way.CONTROL, ptm(INIT, bytes(4)))]
    found += [Exchange(name, Way.DATA, command) for name, command in story]
    restart = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
    for number in range(2400 if tpm2 else 1600):
        if (
            number % (100 if tpm2 else 200) == 0
        ):  # what was done to it, or a failure mode, does not last
            found += [
                Exchange(f"reset {number}", Way.CONTROL, ptm(INIT, bytes(4))),
                Exchange(f"startup {number}", Way.DATA, restart),
            ]
        if rng.random() < 0.6:
            command = _changed(rng, rng.choice(templates))
        else:
            command = _random_command(rng, tpm2=tpm2)
        found.append(Exchange(f"generated {number}: {command[:40].hex()}", Way.DATA, command))
    return Session(f"data {version(tpm2=tpm2)}", tpm2, tuple(found))


def _control_session(*, tpm2: bool) -> Session:
    """Control messages good and bad, in every state, with commands between them."""
    rng = random.Random(SEED + 10 + tpm2)  # noqa: S311 - not for secrets
    startup = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
    read = tpm.pcr_read(17) if tpm2 else tpm.tpm12_pcr_read(17)
    found: list[Exchange] = []

    def add(name: str, message: bytes, way: Way = Way.CONTROL) -> None:
        found.append(Exchange(f"{name} ({len(found)})", way, message))

    for state in ("stopped", "initialised", "started"):
        if state == "initialised":
            add("init", ptm(INIT, bytes(4)))
        if state == "started":
            add("startup", startup, Way.DATA)
        for command, size in BODIES.items():
            if command in {INIT, STOP, SET_DATAFD}:
                continue
            for body in (b"", *(bytes(n) for n in {1, 4, 8, 12, 16, size} - {0})):
                if command == SET_BLOB and size <= len(body):
                    continue  # empty permanent states end the C suite's process
                if command == HASH_DATA and size < len(body):
                    continue  # more than announced: below
                add(f"{state}: {command:x} with {len(body)} bytes", ptm(command, body))
        for locality in (0, 1, 3, 4, 5, 255):
            for command in (SET_LOCALITY, RESET_ESTABLISHED):
                add(f"{state}: {command:x} of locality {locality}", ptm(command, bytes([locality])))
            add(f"{state}: command there", read, Way.DATA)
        add(f"{state}: locality 0", ptm(SET_LOCALITY, b"\0"))
        for flags in (*(1 << n for n in range(9)), 0xFF, 1 << 31, 1 << 32, (1 << 64) - 1):
            add(f"{state}: info {flags:x}", get_info(flags))
        for offset in (1, 100, 3071, 3072, 4000, 1 << 20, 0xFFFFFFFF):
            add(f"{state}: info at {offset}", get_info(0xDF, offset))
        for kind in (0, PERMANENT, VOLATILE, SAVESTATE, 4, 0xFFFFFFFF):
            for offset in (0, 1, 100, 1 << 20):
                add(f"{state}: blob {kind:x} at {offset}", get_blob(kind, offset=offset))
            add(f"{state}: take rubbish for {kind:x}", set_blob(kind, b"rubbish"))
        for size in (0, 1, 0xAF8, 0xC00, 4096, 4097, 0xFFFFFFFF):
            add(f"{state}: buffer size {size}", ptm(SET_BUFFERSIZE, u32(size)))
        for text in (b"", b"a", b"a" * 4092, b"a" * 4096, b"a" * 4097, b"a" * 20000):
            if len(text) > 4096 and (state == "stopped" or not (tpm2 or state == "started")):
                continue  # refused: below
            add(f"{state}: hash start", ptm(HASH_START))
            add(f"{state}: hash {len(text)}", hash_data(text))
            add(f"{state}: hash end", ptm(HASH_END))
            add(f"{state}: hashed", read, Way.DATA)
        add(f"{state}: stop and back", ptm(STOP if state == "stopped" else CANCEL))
        for count in (0, 1):
            add(f"{state}: lock {count}", ptm(LOCK_STORAGE, u32(count)))
    for body in (b"", b"\0", bytes(5), bytes(8), u32(1), u32(2), u32(0xFFFFFFFF)):
        add(f"init with {body.hex() or 'nothing'}", ptm(INIT, body))
        add("command", read, Way.DATA)
        add(f"stop with {body.hex() or 'nothing'}", ptm(STOP, body))
        add("command", read, Way.DATA)
    for number in (0, 0x14, 0x15, 0x100, 0x80000000, 0xFFFFFFFF):
        for body in (b"", bytes(4), bytes(100)):
            add(f"unknown {number:x} with {len(body)}", ptm(number, body))
    for cut in (b"", b"\0", b"\0\0", b"\0\0\0"):
        add(f"{len(cut)} bytes", cut)
    for number in range(700):
        add(f"generated {number}", _random_control(rng, tpm2=tpm2))
        if rng.random() < 0.2:
            add("startup", startup, Way.DATA)
            add("command", read, Way.DATA)
    add("command", read, Way.DATA)  # takes the lock back
    last = {
        "stop": ptm(STOP),
        "init": ptm(INIT, bytes(4)),
        "data descriptor after a client": ptm(SET_DATAFD),
        "hash more than announced": ptm(HASH_DATA, bytes(8)),
        "stop again": ptm(STOP),
        "hash much while off": hash_data(bytes(20000)),
    }
    found += [Exchange(f"last: {name}", Way.CONTROL, message) for name, message in last.items()]
    first = Exchange("first: data descriptor before any client", Way.CONTROL, ptm(SET_DATAFD))
    return Session(f"control {version(tpm2=tpm2)}", tpm2, (first, *found))


def _random_control(rng: random.Random, *, tpm2: bool) -> bytes:
    command = rng.choice([*BODIES, *[INIT] * tpm2, rng.getrandbits(32)])
    if command == SET_DATAFD:
        command = GET_CAPABILITY
    size = BODIES.get(command, 0)
    match command:
        case 0xD:  # SET_BLOB
            return set_blob(rng.choice((0, 1, 2, 3, 4)), rng.randbytes(rng.randint(1, 200)))
        case 0x7:  # HASH_DATA
            return hash_data(rng.randbytes(rng.randint(0, 4000)))
        case 0xC:  # GET_BLOB
            return get_blob(
                rng.randrange(5), decrypted=rng.random() < 0.5, offset=rng.randrange(3000)
            )
        case 0x11:  # SET_BUFFERSIZE
            return ptm(SET_BUFFERSIZE, u32(rng.choice((0, 0xAF8, 3000, 4096, rng.getrandbits(32)))))
        case 0x12:  # GET_INFO
            return get_info(rng.getrandbits(8), rng.choice((0, 0, rng.randrange(5000))))
    if rng.random() < 0.2:
        size = rng.randrange(20)
    return ptm(command, bytes(rng.choice((0, 1, 3)) for _ in range(size)))


def _framing_session(*, tpm2: bool) -> Session:
    """What a stream of bytes may look like."""
    good = tpm.pcr_read(0) if tpm2 else tpm.tpm12_pcr_read(0)
    name = version(tpm2=tpm2)
    found: list[Exchange] = []

    def add(name: str, message: bytes, way: Way = Way.DATA, cut: int = 0) -> None:
        found.append(Exchange(name, way, message, cut))

    def sized(size: int, command: bytes = good) -> bytes:
        return command[:2] + struct.pack(">I", size) + command[6:]

    for state in ("off", "on"):
        if state == "on":
            add("init", ptm(INIT, bytes(4)), Way.CONTROL)
            add("startup", tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR)
        add(f"{state}: good", good)
        add(f"{state}: good, then the end", good, Way.DATA_END)
        add(f"{state}: nothing, then the end", b"", Way.DATA_END)
        for count in range(1, 10):
            add(f"{state}: {count} bytes, then the end", good[:count], Way.DATA_END)
        for count in range(10, len(good)):
            add(f"{state}: {count} bytes of more, then the end", good[:count], Way.DATA_END)
        for size in (0, 1, 9, 4097, 5000, 0x7FFFFFFF, 0xFFFFFFFF):
            add(f"{state}: size field {size}", sized(size))
        for size in (len(good) + 1, 100, 4096):
            add(f"{state}: size field {size}, then the end", sized(size), Way.DATA_END)
        for size in (10, len(good) - 1):
            add(f"{state}: surplus, size field {size}", sized(size), Way.DATA_END)
        add(f"{state}: two at once", good + good, Way.DATA_END)
        add(f"{state}: surplus byte", good + b"\0", Way.DATA_END)
        add(f"{state}: in two parts", good, Way.DATA_PARTS, 10)
        add(f"{state}: in two parts, the first short", good, Way.DATA_PARTS, 4)
        for size in (10, 11, 1000, 4095, 4096):
            add(
                f"{state}: rubbish of {size}",
                bytes(2) + struct.pack(">I", size) + b"\xff" * (size - 6),
            )
        add(
            f"{state}: largest",
            tpm.tpm2(0x17B, bytes(4086)) if tpm2 else tpm.tpm12(0x46, bytes(4086)),
        )
        for tag in (0xC1, 0xC2, 0xC3, 0xC4, 0x8001, 0x8002, 0x8003, 0, 0xFFFF):
            add(f"{state}: set locality by tag {tag:x}", vendor_set_locality(tag, b"\1"))
        for body in (b"", b"\0", b"\4", b"\5", b"\xff", bytes(4)):
            add(f"{state}: set locality {body.hex()}", vendor_set_locality(0x8001, body))
        for locality in (0, 1, 4, 5, 31, 32, 77, 255):
            # TPM 1.2 does not know the prefix, and takes its size field for a silly one.
            add(f"{state}: prefix of locality {locality}", prefixed(locality, good))
            add(f"{state}: unprefixed after {locality}", good)
        for announced in (0, 5, 0xFFFFFFFF):
            add(f"{state}: prefix announces {announced}", prefixed(0, good, announced))
        add(f"{state}: prefix alone, then the end", prefixed(0, b""), Way.DATA_END)
        add(f"{state}: prefix and 5 bytes, then the end", prefixed(0, good[:5]), Way.DATA_END)
        add(f"{state}: prefix of a bad command", prefixed(0, sized(5)))
        add(
            f"{state}: another message of the simulator",
            struct.pack(">IBI", 9, 0, 20) + good,
            Way.DATA_END,
        )
    return Session(f"framing {name}", tpm2, tuple(found))


def _seeds_session() -> Session:
    story = [Exchange(name, Way.DATA, command) for name, command in tpm2_last_story()]
    return Session("new seeds", True, (Exchange("init", Way.CONTROL, ptm(INIT, bytes(4))), *story))


def _locality_sessions() -> Iterator[Session]:
    """The vendor command where it is allowed, and locality 4 where it is not."""
    for tpm2 in (True, False):
        read = tpm.pcr_read(17) if tpm2 else tpm.tpm12_pcr_read(17)
        extend = tpm.pcr_extend(17, bytes(32)) if tpm2 else tpm.tpm12_pcr_extend(17, bytes(20))
        found = []
        for body in (b"", b"\0", b"\1", b"\3", b"\4", b"\5", b"\xff", b"\2\0\0\0"):
            command = vendor_set_locality(0x8001 if tpm2 else 0xC1, body)
            found.append(Exchange(f"by command: {body.hex()}", Way.DATA, command))
            found.append(Exchange(f"extend after {body.hex()}", Way.DATA, extend))
            found.append(Exchange(f"read after {body.hex()}", Way.DATA, read))
            found.append(
                Exchange(f"by control: {body.hex()}", Way.CONTROL, ptm(SET_LOCALITY, body))
            )
            found.append(Exchange(f"extend behind {body.hex()}", Way.DATA, extend))
        yield Session(
            f"locality {version(tpm2=tpm2)}",
            tpm2,
            tuple(found),
            flags=("not-need-init", "startup-clear"),
            locality=("allow-set-locality", "reject-locality-4"),
        )


def _life_sessions() -> Iterator[Session]:
    """Resets, automatic shutdown, volatile state, migration: in all orders that matter."""
    for tpm2 in (True, False):
        some = ((), ("disable-auto-shutdown",), ("not-need-init", "startup-clear"))
        for flags in some if tpm2 else some[:1]:  # TPM 1.2 has no such shutdown, and starts slowly
            name = f"life {version(tpm2=tpm2)} {'+'.join(flags)}".strip()
            yield Session(name, tpm2, tuple(_life(tpm2=tpm2)), flags)


def _life(*, tpm2: bool) -> Iterator[Exchange]:
    clear, state = (
        (tpm.TPM2_STARTUP_CLEAR, tpm.TPM2_STARTUP_STATE)
        if tpm2
        else (tpm.TPM12_STARTUP_CLEAR, tpm.TPM12_STARTUP_STATE)
    )
    read = tpm.pcr_read(10) if tpm2 else tpm.tpm12_pcr_read(10)
    extend = tpm.pcr_extend(10, b"\1" * 32) if tpm2 else tpm.tpm12_pcr_extend(10, b"\1" * 20)
    ends = (
        [("state", tpm.TPM2_SHUTDOWN_STATE), ("clear", tpm.TPM2_SHUTDOWN_CLEAR)]
        if tpm2
        else [("state", tpm.TPM12_SAVE_STATE)]
    )
    init, delete = ptm(INIT, bytes(4)), ptm(INIT, u32(1))
    number = 0

    def step(name: str, message: bytes, way: Way = Way.CONTROL) -> Exchange:
        nonlocal number
        number += 1
        return Exchange(f"{number}: {name}", way, message)

    for reset in ("init", "stop and init"):
        for end_name, end in [("nothing", b""), ("random", read), *ends]:
            for begin_name, begin in (("clear", clear), ("state", state)):
                about = f"{begin_name} after {end_name}, {reset}"
                yield step("init", init)
                yield step("startup", clear, Way.DATA)
                yield step("extend", extend, Way.DATA)
                if end:
                    yield step(f"end by {end_name}", end, Way.DATA)
                if reset != "init":
                    yield step("stop", ptm(STOP))
                yield step("init", init)
                yield step(f"startup {about}", begin, Way.DATA)
                yield step(f"pcr {about}", read, Way.DATA)
    yield step("startup", clear, Way.DATA)
    yield step("extend", extend, Way.DATA)
    yield step("store volatile", ptm(STORE_VOLATILE))
    for message in (init, init, delete, init, ptm(STOP)):
        yield step(f"volatile: {message.hex()}", message)
        yield step("resumed", read, Way.DATA)
        yield step("startup after resume", clear, Way.DATA)
    yield from _migration(step, init, read, extend, clear, prefix="plain")
    if tpm2:
        yield step("hash before startup: init", init)
        yield step("hash start", ptm(HASH_START))
        yield step("hash", hash_data(b"firmware"))
        yield step("hash end", ptm(HASH_END))
        yield step("startup", clear, Way.DATA)
        yield step("pcr 0", tpm.pcr_read(0), Way.DATA)
        yield step("pcr 17", tpm.pcr_read(17), Way.DATA)
        yield step("established", ptm(GET_ESTABLISHED))
        yield step("locality", ptm(SET_LOCALITY, b"\3"))
        yield step("locality survives: init", init)
        yield step("startup in locality 3", clear, Way.DATA)
        yield step("extend 17", tpm.pcr_extend(17, bytes(32)), Way.DATA)
        yield step("locality 1", ptm(SET_LOCALITY, b"\1"))
        yield step("init", init)
        yield step("startup in locality 1", clear, Way.DATA)


def _migration(
    step: Callable[[str, bytes], Exchange],
    init: bytes,
    read: bytes,
    extend: bytes,
    clear: bytes,
    *,
    prefix: str,
) -> Iterator[Exchange]:
    """State out and in again, the TPM as it was."""

    def data(name: str, command: bytes) -> Exchange:
        made = step(name, command)
        return Exchange(made.name, Way.DATA, command)

    def give(kind: int, source: str) -> Exchange:
        def message(answers: dict[str, bytes]) -> bytes:
            answer = answers[source]
            flags = int.from_bytes(answer[4:8], "big")
            return set_blob(kind, answer[16:], flags)

        made = step(f"{prefix}: give {kind}", b"")
        return Exchange(made.name, Way.CONTROL, message)

    yield step(f"{prefix}: init", init)
    yield data("startup", clear)
    yield data("extend", extend)
    gets = {}
    for kind in (PERMANENT, VOLATILE, SAVESTATE):
        taken = step(f"{prefix}: take {kind}", get_blob(kind))
        gets[kind] = taken.name
        yield taken
    yield data("the source goes on", read)
    yield step(f"{prefix}: stop", ptm(STOP))
    for kind in (PERMANENT, VOLATILE):
        yield give(kind, gets[kind])
    yield step(f"{prefix}: give no savestate", set_blob(SAVESTATE, b""))
    yield step(f"{prefix}: init with it", init)
    yield data("resumed", read)
    yield step(f"{prefix}: stop again", ptm(STOP))
    yield give(PERMANENT, gets[PERMANENT])
    yield step(f"{prefix}: give a damaged volatile", set_blob(VOLATILE, b"rubbish" * 10))
    yield step(f"{prefix}: init after damage", init)
    yield data("startup after damage", clear)
    yield data("read after damage", read)


def _key_sessions() -> Iterator[Session]:
    """Blobs of an encrypted state, with and without a migration key."""
    for tpm2 in (True, False):
        clear = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
        read = tpm.pcr_read(10) if tpm2 else tpm.tpm12_pcr_read(10)
        extend = tpm.pcr_extend(10, b"\1" * 32) if tpm2 else tpm.tpm12_pcr_extend(10, b"\1" * 20)
        for migration_key in (False, True):
            number = 0

            def step(name: str, message: bytes, way: Way = Way.CONTROL) -> Exchange:
                nonlocal number
                number += 1
                return Exchange(f"{number}: {name}", way, message)

            found = [step("config", ptm(GET_CONFIG))]
            found += _migration(step, ptm(INIT, bytes(4)), read, extend, clear, prefix="keys")
            found.append(step("init", ptm(INIT, bytes(4))))
            for kind in (PERMANENT, VOLATILE, SAVESTATE):
                found.append(step(f"decrypted {kind}", get_blob(kind, decrypted=True)))
            yield Session(
                f"keys {version(tpm2=tpm2)}{' migration' if migration_key else ''}",
                tpm2,
                tuple(found),
                migration_key=migration_key,
                file_key=True,
            )
