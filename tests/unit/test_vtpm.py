"""The vTPM: life cycle, automatic shutdown, refusals, locality, state in and out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import commands as tpm
from tests.support.engine import FakeEngine, echo
from tests.support.stores import FailingStore
from vtpm_cuse.errors import (
    EngineError,
    PtmError,
    StateDamaged,
    StateLocked,
    StateMissing,
    StorageError,
    TpmUnavailable,
)
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions

SHUTDOWN_STATE, SHUTDOWN_CLEAR = tpm.TPM2_SHUTDOWN_STATE, tpm.TPM2_SHUTDOWN_CLEAR
Change = Callable[[bytes], bytes]
SET_LOCALITY_3 = bytes.fromhex("80010000000b2000100003")


def make(
    *, tpm2: bool = True, running: bool = True, options: VtpmOptions | None = None
) -> tuple[Vtpm, FakeEngine, FailingStore]:
    store = FailingStore()
    engine = FakeEngine(tpm2=tpm2)
    vtpm = Vtpm(engine, SealedStore(store), options)
    if running:
        vtpm.start()
        engine.calls.clear()
    return vtpm, engine, store


def result_of(vtpm: Vtpm, *, delete_volatile: bool = False) -> int:
    with pytest.raises(TpmUnavailable) as caught:
        vtpm.start(delete_volatile=delete_volatile)
    return caught.value.result


# -- start and stop -----------------------------------------------------------------------


def test_lock_comes_before_the_engine_looks_at_state() -> None:
    vtpm, engine, store = make(running=False)
    store.faults["lock"] = StateLocked("/x/.lock", "taken")
    assert result_of(vtpm) == 9
    assert "start" not in engine.calls
    assert not vtpm.running


@pytest.mark.parametrize(
    ("fault", "tpm2_result", "tpm12_result"),
    [
        (StorageError("x", "disk on fire"), 0x101, 9),
        (StateDamaged("x", "short", 3), 0x101, 3),
        (StateDamaged("x", "unknown version", 9), 0x101, 9),
        (EngineError("TPMLIB_MainInit", 0x101), 0x101, 0x101),
        (EngineError("TPMLIB_MainInit", 0x1C), 0x101, 0x1C),
    ],
)
def test_failed_start(fault: Exception, tpm2_result: int, tpm12_result: int) -> None:
    for tpm2, expected in ((True, tpm2_result), (False, tpm12_result)):
        vtpm, engine, _ = make(tpm2=tpm2, running=False)
        engine.faults["start"] = fault
        assert result_of(vtpm) == expected
        assert not vtpm.running
        engine.faults.clear()
        vtpm.start()
        assert vtpm.running


def test_no_state_location() -> None:
    vtpm = Vtpm(FakeEngine(), None)
    assert result_of(vtpm) == 9


def test_volatile_state_is_deleted_on_demand_only() -> None:
    vtpm, _, store = make(running=False)
    store.blobs["volatilestate"] = b"x"
    vtpm.start()
    assert "volatilestate" in store.blobs
    vtpm.start(delete_volatile=True)
    assert "volatilestate" not in store.blobs
    vtpm.start(delete_volatile=True)


def test_volatile_state_survives_a_failed_start() -> None:
    vtpm, engine, store = make(running=False)
    store.blobs["volatilestate"] = b"x"
    engine.faults["start"] = EngineError("TPMLIB_MainInit", 0x101)
    result_of(vtpm, delete_volatile=True)
    assert "volatilestate" in store.blobs


def test_locality_and_buffer_size_survive_a_reset() -> None:
    vtpm, engine, _ = make(running=False)
    engine.buffer_size(3100)
    vtpm.start()
    vtpm.set_locality(3)
    vtpm.start()
    assert engine.locality == 3
    assert engine.buffer_size(0)[0] == 3100


def test_close_stops_and_unlocks() -> None:
    vtpm, engine, store = make()
    closed: list[bool] = []
    store.close = lambda: closed.append(engine.running)  # type: ignore[method-assign]
    vtpm.close()
    assert closed == [False]


# -- profile ------------------------------------------------------------------------------


def test_profile_goes_to_a_new_tpm_once() -> None:
    vtpm, engine, _ = make(running=False, options=VtpmOptions(profile='{"Name":"x"}'))
    engine.manufactured = True
    vtpm.start()
    assert engine.profile == '{"Name":"x"}'
    engine.profile = None
    vtpm.start()
    assert engine.profile is None


def test_profile_on_an_old_tpm_fails() -> None:
    vtpm, engine, _ = make(running=False, options=VtpmOptions(profile="{}"))
    assert result_of(vtpm) == 9
    assert not engine.running


def test_profile_means_nothing_to_tpm12() -> None:
    vtpm, engine, _ = make(tpm2=False, running=False, options=VtpmOptions(profile="{}"))
    vtpm.start()
    assert engine.profile is None


# -- automatic shutdown -------------------------------------------------------------------


def after_stop(vtpm: Vtpm, engine: FakeEngine) -> list[bytes]:
    """The commands that stopping gives the engine."""
    engine.commands.clear()
    vtpm.stop()
    return engine.commands


def test_shutdown_is_sent_once_before_power_goes() -> None:
    vtpm, engine, _ = make()
    vtpm.stop()
    assert engine.calls == ["process:145", "stop"]
    vtpm.stop()
    assert engine.calls == ["process:145", "stop"]


def test_reset_and_close_shut_down_too() -> None:
    vtpm, engine, _ = make()
    vtpm.process(tpm.get_random(8))
    vtpm.start()
    assert engine.commands == [tpm.get_random(8), SHUTDOWN_STATE]
    vtpm.process(tpm.get_random(8))
    vtpm.close()
    assert engine.commands[-1] == SHUTDOWN_STATE


def test_after_an_automatic_shutdown_the_next_reset_sends_none() -> None:
    """The last command counts and is then the shutdown itself."""
    vtpm, engine, _ = make()
    vtpm.start()
    assert after_stop(vtpm, engine) == []


@pytest.mark.parametrize("command", [SHUTDOWN_CLEAR, SHUTDOWN_STATE, SHUTDOWN_STATE[:10]])
@pytest.mark.parametrize("answer", [0, 0x9A, 0x100])
def test_the_guests_own_shutdown_counts_whatever_its_outcome(command: bytes, answer: int) -> None:
    vtpm, engine, _ = make()
    engine.script[0x145] = tpm.tpm2(answer)
    vtpm.process(command)
    assert after_stop(vtpm, engine) == []


def test_a_later_command_makes_it_due_again() -> None:
    vtpm, engine, _ = make()
    vtpm.process(SHUTDOWN_CLEAR)
    vtpm.process(tpm.get_random(8))
    assert after_stop(vtpm, engine) == [SHUTDOWN_STATE]


def test_a_stump_does_not_count_as_a_command() -> None:
    vtpm, engine, _ = make()
    vtpm.process(SHUTDOWN_CLEAR)
    vtpm.process(b"\x80\x01\x00")
    assert after_stop(vtpm, engine) == []


def test_clear_follows_a_refused_state() -> None:
    vtpm, engine, _ = make()
    engine.script[0x145] = lambda command: tpm.tpm2(0 if command == SHUTDOWN_CLEAR else 0x922)
    assert after_stop(vtpm, engine) == [SHUTDOWN_STATE, SHUTDOWN_CLEAR]


def test_before_startup_it_is_left_at_that() -> None:
    vtpm, engine, _ = make()
    engine.script[0x145] = tpm.tpm2(0x100)
    assert after_stop(vtpm, engine) == [SHUTDOWN_STATE]


def test_refused_shutdown_is_tried_again_next_time() -> None:
    vtpm, engine, _ = make()
    engine.script[0x145] = tpm.tpm2(0x101)
    assert after_stop(vtpm, engine) == [SHUTDOWN_STATE, SHUTDOWN_CLEAR]
    vtpm.start()
    assert after_stop(vtpm, engine) == [SHUTDOWN_STATE, SHUTDOWN_CLEAR]


@pytest.mark.parametrize(
    "answer", [b"", b"\x80", EngineError("TPMLIB_Process", 9), StorageError("x", "full")]
)
def test_failing_shutdown_does_not_keep_it_from_stopping(answer: bytes | Exception) -> None:
    vtpm, engine, _ = make()
    engine.script[0x145] = answer
    vtpm.stop()
    assert not engine.running


def test_it_can_be_turned_off() -> None:
    vtpm, engine, _ = make(options=VtpmOptions(auto_shutdown=False))
    assert after_stop(vtpm, engine) == []


def test_tpm12_has_none() -> None:
    vtpm, engine, _ = make(tpm2=False)
    assert after_stop(vtpm, engine) == []


# -- commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpm2", "stopped", "stump"),
    [
        (True, "80010000000a00000101", "80010000000a0000009a"),
        (False, "00c40000000a00000009", "00c40000000a00000019"),
    ],
)
def test_answers_the_server_makes_itself(tpm2: bool, stopped: str, stump: str) -> None:
    vtpm, engine, _ = make(tpm2=tpm2, running=False)
    for command in (tpm.TPM2_READ_CLOCK, b"", bytes(9)):
        assert vtpm.process(command).hex() == stopped
    vtpm.start()
    for command in (b"", b"\x80", bytes(9)):
        assert vtpm.process(command).hex() == stump
    assert engine.commands == []
    assert vtpm.process(bytes(10)) == echo(bytes(10))


@pytest.mark.parametrize(
    "fault",
    [
        EngineError("TPMLIB_Process", 9),
        StorageError("x", "disk full"),
        StateMissing("x", "gone"),
        MemoryError(),
        KeyError("a bug"),
    ],
)
@pytest.mark.parametrize("tpm2", [True, False])
def test_a_fault_becomes_a_response(fault: Exception, tpm2: bool) -> None:
    vtpm, engine, _ = make(tpm2=tpm2)
    engine.script[0x17B] = fault
    expected = "80010000000a00000101" if tpm2 else "00c40000000a00000009"
    assert vtpm.process(tpm.get_random(8)).hex() == expected


def test_only_a_running_tpm_has_long_commands() -> None:
    vtpm, _, _ = make(running=False)
    assert not vtpm.is_long(tpm.create_primary_rsa())
    vtpm.start()
    assert vtpm.is_long(tpm.create_primary_rsa())
    assert not vtpm.is_long(tpm.get_random(8))
    assert not vtpm.is_long(b"\x80\x01")
    assert not make(tpm2=False)[0].is_long(tpm.create_primary_rsa())


def test_what_was_processed_once_is_known() -> None:
    vtpm, engine, _ = make()
    command = tpm.get_random(8)
    assert vtpm.process_known(command) is None
    assert engine.commands == []
    response = vtpm.process(command)
    assert vtpm.process_known(command) == response
    assert vtpm.process_known(tpm.get_random(9)) == vtpm.process(tpm.get_random(9))
    assert engine.commands == [command, command, tpm.get_random(9), tpm.get_random(9)]


@pytest.mark.parametrize(
    "change",
    [lambda command: command[:-1], lambda command: command + b"\0", lambda command: command[:5]],
)
def test_a_known_header_with_another_length_is_not_known(change: Change) -> None:
    vtpm, engine, _ = make()
    vtpm.process(tpm.get_random(8))
    assert vtpm.process_known(change(tpm.get_random(8))) is None
    vtpm.process(change(tpm.get_random(8)))
    assert vtpm.process_known(change(tpm.get_random(8))) is None
    assert vtpm.process_known(b"") is None
    assert len(engine.commands) <= 2


@pytest.mark.parametrize("command", [tpm.create_primary_rsa(), SET_LOCALITY_3])
def test_what_needs_more_than_the_tpm_never_is_known(command: bytes) -> None:
    vtpm, _, _ = make(options=VtpmOptions(allow_set_locality=True))
    vtpm.process(command)
    assert vtpm.process_known(command) is None


def test_nothing_is_known_of_a_stopped_tpm() -> None:
    vtpm, engine, _ = make()
    vtpm.process(tpm.get_random(8))
    vtpm.stop()
    engine.commands.clear()
    assert vtpm.process_known(tpm.get_random(8)) is None
    vtpm.process(tpm.get_random(8))
    vtpm.start()
    assert vtpm.process_known(tpm.get_random(8)) is None
    assert engine.commands == []


def test_nothing_is_known_while_the_state_is_handed_out() -> None:
    """The next command must first take the lock back."""
    vtpm, _, store = make()
    vtpm.process(tpm.get_random(8))
    vtpm.release_storage()
    store.faults["lock"] = StateLocked("/x/.lock", "taken")
    vtpm.abort()
    assert vtpm.process_known(tpm.get_random(8)) is None
    assert vtpm.process(tpm.get_random(8)).hex() == "80010000000a00000101"
    assert vtpm.process_known(tpm.get_random(8)) is None
    store.faults.clear()
    response = vtpm.process(tpm.get_random(8))
    assert vtpm.process_known(tpm.get_random(8)) == response


def test_a_client_cannot_make_much_known() -> None:
    vtpm, _, _ = make()
    commands = [tpm.tpm2(0x17B, bytes(length)) for length in range(200)]
    for command in commands:
        vtpm.process(command)
    known = [vtpm.process_known(command) is not None for command in commands]
    assert known == [True] * 64 + [False] * 136


@pytest.mark.parametrize("fault", [StorageError("x", "no"), RuntimeError("a bug")])
def test_a_fault_of_a_known_command_becomes_a_response(fault: Exception) -> None:
    vtpm, engine, _ = make()
    vtpm.process(tpm.get_random(8))
    engine.script[0x17B] = fault
    response = vtpm.process_known(tpm.get_random(8))
    assert response is not None
    assert response.hex() == "80010000000a00000101"


def test_a_known_shutdown_counts_as_the_last_command() -> None:
    vtpm, engine, _ = make()
    for command in (SHUTDOWN_CLEAR, tpm.get_random(8)):
        vtpm.process(command)
    assert vtpm.process_known(SHUTDOWN_CLEAR) is not None
    engine.commands.clear()
    vtpm.stop()
    assert engine.commands == []


# -- locality -----------------------------------------------------------------------------


def test_localities() -> None:
    vtpm, engine, _ = make()
    for locality in range(5):
        vtpm.set_locality(locality)
        assert engine.locality == locality
    for locality in (5, 255):
        with pytest.raises(PtmError) as caught:
            vtpm.set_locality(locality)
        assert caught.value.result == 0x3D
    assert engine.locality == 4


def test_locality_4_can_be_refused() -> None:
    vtpm, engine, _ = make(options=VtpmOptions(reject_locality_4=True))
    with pytest.raises(PtmError):
        vtpm.set_locality(4)
    vtpm.set_locality(3)
    assert engine.locality == 3


def test_reset_established_borrows_a_locality() -> None:
    vtpm, engine, _ = make(options=VtpmOptions(reject_locality_4=True))
    vtpm.set_locality(1)
    assert vtpm.reset_established(4) == 0
    assert engine.localities == [4]
    assert engine.locality == 1
    assert vtpm.reset_established(5) == 0x3D
    assert engine.localities == [4]


def test_reset_established_restores_after_a_fault() -> None:
    vtpm, engine, _ = make()
    vtpm.set_locality(1)
    engine.faults["reset_established"] = StorageError("x", "full")
    with pytest.raises(StorageError):
        vtpm.reset_established(3)
    assert engine.locality == 1


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (SET_LOCALITY_3, "80010000000a00000000"),
        (bytes.fromhex("80010000000b2000100005"), "80010000000a00000107"),
        (SET_LOCALITY_3[:10], "80010000000a0000009a"),
        (bytes.fromhex("80020000000b2000100002"), "80010000000a00000000"),
    ],
)
def test_set_locality_command(command: bytes, answer: str) -> None:
    vtpm, engine, _ = make(options=VtpmOptions(allow_set_locality=True))
    assert vtpm.process(command).hex() == answer
    assert engine.commands == []
    assert engine.locality == (command[10] if answer.endswith("0000") else 0)


def test_set_locality_command_of_tpm12() -> None:
    vtpm, engine, _ = make(tpm2=False, options=VtpmOptions(allow_set_locality=True))
    assert vtpm.process(SET_LOCALITY_3).hex() == "00c40000000a00000000"
    assert engine.locality == 3
    assert vtpm.process(SET_LOCALITY_3[:10] + b"\x07").hex() == "00c40000000a0000003d"


def test_set_locality_command_is_off_unless_allowed() -> None:
    vtpm, engine, _ = make()
    assert tpm.code_of(vtpm.process(SET_LOCALITY_3)) != 0
    assert engine.locality == 0


# -- state --------------------------------------------------------------------------------

MIGRATION_HEADER = bytes.fromhex("0201000a0004")


def test_export_reads_what_is_stored() -> None:
    vtpm, _, store = make()
    SealedStore(store).store("permall", b"permanent")
    flags, blob = vtpm.export_blob(1, decrypted=False)
    assert flags == 0
    assert blob[:6] == MIGRATION_HEADER
    assert blob.endswith(b"permanent")


def test_export_of_volatile_is_fresh_and_leaves_none_behind() -> None:
    vtpm, engine, store = make()
    SealedStore(store).store("volatilestate", b"stale")
    engine.volatile = b"fresh"
    assert vtpm.export_blob(2, decrypted=False)[1].endswith(b"fresh")
    assert "volatilestate" not in store.blobs
    vtpm.export_blob(2, decrypted=False)


def test_export_of_nothing() -> None:
    vtpm, _, _ = make()
    with pytest.raises(StateMissing):
        vtpm.export_blob(3, decrypted=False)


@pytest.mark.parametrize("kind", [0, 4, 0xFFFFFFFF])
def test_unknown_blob_type(kind: int) -> None:
    vtpm, _, _ = make(running=False)
    with pytest.raises(PtmError) as caught:
        vtpm.export_blob(kind, decrypted=False)
    assert caught.value.result == 9
    with pytest.raises(PtmError) as caught:
        vtpm.import_blob(kind, 0, b"")
    assert caught.value.result == 3


def test_import_unwraps() -> None:
    source, _, store = make()
    SealedStore(store).store("permall", b"permanent")
    _, blob = source.export_blob(1, decrypted=False)
    vtpm, engine, store = make(running=False)
    vtpm.import_blob(1, 0, blob)
    assert engine.given == {"permall": b"permanent"}
    assert store.locks == 1
    assert store.blobs == {}


def test_empty_blobs() -> None:
    """A volatile or saved state is hidden; a permanent one stays: no TPM is ever lost by this."""
    vtpm, engine, _ = make(running=False)
    for kind in (2, 3):
        vtpm.import_blob(kind, 0, b"")
    assert engine.given == {"volatilestate": None, "savestate": None}
    vtpm.import_blob(1, 0, b"")
    assert "permall" not in engine.given


def test_import_needs_the_lock() -> None:
    vtpm, engine, store = make(running=False)
    store.faults["lock"] = StateLocked("x", "taken")
    with pytest.raises(PtmError) as caught:
        vtpm.import_blob(2, 0, b"")
    assert caught.value.result == 0x1F
    assert engine.given == {}


def test_store_volatile() -> None:
    vtpm, engine, store = make()
    engine.volatile = b"fresh"
    vtpm.store_volatile()
    assert SealedStore(store).load("volatilestate") == b"fresh"
    store.faults["store"] = StorageError("x", "full")
    with pytest.raises(StorageError):
        vtpm.store_volatile()


@pytest.mark.parametrize(("tpm2", "code"), [(True, "00000101"), (False, "0000001c")])
def test_failure_mode_is_said_once_a_start(
    tpm2: bool, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    vtpm, engine, _ = make(tpm2=tpm2)
    engine.script[0x17B] = bytes.fromhex("80010000000a" + code)
    for _ in range(2):
        vtpm.process(tpm.get_random(8))
    assert [line.levelname for line in caplog.records] == ["ERROR"]
    assert "failure mode" in caplog.text
    vtpm.start()
    vtpm.process(tpm.get_random(8))
    assert len(caplog.records) == 2
