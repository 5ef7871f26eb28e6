"""The engine on the real libtpms. Each test has a process of its own: libtpms is process-wide."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support.libtpms import (
    BOTH,
    READ_PCR_10,
    is_running,
    make,
    nv_commands,
    run,
    started,
)
from tests.support.processes import in_child
from tests.support.stores import FailingStore
from vtpm_cuse.engine.libtpms import LibtpmsEngine, supported_versions
from vtpm_cuse.errors import (
    EngineError,
    EngineUnavailable,
    StateDamaged,
    StateMissing,
    StorageError,
)
from vtpm_cuse.storage.sealed import SealedStore

if TYPE_CHECKING:
    from collections.abc import Callable

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
    engine.stop()
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
        engine.stop()


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
def test_version() -> None:
    engine = make()
    major, minor, _micro = engine.version
    assert (major, minor) >= (0, 9)


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
    assert json.loads(engine.info(0x7FFFFFFF)) == json.loads(engine.info(0xFFFF_FFFF_FFFF_FFFF))


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
    engine.stop()
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


# -- failing callbacks --------------------------------------------------------------------


@BOTH
@in_child
def test_failing_load_never_makes_a_tpm(tpm2: bool) -> None:
    store = FailingStore()
    engine = make(tpm2=tpm2, store=store)
    engine.start()
    engine.stop()
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
        engine.stop()


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
    define, write, read = nv_commands(tpm2=tpm2)
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
