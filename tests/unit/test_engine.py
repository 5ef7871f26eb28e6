"""The engine on the real libtpms. Each test has a process of its own: libtpms is process-wide."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support.processes import in_child
from tests.support.stores import FailingStore
from tests.support.vectors import state_in
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.engine.libtpms import LibtpmsEngine, supported_versions
from vtpm_cuse.errors import (
    EngineError,
    EngineUnavailable,
    StateDamaged,
    StateMissing,
    StorageError,
    VtpmError,
)
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.sealed import SealedStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOTH = pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
READ_PCR_10 = tpm.pcr_read(10)


def make(*, tpm2: bool = True, store: FailingStore | None = None) -> LibtpmsEngine:
    return LibtpmsEngine(tpm2=tpm2, nvram=SealedStore(store or FailingStore()))


def started(*, tpm2: bool = True, store: FailingStore | None = None) -> LibtpmsEngine:
    """Powered on and past Startup."""
    engine = make(tpm2=tpm2, store=store)
    engine.start()
    assert run(engine, tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR) == 0
    return engine


def on_directory(directory: Path, *, tpm2: bool = True) -> LibtpmsEngine:
    return LibtpmsEngine(tpm2=tpm2, nvram=SealedStore(DirectoryStore(str(directory), tpm2=tpm2)))


def is_running(engine: LibtpmsEngine) -> bool:
    return engine.running


def run(engine: LibtpmsEngine, command: bytes) -> int:
    return tpm.code_of(engine.process(command))


# -- life cycle ---------------------------------------------------------------------------


@BOTH
@in_child
def test_start_makes_a_tpm_once(tpm2: bool) -> None:
    store = FailingStore()
    engine = make(tpm2=tpm2, store=store)
    assert not is_running(engine)
    engine.start()
    assert is_running(engine)
    assert list(store.blobs) == ["permall"]
    engine.stop()
    made = store.blobs["permall"]
    engine.start()
    assert store.blobs["permall"] == made
    engine.close()
    assert not is_running(engine)


@BOTH
@in_child
def test_reset_wants_startup_again(tpm2: bool) -> None:
    startup = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
    engine = started(tpm2=tpm2)
    for _ in range(3):
        engine.start()
        read = tpm.get_random(8) if tpm2 else tpm.tpm12_pcr_read(0)
        assert run(engine, read) == (0x100 if tpm2 else 0x26)
        assert run(engine, startup) == 0
        assert run(engine, read) == 0
    engine.stop()
    engine.stop()


@in_child
def test_both_versions_in_turn() -> None:
    for tpm2 in (True, False, True):
        engine = started(tpm2=tpm2)
        engine.close()


@BOTH
@in_child
def test_stopped_tpm_is_never_entered(tpm2: bool) -> None:
    """libtpms itself crashes, or answers with nothing."""
    engine = make(tpm2=tpm2)
    calls: list[Callable[[], object]] = [
        lambda: engine.process(tpm.get_random(8)),
        engine.hash_start,
        lambda: engine.hash_data(b"x"),
        engine.hash_end,
        engine.established,
        engine.reset_established,
        engine.volatile_state,
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(EngineError) as caught:
                call()
            assert caught.value.rc == 9
        engine.start()
        engine.stop()


def test_supported_versions() -> None:
    assert supported_versions() == {"1.2", "2.0"}


@in_child
def test_version_and_properties() -> None:
    engine = make()
    major, minor, _micro = engine.version
    assert (major, minor) >= (0, 9)
    assert engine.tpm_property(2) == 4096
    with pytest.raises(EngineError):
        engine.tpm_property(999)


@in_child
def test_profiles_are_reported_honestly() -> None:
    engine = make()
    if engine.has_profiles:
        engine.set_profile('{"Name":"default-v1"}')
        engine.start()
        assert engine.was_manufactured()
    else:
        with pytest.raises(EngineUnavailable):
            engine.set_profile('{"Name":"default-v1"}')
        engine.start()
        assert not engine.was_manufactured()


@BOTH
@in_child
def test_info_is_json_stopped_and_running(tpm2: bool) -> None:
    engine = make(tpm2=tpm2)
    assert json.loads(engine.info(1))
    engine.start()
    assert json.loads(engine.info(1))["TPMSpecification"]["family"] == ("2.0" if tpm2 else "1.2")
    assert json.loads(engine.info(0x7FFFFFFF))


@pytest.mark.parametrize(("tpm2", "smallest"), [(True, 0xAF8), (False, 0xC00)])
@in_child
def test_buffer_size(tpm2: bool, smallest: int) -> None:
    engine = make(tpm2=tpm2)
    assert engine.buffer_size(0) == (4096, smallest, 4096)
    assert engine.buffer_size(1) == (smallest, smallest, 4096)
    assert engine.buffer_size(1 << 20) == (4096, smallest, 4096)
    assert engine.buffer_size(3100) == (3100, smallest, 4096)
    engine.start()
    assert engine.buffer_size(0) == (3100, smallest, 4096)


@in_child
def test_debug_log(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("wb") as file:
        engine = make(tpm2=False)
        engine.set_debug(file.fileno(), 10, "PREFIX ")
        engine.start()
        engine.process(tpm.TPM12_STARTUP_CLEAR)
        engine.set_debug(-1, 0, "")
    assert "PREFIX " in log.read_text()


# -- commands -----------------------------------------------------------------------------


@in_child
def test_commands_of_tpm2() -> None:
    engine = started()
    first, second = (engine.process(tpm.get_random(16)) for _ in range(2))
    assert len(first) == 12 + 16
    assert first != second
    before = tpm.pcr_value(engine.process(READ_PCR_10))
    assert run(engine, tpm.pcr_extend(10, b"\x11" * 32)) == 0
    assert tpm.pcr_value(engine.process(READ_PCR_10)) != before


@in_child
def test_commands_of_tpm12() -> None:
    engine = started(tpm2=False)
    extended = engine.process(tpm.tpm12_pcr_extend(10, b"\x11" * 20))
    assert tpm.code_of(extended) == 0
    assert engine.process(tpm.tpm12_pcr_read(10)) == extended


@BOTH
@in_child
def test_rubbish_gets_an_answer(tpm2: bool) -> None:
    engine = started(tpm2=tpm2)
    for command in (bytes(10), b"\xff" * 10, b"\xff" * 4096, tpm.get_random(8)[:9], b"\x80", b""):
        response = engine.process(command)
        assert len(response) == 10
        assert tpm.code_of(response) != 0
    read = tpm.get_random(8) if tpm2 else tpm.tpm12_pcr_read(0)
    assert run(engine, read) == 0


@in_child
def test_command_is_not_changed() -> None:
    """TPM 1.2 decrypts in place; the caller's bytes are the caller's."""
    engine = started(tpm2=False)
    command = tpm.tpm12_pcr_extend(10, b"\x11" * 20)
    copy = bytes(bytearray(command))
    engine.process(command)
    assert command == copy


@in_child
def test_locality_reaches_the_tpm() -> None:
    engine = started()
    assert run(engine, tpm.pcr_extend(17, bytes(32))) == 0x907
    for locality, result in ((3, 0), (0, 0x907), (2, 0), (0, 0x907)):
        engine.locality = locality
        assert run(engine, tpm.pcr_extend(17, bytes(32))) == result


@in_child
def test_running_command_is_cancelled() -> None:
    """The library forgets a cancellation that comes before the command: so ask until it ends."""
    engine = started()
    for attempt in range(30):
        over = threading.Event()

        def keep_asking(over: threading.Event = over) -> None:
            while not over.wait(0.0005):
                assert engine.cancel() == 0

        asker = threading.Thread(target=keep_asking)
        asker.start()
        try:
            code = run(engine, tpm.create_primary_rsa(bits=3072, unique=b"%d" % attempt))
        finally:
            over.set()
            asker.join()
        assert code in {0, 0x909}
        if code == 0x909:
            break
        engine.start()  # the key would fill its slots
        run(engine, tpm.TPM2_STARTUP_CLEAR)
    else:
        pytest.fail("no command was cancelled")
    assert run(engine, tpm.get_random(8)) == 0


@in_child
def test_idle_cancellation_has_no_effect() -> None:
    engine = started()
    assert engine.cancel() == 0
    assert run(engine, tpm.create_primary_rsa()) == 0
    engine.close()
    assert started(tpm2=False).cancel() == 9


# -- hash sequence and established bit ----------------------------------------------------


@in_child
def test_hash_sequence_of_tpm2() -> None:
    engine = started()
    assert engine.established() is False
    before = tpm.pcr_value(engine.process(tpm.pcr_read(17)))
    assert engine.hash_start() == 0
    assert engine.hash_data(b"a" * 5000) == 0
    assert engine.hash_data(b"") == 0
    assert engine.hash_end() == 0
    after = tpm.pcr_value(engine.process(tpm.pcr_read(17)))
    assert after != before
    assert engine.established() is True
    # In two parts it is the same measurement.
    engine.hash_start()
    engine.hash_data(b"a" * 2000)
    engine.hash_data(b"a" * 3000)
    engine.hash_end()
    assert tpm.pcr_value(engine.process(tpm.pcr_read(17))) == after


@BOTH
@in_child
def test_established_bit(tpm2: bool) -> None:
    engine = started(tpm2=tpm2)
    assert engine.established() is False
    assert engine.hash_start() == 0
    assert engine.hash_end() == 0
    assert engine.established() is True
    for locality, result in ((0, 0x3D), (1, 0x3D), (2, 0x3D)):
        engine.locality = locality
        assert engine.reset_established() == result
        assert engine.established() is True
    engine.locality = 3
    assert engine.reset_established() == 0
    assert engine.established() is False


@in_child
def test_hash_out_of_order_on_tpm12() -> None:
    engine = started(tpm2=False)
    assert engine.hash_end() == 0x1A
    engine.start()
    assert engine.hash_start() == 0x26  # before Startup


# -- state --------------------------------------------------------------------------------


@BOTH
@in_child
def test_permanent_state_is_kept(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    define, write, read = _nv(tpm2=tpm2)
    assert run(engine, define) == 0
    assert run(engine, write) == 0
    engine.close()
    engine = started(tpm2=tpm2, store=store)
    assert engine.process(read)[-20:].find(b"persists") >= 0


def _nv(*, tpm2: bool) -> tuple[bytes, bytes, bytes]:
    if tpm2:
        index = tpm.NV_INDEX
        return (
            tpm.nv_define(index, 8),
            tpm.nv_write(index, b"persists"),
            tpm.nv_read(index, 8),
        )
    index = 0x1101
    return (
        tpm.tpm12_nv_define(index, 8),
        tpm.tpm12_nv_write(index, b"persists"),
        tpm.tpm12_nv_read(index, 8),
    )


@BOTH
@in_child
def test_volatile_state_resumes(tpm2: bool) -> None:
    store = FailingStore()
    extend, read = (
        (tpm.pcr_extend(10, b"\x22" * 32), READ_PCR_10)
        if tpm2
        else (tpm.tpm12_pcr_extend(10, b"\x22" * 20), tpm.tpm12_pcr_read(10))
    )
    engine = started(tpm2=tpm2, store=store)
    assert run(engine, extend) == 0
    expected = engine.process(read)
    SealedStore(store).store("volatilestate", engine.volatile_state())
    for _ in range(2):
        engine.start()
        assert engine.process(read)[-20:] == expected[-20:]
    store.delete("volatilestate")
    engine.start()
    assert run(engine, read) != 0


@BOTH
@in_child
def test_state_moves_to_another_tpm(tpm2: bool) -> None:
    extend, read = (
        (tpm.pcr_extend(10, b"\x33" * 32), READ_PCR_10)
        if tpm2
        else (tpm.tpm12_pcr_extend(10, b"\x33" * 20), tpm.tpm12_pcr_read(10))
    )
    engine = started(tpm2=tpm2)
    assert run(engine, extend) == 0
    expected = engine.process(read)
    volatile = engine.volatile_state()
    permanent = engine.get_state(StateType.PERMANENT)
    engine.close()

    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    with pytest.raises(EngineError):  # only a stopped one can be given a state
        engine.set_state(StateType.PERMANENT, permanent)
    engine.stop()
    before = dict(store.blobs)
    engine.set_state(StateType.PERMANENT, permanent)
    engine.set_state(StateType.VOLATILE, volatile)
    engine.set_state(StateType.SAVESTATE, None)
    assert store.blobs == before  # nothing is written before the start
    engine.start()
    assert engine.process(read)[-20:] == expected[-20:]
    assert SealedStore(store).load("permall") == permanent


@BOTH
@in_child
def test_bad_state_is_refused_and_stored_one_stays(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    engine.stop()
    before = dict(store.blobs)
    for rubbish in (b"\0", b"rubbish" * 100, SealedStore(store).load("permall")[:-100]):
        with pytest.raises(EngineError) as caught:
            engine.set_state(StateType.PERMANENT, rubbish)
        assert caught.value.rc
        assert store.blobs == before
    engine.start()
    assert is_running(engine)


@in_child
def test_savestate_of_tpm2_is_of_bad_type() -> None:
    engine = make()
    engine.set_state(StateType.SAVESTATE, None)
    with pytest.raises(EngineError) as caught:
        engine.set_state(StateType.SAVESTATE, b"x" * 100)
    assert caught.value.rc == 0x34


@BOTH
@in_child
def test_get_state_of_a_stopped_engine(tpm2: bool) -> None:
    store = FailingStore()
    engine = make(tpm2=tpm2, store=store)
    with pytest.raises(StateMissing):
        engine.get_state(StateType.PERMANENT)
    engine.start()
    engine.stop()
    assert engine.get_state(StateType.PERMANENT) == SealedStore(store).load("permall")
    store.faults["load"] = StorageError("x", "disk on fire")
    with pytest.raises(StorageError, match="fire"):
        make(tpm2=tpm2, store=store).get_state(StateType.PERMANENT)


@BOTH
@in_child
def test_validate_state(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    engine.stop()
    engine.validate_state(StateType.PERMANENT)
    SealedStore(store).store("permall", b"rubbish" * 30)
    engine = make(tpm2=tpm2, store=store)
    with pytest.raises(VtpmError):
        engine.validate_state(StateType.PERMANENT)


@in_child
def test_save_state_of_tpm12() -> None:
    store = FailingStore()
    engine = started(tpm2=False, store=store)
    extended = engine.process(tpm.tpm12_pcr_extend(10, b"\x11" * 20))
    assert run(engine, tpm.TPM12_SAVE_STATE) == 0
    assert "savestate" in store.blobs
    engine.start()
    assert run(engine, tpm.TPM12_STARTUP_STATE) == 0
    assert engine.process(tpm.tpm12_pcr_read(10))[-20:] == extended[-20:]
    assert run(engine, tpm.tpm12_pcr_extend(10, b"\x11" * 20)) == 0
    assert "savestate" not in store.blobs


# -- failing callbacks --------------------------------------------------------------------


@BOTH
@in_child
def test_failing_load_never_makes_a_tpm(tpm2: bool) -> None:
    store = FailingStore()
    engine = make(tpm2=tpm2, store=store)
    engine.start()
    engine.close()
    before = dict(store.blobs)
    for fault in (
        StorageError("permall", "disk on fire"),
        StateDamaged("permall", "short", 3),
        StateDamaged("permall", "of the missing kind", 0x800),
    ):
        engine = make(tpm2=tpm2, store=store)
        store.faults["load:permall"] = fault
        with pytest.raises(StorageError) as caught:
            engine.start()
        assert caught.value is fault
        assert not is_running(engine)
        assert store.blobs == before
        store.faults.clear()
        engine.start()
        assert store.blobs == before
        engine.close()


@BOTH
@in_child
def test_failing_store_of_a_new_tpm(tpm2: bool) -> None:
    store = FailingStore()
    fault = store.faults["store"] = StorageError("permall", "disk full")
    engine = make(tpm2=tpm2, store=store)
    with pytest.raises(StorageError) as caught:
        engine.start()
    assert caught.value is fault
    assert not is_running(engine)
    store.faults.clear()
    engine.start()
    assert is_running(engine)
    assert list(store.blobs) == ["permall"]


@BOTH
@in_child
def test_failing_store_during_a_command(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    define, write, read = _nv(tpm2=tpm2)
    assert run(engine, define) == 0
    before = dict(store.blobs)
    fault = store.faults["store"] = StorageError("permall", "disk full")
    with pytest.raises(StorageError) as caught:
        engine.process(write)
    assert caught.value is fault
    assert store.blobs == before
    store.faults.clear()
    engine.start()  # the fault is not remembered
    assert run(engine, tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR) == 0
    assert run(engine, write) == 0
    assert b"persists" in engine.process(read)


@in_child
def test_any_exception_of_a_callback_comes_out() -> None:
    class Broken(SealedStore):
        def store(self, name: str, data: bytes) -> None:
            raise KeyError(name)

    engine = LibtpmsEngine(tpm2=True, nvram=Broken(FailingStore()))
    with pytest.raises(KeyError, match="permall"):
        engine.start()
    assert not is_running(engine)


@in_child
def test_failing_delete_of_tpm12() -> None:
    store = FailingStore()
    engine = started(tpm2=False, store=store)
    assert run(engine, tpm.TPM12_SAVE_STATE) == 0
    store.faults["delete"] = StorageError("savestate", "disk on fire")
    with pytest.raises(StorageError, match="fire"):
        engine.process(tpm.tpm12_pcr_extend(10, b"\x11" * 20))
    store.faults.clear()


@in_child
def test_savestate_taken_away_from_tpm12() -> None:
    """libtpms wants it deleted when it must exist: an error, and a good one."""
    store = FailingStore()
    engine = started(tpm2=False, store=store)
    assert run(engine, tpm.TPM12_SAVE_STATE) == 0
    store.delete("savestate")
    with pytest.raises(StateMissing):
        engine.process(tpm.tpm12_pcr_extend(10, b"\x11" * 20))


# -- states of the C suite ----------------------------------------------------------------

PCR_10 = hashlib.sha256(bytes(32) + b"\x11" * 32).digest()
"""After the one extension that the vectors have."""


@pytest.mark.parametrize("vector", ["v0.7.1-tpm2-dir-plain", "v0.10.2-tpm2-dir-plain"])
@in_child
def test_c_suites_tpm2_goes_on(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    engine = on_directory(directory)
    engine.start()
    assert tpm.pcr_value(engine.process(READ_PCR_10)) == PCR_10


@pytest.mark.parametrize("vector", ["v0.7.1-tpm2-dir-plain", "v0.10.2-tpm2-dir-plain", "v1-plain"])
@in_child
def test_c_suites_permanent_state(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    (directory / "tpm2-00.volatilestate").unlink(missing_ok=True)
    engine = on_directory(directory)
    engine.start()
    assert run(engine, tpm.TPM2_STARTUP_CLEAR) == 0
    assert run(engine, tpm.get_random(8)) == 0
    assert (directory / "tpm2-00.permall").read_bytes()[:4].hex() == "0201000a"


@pytest.mark.parametrize("vector", ["v0.7.1-tpm12-dir-plain", "v0.10.2-tpm12-dir-plain"])
@in_child
def test_c_suites_tpm12_goes_on(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    before = (directory / "tpm-00.permall").read_bytes()
    engine = on_directory(directory, tpm2=False)
    engine.start()
    assert run(engine, tpm.tpm12_pcr_read(0)) == 0  # resumed: no Startup needed
    assert (directory / "tpm-00.permall").read_bytes() == before


@in_child
def test_c_suites_savestate(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), "v0.10.2-tpm12-savestate")
    source = state_in(tmp_path_factory.mktemp("state"), "v0.10.2-tpm12-dir-plain")
    shutil.copy(source / "tpm-00.permall", directory)
    engine = on_directory(directory, tpm2=False)
    engine.start()
    assert engine.get_state(StateType.SAVESTATE)


# -- damage -------------------------------------------------------------------------------


def _damages(original: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "truncated": original[: len(original) // 2],
        "one byte more": original + b"\0",
        "garbage": b"garbage" * 50,
        "no payload": original[:6] + (10).to_bytes(4, "big"),
        "empty payload": bytes.fromhex("0201000a000000000010000100000000"),
        "payload cut": original[:6]
        + (len(original) - 100).to_bytes(4, "big")
        + original[10:12]
        + (len(original) - 116).to_bytes(4, "big")
        + original[16:-100],
        "payload of zeros": original[:16] + bytes(len(original) - 16),
        "newer format": b"\x03\x03" + original[2:],
        "encrypted": original[:10] + b"\0\2" + original[12:],
    }


@BOTH
@pytest.mark.parametrize("damage", list(_damages(bytes(200))))
@in_child
def test_damaged_state_is_an_error_and_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, tpm2: bool, damage: str
) -> None:
    vector, name = (
        ("v0.7.1-tpm2-dir-plain", "tpm2-00.permall")
        if tpm2
        else ("v0.7.1-tpm12-dir-plain", "tpm-00.permall")
    )
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    (directory / name.replace("permall", "volatilestate")).unlink()
    path = directory / name
    good = path.read_bytes()
    bad = _damages(good)[damage]
    path.write_bytes(bad)
    engine = on_directory(directory, tpm2=tpm2)
    with pytest.raises(VtpmError):
        engine.start()
    assert not is_running(engine)
    assert path.read_bytes() == bad
    assert [entry.name for entry in directory.iterdir()] == [name]
    path.write_bytes(good)
    engine.start()  # the right file put back, it works again
    assert is_running(engine)


@in_child
def test_damaged_volatile_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the C suite: a TPM 2 ignores an unreadable file, a TPM 1.2 does not start."""
    for tpm2, vector, prefix in (
        (True, "v0.7.1-tpm2-dir-plain", "tpm2-00"),
        (False, "v0.7.1-tpm12-dir-plain", "tpm-00"),
    ):
        directory = state_in(tmp_path_factory.mktemp("state"), vector)
        path = directory / f"{prefix}.volatilestate"
        path.write_bytes(path.read_bytes()[:-1])
        engine = on_directory(directory, tpm2=tpm2)
        if tpm2:
            engine.start()
            assert run(engine, tpm.TPM2_STARTUP_CLEAR) == 0
        else:
            with pytest.raises(StateDamaged):
                engine.start()
        engine.close()
